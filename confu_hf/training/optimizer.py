"""Muon for the draft's matrices, AdamW for everything else, as one optimizer that a `Trainer` can hold.

Muon orthogonalises the momentum of a weight matrix, and learns more from each token than AdamW does; embeddings,
heads, norms, soft prompts and experts are no
such matrices and keep AdamW. Both are torch's own; this file only deals out the parameters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

ADAPTER_MARK = "confu_"  # in the names of the adapter's weights
NOT_MUON = ("lm_head", "mixture", ADAPTER_MARK)


class MuonAdamW(torch.optim.Optimizer):
    """One optimizer out of `torch.optim.Muon` and `torch.optim.AdamW`.

    Args:
        named_parameters: those that require a gradient.
        lr: learning rate of both; Muon's steps are scaled to the size of AdamW's.
        adapter_lr: learning rate of soft prompts and experts; None = `lr`.
        betas, eps, weight_decay: of AdamW; weight decay is Muon's as well.

    Raises:
        ImportError: this torch has no Muon (it came with 2.9).
    """

    def __init__(
        self,
        named_parameters: list[tuple[str, nn.Parameter]],
        lr: float,
        adapter_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        if not hasattr(torch.optim, "Muon"):
            raise ImportError(
                f"torch {torch.__version__} has no Muon, expected torch>=2.9. "
                "Upgrade torch, or train without it (--muon false)."
            )
        matrices, adapter, others = [], [], []
        for name, parameter in named_parameters:
            if ADAPTER_MARK in name:
                adapter.append(parameter)
            elif parameter.ndim == 2 and not any(mark in name for mark in NOT_MUON):
                matrices.append(parameter)
            else:
                others.append(parameter)
        groups = [{"params": others, "lr": lr}, {"params": adapter, "lr": lr if adapter_lr is None else adapter_lr}]
        self.parts = [
            torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(
                [group for group in groups if group["params"]], betas=betas, eps=eps, weight_decay=weight_decay
            ),
        ]
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
