""" "May attend" turned into what a Transformers model takes as its mask."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .geometry import layer_types


def model_mask(
    config: PreTrainedConfig, mask: Tensor, query_positions: Tensor, key_positions: Tensor, dtype: torch.dtype
) -> Tensor | dict[str, Tensor]:
    """Turn "may attend" into what the model takes: additive `(B, 1, Q, K)`, one per layer type if it has several.

    Args:
        mask: `(B, Q, K)` bool.
        query_positions: `(B, Q)`.
        key_positions: `(B, K)` or `(B, Q, K)`, -1 for soft prompts, which are inside every window.
    """
    queries = query_positions[..., None]  # (B, Q, 1)
    keys = key_positions if key_positions.ndim == 3 else key_positions[:, None]  # (B, 1 or Q, K)
    masks = {}
    for kind in sorted(set(layer_types(config))):
        visible = mask
        if kind == "sliding_attention":
            visible = mask & ((queries - keys < config.sliding_window) | (keys < 0))
        elif kind == "chunked_attention":
            size = config.attention_chunk_size
            visible = mask & ((queries // size == keys // size) | (keys < 0))
        additive = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
        masks[kind] = additive.masked_fill_(~visible, torch.finfo(dtype).min)[:, None]
    # Models with one kind of layer take no dict; all models pass a ready 4-D tensor through.
    return masks if len(masks) > 1 else next(iter(masks.values()))
