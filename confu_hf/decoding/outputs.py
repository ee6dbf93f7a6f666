"""What `return_dict_in_generate` returns beside the ids, taken from verify passes: of each row, one entry for every token.

A token was chosen at a node of a tree; what plain decoding would have recorded then is what the pass says of that node.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig

from ..target.passes import Asked, States

FIELDS = ("scores", "logits", "hidden_states", "attentions")
_PER_LAYER = ("hidden_states", "attentions")


class Outputs:
    """Entries of all rows of a call, by their numbers in the batch.

    Attributes:
        keeps_scores: whether scores or logits are asked for. asked: what passes shall leave for it.

    Args:
        config: as `generate()` prepared it.
        windows: of every layer the window beyond which plain decoding's cache drops rows, None = it keeps all: of what
            was dropped it has no attention weight.
    """

    def __init__(self, config: GenerationConfig, windows: Sequence[int | None] = ()):
        returned = bool(config.return_dict_in_generate)
        self.wanted = tuple(name for name in FIELDS if returned and getattr(config, f"output_{name}"))
        self.keeps_scores = "scores" in self.wanted or "logits" in self.wanted
        self.asked = Asked(*(name in self.wanted for name in _PER_LAYER))
        self.windows = windows
        self.rows: list[dict[str, list]] = []

    def open(self, batch_size: int, states: States) -> None:
        """After prefill: what its pass says, all of it, goes with the first token."""
        self.rows = [{name: [] for name in FIELDS} for _ in range(batch_size)]
        for number, row in enumerate(self.rows):
            one = slice(number, number + 1)
            if self.asked.hidden_states:
                row["hidden_states"].append(tuple(state[one] for state in states.hidden_states))
            if self.asked.attentions:
                whole = zip(states.attentions, self.windows, strict=True)
                row["attentions"].append(tuple(_within(weights[one], window) for weights, window in whole))

    def add_scores(self, number: int, scores: Sequence[Tensor], logits: Sequence[Tensor]) -> None:
        """Scores and logits `(1, V)` of tokens that row `number` emitted, none if neither is asked for."""
        self.rows[number]["scores"] += scores
        self.rows[number]["logits"] += logits

    def add_states(
        self,
        numbers: Sequence[int],
        states: States,
        nodes: Sequence[Sequence[int]],
        lengths: Sequence[int],
        soft_prompts: int,
    ) -> None:
        """Hidden states and attention weights of the tokens chosen at `nodes`, by row of a verify pass.

        Args:
            lengths: committed tokens of each row, before the pass. soft_prompts: columns in front of them.
        """
        for index, number in enumerate(numbers):
            path = list(nodes[index])
            for step, node in enumerate(path):
                one = slice(index, index + 1), slice(node, node + 1)
                if self.asked.hidden_states:
                    kept = tuple(state[one].clone() for state in states.hidden_states)
                    self.rows[number]["hidden_states"].append(kept)
                if self.asked.attentions:
                    slots = [*range(lengths[index]), *(lengths[index] + other for other in path[: step + 1])]
                    columns = torch.tensor(slots) + soft_prompts
                    kept = tuple(
                        weights[one[0], :, one[1], columns[-(window or 0) :].to(weights.device)]
                        for weights, window in zip(states.attentions, self.windows, strict=True)
                    )
                    self.rows[number]["attentions"].append(kept)

    def cut(self, number: int, count: int) -> None:
        """Forget what row `number` has behind its first `count` tokens."""
        for entries in self.rows[number].values():
            del entries[count:]

    def past_scores(self) -> tuple[Tensor, ...] | None:
        """What criteria see of earlier tokens, as in plain decoding, if there is one row and scores are asked for."""
        return tuple(self.rows[0]["scores"]) if "scores" in self.wanted and len(self.rows) == 1 else None

    def by_step(self, steps: int) -> dict[str, tuple | None]:
        """Fields of the output: of every step all rows, in one tensor, or in one for every layer."""
        fields: dict[str, tuple | None] = dict.fromkeys(FIELDS)
        for name in self.wanted:
            entries = [[row[name][step] for row in self.rows] for step in range(steps)]
            if name in _PER_LAYER:
                fields[name] = tuple(tuple(map(_joined, zip(*rows, strict=True))) for rows in entries)
            else:
                fields[name] = tuple(map(_joined, entries))
        return fields


def _within(weights: Tensor, window: int | None) -> Tensor:
    """Of `(B, heads, Q, K)` the columns that a cache with this window had: for `Q` new rows, window - 1 older ones."""
    past = weights.shape[3] - weights.shape[2]
    return weights[..., 0 if window is None else max(0, past - window + 1) :]


def _joined(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))
