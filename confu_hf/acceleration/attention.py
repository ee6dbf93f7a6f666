"""Attention over a tree's mask without copies of keys and values, for targets with grouped queries on the CPU.

Transformers' `sdpa` copies every key and value once per query head as soon as there is a mask: in every layer of every
verify pass the whole cache, several times over. PyTorch's kernel for the CPU reads groups as they are. On other devices
it would leave its fast kernels for that, so nothing changes there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from .. import compat
from .shared import holding

GROUPED = f"{compat.OWN_ATTENTION}sdpa"
FUNCTIONS = AttentionInterface()
MORE = ("position_bias", "softcap")  # arguments that are more than a mask


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """What `sdpa` computes: `query` `(B, heads, Q, d)`, `key` and `value` `(B, kv_heads, K, d)` -> `(B, Q, heads, d)`.

    With nothing to gain (no mask, one query head per key) or more to do than a mask (`position_bias`, ...), it is
    `sdpa` that computes it.
    """
    nothing_to_gain = attention_mask is None or query.shape[1] == key.shape[1]
    if nothing_to_gain or arguments.get("dropout") or any(arguments.get(name) is not None for name in MORE):
        return FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **arguments)
    context = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=arguments.get("scaling"), enable_gqa=True
    )
    return context.transpose(1, 2).contiguous(), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, AttentionMaskInterface()["sdpa"])


@contextmanager
def grouped_queries(model: PreTrainedModel) -> Iterator[None]:
    """Within it, `model` attends by [`grouped_attention`] if it is on the CPU and attends by `sdpa`."""
    config = model.config.get_text_config(decoder=True)
    if model.device.type != "cpu" or compat.attention_implementation(config) != "sdpa":
        yield
        return
    use = compat.set_attention_implementation
    with holding(model, lambda: use(config, GROUPED), lambda: use(config, "sdpa")):
        yield
