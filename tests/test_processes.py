"""Micro-batches and processes: however a batch is cut, its loss and its step are the same."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_llama
from two_processes import train

from confu_hf.training.sharding import shard_target
from confu_hf.training.trainer import ConFuTrainer

TESTS = Path(__file__).parent


def same(got, expected, tolerance: float) -> None:
    for name in ("tokens", "accepted"):
        assert got[name] == expected[name]
    assert got["loss"] == pytest.approx(expected["loss"], abs=2e-4)  # logged with four digits
    assert got["weights"] == pytest.approx(expected["weights"], rel=tolerance)


def test_accumulation_over_unequal_batches_is_one_batch(tmp_path):
    whole, parts, other = (
        train(tmp_path, batch_size=size, accumulation=4 // size, deep_rows="all") for size in (4, 2, 1)
    )
    same(parts, whole, 1e-12)
    same(other, whole, 1e-12)


def test_means_of_means_would_be_seen(tmp_path, monkeypatch):
    """The negative control: each micro-batch divided by its own count."""
    whole = train(tmp_path, batch_size=4, accumulation=1, deep_rows="all")
    count = ConFuTrainer.get_batch_samples
    monkeypatch.setattr(ConFuTrainer, "get_batch_samples", lambda *arguments: (count(*arguments)[0], None))
    parts = train(tmp_path, batch_size=2, accumulation=2, deep_rows="all")
    assert parts["tokens"] == whole["tokens"]
    assert parts["weights"] != pytest.approx(whole["weights"], rel=1e-6)


# Anchors are drawn at random, by each process for itself: here all rows are anchors.
EVERY_ROW = {"num_anchors": 100, "replication": 1, "max_lag": 1}


@pytest.mark.parametrize(
    "options",
    [
        {"deep_rows": "survivors"},
        {"deep_rows": "all", "contemplate": True, **EVERY_ROW},
        {"deep_rows": "all", "contemplate": True, "shard": True, **EVERY_ROW},
    ],
    ids=["eagle3", "confu", "sharded target"],
)
def test_two_processes_are_one_with_accumulation(tmp_path, options):
    """Over gloo on the CPU, with rows that depend on what the draft guesses."""
    alone = {name: value for name, value in options.items() if name != "shard"}
    expected = train(tmp_path, batch_size=2, accumulation=2, **alone)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, str(TESTS / "two_processes.py"), str(tmp_path), json.dumps(options)]
    processes = [
        subprocess.Popen(
            command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    got = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert got[0]["weights"] == got[1]["weights"]
    same(got[0], expected, 1e-12)


def test_a_target_is_sharded_among_several_processes_only():
    with pytest.raises(ValueError, match="got 1 processes, a LlamaForCausalLM, expected several.*accelerate launch"):
        shard_target(tiny_llama())
