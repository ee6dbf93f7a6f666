"""Runs the target: prefill and verify for decoding, contemplate anchors for training.

The only file that knows how a Transformers model takes masks, positions and caches and where its layers differ. What
to verify is tree.py's business, where keys and values live cache.py's, which tokens are accepted verification.py's.

Features are the hidden states ENTERING the layers `layer_ids` (`hidden_states[i]` of Transformers), concatenated:
`(..., 3 d)`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, PreTrainedModel

from . import compat
from .cache import ContemplateContext, TreeCache
from .tree import VerifyLayout

SUPPORTED_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
SUPPORTED_ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Prefilled:
    """`logits` `(B, V)` of the last position; `features` `(B, N, 3 d)` of every position of this pass."""

    logits: Tensor
    features: Tensor


@dataclass(frozen=True)
class Verified:
    """`logits` `(B, T+1, V)` and `features` `(B, T+1, 3 d)` of the tree's nodes, index 0 the root; `futures` of the
    contemplate tokens, `(B, M, 3 d)` in the order of `layout.contemplate_nodes`, None if there were none."""

    logits: Tensor
    features: Tensor
    futures: Tensor | None


def attention_geometry(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Shape of a target's cache: `(num_layers, kv_heads, head_dim)`."""
    config = config.get_text_config(decoder=True)
    num_heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // num_heads
    return config.num_hidden_layers, kv_heads, head_dim


def check_supported(model: PreTrainedModel) -> None:
    """Raise a ValueError that says why `model` cannot be a target and what to do about it."""
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"{name} is an encoder-decoder, expected a decoder-only model. Load it with AutoModelForCausalLM."
        )
    if model.get_input_embeddings() is None or model.get_output_embeddings() is None:
        raise ValueError(f"{name} has no token embeddings or no LM head. Load the target with AutoModelForCausalLM.")
    accepted = inspect.signature(type(model).forward).parameters
    missing = {"inputs_embeds", "position_ids", "attention_mask"} - set(accepted)
    if compat.cache_argument(model) is None:
        missing.add("cache")
    if missing and not compat.is_stateful(model):
        raise ValueError(
            f"{name}.forward() does not take {', '.join(sorted(missing))}, which a tree of tokens needs. "
            "Use a target with rotary positions."
        )
    foreign = sorted(set(_layer_types(config)) - set(SUPPORTED_LAYER_TYPES))
    if foreign or compat.is_stateful(model):
        raise ValueError(
            f"{name} has layers with recurrent or unsupported state ({', '.join(foreign) or 'stateful model'}), "
            f"expected only {', '.join(SUPPORTED_LAYER_TYPES)}. A tree cannot branch off such a state: "
            "use an attention-only target."
        )
    _check_attention(name, config)


def _check_attention(name: str, config: PreTrainedConfig) -> None:
    implementation = compat.attention_implementation(config)
    if implementation not in SUPPORTED_ATTENTION:
        raise ValueError(
            f"{name} uses attn_implementation={implementation!r}, expected one of {SUPPORTED_ATTENTION}: "
            'the tree needs a 4-D mask. Call model.set_attn_implementation("sdpa") (or "eager").'
        )
    if getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True):
        raise ValueError(f"{name} attends in both directions, expected a causal model. Use a causal target.")
    if getattr(config, "alibi", False):
        raise ValueError(f"{name} uses ALiBi, which takes positions from slots. Use a target with rotary positions.")
    if getattr(config, "kv_lora_rank", None):
        raise ValueError(
            f"{name} uses multi-head latent attention, whose keys and values differ in size: not supported yet. "
            "Use a target with multi-head or grouped-query attention."
        )
    if getattr(config, "num_kv_shared_layers", 0) or getattr(config, "is_heterogeneous", False):
        raise ValueError(
            f"{name} has layers that share keys and values or differ in geometry; that is not supported yet. "
            "Use a target whose layers all have a cache of the same shape."
        )


