"""A drafter whose trees are drawn from what a network says; rejection.py chooses tokens at their nodes."""

from __future__ import annotations

from torch import Tensor

from ..tree.drawing import DrawnTree, draw_tree
from .drafting import NetworkDrafter
from .policy import RoundPlan
from .state import DecodingState
from .wrapping import WrappingDrafter

# Of the draft beside the target: sharper guesses were accepted more often (EXPERIMENTS.md).
SHARPENED = 0.8


class DrawingDrafter(WrappingDrafter):
    """Draws trees from what a network says.

    Args:
        drafter: the network's. temperature: the target's.
    """

    def __init__(self, drafter: NetworkDrafter, temperature: float):
        super().__init__(drafter)
        self.temperature = SHARPENED * temperature

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
