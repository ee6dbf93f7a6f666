"""Small caches full of random numbers, for tests of the cache alone."""

from __future__ import annotations

import torch
from tiny_models import VOCAB_SIZE

from confu_hf.target.cache import TreeCache

LAYERS, HEADS, DIM, PROMPTS = 3, 2, 4, 5


def states(length: int, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, HEADS, length, DIM), torch.randn(batch, HEADS, length, DIM)


def soft_prompts() -> torch.Tensor:
    return torch.randn(LAYERS, 2, PROMPTS, HEADS, DIM)


def filled(length: int, batch: int = 1, prompts: torch.Tensor | None = None, **kwargs) -> TreeCache:
    cache = TreeCache(LAYERS, prompts, **kwargs)
    for i in range(LAYERS):
        cache.update(*states(length, batch), i)
    return cache


def prompt_ids(batch: int = 1, length: int = 11) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(1))
