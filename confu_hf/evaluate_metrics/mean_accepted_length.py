"""`mean_accepted_length` as a metric of `evaluate`. Absolute imports: `evaluate` loads this file from a copy."""

from __future__ import annotations

import datasets
import evaluate

from confu_hf.metrics import mean_accepted_length

DESCRIPTION = "Tokens that the target emits per forward pass after prefill, bonus token included; 1 is plain decoding."
INPUTS = """
Args:
    counts: tokens emitted by each round, at least one each: `record.accepted` of `confu.stats.records`.
Returns:
    mean_accepted_length: their mean, every round weighing alike; nan without any.
Example: counts=[3, 1, 2] gives 2.0.
"""


class MeanAcceptedLength(evaluate.Metric):
    """See `confu_hf.metrics.mean_accepted_length`."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({"counts": datasets.Value("int64")})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(self, counts: list[int]) -> dict[str, float]:
        return {"mean_accepted_length": mean_accepted_length(counts)}
