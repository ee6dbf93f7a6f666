"""ConFu at work: streams answers, and compares plain `generate`, EAGLE-3 and ConFu on the same prompts in one run.

    python examples/quickstart.py
    python examples/quickstart.py --prompts questions.jsonl --limit 40 --no-stream --json runs/figures.json

Loads, prints and keeps the figures; what is compared is in `_methods.py`, timing in `_measure.py`, prompts in
`_prompts.py`; `benchmark.py` measures more.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _allocator
    import _script

    _script.begin()
    _allocator.keep_freed_memory()

import argparse
import sys
from pathlib import Path
from typing import Any

from _measure import environment, run, summarize_tasks, write_json
from _methods import (
    add_arguments,
    decoding,
    encode,
    in_turn,
    load_methods,
    measure_prompt,
    settings,
    warm_up,
)
from _prompts import DEMO_PROMPTS, evenly, read_prompts
from _smollm2 import load_target
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

COMPARED = ("plain", "no-draft", "prompt-lookup", "lookup-tree", "eagle3", "confu")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_arguments(parser, methods=COMPARED, default=["plain", "eagle3", "confu"])
    parser.add_argument("--no-stream", action="store_true", help="do not show the answers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as data, after every prompt")
    return parser.parse_args()


def print_prompt(tokenizer: PreTrainedTokenizerBase, methods: dict[str, dict[str, Any]]) -> None:
    print(f"{'':15}{'identical':>10}{'accepted':>10}{'tokens':>8}{'tokens/s':>10}{'to plain':>10}")
    for method, result in methods.items():
        identical = {None: "-", True: "yes", False: "no"}[result.get("identical")]
        accepted = (result["stats"] or {}).get("mean_accepted_length", 1.0 if method == "plain" else None)
        print(
            f"{method:15}{identical:>10}{number(accepted):>10}{result['new_tokens']:>8}"
            f"{result['tokens_per_second']:>10.1f}{number(result.get('ratio'), 'x'):>10}"
        )
    for method, result in methods.items():
        if "difference" in result:
            print(f"  {method}: {describe_difference(tokenizer, result['difference'])}")
    print(flush=True)


def describe_difference(tokenizer: PreTrainedTokenizerBase, found: dict[str, Any]) -> str:
    if "gap" not in found:
        return f"differs from plain at new token {found['index']}" + (
            f": {found['reason']}" if "reason" in found else ""
        )
    top = ", ".join(
        f"{tokenizer.decode([token])!r} {logit:.5f}"
        for token, logit in zip(found["top_tokens"], found["top_logits"], strict=True)
    )
    verdict = "a tie within rounding" if found["tie"] else "NOT a tie: please report this as a bug"
    return (
        f"differs from plain at new token {found['index']}, {verdict}. The target's two best there: {top}; "
        f"plain took {tokenizer.decode([found['expected_token']])!r}, "
        f"this run {tokenizer.decode([found['got_token']])!r}; "
        f"gap {found['gap']:.2g}, rounding {found['rounding']:.2g}"
    )


def number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


def print_summary(summary: dict[str, dict[str, dict[str, Any]]]) -> None:
    print(f"{'task':16}{'':15}{'identical':>10}{'accepted':>10}{'tokens/s':>10}{'median':>9}{'overall':>9}")
    for task, methods in summary.items():
        for method, row in methods.items():
            identical = f"{row['identical']}/{row['prompts']}" if "identical" in row else "-"
            accepted = row.get("mean_accepted_length", 1.0 if method == "plain" else None)
            print(
                f"{task:16}{method:15}{identical:>10}{number(accepted):>10}{row['tokens_per_second']:>10.1f}"
                f"{number(row.get('median_ratio'), 'x'):>9}{number(row.get('overall_ratio'), 'x'):>9}"
            )
    print("accepted: tokens per forward pass of the target; median, overall: tokens/s as a ratio to plain, same run")


def stream_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Any, **arguments: Any) -> None:
    print("-" * 80)
    run(model, inputs, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), **arguments)
    print("-" * 80)


def main() -> None:
    args = parse_arguments()
    prompts = read_prompts(args.prompts, args.limit) if args.prompts else evenly(DEMO_PROMPTS, args.limit)
    model, tokenizer = load_target(args.target, args.dtype, args.device)
    if not args.no_stream:
        args.lookup_memory = 0  # an answer that was shown would be known when it is measured
    methods = load_methods(model, args)
    document: dict[str, Any] = {
        "environment": environment(model),
        "settings": settings(args),
        "prompts": [],
    }
    names = list(methods)
    for index, prompt in enumerate(prompts):
        inputs = encode(tokenizer, prompt, model.device)
        if index == 0:
            warm_up(model, inputs, methods, args)
        print(f"[{index + 1}/{len(prompts)}] {prompt.task}: {prompt.messages[-1]['content'][:100]!r}")
        if not args.no_stream:
            stream_answer(model, tokenizer, inputs, seed=args.seed, **methods[names[-1]](), **decoding(args))
        results = measure_prompt(model, inputs, methods, in_turn(names, index), args)
        print_prompt(tokenizer, results)
        record = {"id": prompt.id, "task": prompt.task, "prompt_tokens": inputs["input_ids"].shape[1]}
        document["prompts"].append({**record, "methods": results})
        document["summary"] = summarize_tasks(document["prompts"], names)
        if args.json:
            write_json(args.json, document)
    print_summary(document["summary"])


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped. What was measured is in the file of --json, if one was given.", file=sys.stderr)
        raise SystemExit(130) from None
