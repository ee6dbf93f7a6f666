"""A trace as one HTML page that needs nothing else: text, costs, contemplation and trees are drawn here, as plain SVG.

Gathered by `_trace.py`; colours and the little script are in `_trace_page.html`.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from _rounds import DRAFTED, LOOKED_UP, ORIGINS, TARGET
from _trace import COSTS
from _trace_tree import draw_tree

TEMPLATE = Path(__file__).with_name("_trace_page.html")
CLASSES = {DRAFTED: "drafted", LOOKED_UP: "looked-up", TARGET: "target"}
TINTS = 3
PAGE_WIDTH, WIDEST_BAR, BARS_HEIGHT, AXIS = 1160, 40, 130, 46

Trace = dict[str, Any]


def page(document: Trace) -> str:
    """The whole page of what `_trace.trace` gathered, with `prompt` and `environment`."""
    sections = (_head, _text, _costs, _contemplation, _trees)
    body = "\n".join(section(document) for section in sections)
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(body=body)


def _head(document: Trace) -> str:
    came = Counter(token["origin"] for token in document["tokens"])
    accepted = document["mean_accepted_length"]
    tiles = {
        "new tokens": document["new_tokens"],
        "rounds": len(document["rounds"]),
        "tokens a round": "-" if accepted is None else f"{accepted:.2f}",
        "tokens/s": f"{document['new_tokens'] / document['seconds']:.1f}",
        **{_describe(origin): came[origin] for origin in ORIGINS},
    }
    boxes = "".join(f'<div class="tile"><b>{value}</b>{name}</div>' for name, value in tiles.items())
    made = document["environment"]
    where = f"{made['device']}, threads: {made['threads']}, {made['dtype']}"
    versions = ", ".join(f"{name} {made[name]}" for name in ("confu_hf", "transformers", "torch"))
    return (
        f"<h1>One answer, round by round</h1>"
        f'<p class="prompt">{escape(document["prompt"])}</p><div class="tiles">{boxes}</div>'
        f'<p class="dim">{escape(made["command"])} (commit {escape(str(made["commit"]))}, {made["date"]})<br>'
        f"{escape(where)}; {escape(versions)}</p>"
    )


def _describe(origin: str) -> str:
    return {DRAFTED: "drafted by the network", LOOKED_UP: "looked up", TARGET: "the target's own"}[origin]


def _text(document: Trace) -> str:
    spans = "".join(
        f'<span class="token {CLASSES[token["origin"]]} tint{token["round"] % TINTS}" data-round="{token["round"]}" '
        f'title="round {token["round"]}, {_describe(token["origin"])}">{escape(token["text"])}</span>'
        for token in document["tokens"]
    )
    keys = (
        '<span class="key"><span class="token drafted">drafted by the network</span></span>'
        '<span class="key"><span class="token looked-up">looked up in the text</span></span>'
        '<span class="key"><span class="token target">the target\'s own</span></span>'
    )
    return f'<h2>The text</h2><p>{keys}<span class="dim">A tint is a round.</span></p><div class="text">{spans}</div>'


def _costs(document: Trace) -> str:
    rounds = document["rounds"]
    if not rounds:
        return ""
    totals = [sum(one["milliseconds"].values()) for one in rounds]
    scale = BARS_HEIGHT / max(totals)
    wide = min(WIDEST_BAR, (PAGE_WIDTH - AXIS) / len(rounds))
    bars = "".join(_bar(number, one, scale, wide) for number, one in enumerate(rounds, start=1))
    width, height = AXIS + len(rounds) * wide, BARS_HEIGHT + 36
    axis = f'<text class="small" x="0" y="22">{max(totals):.0f} ms</text><text class="small" x="0" y="{BARS_HEIGHT + 16}">0 ms</text>'
    mean = {name: sum(one["milliseconds"][name] for one in rounds) / len(rounds) for name in COSTS}
    keys = "".join(
        f'<span class="key"><i style="background: var(--{name})"></i>{name}, {mean[name]:.1f} ms</span>'
        for name in COSTS
    )
    return (
        f'<h2>What each round cost</h2><p>{keys}<span class="dim">Means. Below each bar the tokens that it brought.</span></p>'
        f'<svg id="costs" width="{width:.0f}" height="{height}" viewBox="0 0 {width:.0f} {height}">{axis}{bars}</svg>'
    )


def _bar(number: int, one: Trace, scale: float, wide: float) -> str:
    x, top, parts = AXIS + (number - 1) * wide, BARS_HEIGHT + 16.0, ""
    for name in COSTS[::-1]:
        height = one["milliseconds"][name] * scale
        top -= height
        parts += (
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{0.8 * wide:.1f}" height="{height:.1f}" fill="var(--{name})"/>'
        )
    label = f'<text class="small" x="{x + 0.4 * wide:.1f}" y="{BARS_HEIGHT + 30}" text-anchor="middle">{one["emitted"]}</text>'
    spent = ", ".join(f"{name} {one['milliseconds'][name]:.1f} ms" for name in COSTS)
    return f'<g class="bar" data-round="{number}"><title>round {number}: {spent}</title>{parts}{label}</g>'


def _contemplation(document: Trace) -> str:
    known = [(number, one) for number, one in enumerate(document["rounds"], start=1) if one["opinions"]]
    title = "<h2>Where contemplation helped</h2>"
    if not known:
        return f"{title}<p>No round had a future to draft with.</p>"
    given, masked = ([one["opinions"][way]["accepted"] for _, one in known] for way in ("given", "masked"))
    better, worse = (sum(a > b for a, b in zip(*pair, strict=True)) for pair in ((given, masked), (masked, given)))
    summary = (
        f"For {len(known)} of {len(document['rounds'])} rounds there was a future <i>f</i>. Drafted over again, the "
        f"network alone brings {sum(given) / len(given):.2f} tokens a round with it and "
        f"{sum(masked) / len(masked):.2f} with <i>f</i> masked: more in {better} rounds, fewer in {worse}. (The same "
        "draft, which was trained with <i>f</i>; a draft trained without one is another matter.)"
    )
    rows = "".join(_opinion_row(number, one) for number, one in known if _differs(one["opinions"]))
    head = "<tr><th>round</th><th>with f</th><th>f masked</th><th>first guess with f</th><th>f masked</th><th>chance of what came</th></tr>"
    table = f"<table>{head}{rows}</table>" if rows else "<p>It changed no first guess and no accepted length.</p>"
    return f'{title}<div id="contemplation"><p>{summary}</p>{table}</div>'


def _differs(opinions: Trace) -> bool:
    return any(opinions["given"][name] != opinions["masked"][name] for name in ("accepted", "first"))


def _opinion_row(number: int, one: Trace) -> str:
    given, masked = one["opinions"]["given"], one["opinions"]["masked"]
    gain = given["accepted"] - masked["accepted"]
    kind = "gained" if gain > 0 else "lost" if gain < 0 else "dim"
    return (
        f'<tr class="opinion" data-round="{number}"><td>{number}</td><td class="{kind}">{given["accepted"]}</td>'
        f"<td>{masked['accepted']}</td><td><code>{escape(given['first'])}</code></td>"
        f"<td><code>{escape(masked['first'])}</code></td>"
        f"<td>{given['chance']:.0%}, masked {masked['chance']:.0%}</td></tr>"
    )


def _trees(document: Trace) -> str:
    keys = (
        '<span class="key"><i style="background: var(--drafted)"></i>accepted</span>'
        '<span class="key"><i style="border: 2px dashed var(--looked)"></i>looked up</span>'
        '<span class="key"><i style="background: var(--future); border-radius: 6px"></i>carried a contemplate token</span>'
        '<span class="dim">The percentage is the joint probability that the draft expected. Behind the path: the '
        "target's own token.</span>"
    )
    rounds: Sequence[Trace] = document["rounds"]
    cards = "".join(_card(number, one) for number, one in enumerate(rounds, start=1))
    return f'<h2>The trees</h2><p>{keys}</p><div class="rounds">{cards}</div>'


def _card(number: int, one: Trace) -> str:
    drafted = len(one["nodes"]) - 1
    total = sum(one["milliseconds"].values())
    return (
        f'<section class="round" id="round-{number}" data-round="{number}"><header><b>Round {number}</b>: '
        f"{one['emitted'] - 1} of {drafted} accepted, {total:.0f} ms</header>{draw_tree(one)}</section>"
    )
