"""SpecForge and SGLang, and what vLLM reads of them: `LlamaForCausalLMEagle3` with an `eagle_config`.

`eagle_config` counts layers by the state that *leaves* them (SGLang adds one); the same name at the top of the config is
vLLM's and counts by the state that enters. `norm_output` is a trap: SpecForge's says that there is a norm before the head
(there always is), vLLM's that drafted rows hand on the normed state. Where it says true, nothing but the user, or our own
field, tells which is meant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...configuration_confu import ConFuConfig, default_layer_ids
from .layer import (
    ExportTarget,
    Foreign,
    Format,
    check_writable,
    flat_config,
    flat_fields,
    input_layer_ids,
    refuse,
    stated_flags,
)

ARCHITECTURES = {"LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"}
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
FLAGS = {
    "fc_norm": "fc_norm",
    "norm_before_fc": "norm_before_fc",
    "norm_before_residual": "norm_before_residual",
    "feedback_after_norm": "feedback_after_norm",
}


def _matches(config: Mapping[str, Any]) -> bool:
    return bool(ARCHITECTURES & set(config.get("architectures") or ()))


def eagle_layer_ids(checkpoint: Foreign) -> list[int] | None:
    """The layers that are read, by the state that enters them; None for the default."""
    eagle = checkpoint.config.get("eagle_config") or {}
    entering = input_layer_ids(checkpoint.config.get(LAYER_IDS), outputs=False)
    leaving = input_layer_ids(eagle.get(LAYER_IDS) or None, outputs=True)
    if entering and leaving and entering != leaving:
        raise refuse(
            checkpoint.source,
            f"{LAYER_IDS} {entering} and, in eagle_config, {eagle[LAYER_IDS]}",
            f"{[index - 1 for index in entering]} in eagle_config, which counts by the state that leaves a layer",
            "Pass `target_layer_ids`, counted by the state that enters a layer.",
        )
    return entering or leaving


def _fields(checkpoint: Foreign) -> dict[str, Any]:
    config = checkpoint.config
    eagle = config.get("eagle_config") or {}
    if eagle.get("use_aux_hidden_state") is False:
        raise refuse(checkpoint.source, "use_aux_hidden_state=False", "a draft that reads features of three layers")
    if config.get("norm_output") is False:
        raise refuse(checkpoint.source, "norm_output=False", "a norm before the LM head")
    fields = flat_fields(config, checkpoint.source) | stated_flags({**eagle, **config}, FLAGS)
    fields["target_layer_ids"] = eagle_layer_ids(checkpoint)
    if config.get("norm_output") and "feedback_after_norm" not in fields:
        fields["feedback_after_norm"] = None
    return fields


def _write(config: ConFuConfig, weights: Mapping[str, Tensor], target: ExportTarget) -> tuple[dict, dict[str, Tensor]]:
    check_writable(config, FORMAT.name, {"qk_norm": False})
    fields = {"architectures": ["LlamaForCausalLMEagle3"], **flat_config(config, weights)}
    fields["draft_vocab_size"] = config.draft_vocab_size
    if config.own_embeddings:
        fields["target_hidden_size"] = config.target_hidden_size
    fields |= {name: True for name, ours in FLAGS.items() if getattr(config, ours)}
    if config.feedback_after_norm:
        fields["norm_output"] = True
    ids = config.target_layer_ids
    if ids != default_layer_ids(config.target_num_hidden_layers):
        # Each engine finds its own way of counting: vLLM the first, SGLang the second.
        fields[LAYER_IDS] = ids
        fields["eagle_config"] = {"use_aux_hidden_state": True, LAYER_IDS: [index - 1 for index in ids]}
    return fields, dict(weights)


FORMAT = Format("specforge", _matches, _fields, _write)
