"""How much is computed at once: batch sizes and workers from the memory and the kind of a device.

The figures behind it are upper estimates of what one row needs; half of the free memory is planned with.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..target.geometry import attention_geometry

USED_SHARE = 0.5
# More rows of a training step than these learn less from each token, so they are the most, not the aim: a young draft learns
# from steps, and a CPU has few of them to give.
MOST_SEQUENCES = {"cpu": 2, "cuda": 48}
MOST_ANSWERS = {"cpu": 64, "cuda": 1024}
# Tensors as wide as the hidden state that a position keeps for the backward pass, per test-time step.
STATES_PER_STEP = 40


@dataclass(frozen=True)
class Sizes:
    """`sequences` of a training batch on one device, `answers` that are written together, `workers` that load data."""

    sequences: int
    answers: int
    workers: int


def free_memory(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def bytes_per_token(target: PreTrainedModel, draft_vocab_size: int, steps: int) -> int:
    """What one position of a training batch takes: what the target says, its cache, the draft's rows."""
    text = target.config.get_text_config(decoder=True)
    layers, kv_heads, head_dim = attention_geometry(target.config)
    cache = 2 * layers * kv_heads * head_dim * 2
    said = text.vocab_size * 2 + draft_vocab_size * 8 + 4 * text.hidden_size * 4
    draft = steps * STATES_PER_STEP * text.hidden_size * 4
    return cache + said + draft


def bytes_per_answer(target: PreTrainedModel, length: int) -> int:
    """Keys and values of one sequence while it is written, and its logits."""
    layers, kv_heads, head_dim = attention_geometry(target.config)
    size = target.get_input_embeddings().weight.element_size()
    return 2 * layers * kv_heads * head_dim * size * length + 4 * target.config.get_text_config().vocab_size


def plan_sizes(
    target: PreTrainedModel, *, draft_vocab_size: int, steps: int, max_length: int, memory: int | None = None
) -> Sizes:
    """What fits the device of `target`, at least one of each.

    Args:
        steps: test-time steps. max_length: tokens of a sequence.
        memory: free bytes; None = as the device says.
    """
    device = target.device
    usable = USED_SHARE * (free_memory(device) if memory is None else memory)
    sequences = int(usable // (bytes_per_token(target, draft_vocab_size, steps) * max_length))
    answers = int(usable // bytes_per_answer(target, max_length))
    kind = "cpu" if device.type == "cpu" else "cuda"
    return Sizes(
        sequences=max(1, min(sequences, MOST_SEQUENCES[kind])),
        answers=max(1, min(answers, MOST_ANSWERS[kind])),
        workers=0 if kind == "cpu" else min(4, os.cpu_count() or 1),
    )
