"""Start a draft from what the target already knows instead of from noise.

An EAGLE-3 draft stands where the target's last layers stand: it reads a late hidden state and ends in a language-model
head. So its fusion starts as the identity on the highest feature, its decoder layer as one of the target's last layers,
and its head as the target's rows. What does not fit (other shapes, other layer kinds) keeps its random start; nothing is
required.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import refusal
from ..modeling_confu import ConFuDraftModel
from ..target.weights import head_rows, last_norm_weight, layer_weights

# Columns of the draft's are those of [norm(emb) ; norm(h)]: the target's layer reads a hidden state only.
_HIDDEN_HALF = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
_NORMS = {"before_attention": "hidden_norm.weight", "before_mlp": "post_attention_layernorm.weight"}


@torch.no_grad()
def warm_start_from_target(
    draft: ConFuDraftModel, target: PreTrainedModel, layer_index: int = -2, sample: Tensor | None = None
) -> list[str]:
    """Copy what fits from the target's decoder layer `layer_index`, head and embeddings into the draft.

    Args:
        sample: `(B, N)` token ids, for drafts with norms before `fc`: all their weights start as the RMS that the highest
            feature has there, so that its hidden states come through about as large as they were. None = as 1.

    Returns:
        Names of the draft's weights that were set.
    """
    sources = {"norm.weight": last_norm_weight(target)}
    for name, weight in layer_weights(target, layer_index).items():
        if name in _HIDDEN_HALF and weight is not None:
            weight = torch.cat([torch.zeros_like(weight), weight], dim=1)
        sources[f"midlayer.{_NORMS.get(name, name)}"] = weight
    if draft.config.hidden_size == draft.config.target_hidden_size:
        identity = torch.zeros_like(draft.fc.weight)
        identity[:, -draft.config.hidden_size :].fill_diagonal_(1.0)
        sources |= {"fc.weight": identity, "lm_head.weight": head_rows(target, draft.draft_token_ids)}
    if draft.config.own_embeddings:
        sources["embed_tokens.weight"] = target.get_input_embeddings().weight
    if draft.config.fc_norm and sample is not None:
        size = feature_rms(target, draft.config.target_layer_ids[-1], sample)
        for name, weight in draft.fc_norm.named_parameters():
            sources[f"fc_norm.{name}"] = torch.full_like(weight, size)
    goals, done = dict(draft.named_parameters()), []
    for name, source in sources.items():
        if source is not None and name in goals and source.shape == goals[name].shape:
            goals[name].copy_(source)
            done.append(name)
    return done


def feature_rms(target: PreTrainedModel, layer_id: int, sample: Tensor) -> float:
    """The median over positions of the RMS of the hidden state that enters layer `layer_id`.

    The median: first tokens have states hundreds of times larger than all others.
    """
    output = target.get_decoder()(input_ids=sample.to(target.device), output_hidden_states=[layer_id], use_cache=False)
    return output.hidden_states[layer_id].float().square().mean(-1).sqrt().median().item()


WORD_SHARE = 0.5  # of a contemplate token's logits beside the draft's, to begin with


@torch.no_grad()
def warm_start_from_eagle3(draft: ConFuDraftModel, eagle3: ConFuDraftModel) -> None:
    """Start a ConFu draft from an EAGLE-3 draft of the same geometry.

    The future token starts as what the network can already read: `W_f` as the fusion of features, for `f_v` stands where
    the features of the next position would stand; the skip connection and the words stay closed (zero), see [`open_words`].
    """
    missing, unexpected = draft.load_state_dict(eagle3.state_dict(), strict=False)
    foreign = [name for name in missing if not name.startswith("future_")]
    if foreign or unexpected:
        raise refusal(
            "EAGLE-3 checkpoint",
            got=f"unexpected weights {unexpected} and no {foreign}",
            expected="those of this draft's geometry",
            fix="Create the ConFu draft from the EAGLE-3 checkpoint's config.",
        )
    draft.future_fc.weight.copy_(draft.fc.weight)


@torch.no_grad()
def open_words(draft: ConFuDraftModel, target: PreTrainedModel, known: int = 0, share: float = WORD_SHARE) -> None:
    """Have the draft's head say of contemplate tokens' last states what the target's head says, times `share`; the first
    `known` of them stay as they are.

    A token's part of `future_word` is the `(d, d)` map `M` that makes `lm_head M` come nearest to the target's rows (least
    squares). An
    adapter that was taught first is heard at once; one that was not adds noise, which training takes back.
    """
    head = draft.lm_head.weight.float()
    rows = head_rows(target, draft.draft_token_ids.to(target.device)).to(head)
    every = draft.future_word.weight.unflatten(0, (draft.config.future_words, -1))  # (n, d, target's d)
    every[known:] = share * torch.linalg.solve(head.T @ head, head.T @ rows)
