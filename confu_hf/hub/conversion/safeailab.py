"""SafeAILab/EAGLE: a flat Llama config with `draft_vocab_size`, one layer called `midlayer`.

The layers that are read are always `[2, L // 2, L - 3]`, by the state that enters them. The draft has token embeddings of
its own exactly if its config states `target_hidden_size`. Over the whole vocabulary there are no maps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...configuration_confu import ConFuConfig, default_layer_ids
from .layer import ExportTarget, Foreign, Format, check_writable, flat_config, flat_fields


def _matches(config: Mapping[str, Any]) -> bool:
    return "draft_vocab_size" in config


def _fields(checkpoint: Foreign) -> dict[str, Any]:
    fields = flat_fields(checkpoint.config, checkpoint.source)
    if "target_hidden_size" in checkpoint.config:
        fields["own_embeddings"] = True
    return fields


def _write(config: ConFuConfig, weights: Mapping[str, Tensor], target: ExportTarget) -> tuple[dict, dict[str, Tensor]]:
    plain = ("fc_norm", "norm_before_fc", "feedback_after_norm", "norm_before_residual", "qk_norm", "attention_bias")
    ids = default_layer_ids(config.target_num_hidden_layers)
    check_writable(config, FORMAT.name, {**dict.fromkeys(plain, False), "target_layer_ids": ids})
    fields = {"architectures": ["LlamaForCausalLM"], **flat_config(config, weights)}
    fields["draft_vocab_size"] = config.draft_vocab_size
    if config.own_embeddings:
        fields["target_hidden_size"] = config.target_hidden_size
    whole = config.draft_vocab_size == config.vocab_size
    return fields, {name: tensor for name, tensor in weights.items() if not (whole and name in ("d2t", "t2d"))}


FORMAT = Format("safeailab", _matches, _fields, _write)
