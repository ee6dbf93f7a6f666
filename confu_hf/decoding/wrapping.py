"""A drafter around another one: told what that one is told. What it drafts is left to its subclasses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import Cache

from .drafting import Drafter
from .state import DecodingState, Rows


class WrappingDrafter(Drafter):
    """Hands on all that the loop tells it.

    Args:
        drafter: the one around which it is.
    """

    def __init__(self, drafter: Drafter):
        self.drafter = drafter
        self.network = drafter.network

    def recall(self, cache: Cache | None, input_ids: Tensor) -> None:
        """Handed on."""
        self.drafter.recall(cache, input_ids)

    def remember(self, cache: Cache, input_ids: Tensor) -> None:
        """Handed on."""
        self.drafter.remember(cache, input_ids)

    def read(self, embeds: Tensor, features: Tensor, position_ids: Tensor, is_whole: bool) -> None:
        """Handed on."""
        self.drafter.read(embeds, features, position_ids, is_whole)

    def observe(self, state: DecodingState, rows: Rows) -> None:
        """Handed on."""
        self.drafter.observe(state, rows)

    def select(self, rows: Sequence[int]) -> None:
        """Handed on."""
        self.drafter.select(rows)
