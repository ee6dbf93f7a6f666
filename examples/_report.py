"""What a benchmark's questions say together: figures per task and method, and a Markdown table of them. Knows no model."""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from _measure import summarize_tasks

from confu_hf.decoding.stats import PHASES
from confu_hf.metrics import acceptance_by_depth, acceptance_rate

RESAMPLES, CONFIDENCE = 2000, 0.95
Records = Sequence[dict[str, Any]]


def condensed(result: dict[str, Any]) -> dict[str, Any]:
    """The result of one method without what the report does not need of every single round."""
    if result["stats"] is None:
        return result
    stats = dict(result["stats"])
    records = stats.pop("records")
    stats["accepted"] = [count for record in records for count in record["accepted"]]
    stats["drafted"] = [record["nodes"] - 1 for record in records]
    stats["rows"] = [
        record["nodes"] + record["contemplate_length"] * record["contemplate_tokens"] for record in records
    ]
    stats["verify_ms"] = [round(1000 * record["seconds"]["verify"], 3) for record in records]
    stats["phase_seconds"] = {name: sum(record["seconds"][name] for record in records) for name in PHASES}
    return {**result, "stats": stats}


def report(records: Records, methods: Sequence[str]) -> dict[str, Any]:
    """All figures as data: `tasks` (and `all`) by method, the time budget of a round, and what the plots show."""
    tasks = summarize_tasks(records, methods)
    for task, rows in tasks.items():
        chosen = [record for record in records if task in ("all", record["task"])]
        for method, row in rows.items():
            _extend(row, method, rows, chosen)
    with_rounds = [method for method in methods if _all_stats(records, method)]
    return {
        "tasks": tasks,
        "round_ms": {method: round_budget(records, method) for method in with_rounds},
        "acceptance_by_depth": {method: _by_depth(records, method) for method in with_rounds},
        "verify_ms_by_rows": {method: _verify_by_rows(records, method) for method in with_rounds},
        "reliability": {
            name: bins
            for method in with_rounds
            for name, origin in ((method, "reliability"), (f"{method}, looked up", "lookup_reliability"))
            if (bins := _reliability(_all_stats(records, method), origin))
        },
    }


def _extend(row: dict[str, Any], method: str, rows: dict[str, dict[str, Any]], records: Records) -> None:
    runs = [record["methods"][method] for record in records]
    counted = _all_stats(records, method)
    if all("drafted" in stats for stats in counted):  # journals of earlier versions lack it
        counts, drafted = ([count for stats in counted for count in stats[name]] for name in ("accepted", "drafted"))
        row["acceptance_rate"] = acceptance_rate(counts, drafted) if any(drafted) else None
    peaks = [run["peak_bytes"] for run in runs if run["peak_bytes"] is not None]
    row["peak_bytes"] = max(peaks, default=None)
    others = [other["tokens_per_second"] for name, other in rows.items() if name != method]
    row["ratio_to_best_other"] = row["tokens_per_second"] / max(others) if others else None
    if "median_ratio" in row:
        ratios = [run["ratio"] for run in runs]
        row["interval"] = bootstrap_interval(ratios)
        row["least_ratio"], row["most_ratio"] = min(ratios), max(ratios)
        if "mean_accepted_length" in row:
            row["efficiency"] = row["median_ratio"] / row["mean_accepted_length"]


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """Percentile interval of the median, questions drawn with replacement."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(RESAMPLES))
    margin = round((1 - CONFIDENCE) / 2 * (RESAMPLES - 1))
    return medians[margin], medians[-1 - margin]


def round_budget(records: Records, method: str) -> dict[str, float]:
    """Milliseconds of a round by phase; the rest is what a call takes beside its rounds' phases and its prefill."""
    counted = [record for record in records if _stats(record, method)]
    rounds = sum(_stats(record, method)["rounds"] for record in counted)
    phases = {
        name: sum(_stats(record, method)["phase_seconds"][name] for record in counted) / rounds for name in PHASES
    }
    seconds = sum(record["methods"][method]["seconds"] - record["prefill_seconds"] for record in counted) / rounds
    phases["rest"] = max(0.0, seconds - sum(phases.values()))
    return {name: 1000 * value for name, value in phases.items()}


def markdown(figures: dict[str, Any], methods: Sequence[str]) -> str:
    """The figures as three tables: everything over all questions, the median ratio by task, a round's time."""
    tasks = figures["tasks"]
    head = ["method", "identical", "accepted length", "tokens/s", "ratio to plain, median [95 %] (least, most)"]
    head += ["to the best other", "efficiency", "peak memory, GB"]
    overall = [[method, *_cells(tasks["all"][method], method)] for method in methods]
    parts = [_table(head, overall)]
    if len(tasks) > 1:
        by_task = [
            [method, *(_number(rows[method].get("median_ratio")) for rows in tasks.values())] for method in methods
        ]
        parts.append(_table(["median ratio", *tasks], by_task[1:] if methods[0] == "plain" else by_task))
    budgets = figures["round_ms"]
    if budgets:
        phases = list(next(iter(budgets.values())))
        rows = [[method, *(_number(value, 1) for value in budget.values())] for method, budget in budgets.items()]
        parts.append(_table(["ms a round", *phases], rows))
    return "\n".join(parts)


def _cells(row: dict[str, Any], method: str) -> list[str]:
    ratio = "1"
    if "median_ratio" in row:
        low, high = row["interval"]
        spread = f"({_number(row['least_ratio'])}, {_number(row['most_ratio'])})"
        ratio = f"{_number(row['median_ratio'])} [{_number(low)}, {_number(high)}] {spread}"
    peak = row["peak_bytes"]
    return [
        f"{row['identical']}/{row['prompts']}" if "identical" in row else "-",
        _number(row.get("mean_accepted_length", 1.0 if method.startswith("plain") else None)),
        _number(row["tokens_per_second"], 1),
        ratio if "median_ratio" in row or method == "plain" else "-",
        _number(row["ratio_to_best_other"]),
        _number(row.get("efficiency")),
        _number(None if peak is None else peak / 1e9),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _stats(record: dict[str, Any], method: str) -> dict[str, Any] | None:
    stats = record["methods"][method]["stats"]
    return stats if stats and stats["rounds"] else None


def _all_stats(records: Records, method: str) -> list[dict[str, Any]]:
    return [stats for record in records if (stats := _stats(record, method))]


def _by_depth(records: Records, method: str) -> tuple[float, ...]:
    return acceptance_by_depth([count for stats in _all_stats(records, method) for count in stats["accepted"]])


def _verify_by_rows(records: Records, method: str) -> dict[int, float]:
    """Median milliseconds of a verify pass by its rows, nodes and contemplate tokens."""
    groups = defaultdict(list)
    for stats in _all_stats(records, method):
        for rows, milliseconds in zip(stats["rows"], stats["verify_ms"], strict=True):
            groups[rows].append(milliseconds)
    return {rows: statistics.median(times) for rows, times in sorted(groups.items())}


def _reliability(all_stats: Sequence[dict[str, Any]], origin: str) -> list[dict[str, float]]:
    """Where the policy forecasts: tenths of expected probability, with what was expected and observed there."""
    groups = defaultdict(list)
    for stats in all_stats:
        for found in stats.get(origin, ()):
            groups[min(9, int(10 * found["expected"]))].append(found)
    bins = []
    for _, found in sorted(groups.items()):
        count = sum(one["count"] for one in found)
        means = {name: sum(one[name] * one["count"] for one in found) / count for name in ("expected", "observed")}
        bins.append({"count": count, **means})
    return bins
