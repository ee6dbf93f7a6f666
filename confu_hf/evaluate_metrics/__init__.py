"""The figures of speculative decoding as metrics of the package `evaluate`: files that lie here, so no network is needed.

    from confu_hf.evaluate_metrics import load_metric
    load_metric("mean_accepted_length").compute(counts=[3, 1, 2])  # {"mean_accepted_length": 2.0}

What they compute is defined in metrics.py. `evaluate` is imported when a metric is loaded, not before.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import marked, refusal

if TYPE_CHECKING:
    from evaluate import EvaluationModule

METRICS = ("mean_accepted_length", "acceptance_rate", "speedup_ratio")


def metric_path(name: str) -> str:
    """The file of a metric, as `evaluate.load` takes it.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in METRICS:
        raise refusal("load_metric", got=repr(name), expected=f"one of {METRICS}", fix="Choose one of these.")
    return str(Path(__file__).with_name(f"{name}.py"))


def load_metric(name: str, **arguments: Any) -> EvaluationModule:
    """`evaluate.load` of one of [`METRICS`]; `arguments` are its own (`experiment_id`, `keep_in_memory`, ...).

    Raises:
        ValueError: there is none of that name.
        ImportError: `evaluate` is not installed.
    """
    path = metric_path(name)
    try:
        import evaluate
    except ImportError as error:
        raise marked(
            ImportError(f"{error}: metrics need the package `evaluate`. Install it with `pip install evaluate`.")
        ) from error
    return evaluate.load(path, **arguments)
