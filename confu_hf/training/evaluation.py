"""How good a draft is on held-out answers: chains, from the training forward, and trees, as in decoding, by task.

A chain misleads: a tree forgives a wrong first guess. Trees are replayed over answers that the target wrote greedily; who
replays them is handed in ([`Replay`]), for training knows no decoding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import EvalPrediction

from ..metrics import tokens_per_round
from ..target.context import KnownTexts
from .data import IGNORED
from .module import ConFuForTraining

TREES = "tree_accepted_length"


class Replay(Protocol):
    """Decoding over again of known texts: `decoding.replay.TreeReplay`, which `ConFuAssistant.replay` makes."""

    def counts(self, texts: KnownTexts) -> list[list[int]]:
        """Tokens that each round would emit, bonus included, by sequence."""


class HeldOut:
    """Which task each held-out sequence is of, by its `index`; those that were not written greedily are of none.

    Args:
        rows: with `index`, and `task` and `greedy` as `load_conversations` gives them; without those, greedy ones of
            one task.
    """

    def __init__(self, rows: Iterable[dict[str, Any]]):
        tasks = {row["index"]: row.get("task", "all") for row in rows if row.get("greedy", True)}
        self.names = sorted(set(tasks.values()))
        self._numbers = {index: self.names.index(task) for index, task in tasks.items()}

    def numbers(self, index: Tensor) -> Tensor:
        """`(B,)` sequences -> `(B,)` long, places in `names`; -1 for those of no task."""
        return torch.tensor([self._numbers.get(number, -1) for number in index.tolist()], device=index.device)


@torch.no_grad()
def replayed(
    module: ConFuForTraining, replay: Replay, held_out: HeldOut, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """A batch of the trainer's in trees.

    Returns:
        `(B, 2)` float, tokens and rounds of each sequence; `(B, 1)` long, its place in `held_out.names`, -1 = not
        replayed.
    """
    numbers = held_out.numbers(batch["index"])
    totals = torch.zeros(len(numbers), 2, device=numbers.device)
    chosen = (numbers >= 0).nonzero()[:, 0]
    if len(chosen):
        part = {name: states[chosen] for name, states in batch.items()}
        for row, counts in zip(chosen.tolist(), replay.counts(known_texts(module, part)), strict=True):
            totals[row] = torch.tensor([float(sum(counts)), float(len(counts))])
    return totals, numbers[:, None]


@torch.no_grad()
def known_texts(module: ConFuForTraining, batch: dict[str, Tensor]) -> KnownTexts:
    """What a replay reads, of a batch of `ConversationCollator`."""
    lengths = batch["attention_mask"].sum(-1)
    prompts = (batch["labels"] != IGNORED).int().argmax(-1)
    view = module.teacher.view(
        batch["input_ids"],
        batch["attention_mask"],
        module.draft.draft_token_ids,
        needed=torch.zeros_like(batch["input_ids"], dtype=torch.bool),  # what the target says is in the text
        index=batch["index"],
        with_cache=module.draft.config.contemplate,
    )
    weight = module.target.get_input_embeddings().weight
    return KnownTexts(batch["input_ids"], view.features.to(weight), view.cache, prompts, lengths)


def acceptance_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """`compute_metrics` of the trainer: chain accepted length (bonus included) and the share of right guesses per
    depth."""
    accepted, correct = prediction.predictions[:2]
    totals = accepted.sum(0)
    per_depth = correct.sum(0)
    metrics = {"accepted_length": float(tokens_per_round(totals[0], totals[1]))}
    for depth, (right, guesses) in enumerate(per_depth, start=1):
        metrics[f"accuracy_depth_{depth}"] = float(right / max(guesses, 1))
    return metrics


def tree_metrics(totals: np.ndarray, numbers: np.ndarray, names: list[str]) -> dict[str, float]:
    """Accepted length in trees, every round weighing alike: of all, and of each task.

    Args:
        totals: `(N, 2)`, tokens and rounds. numbers: `(N,)`, places in `names`; -1 = left out.
    """
    parts = {TREES: numbers >= 0} | {f"{TREES}_{name}": numbers == place for place, name in enumerate(names)}
    sums = {name: totals[part].sum(0) for name, part in parts.items()}
    return {name: float(tokens_per_round(tokens, rounds)) for name, (tokens, rounds) in sums.items() if rounds}