def _layer_types(config: PreTrainedConfig) -> list[str]:
    """Attention type per layer; inferred, as Transformers does for its caches, where the config does not list it."""
    listed = getattr(config, "layer_types", None)
    if listed is not None:
        return list(listed)
    if getattr(config, "sliding_window", None) is not None:
        only = "sliding_attention"
    elif getattr(config, "attention_chunk_size", None) is not None:
        only = "chunked_attention"
    else:
        only = "full_attention"
    return [only] * config.num_hidden_layers


def _attention_mask(
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
    for kind in sorted(set(_layer_types(config))):
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


def _features(hidden_states: Sequence[Tensor], layer_ids: Sequence[int]) -> Tensor:
    """`(B, Q, d)` each -> `(B, Q, 3 d)`, in the order of `layer_ids` and on the device of the last of them."""
    device = hidden_states[layer_ids[-1]].device
    return torch.cat([hidden_states[i].to(device) for i in layer_ids], dim=-1)


@torch.no_grad()
def prefill(
    model: PreTrainedModel,
    input_ids: Tensor,
    cache: Cache,
    layer_ids: Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
) -> Prefilled:
    """The model's own causal forward pass over `input_ids` `(B, N)`, behind what `cache` already holds.

    Args:
        attention_mask: `(B, C + N)`, 0 for padding; positions are then counted without it, as `generate()` does.
        position_ids: `(B, N)`, overrides that.
    """
    if attention_mask is not None and position_ids is None:
        position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
    output = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **compat.cache_keyword(model, cache),
        use_cache=True,
        logits_to_keep=1,
        output_hidden_states=list(layer_ids),
        return_dict=True,
    )
    return Prefilled(logits=output.logits[:, -1], features=_features(output.hidden_states, layer_ids))


@torch.no_grad()
def verify(
    model: PreTrainedModel,
    layout: VerifyLayout,
    contemplate_embedding: Tensor | None,
    cache: TreeCache,
    layer_ids: Sequence[int],
) -> Verified:
    """Check a whole tree in one forward pass; its rows stay pending in `cache` until `cache.keep_path()`.

    Args:
        layout: tokens, positions and mask, for `cache` as it is now.
        contemplate_embedding: `(B, d)`, the input of all contemplate tokens; None only if the layout has none.
    """
    num_nodes, num_contemplate = layout.tokens.shape[1], layout.contemplate_nodes.shape[1]
    _check_layout(layout, contemplate_embedding, cache)
    embeds = model.get_input_embeddings()(layout.tokens)  # (B, T+1, d)
    if num_contemplate:
        contemplate = contemplate_embedding.to(embeds)[:, None].expand(-1, num_contemplate, -1)
        embeds = torch.cat([embeds, contemplate], dim=1)  # (B, Q, d)
    mask = _attention_mask(
        model.config.get_text_config(decoder=True),
        layout.mask,
        layout.position_ids,
        layout.key_position_ids,
        embeds.dtype,
    )
    # The whole ...ForCausalLM, not its parts: soft-capping, logit scaling and adapters stay where they are.
    with cache.verifying():
        output = model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=layout.position_ids,
            **compat.cache_keyword(model, cache),
            use_cache=True,
            logits_to_keep=torch.arange(num_nodes, device=embeds.device),
            output_hidden_states=list(layer_ids),
            return_dict=True,
        )
    features = _features(output.hidden_states, layer_ids)
    return Verified(
        logits=output.logits[:, :num_nodes],  # a model that ignores logits_to_keep returns all Q rows
        features=features[:, :num_nodes],
        futures=features[:, num_nodes:] if num_contemplate else None,
    )


