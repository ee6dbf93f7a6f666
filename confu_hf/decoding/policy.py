"""What a round may spend: the policy decides, the loop obeys.

Here are the decisions as data, what a policy is asked, and the one that decides the same every time. The one that weighs
costs against what is accepted is cost_policy.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ..options import TreeOptions
from ..tree.draft_tree import DraftTree
from ..tree.growing import AnotherStep
from .state import DecodingState
from .stats import Forecast, RoundRecord
from .sweep import Bench


@dataclass(frozen=True)
class RoundPlan:
    """What one round does.

    Attributes:
        total_tokens: nodes to draft; 0 = a plain decoding step.
        depth: the most tokens drafted in a row by a network; 0 = none, what is looked up may be drafted all the same. top_k: nodes expanded per layer, and children considered for each.
        confidence_threshold: drafted nodes of a smaller joint probability are not verified.
        another_step: asked between two draft steps whether to go on; None = always.
    """

    total_tokens: int
    depth: int
    top_k: int
    confidence_threshold: float = 0.0
    another_step: AnotherStep | None = None


@dataclass(frozen=True)
class Chosen:
    """What of a drafted tree goes through the target.

    Attributes:
        tree: the nodes to verify.
        contemplate_tokens: how many of them carry a contemplate token, None = all; of no meaning in EAGLE-3 mode.
        forecasts: what is expected of the tree, by batch row; empty if nothing was calculated.
    """

    tree: DraftTree
    contemplate_tokens: int | None
    forecasts: tuple[Forecast, ...] = ()


class Policy(Protocol):
    """Decides each round from where the generation stands and from what earlier rounds were like, nothing else."""

    def prepare(self, bench: Bench) -> None:
        """Before the first round: `bench` names the models and can time passes of them."""

    def plan(self, state: DecodingState, history: Sequence[RoundRecord]) -> RoundPlan:
        """The next round, before anything is drafted."""

    def prune(self, state: DecodingState, tree: DraftTree, steps: int) -> Chosen:
        """What of the tree that was drafted, with so many draft steps, is verified."""

    def finish(self) -> None:
        """After the last round."""


def depth_left(state: DecodingState, depth: int) -> int:
    """`depth`, or less where fewer tokens are wanted. Of n decided tokens and a limit of n + 2, the bonus token takes
    one place: draft one."""
    if state.max_length is None:
        return depth
    running = [n for n, done in zip(state.lengths, state.finished, strict=True) if not done]
    return max(0, min(depth, state.max_length - min(running, default=0) - 1))


@dataclass(frozen=True)
class FixedPolicy:
    """The same tree in every round, as the options say."""

    options: TreeOptions

    def prepare(self, bench: Bench) -> None:
        """Nothing to prepare."""

    def plan(self, state: DecodingState, history: Sequence[RoundRecord]) -> RoundPlan:
        """Never deeper than tokens are wanted."""
        options, depth = self.options, depth_left(state, self.options.depth)
        return RoundPlan(
            total_tokens=options.total_tokens if depth else 0,
            depth=depth,
            top_k=options.top_k,
            confidence_threshold=options.confidence_threshold,
        )

    def prune(self, state: DecodingState, tree: DraftTree, steps: int) -> Chosen:
        """All of it. Where nothing is drafted no one reads a future."""
        return Chosen(tree, self.options.contemplate_tokens if self.options.total_tokens else 0)

    def finish(self) -> None:
        """Nothing to keep."""
