"""How speculative decoding is judged: one definition for `confu.stats`, the trainer and whoever compares methods."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from .errors import refusal

RELIABILITY_EDGES = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0)


def mean_accepted_length(counts: Sequence[int]) -> float:
    """Tokens per forward pass of the target after prefill, bonus token included.

    Args:
        counts: tokens emitted by each round, at least one each.

    Returns:
        Their mean, every round weighing alike; nan without any.
    """
    return tokens_per_round(sum(counts), len(counts))


def tokens_per_round(tokens: float, rounds: float) -> float:
    """[`mean_accepted_length`] of totals: `tokens` that so many `rounds` emitted; nan without any."""
    return tokens / rounds if rounds else float("nan")


def acceptance_rate(counts: Sequence[int], drafted: Sequence[int]) -> float:
    """Share of the drafted tokens that were accepted.

    Args:
        counts: tokens emitted by each round, at least one each; one of them is the bonus token, which nobody drafted.
        drafted: drafted tokens that each round verified.

    Returns:
        Accepted ones of all rounds over drafted ones; nan without any. Rounds of 3, 1 and 2 tokens with 4, 4 and 2 drafted
        ones: 3/10.
    """
    return sum(count - 1 for count in counts) / sum(drafted) if any(drafted) else float("nan")


@dataclass(frozen=True)
class SpeedUp:
    """Tokens per second as a ratio to plain decoding: of all questions together, and the median of their own ratios."""

    overall: float
    median: float


def speedup_ratio(
    tokens: Sequence[int], seconds: Sequence[float], plain_tokens: Sequence[int], plain_seconds: Sequence[float]
) -> SpeedUp:
    """How much faster than plain decoding the same questions were answered.

    Args:
        tokens, seconds: new tokens of each question, and what `generate` took, prefill included.
        plain_tokens, plain_seconds: the same of plain decoding.

    Raises:
        ValueError: there is no question, or not one number of each kind per question.
    """
    numbers = [len(values) for values in (tokens, seconds, plain_tokens, plain_seconds)]
    if len(set(numbers)) > 1 or not numbers[0]:
        raise refusal(
            "speedup_ratio",
            got=f"{numbers} values",
            expected="one of each kind for every question, and a question",
            fix="Time every question both ways.",
        )
    rates = [count / time for count, time in zip(tokens, seconds, strict=True)]
    plain_rates = [count / time for count, time in zip(plain_tokens, plain_seconds, strict=True)]
    overall = (sum(tokens) / sum(seconds)) / (sum(plain_tokens) / sum(plain_seconds))
    return SpeedUp(overall, statistics.median(a / b for a, b in zip(rates, plain_rates, strict=True)))


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
