"""A chat in the terminal: tokens are coloured by how they came, drafted by the network, looked up, or the target's own.

    python examples/chat.py
    python examples/chat.py --plain          # the same without an assistant
    NO_COLOR=1 python examples/chat.py --show marks

`/reset` forgets the conversation, `/quit` (or Ctrl-D) ends it, Ctrl-C ends an answer. Rounds are watched by `_rounds.py`,
the conversation and its cache are `_conversation.py`'s, colours `_terminal.py`'s.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _allocator
    import _script

    _script.begin()
    _allocator.keep_freed_memory()

import argparse
import signal
import sys
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import torch
from _conversation import Conversation
from _rounds import (
    ORIGINS,
    RoundStreamer,
    TokenText,
    Watched,
    WatchedConFu,
    WatchedLookup,
    add_model_arguments,
    watched,
)
from _smollm2 import load_target
from _terminal import LEGENDS, SHOWS, Screen, default_show
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from confu_hf.compat import cache_keyword
from confu_hf.metrics import mean_accepted_length

with suppress(ImportError):  # Windows has none
    import readline  # noqa: F401 - lines typed at `input` can be edited and called back

HELP = "/reset forgets the conversation, /quit ends it; Ctrl-C ends an answer."


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--plain", action="store_true", help="no assistant")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--max-new-tokens", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=50, help="when sampling; 0 means all tokens")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", choices=SHOWS, help="default: colors on a terminal, unless NO_COLOR is set")
    return parser.parse_args(arguments)


class Interruption(StoppingCriteria):
    """Within it, Ctrl-C ends the answer at its next token, so that text and cache stay whole."""

    def __init__(self):
        self.asked = False

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), self.asked, device=input_ids.device)

    def __enter__(self) -> Interruption:
        self.previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error) -> None:
        signal.signal(signal.SIGINT, self.previous)

    def _ask(self, *_: Any) -> None:
        self.asked = True


class Answer:
    """One answer as it comes: shown, counted and timed."""

    def __init__(self, name: str, text: TokenText, screen: Screen):
        self.name, self.text, self.screen = name, text, screen
        self.counts: list[int] = []  # tokens of each round; prefill's comes first
        self.came: Counter[str] = Counter()
        self.start = time.perf_counter()

    def show(self, tokens: list[int], came: list[str]) -> None:
        """What a round emitted."""
        self.counts.append(len(tokens))
        self.came.update(came)
        self.screen.write([(self.text.push(token), origin) for token, origin in zip(tokens, came, strict=True)])
        self.screen.status(self.figures())

    def figures(self) -> str:
        """Counts of tokens by origin, tokens a pass, and tokens per second, prefill included."""
        rate = sum(self.counts) / (time.perf_counter() - self.start)
        accepted = mean_accepted_length(self.counts[1:])
        passes = f", {accepted:.2f} a pass" if len(self.counts) > 1 else ""
        origins = ", ".join(f"{self.came[origin]} {origin}" for origin in ORIGINS if self.came[origin])
        return f"{self.name}: {sum(self.counts)} tokens{passes}, {rate:.1f} tokens/s ({origins})"


def load_assistant(model: PreTrainedModel, args: argparse.Namespace) -> Watched | None:
    """What [`watched`] finds, or no assistant at all."""
    return None if args.plain else watched(model, args, WatchedConFu).compile(args.compile)


def reply(
    conversation: Conversation, question: str, assistant: Watched | None, screen: Screen, args: argparse.Namespace
) -> Answer:
    """Ask, and show the answer while it is written."""
    ids = conversation.ask(question, args.max_new_tokens)
    name = "plain" if assistant is None else "lookup" if isinstance(assistant, WatchedLookup) else "confu"
    answer = Answer(name, TokenText(conversation.tokenizer), screen)
    sampling = {"temperature": args.temperature, "top_p": args.top_p, "top_k": args.top_k}
    with Interruption() as interruption:
        output = conversation.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=args.max_new_tokens,
            streamer=RoundStreamer(assistant, answer.show),
            stopping_criteria=StoppingCriteriaList([interruption]),
            **({} if assistant is None else {"assistant_model": assistant}),
            **({"do_sample": True, **sampling} if args.temperature > 0 else {"do_sample": False}),
            **cache_keyword(conversation.model, conversation.cache),
        )
    conversation.keep(output[0])
    screen.write([(answer.text.rest(), ORIGINS[-1])])
    return answer


def chat(conversation: Conversation, assistant: Watched | None, screen: Screen, args: argparse.Namespace) -> None:
    """Questions and answers until there are no more."""
    screen.note(HELP)
    if LEGENDS[screen.show]:
        screen.note(LEGENDS[screen.show])
    screen.status("ready")
    while True:
        try:
            question = input("\n> ").strip()
        except EOFError:
            break
        if not sys.stdin.isatty():  # nobody saw it typed
            print(question, flush=True)
        if question == "/quit":
            break
        if question == "/reset":
            conversation.reset()
            screen.note("Forgotten.")
        elif question.startswith("/"):
            screen.note(HELP)
        elif question:
            try:
                answer = reply(conversation, question, assistant, screen, args)
            except ValueError as error:
                if not getattr(error, "is_refusal", False):
                    raise  # unforeseen: it keeps its traceback
                screen.note(str(error))
                continue
            screen.note(f"\n{answer.figures()}")


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    torch.manual_seed(args.seed)
    model, tokenizer = load_target(args.target, args.dtype, args.device)
    screen = Screen(sys.stdout, args.show or default_show(sys.stdout))
    try:
        chat(Conversation(model, tokenizer, args.system), load_assistant(model, args), screen, args)
    except KeyboardInterrupt:
        print()
    finally:
        screen.close()


if __name__ == "__main__":
    main()
