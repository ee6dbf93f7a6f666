"""What an assistant wrote before: the n-grams of its answers, each with what followed and how often.

Other texts of one model say much of the next token: its phrases come again (SuffixDecoding, arXiv 2411.04975, keeps a tree
of them). Plain lists of token ids on the host, shared by all rows and calls. The text itself is matches.py's.
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..tree.grafting import Chain
from .matches import Rates

# The n-grams that are remembered. Longer ones add nothing (EXPERIMENTS.md, "What was written before").
LENGTHS = (1, 2, 3)
# Tokens that are remembered to follow an n-gram, and those of them that are proposed.
MAX_FOLLOWERS, MAX_CONTINUATIONS = 16, 4
# A follower's share of what followed is told apart at these values.
SHARE_EDGES = (0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9)
# How often a continuation was the next token, by length and share, in 300 greedy answers to training prompts
# (EXPERIMENTS.md, see above): the prior.
PRIOR_RATES = (
    (0.015, 0.03, 0.045, 0.09, 0.23, 0.16, 0.22, 0.27),
    (0.02, 0.025, 0.055, 0.095, 0.22, 0.29, 0.6, 0.6),
    (0.02, 0.05, 0.06, 0.13, 0.25, 0.35, 0.67, 0.88),
)
# Paths of a smaller joint probability are not followed.
LEAST_PROBABILITY = 0.02

Followers = tuple[tuple[int, int], ...]  # tokens and how often each followed, the most frequent first


@dataclass(frozen=True)
class Continuation:
    """A token that may come next.

    Attributes:
        token: id.
        length: of the longest n-gram at the text's end that it followed before.
        share: of all that followed there, counting one that is not known yet: of `a b`, `a c`, `a b`, after `a` the
            token `b` has 2/4.
    """

    token: int
    length: int
    share: float


class AnswerMemory:
    """The newest answers of an assistant, up to about `limit` tokens of them.

    Looking up the end of a text costs the same, however much is remembered. Where more than `limit` tokens are there, an
    answer that begins has the older half forgotten. Entries are replaced, never changed: threads may read while one
    writes. Copies and pickles remember nothing.

    Args:
        limit: tokens.
    """

    def __init__(self, limit: int = 0):
        self.limit = limit
        self._answers: deque[tuple[int, list[int]]] = (
            deque()
        )  # how many tokens of each are its prompt's, and all of it
        self._followers: dict[tuple[int, ...], Followers] = {}
        self._rates = Rates(PRIOR_RATES)

    def __reduce__(self) -> tuple[type[AnswerMemory], tuple[int]]:
        return AnswerMemory, (self.limit,)

    def __len__(self) -> int:
        """Tokens that are remembered."""
        return sum(len(answer) for _, answer in list(self._answers))

    def keep(self, limit: int) -> AnswerMemory:
        """Remember so many tokens from now on; 0 forgets all. Returns the memory itself."""
        self.limit = limit
        if limit == 0:
            self._answers, self._followers = deque(), {}
        return self

    def begin(self, prompt: Sequence[int]) -> list[int]:
        """A new answer, to be handed to [`append`]; it begins with the prompt's last tokens, which tell how answers
        begin."""
        if len(self) > self.limit:
            answers = list(self._answers)
            while answers and sum(len(answer) for _, answer in answers) > self.limit // 2:
                answers.pop(0)
            followers: dict[tuple[int, ...], Followers] = {}
            for start, answer in answers:
                for end in range(max(1, start), len(answer)):
                    _count(followers, answer[max(0, end - LENGTHS[-1]) : end], answer[end])
            self._answers, self._followers = deque(answers), followers
        answer = list(prompt[-LENGTHS[-1] :])
        self._answers.append((len(answer), answer))
        return answer

    def append(self, answer: list[int], token: int) -> None:
        """`answer`, one that [`begin`] gave, goes on with `token`."""
        for found in self.continuations(answer):
            self._rates.count(*_cell(found), found.token == token)
        _count(self._followers, answer, token)
        answer.append(token)

    def continuations(self, text: Sequence[int]) -> list[Continuation]:
        """At most [`MAX_CONTINUATIONS`] tokens that may come next, those behind the longest n-grams first."""
        found: dict[int, Continuation] = {}
        for length, followers in self._known(text):
            total = 1 + sum(count for _, count in followers)
            for token, count in followers[:MAX_CONTINUATIONS]:
                found.setdefault(token, Continuation(token, length, count / total))
            if len(found) >= MAX_CONTINUATIONS:
                break
        return list(found.values())[:MAX_CONTINUATIONS]

    def probability(self, continuation: Continuation) -> float:
        """Chance that it comes next, by length and share; at first [`PRIOR_RATES`]."""
        return self._rates.mean(*_cell(continuation))

    def chains(self, text: Sequence[int], length: int, count: int) -> list[Chain]:
        """The likeliest `count` nodes of what may follow, up to `length` tokens deep: a chain for each of their leaves."""
        end = tuple(text[-LENGTHS[-1] :])
        waiting: list[tuple[float, tuple[int, ...], tuple[float, ...]]] = [(0.0, (), ())]
        kept: dict[tuple[int, ...], tuple[float, ...]] = {}
        while waiting and len(kept) <= count:
            minus_log, path, log_probs = heapq.heappop(waiting)
            kept[path] = log_probs
            if len(path) == length:
                continue
            for found in self.continuations((end + path)[-LENGTHS[-1] :]):
                joint = math.log(self.probability(found)) - minus_log
                if joint >= math.log(LEAST_PROBABILITY):
                    heapq.heappush(waiting, (-joint, (*path, found.token), (*log_probs, joint)))
        inner = {path[:-1] for path in kept if path}
        return [Chain(path, log_probs) for path, log_probs in kept.items() if path and path not in inner]

    def _known(self, text: Sequence[int]) -> Iterator[tuple[int, Followers]]:
        """What followed the n-grams at the text's end, the longest first."""
        for length in reversed(LENGTHS):
            if length <= len(text):
                followers = self._followers.get(tuple(text[-length:]))
                if followers:
                    yield length, followers


def _count(known: dict[tuple[int, ...], Followers], text: Sequence[int], token: int) -> None:
    """`token` followed at the end of `text`. Among equally frequent ones the newest comes first, and the oldest of the
    rarest gives way where too many follow."""
    for length in LENGTHS[: len(text)]:
        end = tuple(text[-length:])
        others = dict(known.get(end, ()))
        counts = {token: others.pop(token, 0) + 1, **others}
        known[end] = tuple(sorted(counts.items(), key=lambda pair: -pair[1])[:MAX_FOLLOWERS])


def _cell(continuation: Continuation) -> tuple[int, int]:
    return LENGTHS.index(continuation.length), bisect_right(SHARE_EDGES, continuation.share)
