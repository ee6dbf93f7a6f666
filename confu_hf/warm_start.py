"""Start a draft from what the target already knows instead of from noise.

An EAGLE-3 draft stands where the target's last layers stand: it reads a late hidden state and ends in a language-model
head. So its fusion starts as the
identity on the highest feature, its decoder layer as one of the target's last layers, and its head as the target's
rows. What does not fit (other
shapes, other layer kinds) keeps its random start; nothing is required.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from .modeling_confu import ConFuDraftModel

# In the draft's layer and in the target's, by name below the layer.
_SAME = (
    "self_attn.o_proj.weight",
    "post_attention_layernorm.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
_HIDDEN_HALF = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")


@torch.no_grad()
def warm_start_from_target(draft: ConFuDraftModel, target: PreTrainedModel, layer_index: int = -2) -> list[str]:
    """Copy what fits from the target's decoder layer `layer_index` and head into the draft.

    Returns:
        Names of the draft's weights that were set.
    """
    done = []
    width = draft.config.hidden_size
    draft.fc.weight.zero_()
    draft.fc.weight[:, -width:].copy_(torch.eye(width))
    done.append("fc.weight")
    draft_weights = dict(draft.midlayer.named_parameters())
    layers = getattr(target.get_decoder(), "layers", None)
    layer_weights = dict(layers[layer_index].named_parameters()) if layers is not None else {}
    for name in (*_SAME, *_HIDDEN_HALF, "input_layernorm.weight"):
        source = layer_weights.get(name)
        goal = draft_weights["hidden_norm.weight" if name == "input_layernorm.weight" else name]
        if name in _HIDDEN_HALF:
            goal.zero_()
            goal = goal[:, width:]  # columns of [norm(emb) ; norm(h)] that read h
        if source is not None and source.shape == goal.shape:
            goal.copy_(source)
            done.append(f"midlayer.{name}")
    head = target.get_output_embeddings()
    norm = getattr(target.get_decoder(), "norm", None)
    if head is not None:
        draft.lm_head.weight.copy_(head.weight[draft.draft_token_ids.to(head.weight.device)])
        done.append("lm_head.weight")
    if norm is not None and getattr(norm, "weight", None) is not None:
        draft.norm.weight.copy_(norm.weight)
        done.append("norm.weight")
    return done


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
