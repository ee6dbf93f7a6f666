"""Which models can be targets; the others are refused by name, before anything is computed."""

from __future__ import annotations

import inspect

from transformers import PreTrainedConfig, PreTrainedModel

from .. import compat
from .geometry import layer_types

SUPPORTED_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


SUPPORTED_ATTENTION = ("sdpa", "eager")


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
    foreign = sorted(set(layer_types(config)) - set(SUPPORTED_LAYER_TYPES))
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
