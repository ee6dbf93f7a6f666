"""Runs the target: prefill and verify for decoding, contemplate anchors for training.

What to verify is tree/layout.py's business, where keys and values live cache.py's, what a mask looks like masks.py's,
which tokens are accepted decoding/acceptance.py's.

Features are the hidden states ENTERING the layers `layer_ids` (`hidden_states[i]` of Transformers), concatenated:
`(..., 3 d)`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from .. import compat
from ..errors import refusal
from ..tree.layout import VerifyLayout
from .cache import TreeCache
from .context import ContemplateContext
from .masks import model_mask
from .soft_prompts import check_no_checkpointing


@dataclass(frozen=True)
class Asked:
    """What a pass shall leave beside logits and features: hidden states of all layers, attention weights."""

    hidden_states: bool = False
    attentions: bool = False


@dataclass(frozen=True)
class States:
    """What was asked for, of every row of a pass. `hidden_states`: of the embeddings and every layer, `(B, Q, d)` each.
    `attentions`: of every layer `(B, heads, Q, K)`, columns in the order of the mask."""

    hidden_states: tuple[Tensor, ...] = ()
    attentions: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Prefilled:
    """`logits` `(B, V)` of the last position; `features` `(B, N, 3 d)` of every position of this pass;
    `next_position_ids` `(B, 1)` long, the position id of the token behind it; `states` of the last chunk."""

    logits: Tensor
    features: Tensor
    next_position_ids: Tensor
    states: States = States()


@dataclass(frozen=True)
class Verified:
    """`logits` `(B, T+1, V)` and `features` `(B, T+1, 3 d)` of the tree's nodes, index 0 the root; `futures` of the
    contemplate tokens, `(B, M, 3 d)`, in the order of `layout.contemplate_nodes`, None if there were none: the features of
    each node's first one and, if `future_layer_ids` asked for it, the last hidden states of all `n`, `(B, M, 3 d + n d)`;
    `states` of all rows."""

    logits: Tensor
    features: Tensor
    futures: Tensor | None
    states: States = States()


def _request(layer_ids: Sequence[int], asked: Asked) -> dict[str, Any]:
    """The arguments of a forward pass that make it leave features, and what is asked for."""
    states = True if asked.hidden_states else compat.layer_states_request(layer_ids)
    return {"output_hidden_states": states} | ({"output_attentions": True} if asked.attentions else {})


def _features(output: ModelOutput, layer_ids: Sequence[int], asked: Asked = Asked()) -> Tensor:
    """`(B, Q, d)` each -> `(B, Q, 3 d)`, in the order of `layer_ids` and on the device of the last of them."""
    states = compat.layer_states(output, layer_ids, all_layers=asked.hidden_states)
    return torch.cat([state.to(states[-1].device) for state in states], dim=-1)


def _states(output: ModelOutput, asked: Asked) -> States:
    return States(
        hidden_states=tuple(output.hidden_states) if asked.hidden_states else (),
        attentions=tuple(output.attentions) if asked.attentions else (),
    )


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Tensor | None,
    cache: Cache,
    layer_ids: Sequence[int],
    *,
    inputs_embeds: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    chunk_size: int | None = None,
    prompt_inputs: Mapping[str, Any] | None = None,
    asked: Asked = Asked(),
) -> Prefilled:
    """The model's own causal forward pass over `input_ids` `(B, N)`, behind what `cache` already holds.

    Args:
        inputs_embeds: `(B, N, d)`, in place of the ids.
        attention_mask: `(B, C + N)`, 0 for padding; positions are then counted without it, as `generate()` does.
        position_ids: `(B, N)` or `(1, N)`, or `(channels, B, N)` of a target that places images in several dimensions;
            overrides that.
        chunk_size: tokens of one pass; None = all of them, as `prompt_inputs` need.
        prompt_inputs: what else the model reads with the prompt, such as `pixel_values`.
    """
    prompt = input_ids if inputs_embeds is None else inputs_embeds
    name = "input_ids" if inputs_embeds is None else "inputs_embeds"
    (batch_size, length), past = prompt.shape[:2], int(cache.get_seq_length())
    if position_ids is None:
        counted = prompt.new_ones(batch_size, past + length, dtype=torch.long)
        if attention_mask is not None:
            counted = attention_mask.long()
        # As plain decoding counts: a masked token stands at 0, and what follows counts on from the last one.
        position_ids = (counted.cumsum(-1) - 1).masked_fill(counted == 0, 0)[:, -length:]
    features, size = [], length if chunk_size is None else chunk_size
    for start in range(0, length, size):
        stop = min(length, start + size)
        inputs = {
            name: prompt[:, start:stop],
            "attention_mask": None if attention_mask is None else attention_mask[:, : past + stop],
            "position_ids": position_ids[..., start:stop],
            **compat.cache_keyword(model, cache),
            "use_cache": True,
        }
        if prompt_inputs:
            inputs = compat.prompt_pass_inputs(model, {**inputs, **prompt_inputs})
        output = model(**inputs, logits_to_keep=1, return_dict=True, **_request(layer_ids, asked))
        features.append(_features(output, layer_ids, asked))
    features = features[0] if len(features) == 1 else torch.cat(features, dim=1)
    last = last_position(inputs["position_ids"])
    return Prefilled(output.logits[:, -1], features, last + 1, _states(output, asked))


def last_position(position_ids: Tensor) -> Tensor:
    """`(B, 1)` of the last token. `position_ids`: `(B, N)`, or `(channels, B, N)`, which agree on the last token."""
    return position_ids[..., -1:] if position_ids.ndim == 2 else position_ids[-1, :, -1:]


@torch.no_grad()
def verify(
    model: PreTrainedModel,
    layout: VerifyLayout,
    contemplate_embedding: Tensor | None,
    cache: TreeCache,
    layer_ids: Sequence[int],
    asked: Asked = Asked(),
    future_layer_ids: Sequence[int] | None = None,
) -> Verified:
    """Check a whole tree in one forward pass; its rows lie behind the committed ones until `cache.keep_path()`.

    Args:
        layout: tokens, positions and mask, for `cache` as it is now.
        contemplate_embedding: `(B, d)`, the input of all contemplate tokens; None only if the layout has none.
        future_layer_ids: `layer_ids` and perhaps the last hidden state, for contemplate tokens alone; None = `layer_ids`.
    """
    num_nodes, num_contemplate = layout.tokens.shape[1], layout.contemplate_rows
    if not num_contemplate or future_layer_ids is None:
        future_layer_ids = layer_ids
    _check_layout(layout, contemplate_embedding, cache)
    embeds = model.get_input_embeddings()(layout.tokens)  # (B, T+1, d)
    if num_contemplate:
        contemplate = contemplate_embedding.to(embeds)[:, None].expand(-1, num_contemplate, -1)
        embeds = torch.cat([embeds, contemplate], dim=1)  # (B, Q, d)
    config = model.config.get_text_config(decoder=True)
    mask = None
    if not layout.sees_all:
        mask = model_mask(config, layout.mask, layout.places, layout.key_places, embeds.dtype)
    # Without one the root alone is a plain decoding step, which models do without copies of keys and values.
    # The whole ...ForCausalLM, not its parts: soft-capping, logit scaling and adapters stay where they are.
    slots = cache.slots_behind(layout.mask.shape[1], soft_prompts=layout.soft_prompt_length > 0)
    with cache.writing(slots):
        output = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=layout.position_ids,
            **compat.cache_keyword(model, cache),
            use_cache=True,
            logits_to_keep=torch.arange(num_nodes, device=embeds.device),
            return_dict=True,
            **_request(future_layer_ids, asked),
        )
    features = _features(output, future_layer_ids, asked)
    num_features = len(layer_ids) * features.shape[-1] // len(future_layer_ids)
    return Verified(
        logits=output.logits[:, :num_nodes],  # a model that ignores logits_to_keep returns all Q rows
        features=features[:, :num_nodes, :num_features],
        futures=as_futures(features[:, num_nodes:], layout.contemplate_length, num_features)
        if num_contemplate
        else None,
        states=_states(output, asked),
    )


def as_futures(states: Tensor, length: int, num_features: int) -> Tensor:
    """What contemplate tokens leave, `(B, n M, F)`, all first ones before all second ones, as futures of their nodes:
    `(B, M, num_features + n (F - num_features))`, features of the first one and what else there is of all of them."""
    parts = states.chunk(length, dim=1)
    return torch.cat([parts[0], *(part[..., num_features:] for part in parts[1:])], dim=-1)


def _check_layout(layout: VerifyLayout, contemplate_embedding: Tensor | None, cache: TreeCache) -> None:
    count = layout.contemplate_nodes.shape[1]
    if count and contemplate_embedding is None:
        raise refusal(
            "verify",
            got=f"a layout with {count} contemplate tokens, and contemplate_embedding=None",
            expected="the embedding of the contemplate tokens",
            fix="Pass the adapter's contemplate embedding, or a layout without contemplate nodes.",
        )
    # Nodes alone may do without the soft prompts, which they do not see.
    prompts = cache.soft_prompt_length if count or layout.soft_prompt_length else 0
    slots = prompts + cache.get_seq_length() + layout.mask.shape[1]
    if layout.mask.shape[2] != slots or layout.soft_prompt_length != prompts:
        raise refusal(
            "verify",
            got=f"a layout for {layout.soft_prompt_length} soft prompts and {layout.mask.shape[2]} slots",
            expected=f"{prompts} and {slots}, the cache's",
            fix="Make the layout for this cache.",
        )


def contemplate_anchors(
    model: PreTrainedModel,
    context: ContemplateContext,
    embeddings: Tensor,
    position_ids: Tensor,
    context_mask: Tensor,
    layer_ids: Sequence[int],
    length: int = 1,
) -> tuple[Tensor, Tensor]:
    """Training: the contemplate tokens of `K` anchors in one pass against a finished context; no logits are computed.

    Each token attends to the soft prompts, its own part of the context, those of its anchor before it and itself, as in
    `verify()`. Gradients reach `embeddings` and the soft prompts in `context`.

    Args:
        embeddings: `(B, K, d)`, of all tokens of an anchor.
        position_ids: `(B, K)`, the anchor's position plus one.
        context_mask: `(B, K, C)` bool, the context up to and including the anchor, without padding.
            Anchor at slot 2 of an unpadded sequence of 4: mask `1 1 1 0`, position 3.
        length: contemplate tokens in a row behind an anchor, `n`.

    Returns:
        Hidden states of the layers `(B, n K, 3 d)`, and what the head would read, `(B, n K, d)`: of all first tokens, then
        of all second ones, ...
    """
    check_no_checkpointing(model)
    count = embeddings.shape[1]
    embeddings, context_mask = embeddings.repeat(1, length, 1), context_mask.repeat(1, length, 1)
    position_ids = torch.cat([position_ids + number for number in range(length)], dim=1)
    batch, anchors, _ = embeddings.shape  # tokens, from here on
    embeds = embeddings.to(model.get_input_embeddings().weight)
    device, prompts = embeds.device, context.soft_prompt_length
    own = torch.zeros(anchors, anchors, dtype=torch.bool, device=device)
    for behind in range(length):
        own.diagonal(-behind * count).fill_(True)
    soft_prompts = torch.ones(batch, anchors, prompts, dtype=torch.bool, device=device)
    mask = torch.cat([soft_prompts, context_mask, own.expand(batch, -1, -1)], dim=-1)  # (B, nK, S + C + nK)
    # Positions of the slots as each anchor counts them: the visible slots are its whole past, in order.
    key_positions = torch.cat(
        [
            torch.full((batch, anchors, prompts), -1, device=device),
            context_mask.long().cumsum(-1) - 1,
            position_ids[:, None].expand(-1, anchors, -1),
        ],
        dim=-1,
    )
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder()
    output = decoder(
        inputs_embeds=embeds,
        attention_mask=model_mask(config, mask, position_ids, key_positions, embeds.dtype),
        position_ids=position_ids,
        **compat.cache_keyword(decoder, context),
        use_cache=True,
        output_hidden_states=compat.layer_states_request(layer_ids),
        return_dict=True,
    )
    return _features(output, layer_ids), output.last_hidden_state
