"""`acceptance_rate` as a metric of `evaluate`. Absolute imports: `evaluate` loads this file from a copy."""

from __future__ import annotations

import datasets
import evaluate

from confu_hf.metrics import acceptance_rate

DESCRIPTION = (
    "Share of the drafted tokens that the target accepted. In a tree at most one token of each depth can be, so trees have "
    "lower rates than chains, and longer accepted lengths."
)
INPUTS = """
Args:
    counts: tokens emitted by each round, at least one each: `record.accepted` of `confu.stats.records`.
    drafted: drafted tokens that each round verified: `record.nodes - 1`.
Returns:
    acceptance_rate: accepted tokens (the bonus tokens left out) of all drafted ones; nan without any.
Example: counts=[3, 1, 2], drafted=[4, 4, 2] gives 0.3.
"""


class AcceptanceRate(evaluate.Metric):
    """See `confu_hf.metrics.acceptance_rate`."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("int64") for name in ("counts", "drafted")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, counts: list[int], drafted: list[int]) -> dict[str, float]:
        return {"acceptance_rate": acceptance_rate(counts, drafted)}
