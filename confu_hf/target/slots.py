"""Where the rows of a pass lie in a `TreeCache`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Slots:
    """Where a pass of `W` rows writes.

    Attributes:
        index: `(B, W)` long, the slot of every row.
        start: the first slot, where all batch rows write to `start .. start + W - 1`; None = they differ.
        visible: the pass sees the slots `0 .. visible - 1`.
        soft_prompts: it sees the soft prompts as well, in front.
    """

    index: Tensor
    start: int | None
    visible: int
    soft_prompts: bool = True
