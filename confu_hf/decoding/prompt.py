"""What a call of `generate` starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import Cache


@dataclass(frozen=True)
class Prompt:
    """`N` tokens that the target reads, and `n` ids that everything else sees.

    With ids alone they are the same. With `inputs_embeds` the target reads these, and the ids, which may be none, are for
    processors, criteria, lookups and for the output: 5 embeddings without ids, 3 tokens decided: N = 5, `input_ids` of
    3, the cache of 5 + 3 - 1. Nor need ids be repeated that a cache holds.

    Attributes:
        input_ids: `(B, n)` long.
        attention_mask: `(B, N)`, 0 = padding; None = there is none.
        position_ids: `(B, N)` or `(1, N)` long, or of the part behind the cache only; None = counted by the mask. Of a
            target that places images in several dimensions `(channels, B, N)`, which agree on the last token.
        inputs_embeds: `(B, N, d)`; None = the ids are read.
        cache: holds a prefix of what is read; it is extended in place. None = the call makes its own.
        left_out: tokens of the cache that the ids do not repeat: all of them, or 0.
        chunk_size: tokens of one pass of prefill; None = all.
        prompt_inputs: what else the target reads with the prompt alone, such as `pixel_values`.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None
    cache: Cache | None = None
    left_out: int = 0
    chunk_size: int | None = None
    prompt_inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The argument of `generate` that the target reads."""
        return "input_ids" if self.inputs_embeds is None else "inputs_embeds"

    @property
    def length(self) -> int:
        """`N`."""
        return (self.input_ids if self.inputs_embeds is None else self.inputs_embeds).shape[1] + self.left_out

    @property
    def without_ids(self) -> int:
        """`N - n`, by which places in the cache differ from places among the ids."""
        return self.length - self.input_ids.shape[1]

    def mask(self) -> Tensor:
        """`(B, N)` long, 0 = padding."""
        ids = self.input_ids
        return ids.new_ones(len(ids), self.length) if self.attention_mask is None else self.attention_mask

    def behind(self, past: int) -> dict[str, Any]:
        """The arguments of prefill for what a cache of `past` tokens does not hold."""
        mask, embeds = self.mask(), self.inputs_embeds
        return {
            "input_ids": None if embeds is not None else self.input_ids[:, past - self.left_out :],
            "inputs_embeds": None if embeds is None else embeds[:, past:],
            "position_ids": None if self.position_ids is None else self.position_ids[..., past - self.length :],
            # Without padding the model's fastest causal path needs no mask.
            "attention_mask": None if bool(mask.all()) and not self.prompt_inputs else mask,
            "prompt_inputs": self.prompt_inputs,
        }

    def roots(self) -> Tensor:
        """`(B,)` long, the root of the first tree; 0 where it has no id."""
        ids = self.input_ids
        return ids[:, -1] if self.inputs_embeds is None else ids.new_zeros(len(ids))
