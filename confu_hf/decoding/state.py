"""`DecodingState`: where a generation stands between two rounds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .acceptance import Acceptance


@dataclass(frozen=True)
class DecodingState:
    """Where a generation stands between two rounds. `R` rows wait for the draft: those of the last accepted path, the
    start row last.

    Attributes:
        input_ids: `(B, n)` long, everything decided; the last token is the root.
        committed_position_ids: `(B, C)` long, position of each committed slot of the target's cache, -1 = padding.
        row_tokens: `(B, R)` long, `x_{i+1}` of the waiting rows; the last is the root.
        row_features: `(B, R, 3 d)`, `F_i` of the waiting rows.
        row_position_ids: `(B, R)` long.
        future: `(B, 3 d)`, `f_v`; None in the first round and in EAGLE-3 mode.
    """

    input_ids: Tensor
    committed_position_ids: Tensor
    row_tokens: Tensor
    row_features: Tensor
    row_position_ids: Tensor
    future: Tensor | None = None

    def advance(self, acceptance: Acceptance, features: Tensor, future: Tensor | None) -> DecodingState:
        """The state after a round whose accepted nodes have `features` `(B, P, 3 d)`.

        Example: root x_5, accepted path x_5 x_6, bonus x_7. Slots 5 and 6 are committed; row 4 (reads
            x_5), from which the round drafted, waits again, and rows 5 (reads x_6) and 6 (reads x_7); x_7 is the next root.
        """
        path_length = acceptance.path.shape[1]
        steps = torch.arange(1, path_length + 1, device=self.row_position_ids.device)
        positions = self.row_position_ids[:, -1:] + steps  # (B, P)
        return DecodingState(
            input_ids=torch.cat([self.input_ids, acceptance.tokens], dim=1),
            committed_position_ids=torch.cat([self.committed_position_ids, positions], dim=1),
            row_tokens=torch.cat([self.row_tokens[:, -1:], acceptance.tokens], dim=1),
            row_features=torch.cat([self.row_features[:, -1:], features], dim=1),
            row_position_ids=torch.cat([self.row_position_ids[:, -1:], positions], dim=1),
            future=future,
        )
