"""A trace as a picture: the text by rounds, what each round cost, and the tree that brought most. Needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # files, no window

from _rounds import DRAFTED, LOOKED_UP, TARGET  # noqa: E402
from _trace import COSTS  # noqa: E402
from _trace_tree import places  # noqa: E402
from matplotlib import pyplot as plt  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import MaxNLocator  # noqa: E402

COLORS = {DRAFTED: "#1a7f4b", LOOKED_UP: "#b45309", TARGET: "#1d2430"}
TINTS = ("#eef1f6", "#dfe8f5", "#f3eee2")
COST_COLORS = dict(zip(COSTS, ("#3b82c4", "#e08a3c", "#aab2bf"), strict=True))
COLUMNS = 110  # characters a line
INCHES_A_LINE, RESOLUTION = 0.26, 110


def draw(document: dict[str, Any], file: Path) -> Path:
    """Write the PNG and return its path."""
    lines = wrapped(document["tokens"])
    rounds = document["rounds"]
    best = max(range(len(rounds)), key=lambda index: rounds[index]["emitted"], default=None)
    spots = [] if best is None else places(rounds[best]["nodes"])
    leaves = 1 + max((line for _, line in spots), default=0)
    heights = [INCHES_A_LINE * (len(lines) + 1), 2.4, 0.32 * leaves + 0.6]
    figure, axes = plt.subplots(
        3, 1, figsize=(11, sum(heights)), layout="constrained", gridspec_kw={"height_ratios": heights}
    )
    _text(axes[0], lines)
    _costs(axes[1], rounds)
    _tree(axes[2], rounds, best, spots)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=RESOLUTION)
    plt.close(figure)
    return file


def wrapped(tokens: list[dict[str, Any]]) -> list[list[tuple[int, dict[str, Any], str]]]:
    """Lines of (column, token, text), none longer than [`COLUMNS`]; a newline ends one."""
    lines: list[list[tuple[int, dict[str, Any], str]]] = [[]]
    column = 0
    for token in tokens:
        for number, part in enumerate(token["text"].split("\n")):
            if number or (column and column + len(part) > COLUMNS):
                lines.append([])
                column = 0
            if part:
                lines[-1].append((column, token, part))
                column += len(part)
    return lines


def _text(axes: Axes, lines: list[list[tuple[int, dict[str, Any], str]]]) -> None:
    axes.set(xlim=(0, COLUMNS), ylim=(len(lines), -0.6))
    axes.set_title(
        "The text; a tint is a round. Green: drafted, brown: looked up, black: the target's own", fontsize=10
    )
    axes.axis("off")
    for row, line in enumerate(lines):
        for column, token, part in line:
            axes.fill_between(
                (column, column + len(part)), row - 0.45, row + 0.45, color=TINTS[token["round"] % 3], linewidth=0
            )
            style = {"color": COLORS[token["origin"]], "family": "monospace", "fontsize": 9, "va": "center"}
            for place, character in enumerate(part):  # one by one: a grid, whatever the font's width
                axes.text(column + place + 0.5, row, character, ha="center", parse_math=False, **style)


def _costs(axes: Axes, rounds: list[dict[str, Any]]) -> None:
    numbers = range(1, len(rounds) + 1)
    below = [0.0] * len(rounds)
    for name in COSTS:
        heights = [one["milliseconds"][name] for one in rounds]
        axes.bar(numbers, heights, bottom=below, color=COST_COLORS[name], label=name)
        below = [low + height for low, height in zip(below, heights, strict=True)]
    for number, one, top in zip(numbers, rounds, below, strict=True):
        axes.text(number, top, one["emitted"], ha="center", va="bottom", fontsize=7)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="round", ylabel="milliseconds")
    axes.set_title("What each round cost, and the tokens it brought", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    if rounds:
        axes.legend(fontsize="small", frameon=False, ncols=len(COSTS))


def _tree(axes: Axes, rounds: list[dict[str, Any]], best: int | None, spots: list[tuple[int, float]]) -> None:
    axes.axis("off")
    if best is None:
        return
    nodes = rounds[best]["nodes"]
    for number, (node, (depth, line)) in enumerate(zip(nodes, spots, strict=True)):
        if number:
            x, y = spots[node["parent"]]
            green = node["accepted"]
            axes.plot((x, depth), (y, line), color=COLORS[DRAFTED] if green else "#d6dae2", lw=2.5 if green else 1)
    for node, (depth, line) in zip(nodes, spots, strict=True):
        chance = f" {node['probability']:.0%}" if node["parent"] >= 0 else ""
        box = {
            "facecolor": "#e3f4ea" if node["accepted"] else "white",
            "edgecolor": COLORS[LOOKED_UP] if node["looked_up"] else "#7c3aed" if node["contemplated"] else "#aab2bf",
            "linestyle": "--" if node["looked_up"] else "-",
            "boxstyle": "round,pad=0.25",
        }
        label = f"{node['text']}{chance}"
        axes.text(depth, line, label, ha="center", va="center", fontsize=8, bbox=box, parse_math=False)
    axes.set(xlim=(-0.5, max(5, max(depth for depth, _ in spots)) + 0.5))
    axes.set_ylim(max(line for _, line in spots) + 0.7, -0.7)
    title = f"The tree of round {best + 1}; violet: carried a contemplate token, dashed: looked up"
    axes.set_title(title, fontsize=10)
