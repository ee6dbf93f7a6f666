"""Prompt lookup: drafts what followed where the text read alike before, alone or as branches of a network's tree.

Matches in the text and their probabilities are matches.py's, what earlier answers say memory.py's, joining trees and
chains tree/grafting.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from ..tree.draft_tree import DraftTree, root_only
from ..tree.grafting import Chain, graft
from .drafting import Drafter
from .matches import Match, MatchRates, NgramIndex
from .memory import AnswerMemory
from .policy import RoundPlan
from .state import DecodingState, Rows
from .wrapping import WrappingDrafter

# The network need not draft where the lookup is at least this sure of as many tokens as the network would draft.
CERTAIN = 0.5


class LookupText:
    """One batch row: its text, how far its matches could be trusted so far, and what earlier answers say.

    Args:
        prompt: token ids that nothing is learned from.
        memory: of the earlier answers, to which this one is added; None = there is none.
    """

    def __init__(self, prompt: list[int], memory: AnswerMemory | None = None):
        self.index, self.rates, self.memory = NgramIndex(prompt), MatchRates(), memory
        self.answer = None if memory is None else memory.begin(prompt)

    def append(self, tokens: Sequence[int]) -> None:
        """The target decided on `tokens`."""
        for token in tokens:
            for match in self.index.matches():
                self.rates.learn(match, self.index.tokens[match.position] == token)
            self.index.append(token)
            if self.memory is not None:
                self.memory.append(self.answer, token)

    def chains(self, length: int, count: int) -> list[Chain]:
        """What followed at each match, up to `length` tokens; and of what followed in earlier answers the likeliest
        `count` tokens, as deep."""
        if length <= 0:
            return []
        remembered = [] if self.memory is None else self.memory.chains(self.answer, length, count)
        return [self._chain(match, length) for match in self.index.matches()] + remembered

    def _chain(self, match: Match, length: int) -> Chain:
        # Once a token was right the match is one longer, and no other is longer: rank 0.
        # A match of 3 and rank 1 whose first two tokens were right: 5 tokens match by then.
        rates = [self.rates.probability(match.length, match.rank)]
        rates += [self.rates.probability(match.length + more, 0) for more in range(1, length)]
        log_probs, joint = [], 0.0
        for rate in rates:
            joint += math.log(rate)
            log_probs.append(joint)
        return Chain(tuple(self.index.copy(match.position, length)), tuple(log_probs))


class LookupDrafter(Drafter):
    """Drafts from the text, and from earlier answers: no network, no weights.

    Args:
        memory: of the earlier answers; None = from the text alone.
    """

    def __init__(self, memory: AnswerMemory | None = None):
        self.texts: list[LookupText] = []
        self.memory = memory

    def observe(self, state: DecodingState, rows: Rows) -> None:
        """Read what is new: after prefill the prompt, and after every round the tokens it decided."""
        if not self.texts:
            prefilled = zip(state.input_ids, state.lengths, strict=True)  # the prompt and the first token of an answer
            self.texts = [LookupText(ids[: length - 1].tolist(), self.memory) for ids, length in prefilled]
        emitted = state.emitted or [
            ids[len(text.index.tokens) : length].tolist()
            for text, ids, length in zip(self.texts, state.input_ids, state.lengths, strict=True)
        ]
        for text, tokens in zip(self.texts, emitted, strict=True):
            text.append(tokens)

    def select(self, rows: Sequence[int]) -> None:
        """The texts of these rows."""
        self.texts = [self.texts[row] for row in rows]

    def chains(self, state: DecodingState, length: int, count: int) -> list[list[Chain]]:
        """For every batch row what may follow its root, as in [`LookupText`]; nothing for rows that have ended."""
        pairs = zip(self.texts, state.finished, strict=True)
        return [[] if finished else text.chains(length, count) for text, finished in pairs]

    def grow(self, state: DecodingState, plan: RoundPlan) -> DraftTree:
        """The likeliest nodes of all matches' continuations."""
        chains = self.chains(state, min(plan.depth, plan.total_tokens), plan.total_tokens)
        return _grafted(root_only(state.known_roots), chains, plan)


class CombinedDrafter(WrappingDrafter):
    """The tree of a drafter with what is looked up as further branches: one verify pass serves both.

    Where the lookup gives a chain of as many tokens as the drafter would draft a probability of [`CERTAIN`] or more, the
    drafter is not asked. The rows that it was told of wait, so it goes on later as if it had been.

    Args:
        drafter: as a rule a network. It alone decides by `plan.depth`; chains are as long as the tree has nodes.
        memory: as in [`LookupDrafter`].
    """

    def __init__(self, drafter: Drafter, memory: AnswerMemory | None = None):
        super().__init__(drafter)
        self.lookup = LookupDrafter(memory)

    def observe(self, state: DecodingState, rows: Rows) -> None:
        """Both read what is new."""
        super().observe(state, rows)
        self.lookup.observe(state, rows)

    def select(self, rows: Sequence[int]) -> None:
        """Both go on with these rows."""
        super().select(rows)
        self.lookup.select(rows)

    def step(self, tokens: Tensor, parents: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
        """The other drafter's."""
        return self.drafter.step(tokens, parents, top_k)

    def grow(self, state: DecodingState, plan: RoundPlan) -> DraftTree:
        """The likeliest nodes of both."""
        chains = self.lookup.chains(state, min(plan.total_tokens, _room(state)), plan.total_tokens)
        certain = _certain(chains, state, plan)
        tree = root_only(state.known_roots) if certain else self.drafter.grow(state, plan)
        self.steps = 0 if certain else self.drafter.steps
        return _grafted(tree, chains, plan)


def _grafted(tree: DraftTree, chains: list[list[Chain]], plan: RoundPlan) -> DraftTree:
    return graft(tree, chains, total_tokens=plan.total_tokens, confidence_threshold=plan.confidence_threshold)


def _room(state: DecodingState) -> float:
    """How many drafted tokens could still be wanted: of n decided tokens and a limit of n + 2, one."""
    if state.max_length is None:
        return math.inf
    running = [length for length, done in zip(state.lengths, state.finished, strict=True) if not done]
    return state.max_length - min(running, default=state.max_length) - 1


def _certain(chains: list[list[Chain]], state: DecodingState, plan: RoundPlan) -> bool:
    """Whether no running row needs more than its best chain."""
    for row, finished in zip(chains, state.finished, strict=True):
        if not finished:
            sure = (chain.log_probs[plan.depth - 1] for chain in row if len(chain.tokens) >= plan.depth > 0)
            if max(sure, default=-math.inf) < math.log(CERTAIN):
                return False
    return True
