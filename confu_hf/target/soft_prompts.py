"""Soft prompts as keys and values."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from .. import compat
from ..errors import refusal

# `(L, 2, S, kv_heads, head_dim)`, index 0 the key; or of each layer a pair, where keys and values differ in width.
SoftPrompts = Tensor | list[tuple[Tensor, Tensor]]


def soft_prompt_key_values(model: PreTrainedModel, embeddings: Tensor) -> SoftPrompts:
    """Run `(S, d)` virtual tokens once through the target, as its first tokens at positions `0 .. S-1`.

    Returns:
        `(L, 2, S, kv_heads, head_dim)`, the keys and values they leave in the cache, differentiable in `embeddings`. Where
        these differ in width (latent attention), a list of `L` pairs `(S, kv_heads, width)`.
    """
    check_no_checkpointing(model)
    cache = DynamicCache()  # without a config: windows are left to the mask, and no layer drops rows
    parameter = model.get_input_embeddings().weight
    decoder = model.get_decoder()
    embeds = embeddings[None].to(parameter)
    decoder(inputs_embeds=embeds, use_cache=True, **compat.cache_keyword(decoder, cache))
    place = embeddings.device
    pairs = [
        (layer.keys[0].transpose(0, 1).to(place), layer.values[0].transpose(0, 1).to(place)) for layer in cache.layers
    ]  # (S, kv_heads, width) each
    if any(key.shape != value.shape for key, value in pairs):
        return pairs
    return torch.stack([torch.stack(pair) for pair in pairs])


def check_no_checkpointing(model: PreTrainedModel) -> None:
    # Asked of the layers themselves: the model's own property is renamed between versions of Transformers.
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise refusal(
            "Contemplation",
            got="a target in training mode with gradient checkpointing, whose layers drop the cache that it reads",
            expected="one whose layers keep it",
            fix="Call model.eval() on the target, or model.gradient_checkpointing_disable().",
        )
