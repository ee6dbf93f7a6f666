"""What all formats of EAGLE-3 drafts share: a flat Llama config and the weights of one decoder layer.

Which field and which key a format has beside that is its own file's business. Everything is brought to the names of
`ConFuConfig` and `modeling_confu.py`; whether weights and config then fit each other is checked by `hub/pair.py`, as for
any other draft.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from ...configuration_confu import ConFuConfig, TargetGeometry, default_layer_ids
from ...errors import refusal

LAYER = "midlayer."
SAME_NAMES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Buffers that follow from the config: some projects save them.
_DERIVED = re.compile(r"(.*\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
_NUMBERED = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class Foreign:
    """A foreign checkpoint as it lies there: `config.json` and all tensors; `source` names it in messages."""

    source: str
    config: dict[str, Any]
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Format:
    """One project's way of saving an EAGLE-3 draft.

    Attributes:
        name: as in `examples/convert.py --format`.
        matches: whether a `config.json` is of this format.
        fields: fields of [`ConFuConfig`] that the format's config states in its own way.
        write: config and weights in this format's names, of a draft; None where there is only a reader. Gets the
            draft's config, its weights, and what is known of the target.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    fields: Callable[[Foreign], dict[str, Any]]
    write: Callable[[ConFuConfig, Mapping[str, Tensor], ExportTarget], tuple[dict, dict[str, Tensor]]] | None = None


@dataclass(frozen=True)
class ExportTarget:
    """What an export may need of the target: its name, the classes in its `config.json`, its embeddings `(V, d)`."""

    name_or_path: str | None = None
    architectures: tuple[str, ...] = ()
    embeddings: Tensor | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, name_or_path: str | None = None) -> ExportTarget:
        """All of it, from a model."""
        architectures = tuple(model.config.architectures or (type(model).__name__,))
        name = name_or_path or model.config.name_or_path or None
        return cls(name, architectures, model.get_input_embeddings().weight)


def refuse(source: str, got: str, expected: str, fix: str = "Convert a checkpoint of that kind.") -> ValueError:
    """The refusal of a foreign checkpoint, for the caller to raise."""
    return refusal(f"The EAGLE-3 checkpoint {source}", got=got, expected=expected, fix=fix)


