"""`speedup_ratio` as a metric of `evaluate`. Absolute imports: `evaluate` loads this file from a copy."""

from __future__ import annotations

import datasets
import evaluate

from confu_hf.metrics import speedup_ratio

DESCRIPTION = "Tokens per second as a ratio to plain decoding of the same questions; below 1 is slower."
INPUTS = """
Args:
    tokens, seconds: new tokens of each question, and the seconds that `generate` took.
    plain_tokens, plain_seconds: the same of plain decoding.
Returns:
    speedup_ratio: the median of the questions' ratios. overall_speedup_ratio: that of all questions together.
Example: tokens=[8, 8], seconds=[1.0, 4.0], plain_tokens=[8, 8], plain_seconds=[2.0, 4.0] gives 1.5 and 1.2.
"""


class SpeedupRatio(evaluate.Metric):
    """See `confu_hf.metrics.speedup_ratio`."""

    def _info(self) -> evaluate.MetricInfo:
        kinds = {"tokens": "int64", "seconds": "float64", "plain_tokens": "int64", "plain_seconds": "float64"}
        features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", inputs_description=INPUTS, features=features)

    def _compute(
        self, tokens: list[int], seconds: list[float], plain_tokens: list[int], plain_seconds: list[float]
    ) -> dict[str, float]:
        found = speedup_ratio(tokens, seconds, plain_tokens, plain_seconds)
        return {"speedup_ratio": found.median, "overall_speedup_ratio": found.overall}
