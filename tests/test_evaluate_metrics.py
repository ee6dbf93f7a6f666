"""The metrics of `evaluate` are those of metrics.py, and load without a network."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from confu_hf.evaluate_metrics import METRICS, load_metric, metric_path
from confu_hf.metrics import acceptance_rate, mean_accepted_length, speedup_ratio

COUNTS, DRAFTED = [3, 1, 2], [4, 4, 2]
TIMES = {"tokens": [8, 8], "seconds": [1.0, 4.0], "plain_tokens": [8, 8], "plain_seconds": [2.0, 4.0]}

# Any connection fails, as it would without a network, and so does looking a name up.
SCRIPT = """
import json, socket, sys
def unreachable(*args, **kwargs):
    raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = unreachable
from confu_hf.evaluate_metrics import METRICS, load_metric
assert "evaluate" not in sys.modules, "imported when it is needed"
show = lambda found: print(json.dumps(found))
show(load_metric("mean_accepted_length").compute(counts=[3, 1, 2]))
show(load_metric("acceptance_rate").compute(counts=[3, 1, 2], drafted=[4, 4, 2]))
times = {"tokens": [8, 8], "seconds": [1.0, 4.0], "plain_tokens": [8, 8], "plain_seconds": [2.0, 4.0]}
show(load_metric("speedup_ratio").compute(**times))
"""


def test_by_hand():
    assert acceptance_rate(COUNTS, DRAFTED) == 0.3
    assert math.isnan(acceptance_rate([1, 1], [0, 0]))
    found = speedup_ratio(**TIMES)
    assert found.median == 1.5 and found.overall == pytest.approx(1.2)
    with pytest.raises(ValueError, match=r"speedup_ratio: got \[1, 1, 2, 1\] values, expected one of each kind"):
        speedup_ratio([8], [1.0], [8, 8], [2.0])
    with pytest.raises(ValueError, match=r"got \[0, 0, 0, 0\] values"):
        speedup_ratio([], [], [], [])


def test_a_fresh_process_without_a_network_loads_them(tmp_path):
    pytest.importorskip("evaluate")
    environment = {**os.environ, "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE")
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert found == [
        {"mean_accepted_length": 2.0},
        {"acceptance_rate": 0.3},
        {"speedup_ratio": 1.5, "overall_speedup_ratio": pytest.approx(1.2)},
    ]


def test_batches_are_gathered_as_evaluate_does(tmp_path):
    evaluate = pytest.importorskip("evaluate")
    metric = evaluate.load(metric_path("mean_accepted_length"), cache_dir=str(tmp_path))
    for counts in ([3, 1], [2]):
        metric.add_batch(counts=counts)
    assert metric.compute() == {"mean_accepted_length": mean_accepted_length(COUNTS)}
    assert "bonus token included" in metric.description and "counts" in metric.features


def test_the_lines_of_the_index_of_the_examples():
    pytest.importorskip("evaluate")
    page = (Path(__file__).parent.parent / "examples" / "README.md").read_text(encoding="utf-8")
    lines, names = re.search(r"^```python\n(.*?)^```", page, re.S | re.M)[1], {}
    exec(lines, names)
    told = re.search(r"emitted: (\{.*\})", lines)[1]
    assert str(names["metric"].compute(counts=[3, 1, 2])) == told


def test_refusals(monkeypatch):
    with pytest.raises(ValueError, match=f"load_metric: got 'speed', expected one of .*{METRICS[0]}"):
        load_metric("speed")
    monkeypatch.setitem(sys.modules, "evaluate", None)
    with pytest.raises(
        ImportError, match="metrics need the package `evaluate`. Install it with `pip install evaluate`"
    ):
        load_metric("acceptance_rate")
