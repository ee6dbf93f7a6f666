"""Weights of a target that others start from or multiply with: its head, and what its layers have for a draft's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

# In a decoder layer of Llama's kind, by name below the layer; a target may lack any of them.
LAYER_WEIGHTS = (
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)


def head_logits(model: PreTrainedModel, states: Tensor, token_ids: Tensor) -> Tensor:
    """`(..., d)` behind the last norm -> logits of `token_ids` `(K,)` alone, `(..., K)`, as the head gives them."""
    head = model.get_output_embeddings()
    bias = getattr(head, "bias", None)
    token_ids = token_ids.to(head.weight.device)
    return F.linear(states, head.weight[token_ids], None if bias is None else bias[token_ids])


def head_rows(model: PreTrainedModel, token_ids: Tensor) -> Tensor | None:
    """`(K, d)`, the head's rows of `token_ids`; None for a target without a head."""
    head = model.get_output_embeddings()
    return None if head is None else head.weight[token_ids.to(head.weight.device)]


def layer_weights(model: PreTrainedModel, index: int) -> dict[str, Tensor | None]:
    """What decoder layer `index` has, counted from the end if negative: `LAYER_WEIGHTS`, and what its norms multiply by, `before_attention` and
    `before_mlp`. None for what is not there, or is another thing there."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None:
        return {}
    layer = layers[max(index, -len(layers))]
    weights = dict(layer.named_parameters())
    found = {name: weights.get(name) for name in LAYER_WEIGHTS}
    before_attention = getattr(layer, "input_layernorm", None)
    # Where there is a norm of its own before the MLP, or none before attention, `post_attention_layernorm` stands
    # behind attention and is another thing than the draft's.
    before_mlp = getattr(layer, "post_attention_layernorm", None) if before_attention is not None else None
    before_mlp = getattr(layer, "pre_feedforward_layernorm", before_mlp)
    found["before_attention"] = norm_weight(before_attention)
    found["before_mlp"] = norm_weight(before_mlp)
    return found


def last_norm_weight(model: PreTrainedModel) -> Tensor | None:
    """What the norm before the head multiplies by, `(d,)`."""
    return norm_weight(getattr(model.get_decoder(), "norm", None))


def norm_weight(norm: nn.Module | None) -> Tensor | None:
    """`(d,)` what an RMS norm multiplies by, read off its output for equal inputs: Gemma's stores the weight minus one.

    None for a norm that removes the mean.
    """
    weight = getattr(norm, "weight", None)
    if weight is None:
        return None
    # A power of two, large beside any epsilon: divided by its RMS it is exactly 1.
    scale = norm(torch.full_like(weight, 1024.0))
    return scale if scale.any() and getattr(norm, "bias", None) is None else None
