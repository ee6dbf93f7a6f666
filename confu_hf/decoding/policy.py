"""What a round may spend: the policy decides, the loop obeys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..options import TreeOptions
from .state import DecodingState
from .stats import RoundRecord


@dataclass(frozen=True)
class RoundPlan:
    """What one round does.

    Attributes:
        total_tokens: nodes to draft; 0 = a plain decoding step.
        depth: the most tokens drafted in a row. top_k: nodes expanded per layer, and children considered for each.
        confidence_threshold: drafted nodes of a smaller joint probability are not verified.
        contemplate_tokens: nodes that carry a contemplate token, None = all of them; of no meaning in EAGLE-3 mode.
    """

    total_tokens: int
    depth: int
    top_k: int
    confidence_threshold: float = 0.0
    contemplate_tokens: int | None = None


class Policy(Protocol):
    """Decides each round from where the generation stands and from what earlier rounds were like, nothing else."""

    def plan(self, state: DecodingState, history: Sequence[RoundRecord]) -> RoundPlan:
        """The next round."""


@dataclass(frozen=True)
class FixedPolicy:
    """The same tree in every round, as the options say."""

    options: TreeOptions

    def plan(self, state: DecodingState, history: Sequence[RoundRecord]) -> RoundPlan:
        """Never deeper than tokens are wanted."""
        options, depth = self.options, self.options.depth
        if state.max_length is not None:
            # Of n decided tokens and a limit of n + 2, the bonus token takes one place: draft one.
            running = [n for n, done in zip(state.lengths, state.finished, strict=True) if not done]
            depth = max(0, min(depth, state.max_length - min(running, default=0) - 1))
        return RoundPlan(
            total_tokens=options.total_tokens if depth else 0,
            depth=depth,
            top_k=options.top_k,
            confidence_threshold=options.confidence_threshold,
            contemplate_tokens=options.contemplate_tokens,
        )
