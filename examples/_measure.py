"""Times ways of generating the same answer and compares them. Prints nothing; an assistant is an argument like any."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _memory import forget_peak, peak_bytes
from transformers import BatchEncoding, DynamicCache, PreTrainedModel

from confu_hf.compat import attention_implementation, cache_keyword
from confu_hf.metrics import speedup_ratio, tokens_per_round


@dataclass(frozen=True)
class Run:
    """One answer: its new tokens, the seconds `generate` took (prefill included), the memory in use at its height (None
    where it cannot be told), its assistant's statistics."""

    tokens: list[int]
    seconds: float
    peak_bytes: int | None
    stats: dict[str, Any] | None

    @property
    def tokens_per_second(self) -> float:
        return len(self.tokens) / self.seconds


def run(model: PreTrainedModel, inputs: BatchEncoding, seed: int, **generate_arguments: Any) -> Run:
    """One timed call of `generate`. Every method starts from the same seed, so sampled answers compare as well."""
    torch.manual_seed(seed)
    _wait(model)
    forget_peak(model.device)
    start = time.perf_counter()
    output = model.generate(**inputs, **generate_arguments)
    _wait(model)
    seconds = time.perf_counter() - start
    assistant = generate_arguments.get("assistant_model")
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    stats = None if getattr(assistant, "stats", None) is None else _statistics(assistant.stats)
    return Run(tokens, seconds, peak_bytes(model.device), stats)


def first_difference(expected: Sequence[int], got: Sequence[int]) -> int | None:
    """Index of the first token that differs, or where one answer ends before the other; None if they are identical."""
    if list(expected) == list(got):
        return None
    pairs = enumerate(zip(expected, got, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(expected), len(got)))


@torch.inference_mode()
def explain_difference(
    model: PreTrainedModel, prompt_ids: torch.Tensor, expected: Sequence[int], got: Sequence[int]
) -> dict[str, Any] | None:
    """What the target thinks at the first token where a greedy answer differs from plain decoding; None if identical.

    The logits there are computed twice, in one pass and as one step on a cache: how far they differ is how this
    machine rounds. `tie` says that the two tokens are the target's two best and no further apart than twice that.

    Args:
        prompt_ids: `(1, N)`.
    """
    index = first_difference(expected, got)
    if index is None:
        return None
    if index >= min(len(expected), len(got)):
        return {"index": index, "tie": False, "reason": "one answer ends where the other goes on"}
    known = torch.tensor([list(expected[:index])], dtype=prompt_ids.dtype, device=prompt_ids.device)
    ids = torch.cat([prompt_ids, known], dim=1)
    at_once = model(ids).logits[0, -1].float()
    cache = DynamicCache(config=model.config)
    model(ids[:, :-1], **cache_keyword(model, cache))
    as_step = model(ids[:, -1:], **cache_keyword(model, cache)).logits[0, -1].float()
    pair = [expected[index], got[index]]
    gap = (at_once[pair[0]] - at_once[pair[1]]).abs().item()
    resolution = torch.finfo(model.dtype).eps * at_once.max().item()
    rounding = max((at_once - as_step).abs()[pair].max().item(), abs(resolution))
    best = at_once.topk(2)
    return {
        "index": index,
        "expected_token": pair[0],
        "got_token": pair[1],
        "top_tokens": best.indices.tolist(),
        "top_logits": best.values.tolist(),
        "gap": gap,
        "rounding": rounding,
        "tie": set(pair) == set(best.indices.tolist()) and gap <= 2 * rounding,
    }


def summarize(records: Sequence[dict[str, Any]], methods: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Per method over the prompts of `records`: how many are identical, accepted length, tokens/s, ratios to plain.

    `mean_accepted_length` weighs every verify pass alike (not every prompt); `overall_ratio` compares tokens/s of all
    prompts together; `median_ratio` is the median of the prompts' own ratios.
    """
    summary = {}
    for method in methods:
        runs = [record["methods"][method] for record in records]
        rate = sum(run["new_tokens"] for run in runs) / sum(run["seconds"] for run in runs)
        row: dict[str, Any] = {"prompts": len(runs), "tokens_per_second": rate}
        counted = [run["stats"] for run in runs if run["stats"] and run["stats"]["rounds"]]
        rounds = sum(stats["rounds"] for stats in counted)
        if rounds:
            emitted = sum(stats["mean_accepted_length"] * stats["rounds"] for stats in counted)
            row["mean_accepted_length"] = tokens_per_round(emitted, rounds)
        if "plain" in methods and method != "plain":
            row["identical"] = sum(run["identical"] for run in runs)
            plain = [record["methods"]["plain"] for record in records]
            columns = [[run[name] for run in part] for part in (runs, plain) for name in ("new_tokens", "seconds")]
            speed_up = speedup_ratio(*columns)
            row |= {"median_ratio": speed_up.median, "overall_ratio": speed_up.overall}
        summary[method] = row
    return summary


def summarize_tasks(records: list[dict[str, Any]], methods: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """[`summarize`] for each task, unless every prompt is a task of its own, and for `all`."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    groups = {task: [record for record in records if record["task"] == task] for task in tasks}
    by_task = {task: summarize(group, methods) for task, group in groups.items()} if len(tasks) < len(records) else {}
    return {**by_task, "all": summarize(records, methods)}


def environment(model: PreTrainedModel) -> dict[str, Any]:
    """What a published figure must carry: versions, hardware, threads, dtype, commit, command."""
    packages = ("torch", "transformers", "peft", "confu_hf")
    device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else _cpu_name()
    return {
        "command": " ".join(sys.argv),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        **{package: _version(package) for package in packages},
        "device": device,
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": attention_implementation(model.config),
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }


def write_json(path: Path, document: dict[str, Any]) -> None:
    """Replace `path` in one step: whoever interrupts the run keeps the last complete state."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1, ensure_ascii=False, default=_plain) + "\n", encoding="utf-8")
    partial.replace(path)


def _statistics(stats: Any) -> dict[str, Any]:
    """`confu.stats` as a dictionary; an answer of one token has no round, so no accepted length: None, not nan."""
    return {**dataclasses.asdict(stats), "mean_accepted_length": stats.mean_accepted_length if stats.rounds else None}


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, torch.Tensor) else str(value)


def _wait(model: PreTrainedModel) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
    """Commit of the checkout this file lies in, `+changes` if it is not clean; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if dirty.stdout.strip() else "")
