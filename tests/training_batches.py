"""Batches for tests of training, and what is seen of the module while it runs."""

from __future__ import annotations

import torch
from tiny_pairs import conversations

from confu_hf.training.data import ConversationCollator
from confu_hf.training.unroll import DraftUnroll


def batch_of(*lengths: tuple[int, int]) -> dict[str, torch.Tensor]:
    return ConversationCollator(0)(conversations(*lengths))


def choose_anchors(monkeypatch, *rows: int) -> None:
    """Let the random choice of anchors fall on these rows."""

    def chosen(shape, device=None):
        return torch.zeros(shape).index_fill_(-1, torch.tensor(rows), 1.0)

    monkeypatch.setattr(torch, "rand", chosen)


def spy(module, monkeypatch, method: str):
    """Arguments and result of the last call of a method of `module`."""
    seen, original = {}, getattr(module, method)

    def record(*args, **kwargs):
        seen["args"], seen["result"] = args, original(*args, **kwargs)
        return seen["result"]

    monkeypatch.setattr(module, method, record)
    return seen


def steps_of(monkeypatch) -> list[dict]:
    """Of every test-time step: its outputs, which rows they are, and the unrolled drafts' own records."""
    seen, step = [], DraftUnroll.step

    def record(self):
        outputs = step(self)
        seen.append({"outputs": outputs.detach(), "index": self.index})
        return outputs

    monkeypatch.setattr(DraftUnroll, "step", record)
    return seen
