"""EAGLE-3 drafts as other projects save them, written by hand: known numbers under each project's own names."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_models import VOCAB_SIZE
from torch import Tensor

HEADS, KV_HEADS, HEAD_DIM, INTERMEDIATE, TARGET_WIDTH = 4, 2, 8, 40, 32
DRAFT_VOCAB = 61
EPS = 1e-5
FLAT = {
    "model_type": "llama",
    "hidden_size": TARGET_WIDTH,
    "intermediate_size": INTERMEDIATE,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "num_hidden_layers": 1,
    "rms_norm_eps": EPS,
    "max_position_embeddings": 256,
    "vocab_size": VOCAB_SIZE,
    "hidden_act": "silu",
    "torch_dtype": "float64",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@dataclass(frozen=True)
class Case:
    """A checkpoint: how its layer is called, what its config says, which tensors it has beside the plain ones.

    `expected` are the fields of `ConFuConfig` that a reader must arrive at.
    """

    config: dict[str, Any]
    layer: str = "midlayer."
    maps: tuple[str, ...] = ("d2t", "t2d")
    extras: tuple[str, ...] = ()
    width: int = TARGET_WIDTH
    whole: bool = False
    expected: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)


def _nested(layer: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": None, "architectures": []}},
        "transformer_layer_config": {**FLAT, **(layer or {})},
        "draft_vocab_size": DRAFT_VOCAB,
        "norm_before_residual": False,
        **fields,
    }


_MODELOPT = {
    "use_aux_hidden_state": True,
    "use_input_layernorm_in_first_layer": True,
    "use_last_layernorm": True,
    "use_mtp_layernorm": False,
    "next_layer_regular": True,
}
_IDS = "eagle_aux_hidden_state_layer_ids"
_SPECFORGE = {**FLAT, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFT_VOCAB}

CASES = {
    "safeailab": Case({**FLAT, "architectures": ["LlamaForCausalLM"], "draft_vocab_size": DRAFT_VOCAB}),
    "safeailab-whole-vocabulary": Case({**FLAT, "draft_vocab_size": VOCAB_SIZE}, maps=(), whole=True),
    "safeailab-own-embeddings": Case(
        {**FLAT, "hidden_size": 24, "target_hidden_size": TARGET_WIDTH, "draft_vocab_size": DRAFT_VOCAB},
        width=24,
        extras=("embed_tokens",),
        expected={"own_embeddings": True},
    ),
    "safeailab-says-forty-layers": Case(
        {**FLAT, "num_hidden_layers": 40, "draft_vocab_size": DRAFT_VOCAB, "rope_theta": 5e5},
        expected={"rope_theta": 5e5},
    ),
    "specforge": Case({**_SPECFORGE, "norm_output": None}),
    "specforge-layers": Case(
        {**_SPECFORGE, "eagle_config": {"use_aux_hidden_state": True, _IDS: [0, 3, 6]}},
        expected={"target_layer_ids": [1, 4, 7]},
    ),
    "specforge-both-ways-of-counting": Case(
        {**_SPECFORGE, _IDS: [1, 4, 7], "eagle_config": {_IDS: [0, 3, 6]}},
        expected={"target_layer_ids": [1, 4, 7]},
    ),
    "specforge-as-vllm-reads-it": Case(
        {**_SPECFORGE, "fc_norm": True, "norm_output": True, "norm_before_residual": True, "attention_bias": True},
        extras=("fc_norm", "bias"),
        arguments={"feedback_after_norm": True},
        expected={
            "fc_norm": True,
            "feedback_after_norm": True,
            "norm_before_residual": True,
            "attention_bias": True,
        },
    ),
    "specforge-one-norm": Case(
        {**_SPECFORGE, "eagle_config": {"norm_before_fc": True}},
        extras=("input_norm",),
        expected={"norm_before_fc": True},
    ),
    "speculators": Case(_nested(), layer="layers.0.", extras=("embed_tokens",), expected={"own_embeddings": True}),
    "speculators-shared-embeddings": Case(_nested(), layer="layers.0.", extras=("target_embeddings",)),
    "speculators-whole-vocabulary": Case(_nested(draft_vocab_size=VOCAB_SIZE), layer="layers.0.", maps=(), whole=True),
    "speculators-3.1": Case(
        _nested({"model_type": "qwen3"}, fc_norm=True, norm_output=True, norm_before_residual=True, **{_IDS: [1, 4]}),
        layer="layers.0.",
        extras=("fc_norm", "qk_norm"),
        expected={
            "fc_norm": True,
            "feedback_after_norm": True,
            "norm_before_residual": True,
            "qk_norm": True,
            "target_layer_ids": [1, 4],
        },
    ),
    "modelopt": Case(
        {
            **_SPECFORGE,
            "rope_theta": 1e4,
            "rope_scaling": LLAMA3,
            "eagle_config": {**_MODELOPT, _IDS: [1, 3, 4], "parallel_draft_step": 1},
        },
        layer="layers.0.",
        maps=("d2t",),
        expected={"rope_parameters": {**LLAMA3, "rope_theta": 1e4}},
    ),
}


def tensors(case: Case, target_embeddings: Tensor, seed: int = 3) -> dict[str, Tensor]:
    """The weights by the project's names, float64."""
    generator = torch.Generator().manual_seed(seed)
    features = len(case.expected.get("target_layer_ids", (0, 0, 0))) * TARGET_WIDTH
    vocabulary = VOCAB_SIZE if case.whole else DRAFT_VOCAB

    def make(*shape: int) -> Tensor:
        weight = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return 1 + 0.1 * weight if len(shape) == 1 else 0.2 * weight

    width, heads, kv = case.width, HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = {
        "self_attn.q_proj.weight": make(heads, 2 * width),
        "self_attn.k_proj.weight": make(kv, 2 * width),
        "self_attn.v_proj.weight": make(kv, 2 * width),
        "self_attn.o_proj.weight": make(width, heads),
        "mlp.gate_proj.weight": make(INTERMEDIATE, width),
        "mlp.up_proj.weight": make(INTERMEDIATE, width),
        "mlp.down_proj.weight": make(width, INTERMEDIATE),
        **{f"{name}.weight": make(width) for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")},
    }
    if "bias" in case.extras:  # of queries, keys and values alone, as in Qwen2
        layer |= {f"self_attn.{name}_proj.bias": make(size) for name, size in zip("qkv", (heads, kv, kv), strict=True)}
    if "qk_norm" in case.extras:
        layer |= {f"self_attn.{name}_norm.weight": make(HEAD_DIM) for name in "qk"}
    weights = {case.layer + name: tensor for name, tensor in layer.items()}
    weights |= {
        "fc.weight": make(width, features),
        "norm.weight": make(width),
        "lm_head.weight": make(vocabulary, width),
    }
    if "fc_norm" in case.extras:
        weights |= {f"fc_norm.{index}.weight": make(TARGET_WIDTH) for index in range(features // TARGET_WIDTH)}
    if "input_norm" in case.extras:
        weights["input_norm.weight"] = make(features)
    if "embed_tokens" in case.extras:
        weights["embed_tokens.weight"] = make(VOCAB_SIZE, width)
    if "target_embeddings" in case.extras:
        weights["embed_tokens.weight"] = target_embeddings.clone()
    chosen = torch.randperm(VOCAB_SIZE, generator=generator)[:vocabulary].sort().values
    maps = {
        "d2t": chosen - torch.arange(vocabulary),
        "t2d": torch.zeros(VOCAB_SIZE).bool().index_fill(0, chosen, True),
    }
    return weights | {name: maps[name] for name in case.maps}


def save(folder: Path, config: dict[str, Any], weights: dict[str, Tensor], *, pickled: bool = False) -> Path:
    """A folder as it would come from the Hub."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if pickled:
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
