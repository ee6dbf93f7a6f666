"""The small learned piece that ConFu adds to EAGLE-3 on both sides, the target's and the draft's: expert mixtures.

Nothing of Hugging Face's models in here: plain tensors in, plain tensors out. Where the weights live is up to others:
`adapter/` keeps those of the contemplate token as a PEFT adapter on the target, `modeling_confu.py` keeps those of the
future token in the draft.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def expert_gates(states: torch.Tensor, router_weight: torch.Tensor) -> torch.Tensor:
    """`softmax(W_r z)`, `(..., n_expert)` float32, for `states` `(..., d_in)` and a router `(n_expert, d_in)`."""
    states = states.to(router_weight.dtype)
    return F.linear(F.rms_norm(states, states.shape[-1:]), router_weight).float().softmax(dim=-1)


def mix_experts(
    states: torch.Tensor, router_weight: torch.Tensor, expert_weight: torch.Tensor, top_k: int
) -> torch.Tensor:
    """The mixture of ConFu: sum over the top-K experts of `softmax(W_r z)_e * E_e`, `z` = `states` scaled to RMS 1.

    The experts are learned embeddings, not networks: the router picks which "instruction" the contemplate token (or the
    future token) carries here. Hidden states of language models have a few coordinates hundreds of times larger than the
    rest; without the scaling they would saturate the router.

    Args:
        states: `(..., d_in)`.
        router_weight: `(n_expert, d_in)`.
        expert_weight: `(n_expert, d_out)`.
        top_k: how many experts are kept; their gates are not renormalised.

    Returns:
        `(..., d_out)` in the dtype of `expert_weight`.
    """
    gates = expert_gates(states, router_weight)
    kept, chosen = gates.topk(top_k, dim=-1)
    sparse_gates = torch.zeros_like(gates).scatter(-1, chosen, kept)
    return sparse_gates.to(expert_weight.dtype) @ expert_weight


class ExpertMixture(nn.Module):
    """[`mix_experts`] with its weights: `router` `(n_expert, d_in)` and `experts` `(n_expert, d_out)`."""

    def __init__(self, input_size: int, output_size: int, num_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        self.router = nn.Linear(input_size, num_experts, bias=False)
        self.experts = nn.Parameter(torch.empty(num_experts, output_size))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """`(..., input_size)` -> `(..., output_size)`."""
        return mix_experts(states, self.router.weight, self.experts, self.top_k)
