"""Where host and device meet in decoding. A host that reads from a GPU waits for all that it has asked of it, and a copy to
the GPU waits likewise unless it is told not to: so both happen here, several numbers at once.

In a greedy round of one sequence the host waits once, for the target's word (decoding/acceptance.py), and once more where
it has a say in the tree: with `policy="auto"`, or where what was looked up joins a network's tree. A fixed tree with a
`confidence_threshold` asks in every layer (tree/growing.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def waits(device: torch.device) -> bool:
    """Whether reading from `device` makes the host wait; from its own memory it does not."""
    return device.type != "cpu"


def read(*columns: Tensor) -> list[Tensor]:
    """`(B, n)` tensors of numbers on one device, `n` may differ -> the same on the host, in one copy."""
    if not waits(columns[0].device):
        return list(columns)
    exact = torch.float64 if any(column.is_floating_point() for column in columns) else torch.long
    numbers = torch.cat([column.to(exact) for column in columns], dim=1).cpu()
    parts = numbers.split([column.shape[1] for column in columns], dim=1)
    return [part.to(column.dtype) for part, column in zip(parts, columns, strict=True)]


def hold(values: Sequence, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor that stays there."""
    return torch.tensor(values, dtype=dtype)


def send(values: Sequence, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of the host as a tensor on `device`; nobody waits."""
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
