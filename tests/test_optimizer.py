"""Muon as torch computes it, in a dtype that the processor multiplies fast; dealt out with AdamW, resumable."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from confu_hf.training import optimizer as optimizers
from confu_hf.training.optimizer import Muon, MuonAdamW, orthogonalised, product_dtype


def run(make, shape, dtype, steps=4):
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape, dtype=dtype))
    optimizer = make([weight])
    for _ in range(steps):
        weight.grad = torch.randn(shape, dtype=dtype)
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("shape", [(24, 64), (64, 24), (32, 32)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.0), (torch.float32, 3e-3)])
def test_steps_are_those_of_torch(shape, dtype, tolerance):
    """The same to the bit in bfloat16, and within its rounding in float32."""
    options = {"lr": 0.01, "weight_decay": 0.1}
    expected = run(lambda p: torch.optim.Muon(p, adjust_lr_fn="match_rms_adamw", **options), shape, torch.float32)
    got = run(lambda p: Muon(p, dtype=dtype, **options), shape, torch.float32)
    torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)
    still = run(lambda p: Muon(p, lr=0.0, dtype=dtype), shape, torch.float32)
    assert (got - still).abs().max() > 20 * max(tolerance, 1e-4) / 3  # the steps are larger than what is tolerated


@pytest.mark.parametrize("shape", [(24, 64), (64, 24)])
def test_singular_values_come_near_one(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    before, after = (torch.linalg.svdvals(m) for m in (matrix, orthogonalised(matrix, torch.float32)))
    assert before.max() / before.min() > 3
    assert (after > 0.5).all() and (after < 1.5).all()


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_dtype_is_one_that_the_processor_multiplies(fast, expected, monkeypatch):
    monkeypatch.setattr(optimizers, "multiplies_bfloat16", lambda: fast)
    assert product_dtype(torch.device("cpu")) == expected
    assert product_dtype(torch.device("cuda")) == torch.bfloat16


def named_parameters() -> list[tuple[str, nn.Parameter]]:
    torch.manual_seed(0)
    shapes = {
        "fc.weight": (8, 24),
        "norm.weight": (8,),
        "lm_head.weight": (20, 8),
        "embed_tokens.weight": (30, 8),
        "future_mixture.router.weight": (4, 8),
        "target.confu.confu_experts.default.weight": (4, 8),
        "target.confu.confu_lora_down.default.weight": (2, 3, 8),
        "target.confu.confu_router.default.weight": (4, 24),
    }
    return [(name, nn.Parameter(torch.randn(shape))) for name, shape in shapes.items()]


def test_only_matrices_between_hidden_states_are_muons():
    named = named_parameters()
    optimizer = MuonAdamW(named, lr=0.1, adapter_lr=0.2, lora_lr=0.05, router_lr=0.01)
    muon, adamw = optimizer.parts
    names = {id(p): name for name, p in named}
    assert [names[id(p)] for group in muon.param_groups for p in group["params"]] == ["fc.weight"]
    rates = {names[id(p)]: group["lr"] for group in adamw.param_groups for p in group["params"]}
    assert rates.pop("target.confu.confu_experts.default.weight") == 0.2
    assert rates.pop("target.confu.confu_router.default.weight") == 0.01
    assert rates.pop("target.confu.confu_lora_down.default.weight") == 0.05
    assert set(rates.values()) == {0.1} and len(rates) == 4


def test_a_restored_optimizer_goes_on_as_it_would_have():
    def step(optimizer, named, seed):
        torch.manual_seed(seed)
        for _, parameter in named:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()

    named = named_parameters()
    optimizer = MuonAdamW(named, lr=0.1)
    step(optimizer, named, 1)
    state, weights = copy.deepcopy(optimizer.state_dict()), [p.detach().clone() for _, p in named]
    step(optimizer, named, 2)
    again = [(name, nn.Parameter(weight)) for (name, _), weight in zip(named, weights, strict=True)]
    restored = MuonAdamW(again, lr=0.5)
    restored.load_state_dict(state)
    step(restored, again, 2)
    for (name, expected), (_, got) in zip(named, again, strict=True):
        assert torch.equal(got, expected), name
    restored.param_groups[0]["lr"] = 0.0  # as a schedule does
    assert restored.parts[0].param_groups[0]["lr"] == 0.0
