"""Draws what `_report.py` found, one PNG per question a reader may have. Needs matplotlib (`pip install -e ".[bench]"`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files, no window

from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

SIZE, RESOLUTION = (9, 4.5), 150


def draw(figures: dict[str, Any], folder: Path) -> list[Path]:
    """Write all plots that there are figures for; returns their files."""
    plots: dict[str, tuple[Any, Callable[[Axes, Any], None]]] = {
        "speed_up": (_ratios(figures["tasks"]), _speed_up),
        "round": (figures["round_ms"], _round),
        "acceptance": (figures["acceptance_by_depth"], _acceptance),
        "cost": (figures["verify_ms_by_rows"], _cost),
        "calibration": (figures["reliability"], _calibration),
    }
    files = []
    for name, (data, plot) in plots.items():
        if not data:
            continue
        figure, axes = plt.subplots(figsize=SIZE, layout="constrained")
        plot(axes, data)
        axes.legend(fontsize="small")
        files.append(folder / f"{name}.png")
        figure.savefig(files[-1], dpi=RESOLUTION)
        plt.close(figure)
    return files


def _ratios(tasks: dict[str, dict[str, dict[str, Any]]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Rows that have a ratio to plain, by method and task."""
    methods = [method for method, row in tasks["all"].items() if "median_ratio" in row]
    return {method: {task: rows[method] for task, rows in tasks.items()} for method in methods}


def _speed_up(axes: Axes, ratios: dict[str, dict[str, dict[str, Any]]]) -> None:
    width = 0.8 / len(ratios)
    for number, (method, rows) in enumerate(ratios.items()):
        places = [index + width * (number - (len(ratios) - 1) / 2) for index in range(len(rows))]
        medians = [row["median_ratio"] for row in rows.values()]
        below = [row["median_ratio"] - row["interval"][0] for row in rows.values()]
        above = [row["interval"][1] - row["median_ratio"] for row in rows.values()]
        axes.bar(places, medians, width, yerr=(below, above), label=method, error_kw={"linewidth": 0.8})
    axes.axhline(1, color="black", linewidth=0.8)
    tasks: Sequence[str] = list(next(iter(ratios.values())))
    axes.set_xticks(range(len(tasks)), tasks)
    axes.set(title="Speed-up by task", ylabel="tokens/s to plain generate, median and 95 % interval")


def _round(axes: Axes, budgets: dict[str, dict[str, float]]) -> None:
    left = [0.0] * len(budgets)
    for phase in next(iter(budgets.values())):
        widths = [budget[phase] for budget in budgets.values()]
        axes.barh(list(budgets), widths, left=left, label=phase)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set(title="Where a round's time goes", xlabel="milliseconds a round")


def _acceptance(axes: Axes, by_depth: dict[str, Sequence[float]]) -> None:
    for method, shares in by_depth.items():
        if not shares:  # it drafted nothing that was accepted
            continue
        axes.plot(range(1, len(shares) + 1), shares, marker="o", label=method)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(title="Acceptance by depth", xlabel="depth", ylabel="share of rounds that got there", ylim=(0, 1))


def _cost(axes: Axes, by_rows: dict[str, dict[int, float]]) -> None:
    for method, times in by_rows.items():
        axes.plot([int(rows) for rows in times], list(times.values()), marker=".", label=method)
    axes.set(
        title="Cost of a verify pass", xlabel="rows (nodes and contemplate tokens)", ylabel="milliseconds, median"
    )
    axes.set_ylim(bottom=0)


def _calibration(axes: Axes, reliability: dict[str, list[dict[str, float]]]) -> None:
    axes.plot((0, 1), (0, 1), color="black", linewidth=0.8)
    for method, bins in reliability.items():
        axes.plot([one["expected"] for one in bins], [one["observed"] for one in bins], marker="o", label=method)
    axes.set(title="Calibration", xlabel="probability of a node, as forecast", ylabel="share accepted")
