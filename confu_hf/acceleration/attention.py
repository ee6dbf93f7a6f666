"""Attention over a tree's mask without copies of keys and values, for targets with grouped queries.

Transformers' `sdpa` copies every key and value once per query head as soon as there is a mask: in every layer of every
verify pass the whole cache, several times over. PyTorch's kernel for the CPU reads groups as they are. On a GPU it would
leave its fast kernels for that; there the heads of a group become rows of one head, which those kernels do take.
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
MOST_FOLDED = 128  # query rows of a pass: a mask is repeated for each head of a group, and prompts have large ones


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    """What `sdpa` computes: `query` `(B, heads, Q, d)`, `key` and `value` `(B, kv_heads, K, d)` -> `(B, Q, heads, d)`.

    With nothing to gain (no mask, one query head per key) or more to do than a mask (`position_bias`, ...), it is
    `sdpa` that computes it.
    """
    nothing_to_gain = attention_mask is None or query.shape[1] == key.shape[1]
    nothing_to_gain |= query.device.type != "cpu" and query.shape[2] > MOST_FOLDED
    if nothing_to_gain or arguments.get("dropout") or any(arguments.get(name) is not None for name in MORE):
        return FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **arguments)
    if query.device.type != "cpu":
        context = folded_attention(query, key, value, attention_mask, arguments.get("scaling"))
    else:
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=attention_mask, scale=arguments.get("scaling"), enable_gqa=True
        )
    return context.transpose(1, 2).contiguous(), None


def folded_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """`(B, heads, Q, d)`, as `scaled_dot_product_attention` with `enable_gqa`: the `heads / kv_heads` query heads that read
    one key head are its rows. `mask` `(B or 1, 1, Q, K)`, boolean or additive, the same for all heads."""
    batch, heads, rows, width = query.shape
    groups = heads // key.shape[1]
    folded = query.reshape(batch, key.shape[1], groups * rows, width)
    mask = mask.expand(-1, groups, -1, -1).flatten(1, 2)[:, None]  # (B or 1, 1, groups * Q, K)
    context = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scale)
    return context.reshape(batch, heads, rows, -1)


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, AttentionMaskInterface()["sdpa"])


@contextmanager
def grouped_queries(model: PreTrainedModel) -> Iterator[None]:
    """Within it, `model` attends by [`grouped_attention`] if it attends by `sdpa`."""
    config = model.config.get_text_config(decoder=True)
    if compat.attention_implementation(config) != "sdpa":
        yield
        return
    use = compat.set_attention_implementation
    with holding(model, lambda: use(config, GROUPED), lambda: use(config, "sdpa")):
        yield
