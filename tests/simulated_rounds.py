"""Rounds without models: a draft and a target that are probabilities, and a clock that adds up what passes cost."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch

from confu_hf.acceleration.costs import CostModel
from confu_hf.decoding.cost_policy import CostPolicy
from confu_hf.decoding.experience import SWEEP_ROWS, Experience
from confu_hf.decoding.stats import RoundRecord
from confu_hf.options import TreeOptions
from confu_hf.tree.draft_tree import root_only
from confu_hf.tree.ends import likeliest_ends
from confu_hf.tree.growing import grow_tree

RIGHT, WRONG = 0, -7  # the draft's first guess is token 0; no guess is token -7


@dataclass
class Simulation:
    """One call of `generate`, simulated.

    Args:
        confidence: the draft's probability of its first guess; the other guesses share the rest.
        right: of the number of a token, the chance that the target writes the first guess there.
        verify, step: seconds of a pass by its rows, and of a draft step. noise: what each measurement scatters by.
        device_type: where tensors claim to be.
        future: what a fresh future adds to `right` in the next round.
    """

    confidence: float
    right: Callable[[int], float]
    options: TreeOptions = field(default_factory=lambda: TreeOptions(total_tokens=12, depth=4, top_k=6))
    verify: Callable[[int], float] = lambda rows: 0.070 + 0.0025 * (rows - 1)
    step: float = 0.008
    noise: float = 0.1
    seed: int = 0
    device_type: str = "cpu"
    future: float = 0.0

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.experience = Experience()
        self.policy = CostPolicy(self.options, self.experience)
        self.policy.costs = CostModel()
        self.policy.costs.sweep(self.verify, SWEEP_ROWS, budget=10.0, draft_share=0.1)
        self.records: list[RoundRecord] = []
        self.written, self.seconds, self.plain_seconds = 0, 0.0, 0.0
        self.starts: list[int] = []  # tokens written before each round
        self.fresh = False

    def run(self, tokens: int) -> Simulation:
        end = self.written + tokens
        while self.written < end:
            self._round(end)
        return self

    @property
    def speed(self) -> float:
        """Times as fast as plain rounds under the same noise."""
        return self.plain_seconds / self.seconds

    def _round(self, end: int) -> None:
        device = SimpleNamespace(type=self.device_type)
        state = SimpleNamespace(
            input_ids=SimpleNamespace(device=device),
            lengths=(100 + self.written,),
            finished=(False,),
            max_length=100 + end,
        )
        plan = self.policy.plan(state, self.records)
        steps, tree = 0, root_only(torch.tensor([RIGHT]))

        def draft(tokens, parents, top_k):
            nonlocal steps
            steps += 1
            chances = torch.tensor([self.confidence] + [(1 - self.confidence) / (2 * top_k)] * (top_k - 1))
            shape = (1, tokens.shape[1], top_k)
            return torch.arange(top_k).expand(shape), chances.log().expand(shape)

        if plan.total_tokens:
            tree = grow_tree(
                draft,
                torch.tensor([RIGHT]),
                total_tokens=plan.total_tokens,
                depth=plan.depth,
                top_k=plan.top_k,
                another_step=plan.another_step,
            )
        chosen = self.policy.prune(state, tree, steps)
        path = self._walk(chosen.tree)
        contemplated = likeliest_ends(chosen.tree, chosen.contemplate_tokens)[0].tolist()
        self.fresh = path[-1] in contemplated
        rows = chosen.tree.tokens.shape[1] + chosen.contemplate_tokens
        scatter = 1 + self.noise * abs(self.random.gauss(0, 1))
        seconds = {"draft": steps * self.step * scatter, "verify": self.verify(rows) * scatter}
        self.starts.append(self.written)
        self.records.append(
            RoundRecord(
                accepted=(len(path),),
                nodes=chosen.tree.tokens.shape[1],
                contemplate_tokens=chosen.contemplate_tokens,
                seconds=seconds,
                path=(path,),
                ended=(False,),
                fresh=(self.fresh,),
                forecasts=chosen.forecasts,
            )
        )
        self.seconds += sum(seconds.values())
        self.plain_seconds += len(path) * self.verify(1) * scatter
        self.written += len(path)

    def _walk(self, tree) -> tuple[int, ...]:
        tokens, parents = tree.tokens[0].tolist(), tree.parents[0].tolist()
        children = {(parent, token): node for node, (parent, token) in enumerate(zip(parents, tokens, strict=True))}
        path: list[int] = [0]
        while True:
            chance = self.right(self.written + len(path) - 1) + self.future * self.fresh
            token = RIGHT if self.random.random() < chance else WRONG
            if (path[-1], token) not in children:
                return tuple(path)
            path.append(children[path[-1], token])
