"""The benchmark: every way of generating on the same questions, one after the other in one process.

    python examples/benchmark.py --prompts specbench_dev.jsonl --output runs/benchmark

Writes into the folder of `--output`: `questions.jsonl`, a line as soon as a question is done (run the same command again
to go on after a stop), `results.json`, `table.md` and plots. What is compared is in `_methods.py`, timing in
`_measure.py`, figures in `_report.py`, plots in `_plots.py`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _allocator
    import _script

    _script.begin()
    _allocator.keep_freed_memory()

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import environment, run, write_json
from _methods import (
    METHODS,
    Methods,
    add_arguments,
    decoding,
    encode,
    in_turn,
    load_methods,
    measure_prompt,
    settings,
    warm_up,
)
from _prompts import DEMO_PROMPTS, Prompt, evenly, read_prompts
from _report import condensed, markdown, report
from _smollm2 import load_target
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from confu_hf.errors import refusal

DEFAULT_METHODS = ("plain", "prompt-lookup", "no-draft", "lookup-tree", "eagle3", "confu")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, methods=METHODS, default=DEFAULT_METHODS)
    parser.add_argument("--threads", type=int, help="threads of torch (default: as torch decides)")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="where all results go")
    parser.add_argument("--no-plots", action="store_true", help="do without matplotlib")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    prompts = read_prompts(args.prompts, args.limit) if args.prompts else evenly(DEMO_PROMPTS, args.limit)
    model, tokenizer = load_target(args.target, args.dtype, args.device)
    asked = {name: value for name, value in settings(args).items() if name not in ("output", "no_plots")}
    journal = args.output / "questions.jsonl"
    records = read_journal(journal, asked)
    names = [name for name in METHODS if name in args.methods]
    waiting = [prompt for prompt in prompts if prompt.id not in {record["id"] for record in records}]
    if waiting:
        document = environment(model)
        for record in measure(model, tokenizer, prompts, waiting, args):
            append(journal, record if records else {**record, "settings": asked, "environment": document})
            records.append(record)
    first = json.loads(journal.read_text(encoding="utf-8").splitlines()[0])
    figures = report(records, names)
    origin = {"settings": first["settings"], "environment": first["environment"]}
    write_json(args.output / "results.json", {**origin, **figures})
    table = markdown(figures, names)
    (args.output / "table.md").write_text(table, encoding="utf-8")
    if not args.no_plots:
        draw_plots(figures, args.output)
    print(table)


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    waiting: Sequence[Prompt],
    args: argparse.Namespace,
) -> Iterator[dict[str, Any]]:
    """Yield the record of every question that waits."""
    encoded = {prompt.id: encode(tokenizer, prompt, model.device) for prompt in prompts}
    longest = max(inputs["input_ids"].shape[1] for inputs in encoded.values()) + args.max_new_tokens
    methods: Methods = load_methods(model, args, longest)
    warm_up(model, encoded[waiting[0].id], methods, args)
    bar = tqdm(waiting, unit="question", initial=len(prompts) - len(waiting), total=len(prompts))
    for index, prompt in enumerate(bar, start=len(prompts) - len(waiting)):
        bar.set_postfix_str(prompt.task)
        inputs = encoded[prompt.id]
        results = measure_prompt(model, inputs, methods, in_turn(list(methods), index), args)
        prefill = run(model, inputs, args.seed, **decoding(args) | {"max_new_tokens": 1})
        yield {
            "id": prompt.id,
            "task": prompt.task,
            "prompt_tokens": inputs["input_ids"].shape[1],
            "prefill_seconds": prefill.seconds,
            "methods": {name: condensed(result) for name, result in results.items()},
        }


def read_journal(journal: Path, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """The questions that an earlier run with these settings has done."""
    if not journal.exists():
        return []
    lines = journal.read_text(encoding="utf-8").splitlines(keepends=True)
    whole = [line for line in lines if line.endswith("\n")]
    if len(whole) < len(lines):  # stopped while it wrote
        journal.write_text("".join(whole), encoding="utf-8")
    records = [json.loads(line) for line in whole]
    if not records:
        return []
    begun = records[0]["settings"]
    changed = {name: (begun.get(name), value) for name, value in asked.items() if begun.get(name) != value}
    if changed:
        raise refusal(
            f"{journal}, a benchmark to go on with",
            got=", ".join(f"{name}={new!r} (begun with {old!r})" for name, (old, new) in changed.items()),
            expected="the settings that it was begun with",
            fix="Repeat the command as it was, or name another folder with --output.",
        )
    return records


def append(journal: Path, record: dict[str, Any]) -> None:
    journal.parent.mkdir(parents=True, exist_ok=True)
    with journal.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def draw_plots(figures: dict[str, Any], folder: Path) -> None:
    try:
        from _plots import draw
    except ImportError as error:
        raise SystemExit(f'{error}: the plots need `pip install -e ".[bench]"`; or pass --no-plots.') from error
    draw(figures, folder)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped. Run the same command again to go on.", file=sys.stderr)
        raise SystemExit(130) from None
