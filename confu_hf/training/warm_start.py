"""Start a draft from what the target already knows instead of from noise.

An EAGLE-3 draft stands where the target's last layers stand: it reads a late hidden state and ends in a language-model
head. So its fusion starts as the
identity on the highest feature, its decoder layer as one of the target's last layers, and its head as the target's
rows. What does not fit (other
shapes, other layer kinds) keeps its random start; nothing is required.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from ..modeling_confu import ConFuDraftModel

# In the draft's layer and in the target's, by name below the layer.
_SAME = ("self_attn.o_proj.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
_HIDDEN_HALF = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")


@torch.no_grad()
def warm_start_from_target(draft: ConFuDraftModel, target: PreTrainedModel, layer_index: int = -2) -> list[str]:
    """Copy what fits from the target's decoder layer `layer_index` and head into the draft.

    Returns:
        Names of the draft's weights that were set.
    """
    width = draft.config.hidden_size
    draft.fc.weight.zero_()
    draft.fc.weight[:, -width:].copy_(torch.eye(width))
    decoder = target.get_decoder()
    layers = getattr(decoder, "layers", None)
    sources = {} if layers is None else _layer_weights(layers[layer_index])
    head = target.get_output_embeddings()
    if head is not None:
        sources["lm_head.weight"] = head.weight[draft.draft_token_ids.to(head.weight.device)]
    sources["norm.weight"] = _norm_weight(getattr(decoder, "norm", None))
    goals, done = dict(draft.named_parameters()), ["fc.weight"]
    for name, source in sources.items():
        if source is not None and source.shape == goals[name].shape:
            goals[name].copy_(source)
            done.append(name)
    return done


def _layer_weights(layer: nn.Module) -> dict[str, torch.Tensor | None]:
    """What a decoder layer of a target has for the draft's, by the draft's names."""
    weights = dict(layer.named_parameters())
    found = {f"midlayer.{name}": weights.get(name) for name in _SAME}
    for name in _HIDDEN_HALF:
        weight = weights.get(name)
        # Columns of [norm(emb) ; norm(h)]: the target's layer reads a hidden state only.
        found[f"midlayer.{name}"] = None if weight is None else torch.cat([torch.zeros_like(weight), weight], dim=1)
    before_attention = getattr(layer, "input_layernorm", None)
    # Where there is a norm of its own before the MLP, or none before attention, `post_attention_layernorm` stands
    # behind attention and is another thing than the draft's.
    before_mlp = getattr(layer, "post_attention_layernorm", None) if before_attention is not None else None
    before_mlp = getattr(layer, "pre_feedforward_layernorm", before_mlp)
    found["midlayer.hidden_norm.weight"] = _norm_weight(before_attention)
    found["midlayer.post_attention_layernorm.weight"] = _norm_weight(before_mlp)
    return found


def _norm_weight(norm: nn.Module | None) -> torch.Tensor | None:
    """`(d,)` what an RMS norm multiplies by, read off its output for equal inputs: Gemma's stores the weight minus
    one. None for a norm that removes the mean."""
    weight = getattr(norm, "weight", None)
    if weight is None:
        return None
    # A power of two, large beside any epsilon: divided by its RMS it is exactly 1.
    scale = norm(torch.full_like(weight, 1024.0))
    return scale if scale.any() and getattr(norm, "bias", None) is None else None


@torch.no_grad()
def warm_start_from_eagle3(draft: ConFuDraftModel, eagle3: ConFuDraftModel) -> None:
    """Start a ConFu draft from an EAGLE-3 draft of the same geometry.

    The future token starts as what the network can already read: `W_f` as the fusion of features, for `f_v` stands
        where the features of the next position
    would stand; the skip connection stays closed (zero).
    """
    missing, unexpected = draft.load_state_dict(eagle3.state_dict(), strict=False)
    foreign = [name for name in missing if not name.startswith("future_")]
    if foreign or unexpected:
        raise ValueError(
            f"EAGLE-3 checkpoint: got unexpected weights {unexpected} and no {foreign}, expected those of this "
            "draft's geometry. Create the ConFu draft from the EAGLE-3 checkpoint's config."
        )
    draft.future_fc.weight.copy_(draft.fc.weight)
