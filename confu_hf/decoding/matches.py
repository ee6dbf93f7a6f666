"""What the text so far says of the next token: where its last tokens occurred before, and how far that can be trusted.

Plain lists of token ids on the host, for one batch row. Chains and trees are made of it in lookup.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# The n-grams that are looked up. The last tokens of a text match an earlier place by one of these lengths.
LENGTHS = (1, 2, 3, 4, 5, 8, 12)
MAX_CONTINUATIONS = 4

# How often a match named the next token, by length and by rank, in 400 greedy answers to training prompts (EXPERIMENTS.md,
# "Prompt lookup in the tree"); and how many tokens that is worth against what an answer shows itself.
PRIOR_RATES = (
    (0.24, 0.08, 0.04),
    (0.55, 0.11, 0.05),
    (0.63, 0.11, 0.07),
    (0.70, 0.11, 0.06),
    (0.77, 0.12, 0.06),
    (0.85, 0.12, 0.05),
    (0.96, 0.24, 0.05),
)
PRIOR_STRENGTH = 16.0


@dataclass(frozen=True)
class Match:
    """An earlier place where the text read as it does at its end now.

    Attributes:
        position: of the token that followed there, and may follow here.
        length: the longest of [`LENGTHS`] by which the two places agree.
        rank: how many matches come before this one: longer first, then the more recent.
    """

    position: int
    length: int
    rank: int


class NgramIndex:
    """All n-grams of a growing text, each with the last few places where it was followed by different tokens.

    Appending a token and looking up the text's end cost the same, however long the text is.

    Example, after `a b c a b d a b`: the last two tokens were followed by `d` (position 5) and by `c` (position 2), so
    the matches are `Match(5, 2, 0)` and `Match(2, 2, 1)`.
    """

    def __init__(self, tokens: Iterable[int] = ()):
        self.tokens: list[int] = []
        self._places: dict[int, dict[tuple[int, ...], list[int]]] = {length: {} for length in LENGTHS}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """The text goes on with `token`."""
        end = len(self.tokens)
        for length in LENGTHS:
            if length > end:
                break
            places = self._places[length].setdefault(tuple(self.tokens[end - length :]), [])
            places[:] = [end, *(place for place in places if self.tokens[place] != token)][:MAX_CONTINUATIONS]
        self.tokens.append(token)

    def matches(self) -> list[Match]:
        """At most [`MAX_CONTINUATIONS`] places that the end of the text matches, each followed by another token."""
        found: dict[int, Match] = {}
        end = len(self.tokens)
        for length in reversed(LENGTHS):
            if length > end:
                continue
            for place in self._places[length].get(tuple(self.tokens[end - length :]), ()):
                found.setdefault(self.tokens[place], Match(place, length, len(found)))
            if len(found) >= MAX_CONTINUATIONS:
                break
        return list(found.values())[:MAX_CONTINUATIONS]

    def copy(self, position: int, count: int) -> list[int]:
        """`count` tokens from `position` on; where the text ends, the copy goes on with itself.

        Example: the text `a b a b` copied from position 2, five tokens: `a b` and then `a b a`.
        """
        copied: list[int] = []
        for place in range(position, position + count):
            copied.append(self.tokens[place] if place < len(self.tokens) else copied[place - len(self.tokens)])
        return copied


class Rates:
    """How often candidates of a kind are the next token: for every cell of a table a Beta estimate, the posterior mean under
    a prior of [`PRIOR_STRENGTH`] tokens.

    Every decided token says of every candidate that was there before it whether it was right, drafted or not: lossless
    decoding makes the text independent of what was drafted, so nothing biases the counts.

    Args:
        prior: rates, by row and column.
    """

    def __init__(self, prior: Sequence[Sequence[float]]):
        self._right = [[rate * PRIOR_STRENGTH for rate in rates] for rates in prior]
        self._seen = [[PRIOR_STRENGTH for _ in rates] for rates in prior]

    def mean(self, row: int, column: int) -> float:
        """The estimate."""
        return self._right[row][column] / self._seen[row][column]

    def count(self, row: int, column: int, right: bool) -> None:
        """One more decided token."""
        self._right[row][column] += right
        self._seen[row][column] += 1


class MatchRates(Rates):
    """How often a match names the next token, by length and rank, learned from the text itself; at first [`PRIOR_RATES`]."""

    def __init__(self):
        super().__init__(PRIOR_RATES)

    def probability(self, length: int, rank: int) -> float:
        """Chance that a match of `length` (any number; the longest of [`LENGTHS`] not above it counts) is right."""
        return self.mean(*self._cell(length, rank))

    def learn(self, match: Match, right: bool) -> None:
        """One more decided token, which `match` named or not."""
        self.count(*self._cell(match.length, match.rank), right)

    @staticmethod
    def _cell(length: int, rank: int) -> tuple[int, int]:
        row = sum(known <= length for known in LENGTHS) - 1
        return row, min(rank, len(PRIOR_RATES[row]) - 1)
