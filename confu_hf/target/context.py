"""What is kept of finished passes: `ContemplateContext`, which contemplate tokens read, and `KnownTexts`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from ..compat import CacheLayerMixin
from ..errors import refusal
from .soft_prompts import SoftPrompts


class _ContextLayer(CacheLayerMixin):
    """Keys and values `(B, kv_heads, C, head_dim)` of one layer, and its soft prompt: a key and a value
    `(S, kv_heads, head_dim)`."""

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, soft_prompt: Sequence[Tensor] | None, is_reused: bool) -> None:
        self.keys, self.values, self.soft_prompt = keys.detach(), values.detach(), soft_prompt
        self.is_reused, self.joined, self.count = is_reused, (), 0  # the last `count` slots are the new tokens'
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: filled when it was made."""

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        new = (key_states, value_states)
        if not self.is_reused:
            return self._join(new)
        count = key_states.shape[2]
        if self.count != count:
            self.joined, self.count = self._join(new), count
        else:
            for states, part in zip(self.joined, new, strict=True):
                states[:, :, -count:] = part
        return self.joined

    def _join(self, new: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """`(B, kv_heads, S + C + K, head_dim)` of keys and values."""
        key_states, value_states = new
        parts = [[self.keys, key_states], [self.values, value_states]]
        if self.soft_prompt is not None:
            for part, prompt in zip(parts, self.soft_prompt, strict=True):
                prompt = prompt.to(key_states).transpose(0, 1)  # (kv_heads, S, head_dim)
                part.insert(0, prompt.expand(key_states.shape[0], -1, -1, -1))
        keys, values = (torch.cat(part, dim=2) for part in parts)
        return keys, values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return self.keys.shape[2]

    def get_max_length(self) -> int:
        return -1


class ContemplateContext(Cache):
    """Training: a finished pass over `C` tokens as context of contemplate tokens, soft prompts in front with gradient.

    `update()` returns `[S | C | new]` and keeps nothing, so it may be used for several passes.

    Args:
        context: DynamicCache() (without config) or TreeCache of that pass; every layer must hold all its tokens.
        soft_prompts: [`SoftPrompts`] with or without gradient, or None.
        is_reused: many passes of as many tokens follow, without gradients: `[S | C | new]` is laid out once, beside the
            context, and only what is new is written. Else it is made for each pass, and nothing of it is kept.
    """

    def __init__(self, context: Cache, soft_prompts: SoftPrompts | None = None, is_reused: bool = False) -> None:
        num_layers = len(context.layers)
        if soft_prompts is not None and len(soft_prompts) != num_layers:
            raise refusal(
                "Soft prompts",
                got=f"{len(soft_prompts)} layers",
                expected=num_layers,
                fix="Use an adapter made for this target (config.num_hidden_layers).",
            )
        layers = []
        for i, layer in enumerate(context.layers):
            stored = 0 if layer.keys is None else layer.keys.shape[2]
            if stored != layer.get_seq_length():
                raise refusal(
                    f"Layer {i} of the context of contemplate tokens",
                    got=f"{stored} of {layer.get_seq_length()} tokens (sliding window)",
                    expected="all of them",
                    fix="Run the context pass with a DynamicCache(), without a config, or a TreeCache.",
                )
            prompt = None if soft_prompts is None else soft_prompts[i]
            layers.append(_ContextLayer(layer.keys, layer.values, prompt, is_reused))
        super().__init__(layers=layers)
        self.soft_prompt_length = 0 if soft_prompts is None else soft_prompts[0][0].shape[0]


@dataclass(frozen=True)
class KnownTexts:
    """Prompts and answers, `B` of them, and what the target makes of them.

    Attributes:
        input_ids: `(B, N)` long, padded on the right. features: `(B, N, 3 d)` of every position.
        cache: keys and values of all positions, for contemplate tokens; None = without contemplation.
        prompt_lengths, lengths: `(B,)` long, tokens of the prompt, and of prompt and answer.
    """

    input_ids: Tensor
    features: Tensor
    cache: Cache | None
    prompt_lengths: Tensor
    lengths: Tensor
