"""The mixture of experts is the paper's, whatever the scale of its input."""

from __future__ import annotations

import pytest
import torch

from confu_hf.experts import ExpertMixture, mix_experts


def mixture_by_hand(states, router, experts, top_k):
    rows = []
    for state in states.flatten(0, -2):
        gates = (router @ (state / state.square().mean().sqrt())).softmax(-1)
        kept = sorted(range(len(gates)), key=lambda e: -gates[e])[:top_k]
        rows.append(sum(gates[e] * experts[e] for e in kept))
    return torch.stack(rows).view(*states.shape[:-1], -1)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_mix_experts_worked_by_hand(top_k):
    torch.manual_seed(0)
    states, router, experts = torch.randn(2, 3, 6), torch.randn(5, 6), torch.randn(5, 4)
    expected = mixture_by_hand(states, router, experts, top_k)
    torch.testing.assert_close(mix_experts(states, router, experts, top_k), expected, rtol=1e-4, atol=1e-5)


def test_the_scale_of_the_states_does_not_matter_and_the_dtype_is_the_experts():
    torch.manual_seed(0)
    states, router, experts = torch.randn(3, 6), torch.randn(5, 6), torch.randn(5, 4)
    torch.testing.assert_close(
        mix_experts(500 * states, router, experts, 2), mix_experts(states, router, experts, 2), rtol=1e-4, atol=1e-5
    )
    assert mix_experts(states.bfloat16(), router, experts, 2).dtype == torch.float32


def test_gradients_reach_the_router_and_the_chosen_experts_alone():
    torch.manual_seed(0)
    mixture = ExpertMixture(6, 4, num_experts=5, top_k=2)
    torch.nn.init.normal_(mixture.experts)
    state = torch.randn(6)
    mixture(state).square().sum().backward()
    chosen = mixture.router(torch.nn.functional.rms_norm(state, (6,))).topk(2).indices
    assert mixture.experts.grad.any(-1).nonzero().flatten().tolist() == sorted(chosen.tolist())
    assert mixture.router.weight.grad.any()
