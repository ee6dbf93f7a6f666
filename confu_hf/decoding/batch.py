"""The rows of a call: which of them are still decoded, what the others wrote, and all of them as `generate` returns them.

Rows of a batch end at different rounds. One that has ended leaves the verify pass, unless the caller wants the cache: then
it stays, and at the end it reads the padding that plain decoding would have fed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..tree.draft_tree import DraftTree
from .rules import Rules
from .state import DecodingState


class Batch:
    """Where every row of a call stands, by its number in the batch.

    Args:
        rules: see there. prompt_length: tokens that all rows begin with, padding included.
        pad_token_id: None only where no row ends before another.
    """

    def __init__(self, rules: Rules, prompt_length: int, pad_token_id: int | None):
        self.rules, self.pad_token_id = rules, 0 if pad_token_id is None else pad_token_id
        self.rows = list(range(len(rules.processors)))  # of the decoding state, by their numbers
        self.texts: dict[int, Tensor] = {}  # of rows that have left
        self.prompt_length = self.asked = prompt_length  # the batch criteria were asked up to this length
        self.stopped = [False] * len(self.rows)

    @property
    def processors(self) -> tuple:
        """Of the rows of the decoding state."""
        return tuple(self.rules.processors[row] for row in self.rows)

    def written(self, state: DecodingState) -> list[Tensor]:
        """Every row's ids up to its end, by the rows' numbers."""
        texts = dict(self.texts)
        for row, ids, length in zip(self.rows, state.input_ids, state.lengths, strict=True):
            texts[row] = ids[:length]
        return [texts[row] for row in sorted(texts)]

    def sequences(self, state: DecodingState) -> Tensor:
        """`(B, n)` long, every row's ids, shorter ones padded behind their end."""
        padding = {"batch_first": True, "padding_value": self.pad_token_id}
        return torch.nn.utils.rnn.pad_sequence(self.written(state), **padding)

    def stop(self, state: DecodingState) -> DecodingState:
        """Ask the batch criteria for every length that all rows have come to or ended before; what they stop is cut
        there."""
        while self.rules.batch_criteria and self.asked < self._reached(state):
            self.asked += 1
            fired = self.rules.batch_criteria(self.sequences(state)[:, : self.asked], None).tolist()
            if not self.rules.rows_end:
                self.stopped = [before or now for before, now in zip(self.stopped, fired, strict=True)]
                fired = [all(self.stopped)] * len(fired)
            state = self._cut(state, fired)
        return state

    def _reached(self, state: DecodingState) -> int:
        running = [length for length, done in zip(state.lengths, state.finished, strict=True) if not done]
        return min(running) if running else max(len(text) for text in self.written(state))

    def _cut(self, state: DecodingState, fired: Sequence[bool]) -> DecodingState:
        """End rows at the length that was asked about, those that had gone on and ended further on, too."""
        if not any(fired):
            return state
        for row, text in self.texts.items():
            self.texts[row] = text[: self.asked] if fired[row] else text
        ends = [fired[row] for row in self.rows]
        lengths = [min(n, self.asked) if end else n for n, end in zip(state.lengths, ends, strict=True)]
        columns = torch.arange(max(lengths), device=state.input_ids.device)
        real = columns < torch.tensor(lengths, device=columns.device)[:, None]
        return replace(
            state,
            input_ids=torch.where(real, state.input_ids[:, : len(columns)], -1),
            lengths=tuple(lengths),
            finished=tuple(done or end for done, end in zip(state.finished, ends, strict=True)),
        )

    def leave(self, state: DecodingState) -> tuple[DecodingState, list[int] | None]:
        """Let the rows go that have ended. Returns the state of the others, and which of the state's rows they are;
        None if nothing changes."""
        kept = [index for index, done in enumerate(state.finished) if not done]
        if not kept or len(kept) == len(state.finished):
            return state, None
        for index, row in enumerate(self.rows):
            if index not in kept:
                self.texts[row] = state.input_ids[index, : state.lengths[index]].clone()
        self.rows = [self.rows[index] for index in kept]
        return state.select(kept), kept


def chains(sequences: Tensor, read: Sequence[int]) -> tuple[DraftTree, Tensor, tuple[int, ...]]:
    """What rows have not read of `sequences` `(B, n)` but for the last token, of which row `b` has read `read[b]`.

    Returns:
        A tree `(B, W)` that is a chain, its path `(B, W)` with -1 behind a row's end, and the number of tokens of each.
        With sequences of 6, of which rows have read 5 and 2: paths -1 -1 -1 and 0 1 2.
    """
    stop = sequences.shape[1] - 1
    counts = tuple(stop - start for start in read)
    steps = torch.arange(max(counts), device=sequences.device)
    missing = torch.tensor(counts, device=sequences.device)[:, None]
    start = torch.tensor(list(read), device=sequences.device)[:, None]
    tokens = sequences.gather(1, (start + steps).clamp(max=stop))
    depths = steps.expand_as(tokens)
    tree = DraftTree(tokens, depths - 1, depths, torch.zeros(tokens.shape, device=tokens.device))
    return tree, torch.where(steps < missing, steps, -1), counts
