"""One draft tree as SVG, and where its nodes stand: depth goes to the right, every leaf has a line of its own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from html import escape
from typing import Any

COLUMN, LINE, WIDTH, HEIGHT = 120, 30, 98, 24
LONGEST = 8  # characters of a token that fit

Node = dict[str, Any]


def places(nodes: Sequence[Node]) -> list[tuple[int, float]]:
    """(depth, line) of every node; a parent stands in the middle of its children.

    Example: a root with children 1 and 2, 1 with child 3: lines 0.5, 0, 1, 0.
    """
    children = defaultdict(list)
    for number, node in enumerate(nodes):
        if node["parent"] >= 0:
            children[node["parent"]].append(number)
    lines: dict[int, float] = {}
    leaves = 0
    waiting = [0]
    while waiting:  # a node is met again when all its children have their lines
        number = waiting[-1]
        missing = [child for child in children[number] if child not in lines]
        if missing:
            waiting += missing[::-1]
            continue
        waiting.pop()
        below = [lines[child] for child in children[number]]
        lines[number] = (below[0] + below[-1]) / 2 if below else float(leaves)
        leaves += not below
    return [(node["depth"], lines[number]) for number, node in enumerate(nodes)]


def draw_tree(one: dict[str, Any]) -> str:
    """The SVG of a round of a trace: `nodes`, and the `bonus` token behind the last accepted one."""
    nodes = one["nodes"]
    spots = [(4 + COLUMN * depth, 6 + LINE * line) for depth, line in places(nodes)]
    last = max(number for number, node in enumerate(nodes) if node["accepted"])
    depth = max(max(node["depth"] for node in nodes), nodes[last]["depth"] + 1)
    bottom = max(y for _, y in spots) + HEIGHT
    edges = "".join(_edge(nodes, spots, number) for number in range(1, len(nodes)))
    boxes = "".join(_box(node, *spot) for node, spot in zip(nodes, spots, strict=True))
    bonus, extra = _bonus(one["bonus"], nodes, spots, last)
    width, height = COLUMN * (depth + 1), max(bottom, extra) + 8
    size = f'width="{width}" height="{height:.0f}" viewBox="0 0 {width} {height:.0f}"'
    return f'<svg class="tree" {size}>{edges}{boxes}{bonus}</svg>'


def _edge(nodes: Sequence[Node], spots: Sequence[tuple[float, float]], number: int) -> str:
    (x0, y0), (x1, y1) = spots[nodes[number]["parent"]], spots[number]
    style = 'stroke="var(--drafted)" stroke-width="3"' if nodes[number]["accepted"] else 'stroke="var(--line)"'
    return _curve(x0 + WIDTH, y0 + HEIGHT / 2, x1, y1 + HEIGHT / 2, style)


def _curve(x0: float, y0: float, x1: float, y1: float, style: str) -> str:
    middle = (x0 + x1) / 2
    return f'<path fill="none" {style} d="M{x0:.0f} {y0:.1f}C{middle:.0f} {y0:.1f} {middle:.0f} {y1:.1f} {x1:.0f} {y1:.1f}"/>'


def _box(node: Node, x: float, y: float) -> str:
    kinds = [kind for kind in ("accepted", "looked_up", "contemplated") if node[kind]]
    border = "var(--looked)" if node["looked_up"] else "var(--drafted)" if node["accepted"] else "var(--line)"
    dashes = ' stroke-dasharray="4 2"' if node["looked_up"] else ""
    fill = "#e3f4ea" if node["accepted"] else "#fff"
    dot = f'<circle cx="{x + WIDTH:.0f}" cy="{y:.1f}" r="4.5" fill="var(--future)"/>' if node["contemplated"] else ""
    chance = "" if node["parent"] < 0 else f"{node['probability']:.0%}"
    words = ", ".join([kind.replace("_", " ") for kind in kinds] or ["not accepted"])
    return (
        f'<g class="node {" ".join(kinds)}"><title>{escape(node["text"])} {chance} ({words})</title>'
        f'<rect x="{x:.0f}" y="{y:.1f}" width="{WIDTH}" height="{HEIGHT}" rx="5" fill="{fill}" stroke="{border}" '
        f'stroke-width="1.5"{dashes}/>{dot}<text x="{x + 5:.0f}" y="{y + 16:.1f}">{_short(node["text"])}</text>'
        f'<text class="small" x="{x + WIDTH - 4:.0f}" y="{y + 16:.1f}" text-anchor="end">{chance}</text></g>'
    )


def _bonus(text: str, nodes: Sequence[Node], spots: Sequence[tuple[float, float]], last: int) -> tuple[str, float]:
    """The target's own token in the column behind the last accepted node, below what stands there; and its lower edge."""
    x, y = spots[last][0] + COLUMN, spots[last][1]
    children = [spot[1] for node, spot in zip(nodes, spots, strict=True) if spot[0] == x]
    if children:
        y = max(spot[1] for spot in spots) + LINE
    edge = _curve(spots[last][0] + WIDTH, spots[last][1] + HEIGHT / 2, x, y + HEIGHT / 2, 'stroke="var(--ink)"')
    word = f'<text x="{x + 5:.0f}" y="{y + 16:.1f}" font-weight="bold">{_short(text)}</text>'
    return f'{edge}<g class="bonus"><title>the target\'s own: {escape(text)}</title>{word}</g>', y + HEIGHT


def _short(text: str) -> str:
    return escape(text if len(text) <= LONGEST else text[: LONGEST - 1] + "…")