def flat_fields(config: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Fields of [`ConFuConfig`] out of a flat config of Llama's kind, what it leaves out as its own class has it."""
    kind = config.get("model_type", "llama")
    try:
        # Through the class: configs are saved without what equals its defaults, and rotary fields have had three forms.
        flat = AutoConfig.for_model(**{**config, "model_type": kind})
        fields = {name: getattr(flat, name, None) for name in SAME_NAMES}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise refuse(source, f"a config that cannot be read ({error})", "the config of a decoder layer") from error
    fields["vocab_size"] = flat.vocab_size
    fields["target_hidden_size"] = config.get("target_hidden_size") or flat.hidden_size
    fields["draft_vocab_size"] = config.get("draft_vocab_size") or flat.vocab_size
    if config.get("rope_parameters") is None and config.get("rope_scaling") is None:
        # Not the class's base: drafts are trained with 10000 where their config says nothing.
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": config.get("rope_theta") or 10000.0}
    return {name: value for name, value in fields.items() if value is not None}


def stated_flags(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`names` maps a format's flags to fields of [`ConFuConfig`]: those that the config states."""
    return {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}


def input_layer_ids(ids: list[int] | None, *, outputs: bool) -> list[int] | None:
    """Layer ids as `ConFuConfig` counts them, by the state that *enters* a layer.

    Example: the state between layers 1 and 2 is the output of layer 1, `[1]` with `outputs`, and the input of layer 2,
    `[2]` here.
    """
    return None if ids is None else [index + 1 for index in ids] if outputs else list(ids)


def our_names(weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Weights by the names of `modeling_confu.py`; a key without a counterpart keeps its name, to be refused later."""
    numbers = {int(match[1]) for name in weights if (match := _NUMBERED.match(name))}
    if len(numbers) > 1:
        raise refuse(source, f"{len(numbers)} decoder layers", "one", "Drafts of several layers are not supported.")
    renamed = {_NUMBERED.sub(LAYER, name): tensor for name, tensor in weights.items() if not _DERIVED.fullmatch(name)}
    biases = [f"{LAYER}self_attn.{name}_proj.bias" for name in "qkvo"]
    if all(name in renamed for name in biases[:3]) and biases[3] not in renamed:
        # Projections as in Qwen2: no bias is one of zeros.
        norm = f"{LAYER}post_attention_layernorm.weight"
        if norm in renamed:
            renamed[biases[3]] = torch.zeros_like(renamed[norm])
    return renamed


def variants_shown(weights: Mapping[str, Tensor]) -> dict[str, bool]:
    """What the weights themselves show, in our names, where a config says nothing."""
    return {
        "attention_bias": f"{LAYER}self_attn.q_proj.bias" in weights,
        "qk_norm": f"{LAYER}self_attn.q_norm.weight" in weights,
        "fc_norm": "fc_norm.0.weight" in weights,
        "norm_before_fc": "input_norm.weight" in weights,
        "own_embeddings": "embed_tokens.weight" in weights,
    }


def with_vocabulary(weights: Mapping[str, Tensor], config: ConFuConfig, source: str) -> dict[str, Tensor]:
    """Complete the maps `d2t` `(K,)` and `t2d` `(V,)` between draft and target ids, and hold them against each other."""
    complete, size = dict(weights), config.draft_vocab_size
    if "d2t" not in weights:
        if size != config.vocab_size:
            raise refuse(
                source,
                f"no d2t, and draft_vocab_size={size} of vocab_size={config.vocab_size}",
                "d2t, or a draft over the whole vocabulary",
                "Without the map nobody knows which tokens the draft proposes.",
            )
        complete["d2t"] = torch.zeros(size, dtype=torch.long)
    complete["d2t"] = complete["d2t"].to(torch.long)
    token_ids = complete["d2t"] + torch.arange(len(complete["d2t"]))
    if len(token_ids) != size or token_ids.min() < 0 or token_ids.max() >= config.vocab_size:
        return complete  # refused, by name, with all other misfits
    proposed = torch.zeros(config.vocab_size, dtype=torch.bool)
    proposed[token_ids] = True
    if "t2d" in weights and not torch.equal(weights["t2d"].to(torch.bool), proposed):
        raise refuse(source, "a t2d that marks other tokens than d2t names", "two maps that agree", "Export it again.")
    complete["t2d"] = proposed
    return complete


def build_config(
    fields: Mapping[str, Any], weights: Mapping[str, Tensor], target: PreTrainedConfig, source: str
) -> ConFuConfig:
    """The draft's config for `target`: what the format's config states, else what the weights show."""
    geometry, text = TargetGeometry.of(target), target.get_text_config(decoder=True)
    fields = {**variants_shown(weights), **fields}
    ids = fields.pop("target_layer_ids", None) or default_layer_ids(geometry.num_hidden_layers)
    try:
        return ConFuConfig(
            target_model_type=text.model_type,
            target_num_hidden_layers=geometry.num_hidden_layers,
            target_layer_ids=ids,
            contemplate=False,
            **{name: getattr(text, name, None) for name in TOKEN_IDS},
            **fields,
        )
    except ValueError as error:
        raise refuse(source, f"fields that do not fit its target ({error})", "a draft of this target") from error


def flat_config(config: ConFuConfig, weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """A draft's layer as a flat Llama config, in the form that old and new readers know."""
    names = ("vocab_size", "attention_bias", "initializer_range", *SAME_NAMES[:-1], *TOKEN_IDS)
    scaling = {name: value for name, value in config.rope_parameters.items() if name != "rope_theta"}
    return {
        "model_type": "llama",
        "num_hidden_layers": 1,
        **{name: getattr(config, name) for name in names},
        "rope_theta": config.rope_theta,
        "rope_scaling": None if scaling.get("rope_type", "default") == "default" else scaling,
        "tie_word_embeddings": False,
        "torch_dtype": str(weights["fc.weight"].dtype).removeprefix("torch."),
    }


def check_writable(config: ConFuConfig, name: str, can: Mapping[str, Any]) -> None:
    """Raise a `ValueError` unless every field in `can` has the one value that the format `name` has a place for."""
    for field, value in can.items():
        if getattr(config, field) != value:
            raise refusal(
                f"Writing an EAGLE-3 draft as {name}",
                got=f"{field}={getattr(config, field)!r}",
                expected=f"{value!r}: the format has no place for another",
                fix="Write it in another format (`--format`).",
            )
