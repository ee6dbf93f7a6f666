"""Whether training is well: routers that use all their experts, gradients that are numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import refusal
from ..experts import expert_gates


@torch.no_grad()
def router_use(states: Tensor, router_weight: Tensor, top_k: int, present: Tensor) -> Tensor:
    """How a mixture's router distributes rows, as sums that add up over batches.

    Args:
        states: `(B, R, d_in)`, what the router reads. present: `(B, R)` bool, rows that count.

    Returns:
        `(2 + n_expert,)` float: rows, their summed entropy (nats), and how often each expert is among the `top_k`.
    """
    gates = expert_gates(states[present], router_weight)  # (rows, n_expert)
    entropy = torch.special.entr(gates).sum()
    chosen = torch.zeros_like(gates).scatter(-1, gates.topk(top_k, dim=-1).indices, 1.0).sum(0)
    return torch.cat([gates.new_tensor([len(gates)]), entropy[None], chosen])


def router_metrics(name: str, use: Tensor) -> dict[str, float]:
    """What is logged of [`router_use`]: mean entropy, and each expert's share of all choices. A router that has
    collapsed has an entropy near 0 and one expert's share near 1 / top_k."""
    rows, entropy, chosen = use[0].item(), use[1].item(), use[2:]
    if not rows:
        return {}
    shares = (chosen / chosen.sum()).tolist()
    loads = {f"router_{name}_load_{expert}": round(share, 4) for expert, share in enumerate(shares)}
    return {f"router_{name}_entropy": round(entropy / rows, 4), **loads}


def check_gradients(parameters: Iterable[nn.Parameter], *, step: int, sequences: list[int], folder: str) -> None:
    """Raise a `FloatingPointError` if a gradient is NaN or infinite: before the step that would spoil all weights.

    Args:
        step: of the optimizer, the one to come. sequences: what this process's gradients are of. folder: with the
            checkpoints.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients or nn.utils.get_total_norm(gradients).isfinite():
        return
    raise refusal(
        f"Step {step}",
        got=f"gradients that are NaN or infinite, on the sequences {sequences} (their `index`)",
        expected="finite ones; the weights have not been changed by them",
        fix=f"Go on from the last checkpoint in {folder} with a smaller --learning_rate or without --bf16. If it comes "
        "back on the same sequences, look at them and leave them out.",
        error=FloatingPointError,
    )
