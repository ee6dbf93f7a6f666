"""vLLM's `speculators`: a nested config; the draft's layer is in `transformer_layer_config`, layers are `layers.N`.

Layer ids count by the state that enters a layer. `norm_before_residual` must be said: the default differs by reader.
`norm_output` means that drafted rows hand on the normed state. Maps of the vocabulary exist only where it is a part. Token
embeddings are always saved, be they the target's: its own loader does not fetch them dependably.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...configuration_confu import ConFuConfig
from ...errors import refusal
from .layer import (
    LAYER,
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

LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
FLAGS = {
    "fc_norm": "fc_norm",
    "norm_before_fc": "norm_before_fc",
    "norm_before_residual": "norm_before_residual",
    "norm_output": "feedback_after_norm",
}
SPECULATIVE_TOKENS = 3  # how long a chain an engine drafts unless it is told


def _matches(config: Mapping[str, Any]) -> bool:
    return "speculators_model_type" in config


def _fields(checkpoint: Foreign) -> dict[str, Any]:
    config = checkpoint.config
    kind, layer = config["speculators_model_type"], config.get("transformer_layer_config")
    if kind != "eagle3" or not isinstance(layer, dict):
        raise refuse(checkpoint.source, f"speculators_model_type={kind!r}", "'eagle3', with transformer_layer_config")
    if "sliding_attention" in (layer.get("layer_types") or ()):
        raise refuse(checkpoint.source, "a layer with a sliding window", "full attention")
    outer = {name: config[name] for name in ("draft_vocab_size", "target_hidden_size") if name in config}
    fields = flat_fields({**layer, **outer}, checkpoint.source)
    fields |= {"norm_before_residual": None, **stated_flags(config, FLAGS)}
    fields["target_layer_ids"] = input_layer_ids(config.get(LAYER_IDS), outputs=False)
    return fields


def _write(config: ConFuConfig, weights: Mapping[str, Tensor], target: ExportTarget) -> tuple[dict, dict[str, Tensor]]:
    check_writable(config, FORMAT.name, {"hidden_size": config.target_hidden_size})
    layer = flat_config(config, weights)
    if config.qk_norm:
        layer["model_type"] = "qwen3"
    if config.num_features != 3:
        layer["num_aux_hidden_states"] = config.num_features
    proposal = {"proposal_type": "greedy", "speculative_tokens": SPECULATIVE_TOKENS}
    fields = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": target.name_or_path, "architectures": list(target.architectures)},
        },
        "transformer_layer_config": layer,
        "draft_vocab_size": config.draft_vocab_size,
        LAYER_IDS: config.target_layer_ids,
        **{name: getattr(config, ours) for name, ours in FLAGS.items()},
        "tie_word_embeddings": False,
        "torch_dtype": layer["torch_dtype"],
    }
    whole = config.draft_vocab_size == config.vocab_size
    kept = {name: tensor for name, tensor in weights.items() if not (whole and name in ("d2t", "t2d"))}
    if not config.own_embeddings:
        kept["embed_tokens.weight"] = _target_embeddings(target, weights["fc.weight"].dtype)
    return fields, {name.replace(LAYER, "layers.0.", 1): tensor for name, tensor in kept.items()}


def _target_embeddings(target: ExportTarget, dtype: torch.dtype) -> Tensor:
    if target.embeddings is None:
        raise refusal(
            "Writing an EAGLE-3 draft as speculators",
            got="no embeddings of its target",
            expected="them, for the draft has none of its own",
            fix="Pass `ExportTarget.of(model)`.",
        )
    return target.embeddings.detach().to("cpu", dtype).contiguous()


FORMAT = Format("speculators", _matches, _fields, _write)
