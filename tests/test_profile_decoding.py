"""The table of passes by context: every way at every number of rows, and nothing left in the cache."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path

import torch
from tiny_models import tiny_llama

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from profile_decoding import show_passes, time_passes, ways_to_run  # noqa: E402


def test_passes_by_rows_and_context(capsys):
    model = tiny_llama(dtype=torch.float32, num_hidden_layers=2)
    ways = ways_to_run(model, compiled=False)
    arguments = Namespace(rows=[1, 3], times=2)
    seconds = {context: time_passes(model, ways, context, arguments, [0, 1]) for context in (8, 24)}
    for found in seconds.values():
        assert set(found) == {("decode", 1), *((way, rows) for way in ("plain", "packed") for rows in (1, 3))}
        assert all(len(spent) == 2 and min(map(min, spent)) >= 0 for spent in found.values())
    show_passes(seconds)
    printed = capsys.readouterr().out
    assert "| context | 8 | 24 |" in printed and printed.count("| packed, 3 rows | ") == 1
    show_passes({8: seconds[8]})
    assert "context |" not in capsys.readouterr().out
