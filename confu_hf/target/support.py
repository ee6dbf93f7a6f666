"""Which models can be targets; the others are refused by name, before anything is computed. Reads signatures and the
config; how the targets that can be are run is `passes.py`'s, their geometry `geometry.py`'s."""

from __future__ import annotations

import inspect

from transformers import PreTrainedConfig, PreTrainedModel

from .. import compat
from ..errors import refusal
from .geometry import layer_types

SUPPORTED_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
SUPPORTED_ATTENTION = ("sdpa", "eager")


def check_supported(model: PreTrainedModel) -> None:
    """Raise a ValueError that says why `model` cannot be a target and what to do about it."""
    name, config = type(model).__name__, model.config.get_text_config(decoder=True)
    if getattr(model.config, "is_encoder_decoder", False):
        raise _unsupported(name, "an encoder-decoder", "a decoder-only model", "Load it with AutoModelForCausalLM.")
    if model.get_input_embeddings() is None or model.get_output_embeddings() is None:
        raise _unsupported(
            name,
            "a model with no token embeddings or no LM head",
            "both",
            "Load the target with AutoModelForCausalLM.",
        )
    accepted = inspect.signature(type(model).forward).parameters
    missing = {"inputs_embeds", "position_ids", "attention_mask"} - set(accepted)
    if compat.cache_argument(model) is None:
        missing.add("cache")
    if missing and not compat.is_stateful(model):
        raise _unsupported(
            name,
            f"a forward() that does not take {', '.join(sorted(missing))}",
            "one that does, since a tree of tokens needs it",
            "Use a target with rotary positions.",
        )
    foreign = sorted(set(layer_types(config)) - set(SUPPORTED_LAYER_TYPES))
    if foreign or compat.is_stateful(model):
        raise _unsupported(
            name,
            f"layers with recurrent or unsupported state ({', '.join(foreign) or 'stateful model'})",
            f"only {', '.join(SUPPORTED_LAYER_TYPES)}, since a tree cannot branch off such a state",
            "Use an attention-only target.",
        )
    _check_attention(name, config)


def _check_attention(name: str, config: PreTrainedConfig) -> None:
    implementation = compat.attention_implementation(config)
    rotary = "Use a target with rotary positions."
    found = [
        (
            implementation not in SUPPORTED_ATTENTION,
            f"attn_implementation={implementation!r}",
            f"one of {SUPPORTED_ATTENTION}, since the tree needs a 4-D mask",
            'Call model.set_attn_implementation("sdpa") (or "eager").',
        ),
        (
            getattr(config, "use_bidirectional_attention", False) or not getattr(config, "is_causal", True),
            "attention in both directions",
            "a causal model",
            "Use a causal target.",
        ),
        (getattr(config, "alibi", False), "ALiBi, which takes positions from slots", "positions of tokens", rotary),
        (
            getattr(config, "hidden_size_per_layer_input", 0),
            "embeddings of tokens for every layer, which are looked up by ids",
            "a model that can be given embeddings alone, as contemplate tokens are",
            "Use another target; this one is not supported yet.",
        ),
        (
            getattr(config, "cross_attention_layers", None) or getattr(config, "add_cross_attention", False),
            "layers that attend to an image or an encoder",
            "one that reads everything as tokens",
            "Use another target; this one is not supported yet.",
        ),
        (
            config.model_type == "longcat_flash",
            "two attentions in every layer",
            "one, as the cache and the layers that are read are counted",
            "Use another target; this one is not supported yet.",
        ),
        (
            getattr(config, "num_kv_shared_layers", 0) or getattr(config, "is_heterogeneous", False),
            "layers that share keys and values or differ in geometry",
            "layers that all have a cache of the same shape",
            "Use such a target; the other is not supported yet.",
        ),
    ]
    for is_so, got, expected, fix in found:
        if is_so:
            raise _unsupported(name, got, expected, fix)


def _unsupported(subject: str, got: str, expected: str, fix: str) -> ValueError:
    return refusal(f"{subject} as a target", got=got, expected=expected, fix=fix)
