"""How speculative decoding is judged: one definition for `confu.stats`, the trainer and whoever compares methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RELIABILITY_EDGES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)


def mean_accepted_length(counts: Sequence[int]) -> float:
    """Tokens per forward pass of the target after prefill, bonus token included.

    Args:
        counts: tokens emitted by each round, at least one each.

    Returns:
        Their mean, every round weighing alike; nan without any.
    """
    return sum(counts) / len(counts) if counts else float("nan")


def acceptance_by_depth(counts: Sequence[int]) -> tuple[float, ...]:
    """Share of rounds whose accepted path reached depth 1, 2, ...

    Example: rounds of 3, 1 and 2 tokens. Three tokens are two drafted ones and the bonus: depth 2. So (2/3, 1/3).
    """
    deepest = max(counts, default=1) - 1
    return tuple(sum(count > depth for count in counts) / len(counts) for depth in range(1, deepest + 1))


@dataclass(frozen=True)
class ReliabilityBin:
    """Forecasts of similar probability: how many, their mean, and the share that came true."""

    count: int
    expected: float
    observed: float


def reliability(outcomes: Sequence[tuple[float, bool]]) -> tuple[ReliabilityBin, ...]:
    """Forecasts beside what came true, in bins between `RELIABILITY_EDGES`; empty bins are left out.

    Args:
        outcomes: (probability, whether it came true).
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in RELIABILITY_EDGES[1:]]
    for probability, happened in outcomes:
        index = sum(probability > edge for edge in RELIABILITY_EDGES[1:-1])
        bins[index].append((probability, happened))
    return tuple(
        ReliabilityBin(len(found), sum(p for p, _ in found) / len(found), sum(h for _, h in found) / len(found))
        for found in bins
        if found
    )
