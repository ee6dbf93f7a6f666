"""What the figures in a card say: tables and metadata out of the JSON files of the measuring scripts. Measures nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _report import markdown
from huggingface_hub import EvalResult

from confu_hf.errors import refusal

Document = Mapping[str, Any]
LABELS = {
    "plain": "plain `generate`",
    "plain-compiled": "plain, static cache and `torch.compile`",
    "no-draft": "no draft (the loop alone)",
    "prompt-lookup": "prompt lookup (Transformers')",
    "lookup-tree": "`LookupAssistant`",
    "eagle3": "EAGLE-3 + lookup",
    "confu": "ConFu + lookup",
}
DRAFTS = {"eagle3": "EAGLE-3", "confu": "ConFu", "confu-masked": "ConFu, future masked"}


def read(path: Path) -> dict[str, Any]:
    """A file of figures; one without its origin is refused."""
    if not path.is_file():
        raise refusal(
            str(path),
            got="no such file",
            expected="a JSON file of figures",
            fix="Look for a misspelt path, or measure.",
        )
    document = json.loads(path.read_text(encoding="utf-8"))
    if "environment" not in document:
        raise refusal(
            str(path),
            got="figures that do not say where they come from",
            expected="a file of benchmark.py, quickstart.py --json, accepted_length.py or train.py",
            fix="Measure again: a figure carries its command, commit, versions and processor.",
        )
    return document


def origin(document: Document) -> str:
    """The sentence that every figure carries."""
    settings, where = document["settings"], document["environment"]
    asked = " ".join(Path(prompt).name for prompt in settings.get("prompts") or ["five demonstration prompts"])
    temperature = settings["temperature"]
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    return (
        f"{_questions(document)} questions ({asked}), {how}, at most {settings['max_new_tokens']} new tokens, "
        f"{where['dtype']}; {where['device']}, {where['cpus']} cores, {where['threads']} threads; Python "
        f"{where['python']}, torch {where['torch']}, transformers {where['transformers']}, peft {where['peft']}; commit "
        f"{where['commit']}, {where['date']}; `python {where['command']}`."
    )


def _questions(document: Document) -> int:
    if "figures" in document:
        return document["figures"]["all"]["questions"]
    return next(iter(_tasks(document)["all"].values()))["prompts"]


def _tasks(document: Document) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows by task and method: `benchmark.py` calls them tasks, `quickstart.py` the summary."""
    return document["tasks"] if "tasks" in document else document["summary"]


def tree(settings: Document) -> str:
    """The draft tree in words; what was not asked for is the pair's own."""
    names = {"total_tokens": "drafted nodes", "depth": "depth", "top_k": "top_k"}
    names |= {"contemplate_tokens": "contemplate tokens", "confidence_threshold": "confidence threshold"}
    told = [f"{name} {settings[key]}" for key, name in names.items() if settings.get(key) is not None]
    return ", ".join(told) if told else "the tree of `generation_config.json`"


def speed_section(document: Document) -> str:
    """The tables of `benchmark.py`, methods by their names in prose."""
    methods = list(document["tasks"]["all"])
    table = markdown(document, methods)
    lines = []
    for line in table.splitlines():
        first = line.removeprefix("| ").partition(" |")[0]
        lines.append(line.replace(f"| {first} |", f"| {LABELS[first]} |", 1) if first in LABELS else line)
    compiled = "after `confu.compile()`" if document["settings"].get("compile") else "without `confu.compile()`"
    return f"Speed, {compiled}, {tree(document['settings'])}: {origin(document)}\n\n" + "\n".join(lines)


def accepted_lengths(document: Document) -> dict[str, dict[str, float]]:
    """By method and task, `all` last."""
    if "figures" in document:
        rows = {
            task: {method: value for method, value in row.items() if method in DRAFTS}
            for task, row in document["figures"].items()
        }
    else:
        rows = {
            task: {method: row["mean_accepted_length"] for method, row in methods.items() if method in DRAFTS}
            for task, methods in _tasks(document).items()
        }
    tasks = [*(task for task in rows if task != "all"), "all"]
    return {method: {task: rows[task][method] for task in tasks} for method in rows["all"]}


def accepted_section(document: Document) -> str:
    """A table of accepted lengths, a line for each method."""
    lengths = accepted_lengths(document)
    tasks = list(next(iter(lengths.values())))
    lines = [["", *tasks], ["---"] * (len(tasks) + 1)]
    lines += [[DRAFTS[method], *(f"{row[task]:.2f}" for task in tasks)] for method, row in lengths.items()]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    more = [
        f"{DRAFTS[name.removesuffix(', % more')]} accepts {value[0]:+.1f} % (95 %: {value[1]:+.1f} to {value[2]:+.1f} %)."
        for name, value in document.get("figures", {}).get("all", {}).items()
        if name.endswith(", % more")
    ]
    head = f"Accepted length (tokens a verify pass), {tree(document['settings'])}: {origin(document)}"
    return "\n\n".join([head, table, *more])


def accepted_results(document: Document, method: str, benchmark: Mapping[str, str]) -> list[EvalResult]:
    """`model-index` entries of a method's accepted lengths, one for each task."""
    lengths = accepted_lengths(document).get(method, {})
    return [
        _result(benchmark, task, "mean_accepted_length", "Accepted length", value, document)
        for task, value in lengths.items()
    ]


def speed_results(document: Document, method: str, benchmark: Mapping[str, str]) -> list[EvalResult]:
    """`model-index` entries of a method's speed: the median ratio to plain `generate`, one for each task."""
    rows = {task: methods[method] for task, methods in document["tasks"].items() if method in methods}
    return [
        _result(
            benchmark, task, "speedup_ratio", "Speed-up over plain generate, median", row["median_ratio"], document
        )
        for task, row in rows.items()
        if "median_ratio" in row
    ]


def _result(
    benchmark: Mapping[str, str], task: str, metric: str, name: str, value: float, document: Document
) -> EvalResult:
    settings, where = document["settings"], document["environment"]
    return EvalResult(
        task_type="text-generation",
        dataset_type=benchmark["type"],
        dataset_name=benchmark["name"],
        dataset_config=task,
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 3),
        # Of the metric, not of the data set: the client puts results of one data set together, under the first one's args.
        metric_args={"temperature": settings["temperature"], "tree": tree(settings), "device": where["device"]},
    )
