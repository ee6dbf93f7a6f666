"""Soft prompts as keys and values."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .. import compat
from ..errors import refusal


def soft_prompt_key_values(model: PreTrainedModel, embeddings: Tensor) -> Tensor:
    """Run `(S, d)` virtual tokens once through the target, as its first tokens at positions `0 .. S-1`.

    Returns:
        `(L, 2, S, kv_heads, head_dim)`, the keys and values they leave in the cache, differentiable in `embeddings`.
    """
    check_no_checkpointing(model)
    cache = DynamicCache()  # without a config: windows are left to the mask, and no layer drops rows
    parameter = model.get_input_embeddings().weight
    decoder = model.get_decoder()
    embeds = embeddings[None].to(parameter)
    decoder(inputs_embeds=embeds, use_cache=True, **compat.cache_keyword(decoder, cache))
    per_layer = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # (2, kv_heads, S, head_dim)
    return torch.stack([states.to(embeddings.device) for states in per_layer]).transpose(2, 3)


def check_no_checkpointing(model: PreTrainedModel) -> None:
    # Asked of the layers themselves: the model's own property is renamed between versions of Transformers.
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise refusal(
            "Contemplation",
            got="a target in training mode with gradient checkpointing, whose layers drop the cache that it reads",
            expected="one whose layers keep it",
            fix="Call model.eval() on the target, or model.gradient_checkpointing_disable().",
        )
