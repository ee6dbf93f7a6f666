"""The table of decoding counts what a pass really reads and multiplies, and adds it up as it says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from confu_hf.compat import cache_keyword

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from plan_decoding import (  # noqa: E402
    MACHINES,
    PAPER,
    Machine,
    main,
    parse_arguments,
    pass_bytes,
    pass_products,
    pass_seconds,
    plan,
)
from plan_training import Shape  # noqa: E402

TINY = Shape("tiny", 128, 8, 4, 2, 32, 256, 97)


def test_the_products_and_bytes_of_a_pass():
    target = tiny_llama(hidden_size=128, intermediate_size=256, head_dim=32, dtype=torch.float32)
    cache = DynamicCache()
    with torch.no_grad():
        target(torch.arange(3, 33)[None], **cache_keyword(target, cache))
        # Fused attention is not counted.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            target(torch.arange(3, 13)[None], logits_to_keep=6, **cache_keyword(target, cache))
    assert pass_products(TINY, nodes=6, more=4, context=30) == pytest.approx(counter.get_total_flops(), rel=0.02)
    read = sum(parameter.nbytes for name, parameter in target.named_parameters() if "embed" not in name)
    states = sum(layer.keys[:, :, :30].nbytes + layer.values[:, :, :30].nbytes for layer in cache.layers)
    assert pass_bytes(TINY, 30, 4) == pytest.approx(read + states, rel=0.02)


def test_rows_are_free_until_products_take_longer():
    machine = Machine("some", bandwidth=1e9, peak=20e9, memory=1e9, weight=2)
    assert machine.free_rows == pytest.approx(20)
    seconds = [pass_seconds(TINY, machine, rows, 0, 0) for rows in (1, 10, 19, 40)]
    assert seconds[0] == seconds[1] == seconds[2]
    assert seconds[3] == pytest.approx(2 * seconds[0], rel=0.15)


def test_the_ratio_is_accepted_length_times_efficiency(capsys):
    args = parse_arguments([])
    for shape, methods in PAPER.items():
        found = [plan(shape, method, MACHINES["h100"], args) for method in methods]
        for method, parts in zip(methods, found, strict=True):
            assert parts["round"] == pytest.approx((parts["draft"] + parts["verify"]) / (1 - args.overhead))
            assert parts["ratio"] == pytest.approx(method.accepted * parts["plain"] / parts["round"])
            assert parts["ratio"] < method.accepted
            # What is not counted slows a real loop down: the calculation is a bound, and above what the paper measured.
            assert method.paper_ratio is None or parts["ratio"] > method.paper_ratio
        assert found[1]["ratio"] > found[0]["ratio"]
    assert found[0]["devices"] == 2, "70B fits no single device"
    main(["--machine", "cpu"])
    printed = capsys.readouterr().out
    assert "not a measurement" in printed and printed.count("| ConFu |") == len(PAPER)
