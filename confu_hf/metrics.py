"""How speculative decoding is judged: one definition for `confu.stats`, the trainer and whoever compares methods."""

from __future__ import annotations

from collections.abc import Sequence


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
