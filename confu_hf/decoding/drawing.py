"""A drafter whose trees are drawn from what a network says; rejection.py chooses tokens at their nodes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import Cache

from ..tree.drawing import DrawnTree, draw_tree
from .drafting import Drafter, NetworkDrafter
from .policy import RoundPlan
from .state import DecodingState, Rows

# Of the draft beside the target: sharper guesses were accepted more often (EXPERIMENTS.md).
SHARPENED = 0.8


class DrawingDrafter(Drafter):
    """Draws trees from what a network says.

    Args:
        drafter: the network's. temperature: the target's.
    """

    def __init__(self, drafter: NetworkDrafter, temperature: float):
        self.drafter, self.temperature = drafter, SHARPENED * temperature
        self.network = drafter.network

    def recall(self, cache: Cache | None, input_ids: Tensor) -> None:
        """The network's."""
        self.drafter.recall(cache, input_ids)

    def remember(self, cache: Cache, input_ids: Tensor) -> None:
        """The network's."""
        self.drafter.remember(cache, input_ids)

    def read(self, embeds: Tensor, features: Tensor, position_ids: Tensor, is_whole: bool) -> None:
        """The network's."""
        self.drafter.read(embeds, features, position_ids, is_whole)

    def observe(self, state: DecodingState, rows: Rows) -> None:
        """The network's."""
        self.drafter.observe(state, rows)

    def select(self, rows: Sequence[int]) -> None:
        """The network's."""
        self.drafter.select(rows)

    def grow(self, state: DecodingState, plan: RoundPlan) -> DrawnTree:
        """A tree of the plan's size; a threshold has no meaning here."""
        self.steps = 0
        return draw_tree(
            self._counted_distribution,
            state.roots,
            self.drafter.token_ids,
            total_tokens=plan.total_tokens,
            depth=plan.depth,
            most_children=plan.top_k,
            temperature=self.temperature,
        )

    def _counted_distribution(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        self.steps += 1
        return self.drafter.distribution(tokens, parents)
