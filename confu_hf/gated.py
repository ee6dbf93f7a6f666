"""What a gated LoRA adds to one linear layer. Its weights are the adapter's (adapter/low_rank.py); it is a hook, and where
several layers are computed in one call, that call understands it (acceleration/fused.py).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class GatedPass:
    """The pass that is under way: the last `rows` rows (None = all) of each batch row are contemplate tokens, in passes of
    `thread` (None = no pass is)."""

    rows: int | None = None
    thread: int | None = None

    def is_meant(self) -> bool:
        """Whether the pass that runs is that one: passes of other threads have rows of their own."""
        return threading.get_ident() == self.thread

    def first_row(self, length: int) -> int:
        """Of the `length` rows of each batch row, the first one that is a contemplate token."""
        return 0 if self.rows is None else length - self.rows


class GatedProduct:
    """What one projection's contemplate tokens get: a forward hook that adds it to the module's output.

    Attributes:
        down: `(r, in)`. up: `(out, r)`. scale: alpha / r. call: which rows, of which thread's passes.
    """

    def __init__(self, call: GatedPass, down: Tensor, up: Tensor, scale: float):
        self.call, self.down, self.up, self.scale = call, down, up, scale
        self.part: object = None  # what compiled products make of it
        self._down_t, self._up_t = down.t(), up.t()

    def __call__(self, module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> Tensor:
        """The output with the product added, in place where no gradient is wanted."""
        if not self.call.is_meant():
            return output
        states, down, scale = arguments[0], self.down, self.scale  # (B, Q, in)
        first = self.call.first_row(states.shape[1])
        part = states[:, first:]
        alike = down.device == part.device and down.dtype == part.dtype == output.dtype
        if alike and len(part) == 1 and not torch.is_grad_enabled():
            # Few calls: on a GPU each of them takes longer than what it computes.
            output[0, first:].addmm_(part[0].mm(self._down_t), self._up_t, alpha=scale)
            return output
        lowered = part.matmul(self._down_t.to(part)).to(output.dtype)
        up = self._up_t.to(output)
        if torch.is_grad_enabled():
            changed = torch.addmm(output[:, first:].flatten(0, 1), lowered.flatten(0, 1), up, alpha=scale)
            changed = changed.view(len(part), -1, output.shape[2])
            return changed if first == 0 else torch.cat([output[:, :first], changed], 1)
        # In place: there are hundreds of them in every round.
        output[:, first:].baddbmm_(lowered, up.expand(len(part), -1, -1), alpha=scale)
        return output
