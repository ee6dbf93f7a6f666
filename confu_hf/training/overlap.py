"""Finds prompts that share text with a benchmark, so that its questions never enter training data. Pure text work.

Words are compared: lower case, without punctuation. By number of words, with `N = 13`, the least `m = 5`:

    prompt and question of N or more    shared if any N words in a row of one are in the other
    either of m .. N - 1                shared if that one is contained whole in the other
    fewer than m                        shared if both are the same
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator

NGRAM = 13
LEAST_CONTAINED = 5

Words = tuple[str, ...]


def normalised_text(text: str) -> str:
    """What two spellings of one prompt have in common: Unicode form, case and white space do not count."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def normalised_words(text: str) -> Words:
    """`"What's 3 + 4?"` -> `("what", "s", "3", "4")`; underscores separate too."""
    return tuple(re.findall(r"[^\W_]+", normalised_text(text)))


def _ngrams(words: Words, size: int) -> Iterator[Words]:
    return (words[start : start + size] for start in range(len(words) - size + 1))


class OverlapIndex:
    """Which texts share words with `questions`; see the rule at the top.

    Example:
        OverlapIndex(["Name the capital of France."]).shares("Please name the capital of France!")  # True
    """

    def __init__(self, questions: Iterable[str]) -> None:
        self._whole: set[Words] = set()  # questions short enough to be looked for whole
        self._parts: set[Words] = set()  # rows of m .. N words that occur in a question
        for question in questions:
            words = normalised_words(question)
            if words and len(words) < NGRAM:
                self._whole.add(words)
            for size in range(LEAST_CONTAINED, NGRAM + 1):
                self._parts.update(_ngrams(words, size))

    def __len__(self) -> int:
        """Number of word sequences that are looked for."""
        return len(self._whole | self._parts)

    def shares(self, text: str) -> bool:
        """Whether the text shares words with one of the questions."""
        words = normalised_words(text)
        if words in self._whole:
            return True
        if len(words) >= LEAST_CONTAINED:
            size = min(len(words), NGRAM)
            if any(part in self._parts for part in _ngrams(words, size)):
                return True
        return any(part in self._whole for size in range(LEAST_CONTAINED, NGRAM) for part in _ngrams(words, size))
