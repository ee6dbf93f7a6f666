"""The rows of a batch that are trained, and attention of rows to what they share and to what each has for itself.

What a row means, and which keys it has of its own, is told in unroll.py. Index work only: no model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from ..errors import refusal
from .data import IGNORED


@dataclass(frozen=True)
class DraftRows:
    """The rows of a batch that are trained. `R` = the most rows of any sequence."""

    starts: torch.Tensor  # (B, R) long, t of each row
    valid: torch.Tensor  # (K, B, R) bool: x_{t+2+k} belongs to the answer

    @classmethod
    def of(cls, labels: torch.Tensor, steps: int) -> DraftRows:
        """Rows whose `x_{t+1}` and `x_{t+2}` belong to the answer. `labels` `(B, N)`."""
        batch, length = labels.shape
        answer = F.pad(labels != IGNORED, (0, steps + 2))  # (B, N + steps + 2)
        is_row = answer[:, 1 : length + 1] & answer[:, 2 : length + 2]
        if not is_row.any():
            raise refusal(
                "labels",
                got=f"no answer of two tokens or more in {batch} sequences",
                expected="one at least",
                fix="Leave such sequences out (load_conversations does), or raise max_length if it cuts answers off.",
            )
        starts, exists = rows_in_front(is_row)
        starts = torch.where(exists, starts, starts[:, :1])  # padding rows stay in range and are never used
        valid = torch.stack([answer.gather(1, starts + 2 + k) & exists for k in range(steps)])
        return cls(starts, valid.cumprod(0).bool())


def predicted_positions(labels: torch.Tensor) -> torch.Tensor:
    """`(B, N)` bool: positions with which rows are compared: they and the next one belong to the answer.

    Example (answer `c d e` after `a b`): the row of b drafts d, which is compared at c; e is compared at d.
    """
    answer = labels != IGNORED
    return answer & F.pad(answer[:, 1:], (0, 1))


def rows_in_front(chosen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The `chosen` rows `(B, R)` bool of each sequence, in order: indices `(B, R')`, and `(B, R')` bool which are chosen.

    Sequences with fewer of them than others are filled up with rows that are not chosen; one row stays at least.
    """
    count = max(int(chosen.sum(-1).max()), 1)
    # A stable sort brings the chosen rows to the front, in order.
    index = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[:, :count]
    return index, chosen.gather(1, index)


def random_rows(exist: torch.Tensor, fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A random `fraction` of the rows, as [`rows_in_front`]; rows that do not `exist` `(B, R)` come last."""
    chance = torch.rand(exist.shape, device=exist.device).masked_fill(~exist, -1.0)
    index = chance.topk(math.ceil(exist.shape[1] * fraction), dim=-1).indices.sort(-1).values
    return index, exist.gather(1, index)


def gather_rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """`(B, N, d)` at `(B, R)` -> `(B, R, d)`."""
    return states.gather(1, index[..., None].expand(-1, -1, states.shape[-1]))


def select_rows(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `(B, R')` of keys or values `(B, kv_heads, R, head_dim)`, or of a mask `(B, R)`."""
    if states.ndim == 2:
        return states.gather(1, index)
    return states.gather(2, index[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3]))


def row_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    own: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Attention over keys that all rows share and keys that belong to one row each.

    Args:
        query: `(B, heads, R, head_dim)`.
        keys, values: `(B, kv_heads, N, head_dim)`, shared.
        mask: `(B, R, N)` bool, True = may attend.
        own: per extra step, keys and values `(B, kv_heads, R, head_dim)`, row `r` for query `r` alone, and `(B, R)`
            bool which rows have one.

    Returns:
        `(B, heads, R, head_dim)`.
    """
    batch, heads, rows, width = query.shape
    kv_heads, groups = keys.shape[1], heads // keys.shape[1]
    grouped = query.reshape(batch, kv_heads, groups * rows, width)
    scores = (grouped @ keys.transpose(-1, -2)).view(batch, kv_heads, groups, rows, -1)
    scores = scores.masked_fill(~mask[:, None, None], float("-inf"))
    by_group = query.view(batch, kv_heads, groups, rows, width)
    extra = [
        (by_group * key[:, :, None]).sum(-1, keepdim=True).masked_fill(~present[:, None, None, :, None], float("-inf"))
        for key, _, present in own
    ]
    scale = 1 / math.sqrt(width)
    scores = torch.cat([scores, *extra], dim=-1) * scale
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(values.dtype)
    shared = weights[..., : keys.shape[2]].reshape(batch, kv_heads, groups * rows, -1) @ values
    context = shared.view(batch, kv_heads, groups, rows, width)
    for index, (_, value, _) in enumerate(own):
        context = context + weights[..., keys.shape[2] + index, None] * value[:, :, None]
    return context.reshape(batch, heads, rows, width)
