"""What an assistant decides rounds by: the policy of a call, and what is learned from call to call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..acceleration.costs import CostModel
from ..decoding.cost_policy import CostPolicy
from ..decoding.experience import Experience
from ..decoding.memory import AnswerMemory
from ..decoding.policy import FixedPolicy, Policy
from ..options import TreeOptions


class DecidesRounds:
    """An assistant's part that decides what a round may spend."""

    contemplate_length = 1  # rows of a pass that a node's contemplate tokens take

    @property
    def experience(self) -> Experience:
        """What earlier calls of this assistant have shown."""
        return self.__dict__.setdefault("_experience", Experience())

    @property
    def costs(self) -> CostModel | None:
        """Costs that `policy="auto"` goes by: a [`CostModel`], or a dictionary of its `to_dict()`. None = it measures."""
        return self.experience.given

    @costs.setter
    def costs(self, costs: CostModel | Mapping[str, Any] | None) -> None:
        self.experience.give(costs)

    def answer_memory(self, options: TreeOptions) -> AnswerMemory | None:
        """What this assistant wrote before, as far as the options of a call let it be remembered."""
        memory = self.experience.answers.keep(options.lookup_memory)
        return memory if options.lookup_memory else None

    def new_policy(self, options: TreeOptions) -> Policy:
        """Who decides what a round may spend in one call of `generate`. Override it to decide otherwise.

        Args:
            options: the tree options of this call, those of `generation_config` and of `generate` put together.
        """
        if options.policy == "fixed":
            return FixedPolicy(options)
        return CostPolicy(options, self.experience, self.contemplate_length)
