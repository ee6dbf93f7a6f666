"""The planning table counts the products that a training step really does."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from tiny_pairs import conversations, tiny_pair
from torch.utils.flop_counter import FlopCounterMode

from confu_hf.training.data import ConversationCollator
from confu_hf.training.module import ConFuForTraining, ConFuTrainingObjective

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from plan_training import TARGETS, Batch, Shape, main, parse_arguments, plan, products  # noqa: E402


@pytest.mark.parametrize("contemplate", [False, True])
def test_the_products_of_a_step(contemplate):
    """Wide enough that small parts, which are left out, do not matter."""
    target = tiny_llama(hidden_size=128, intermediate_size=256, vocab_size=97, head_dim=32, dtype=torch.float32)
    pair = (
        tiny_pair(target, contemplate=contemplate, num_virtual_tokens=1)
        if contemplate
        else tiny_pair(target, contemplate=False)
    )
    objective = ConFuTrainingObjective(ttt_steps=3, num_anchors=12)
    module = ConFuForTraining(target, pair, objective).train()
    batch = ConversationCollator(0)(conversations((20, 60)))
    with FlopCounterMode(display=False) as counter:
        outputs = module(**batch)
        head = 6 * outputs["denominators"][:3].sum().item() * 64 * 128
        outputs["loss"].backward()
    rows = outputs["denominators"][0].item()
    shape = Shape("tiny", 128, 8, 4, 2, 32, 256, 97)
    expected = products(shape, Batch(60, rows, 3, 12 if contemplate else 0, 64))
    assert expected["loss with the draft's head"] == pytest.approx(head, rel=0.1)
    assert sum(expected.values()) == pytest.approx(counter.get_total_flops(), rel=0.15)


def test_what_does_not_fit_is_sharded(capsys):
    arguments = parse_arguments([])
    lines = [plan(shape, arguments) for shape in TARGETS]
    assert [line[1] for line in lines] == ["whole", "whole", "shards"]
    assert all("too much" not in line[5] for line in lines)
    hours = [float(line[-1]) for line in lines]
    assert hours == sorted(hours) and hours[0] > 0
    assert "too much" in plan(TARGETS[2], parse_arguments(["--devices", "1"]))[5]
    main(["--epochs", "1"])
    assert "not a measurement" in capsys.readouterr().out