def _check_layout(layout: VerifyLayout, contemplate_embedding: Tensor | None, cache: TreeCache) -> None:
    if layout.contemplate_nodes.shape[1] and contemplate_embedding is None:
        raise ValueError(
            f"The layout has {layout.contemplate_nodes.shape[1]} contemplate tokens, but contemplate_embedding "
            "is None. Pass the adapter's contemplate embedding, or a layout without contemplate nodes."
        )
    expected = cache.soft_prompt_length + cache.get_seq_length() + layout.mask.shape[1]
    if layout.mask.shape[2] != expected or layout.soft_prompt_length != cache.soft_prompt_length:
        raise ValueError(
            f"The layout is for {layout.soft_prompt_length} soft prompts and {layout.mask.shape[2]} key slots, "
            f"expected {cache.soft_prompt_length} and {expected}, the cache's. Make the layout for this cache."
        )


def soft_prompt_key_values(model: PreTrainedModel, embeddings: Tensor) -> Tensor:
    """Run `(S, d)` virtual tokens once through the target, as its first tokens at positions `0 .. S-1`.

    Returns:
        `(L, 2, S, kv_heads, head_dim)`, the keys and values they leave in the cache, differentiable in `embeddings`.
    """
    _check_no_checkpointing(model)
    cache = DynamicCache()  # without a config: windows are left to the mask, and no layer drops rows
    parameter = model.get_input_embeddings().weight
    decoder = model.get_decoder()
    embeds = embeddings[None].to(parameter)
    decoder(inputs_embeds=embeds, use_cache=True, **compat.cache_keyword(decoder, cache))
    per_layer = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # (2, kv_heads, S, head_dim)
    return torch.stack([states.to(embeddings.device) for states in per_layer]).transpose(2, 3)


def contemplate_anchors(
    model: PreTrainedModel,
    context: ContemplateContext,
    embeddings: Tensor,
    position_ids: Tensor,
    context_mask: Tensor,
    layer_ids: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Training: the contemplate tokens of `K` anchors in one pass against a finished context; no logits are computed.

    Each token attends to the soft prompts, its own part of the context and itself, as in `verify()`. Gradients reach
    `embeddings` and the soft prompts in `context`.

    Args:
        embeddings: `(B, K, d)`.
        position_ids: `(B, K)`, the anchor's position plus one.
        context_mask: `(B, K, C)` bool, the context up to and including the anchor, without padding.
            Anchor at slot 2 of an unpadded sequence of 4: mask `1 1 1 0`, position 3.

    Returns:
        Futures `(B, K, 3 d)`, and what the head would read, `(B, K, d)`.
    """
    _check_no_checkpointing(model)
    batch, anchors, _ = embeddings.shape
    embeds = embeddings.to(model.get_input_embeddings().weight)
    device, prompts = embeds.device, context.soft_prompt_length
    itself = torch.eye(anchors, dtype=torch.bool, device=device).expand(batch, -1, -1)
    soft_prompts = torch.ones(batch, anchors, prompts, dtype=torch.bool, device=device)
    mask = torch.cat([soft_prompts, context_mask, itself], dim=-1)  # (B, K, S + C + K)
    # Positions of the slots as each anchor counts them: the visible slots are its whole past, in order.
    key_positions = torch.cat(
        [
            torch.full((batch, anchors, prompts), -1, device=device),
            context_mask.long().cumsum(-1) - 1,
            position_ids[:, :, None].expand(-1, -1, anchors),
        ],
        dim=-1,
    )
    config = model.config.get_text_config(decoder=True)
    decoder = model.get_decoder()
    output = decoder(
        inputs_embeds=embeds,
        attention_mask=_attention_mask(config, mask, position_ids, key_positions, embeds.dtype),
        position_ids=position_ids,
        **compat.cache_keyword(decoder, context),
        use_cache=True,
        output_hidden_states=list(layer_ids),
        return_dict=True,
    )
    return _features(output.hidden_states, layer_ids), output.last_hidden_state


def _check_no_checkpointing(model: PreTrainedModel) -> None:
    # Asked of the layers themselves: the model's own property is renamed between versions of Transformers.
    if model.training and any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise ValueError(
            "The target has gradient checkpointing on and is in training mode; its layers then drop the cache that "
            "contemplate tokens read. Call model.eval() on the target, or model.gradient_checkpointing_disable()."
        )
