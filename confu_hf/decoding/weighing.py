"""What is expected of a drafted tree, and how many of its nodes pay: pure arithmetic on the host, one tree at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .stats import Forecast

# The chance that a node is accepted once its parent is, from the drafter's word, the depth, and whether it was looked up.
Calibrate = Callable[[float, int, bool], float]


def conditional(log_prob: float, above: float) -> float:
    """The probability of a node once its parent is accepted, from the joint log-probabilities of both."""
    return math.exp(min(0.0, log_prob - above)) if above > -math.inf else 0.0


def probabilities(
    log_probs: Sequence[float],
    parents: Sequence[int],
    depths: Sequence[int],
    looked_up: Sequence[bool],
    calibrate: Calibrate,
) -> tuple[list[float], list[float], list[float]]:
    """Of the nodes of one tree: the drafter's conditional probabilities, the expected ones, and the products of these
    from the root down. Parents come before their children; entry 0 is the root."""
    drafted, expected, joint = [1.0], [1.0], [1.0]
    for node in range(1, len(log_probs)):
        parent = parents[node]
        drafted.append(conditional(log_probs[node], log_probs[parent]))
        expected.append(calibrate(drafted[node], depths[node], looked_up[node]))
        joint.append(joint[parent] * expected[node])
    return drafted, expected, joint


def ranked(joint: Sequence[float]) -> list[int]:
    """Nodes, best first. Among equals the earlier one, so a parent is before its children: every cut is a tree."""
    return sorted(range(len(joint)), key=joint.__getitem__, reverse=True)


@dataclass(frozen=True)
class Best:
    """The numbers of nodes and of contemplated nodes of each batch row that bring the most tokens a second: `nodes`, the
    root not counted, with the `tokens` expected of all rows in this round and its `seconds`."""

    nodes: int
    tokens: float
    seconds: float
    contemplate_tokens: int = 0


def best_number(
    gains: Sequence[float],
    limit: int,
    active: int,
    seconds: Callable[[int], float],
    futures: Sequence[Sequence[float]] = (),
    contemplate_length: int = 1,
    beside: float = 0.0,
) -> Best:
    """Every number of nodes is looked at: the cost of a pass has steps. Nodes and contemplate tokens share the rows up to
    the next step, so they are chosen together.

    Args:
        gains: tokens expected of the first, second, ... node, of all batch rows together.
        limit: the most nodes. active: batch rows that have not ended, each sure of one token.
        seconds: of a round with so many rows beside the root, for each batch row.
        futures: for 0, 1, ... nodes, the tokens that 1, 2, ... contemplated nodes bring to the next round; never falling.
        contemplate_length: rows that each of these takes. beside: seconds of a round that has any, beside those rows.
    """
    tokens, best, value = float(active), Best(0, float(active), seconds(0)), float(active)
    for number in range(min(limit, len(gains)) + 1):
        tokens += gains[number - 1] if number else 0.0
        brought = (0.0, *futures[number]) if futures else (0.0,)
        for count, more in enumerate(brought):
            cost = seconds(number + contemplate_length * count) + (beside if count else 0.0)
            if (tokens + more) * best.seconds > value * cost:
                best, value = Best(number, tokens, cost, count), tokens + more
            elif (tokens + brought[-1]) * best.seconds <= value * cost:
                break  # further ones cost no less
    return best


def ends_by_size(joint: Sequence[float], parents: Sequence[int], limit: int) -> list[list[float]]:
    """For the trees of the best 0, 1, ... `limit` nodes, the chances that a walk ends at a node, the likeliest first.

    A walk ends at a node if it gets there and to none of its children in the tree: adding a child takes its chance away
    from its parent.
    """
    ends, sizes = {}, []
    for node in ranked(joint)[: limit + 1]:
        ends[node] = joint[node]
        if node:
            ends[parents[node]] -= joint[node]
        sizes.append(sorted((max(0.0, chance) for chance in ends.values()), reverse=True))
    return sizes


def forecast_of(
    kept: Sequence[int],
    parents: Sequence[int],
    depths: Sequence[int],
    looked_up: Sequence[bool],
    drafted: Sequence[float],
    expected: Sequence[float],
) -> Forecast:
    """Of the kept nodes of a tree, renumbered."""
    places = {-1: -1} | {node: place for place, node in enumerate(kept)}
    return Forecast(
        parents=tuple(places[parents[node]] for node in kept),
        depths=tuple(depths[node] for node in kept),
        drafted=tuple(drafted[node] for node in kept),
        expected=tuple(expected[node] for node in kept),
        looked_up=tuple(bool(looked_up[node]) for node in kept),
    )
