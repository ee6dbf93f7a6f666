"""Muon for the draft's matrices, AdamW for everything else, as one optimizer that a `Trainer` can hold.

Muon orthogonalises the momentum of a weight matrix, and learns more from each token than AdamW does; embeddings, heads,
norms, soft prompts and experts are no such matrices and keep AdamW.

`torch.optim.Muon` orthogonalises in bfloat16, which processors without products of bfloat16 do many times slower than
float32. Ours is the same rule in whichever of the two the processor multiplies fast.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..compat import multiplies_bfloat16

ADAPTER_MARK = "confu_"  # in the names of the adapter's weights
LORA_MARK = "confu_lora"
ROUTER_MARK = "confu_router"
NOT_MUON = ("lm_head", "embed_tokens", "mixture", ADAPTER_MARK)

# Keller Jordan's quintic iteration, as in torch.optim.Muon.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
EPSILON = 1e-7


def orthogonalised(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Newton-Schulz: `U S V^T` -> about `U V^T`, `(rows, columns)`, computed in `dtype`.

    `X <- a X + b (X X^T) X + c (X X^T)^2 X`, five times, from a matrix of Frobenius norm 1.
    """
    a, b, c = COEFFICIENTS
    states = matrix.to(dtype)
    tall = states.shape[0] > states.shape[1]
    states = states.T if tall else states
    states = states / states.norm().clamp(min=EPSILON)
    for _ in range(ITERATIONS):
        gram = states @ states.T
        states = torch.addmm(states, torch.addmm(gram, gram, gram, beta=b, alpha=c), states, beta=a)
    return states.T if tall else states


def product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, but for CPUs that have no instructions for its products."""
    return torch.float32 if device.type == "cpu" and not multiplies_bfloat16() else torch.bfloat16


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, Nesterov momentum, and a dtype that fits the processor.

    Args:
        params: matrices.
        dtype: of the orthogonalisation; None = [`product_dtype`] of each matrix's device.
    """

    def __init__(
        self,
        params: list[nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        state, gradient, momentum = self.state[parameter], parameter.grad, group["momentum"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = orthogonalised(gradient.lerp(buffer, momentum), self.dtype or product_dtype(parameter.device))
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        # So large that AdamW's learning rates fit: its steps have an RMS of about 0.2.
        parameter.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(parameter.shape)))


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer out of [`Muon`] and `torch.optim.AdamW`.

    Args:
        named_parameters: those that require a gradient.
        lr: learning rate of both; Muon's steps are scaled to the size of AdamW's.
        adapter_lr: learning rate of soft prompts and experts; None = `lr`.
        lora_lr: learning rate of the gated LoRA; None = `lr`.
        router_lr: learning rate of the adapter's router; None = `adapter_lr`. It reads thousands of coordinates at once: a
            rate that suits soft prompts moves its gates by several logits a step, until one expert has them all.
        betas, eps, weight_decay: of AdamW; weight decay is Muon's as well.
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        lr: float,
        adapter_lr: float | None = None,
        lora_lr: float | None = None,
        router_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        matrices, adapter, lora, router, others = [], [], [], [], []
        for name, parameter in named_parameters:
            if LORA_MARK in name:
                lora.append(parameter)
            elif ROUTER_MARK in name:
                router.append(parameter)
            elif ADAPTER_MARK in name:
                adapter.append(parameter)
            elif parameter.ndim == 2 and not any(mark in name for mark in NOT_MUON):
                matrices.append(parameter)
            else:
                others.append(parameter)
        router_lr = adapter_lr if router_lr is None else router_lr
        rates = ((others, None), (adapter, adapter_lr), (lora, lora_lr), (router, router_lr))
        groups = [{"params": part, "lr": lr if rate is None else rate} for part, rate in rates]
        self.parts = [Muon(matrices, lr=lr, weight_decay=weight_decay)] if matrices else []
        self.parts.append(
            torch.optim.AdamW(
                [group for group in groups if group["params"]], betas=betas, eps=eps, weight_decay=weight_decay
            )
        )
        super().__init__(self._groups(), {})
        self.param_groups = self._groups()

    def _groups(self) -> list[dict[str, Any]]:
        """The parts' own groups, shared: a schedule that sets `lr` here sets it there."""
        return [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()
