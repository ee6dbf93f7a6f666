"""Where a generation stands between two rounds, and what a round tells the drafter.

Positions: `v` is the newest position whose features are known, so the root of the next tree is `x_{v+1}`, decided but
not yet seen by the target.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import host
from .acceptance import Acceptance


@dataclass(frozen=True)
class Rows:
    """Rows that the draft has not read yet. Row `i` knows `x_{i+1}` and the features at position `i`.

    Attributes:
        tokens: `(B, R)` long, `x_{i+1}`. features: `(B, R, 3 d)`, `F_i`. position_ids: `(B, R)` long, ascending; -1 =
            no row there.
        future: `(B, 3 d)`, `f_v` of the newest row; None if there is none. future_known: `(B,)` bool, whether this
            batch row has one; None = all.
        is_whole: known to the host: no row is missing.
    """

    tokens: Tensor
    features: Tensor
    position_ids: Tensor
    future: Tensor | None = None
    future_known: Tensor | None = None
    is_whole: bool = False

    @classmethod
    def joined(cls, parts: Sequence[Rows]) -> Rows:
        """Rows of several rounds, older ones first, with the newest ones' future."""
        newest = parts[-1]
        if len(parts) == 1:
            return newest
        names = ("tokens", "features", "position_ids")
        states = {name: torch.cat([getattr(part, name) for part in parts], dim=1) for name in names}
        whole = all(part.is_whole for part in parts)
        return cls(**states, future=newest.future, future_known=newest.future_known, is_whole=whole)

    def select(self, rows: Sequence[int]) -> Rows:
        """Those of some batch rows."""
        index = torch.tensor(rows, device=self.tokens.device)
        tensors = {
            name: getattr(self, name) for name in ("tokens", "features", "position_ids", "future", "future_known")
        }
        tensors = {name: t if t is None else t[index.to(t.device)] for name, t in tensors.items()}
        return Rows(**tensors, is_whole=self.is_whole)

    def newest_last(self) -> Rows:
        """The same rows, moved to the right where there are gaps."""
        if self.is_whole:
            return self
        real = self.position_ids >= 0
        width = int(real.sum(1).max())
        order = real.long().argsort(dim=1, stable=True)[:, -width:]
        features = self.features.gather(1, order[..., None].expand(-1, -1, self.features.shape[-1]))
        tokens, position_ids = (states.gather(1, order) for states in (self.tokens, self.position_ids))
        return Rows(tokens, features, position_ids, self.future, self.future_known)


@dataclass(frozen=True)
class DecodingState:
    """Where a generation stands between two rounds.

    Attributes:
        input_ids: `(B, n)` long, everything decided; row `b` has `lengths[b]` tokens, the last of them its root, then
            -1.
        lengths: tokens of each row. finished: whether a row has ended.
        features: `(B, 3 d)`, `F_v`.
        position_offset: `(B, 1)` long, what position ids differ by from places among the slots: 0, but where plain
            decoding counts on from a masked token.
        max_length: the most tokens a row may have; None = no limit.
        emitted: what the newest round decided for each row, known to the host; empty if it is not.
    """

    input_ids: Tensor
    lengths: tuple[int, ...]
    finished: tuple[bool, ...]
    features: Tensor
    position_offset: Tensor
    max_length: int | None = None
    emitted: tuple[tuple[int, ...], ...] = ()

    @property
    def roots(self) -> Tensor:
        """`(B,)` long, the newest decided token of every row."""
        last = host.send(self.lengths, self.input_ids.device)[:, None] - 1
        return self.input_ids.gather(1, last)[:, 0]

    @property
    def known_roots(self) -> Tensor:
        """`roots`, on the host if it knows them."""
        if not self.emitted or not all(self.emitted):
            return self.roots
        return host.hold([tokens[-1] for tokens in self.emitted])

    def select(self, rows: Sequence[int]) -> DecodingState:
        """The state of some of the rows."""
        index = torch.tensor(rows, device=self.input_ids.device)
        lengths = tuple(self.lengths[row] for row in rows)
        return DecodingState(
            input_ids=self.input_ids[index, : max(lengths)],
            lengths=lengths,
            finished=tuple(self.finished[row] for row in rows),
            features=self.features[index.to(self.features.device)],
            position_offset=self.position_offset[index.to(self.position_offset.device)],
            max_length=self.max_length,
        )

    def advance(self, acceptance: Acceptance, features: Tensor) -> DecodingState:
        """The state after a round. `features` `(B, P, 3 d)`, of the accepted nodes."""
        newest = features[:, 0]
        if not all(count == 1 for count in acceptance.counts):
            counts = acceptance.counts_tensor.to(features.device)  # (B,)
            newest = features[torch.arange(len(counts), device=features.device), counts.clamp(min=1) - 1]
            newest = torch.where((counts > 0)[:, None], newest, self.features)
        return DecodingState(
            input_ids=append(self.input_ids, self.lengths, acceptance.tokens, acceptance.counts),
            lengths=tuple(map(sum, zip(self.lengths, acceptance.counts, strict=True))),
            finished=acceptance.finished,
            features=newest,
            position_offset=self.position_offset,
            max_length=self.max_length,
            emitted=acceptance.emitted,
        )


def append(ids: Tensor, lengths: Sequence[int], tokens: Tensor, counts: Sequence[int]) -> Tensor:
    """`tokens` `(B, P)` behind the first `lengths[b]` of `ids` `(B, n)`; `counts[b]` of them, -1 behind the end."""
    ends = [length + count for length, count in zip(lengths, counts, strict=True)]
    longer = torch.nn.functional.pad(ids, (0, max(ends) - ids.shape[1]), value=-1)
    for row, (length, end) in enumerate(zip(lengths, ends, strict=True)):
        longer[row, length:end] = tokens[row, : end - length]
    return longer
