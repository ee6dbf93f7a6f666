"""Tiny random targets for all tests, built in memory from configs: 8 layers, hidden size 32, vocabulary 97, GQA."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB_SIZE = 97
NUM_LAYERS = 8
LAYER_IDS = (2, NUM_LAYERS // 2, NUM_LAYERS - 3)
SLIDING_WINDOW = 6

COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}
SLIDING_AND_FULL = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)


def tiny_target(
    model_type: str,
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    without: tuple[str, ...] = (),
    auto_class: type = AutoModelForCausalLM,
    **config,
) -> PreTrainedModel:
    """A frozen random model in eval mode; `config` overrides fields of its configuration and the implementations,
    `without` names common fields that it does not know."""
    implementation = {
        key: config.pop(key) for key in ("attn_implementation", "experts_implementation") if key in config
    }
    fields = {name: value for name, value in {**COMMON, **config}.items() if name not in without}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = auto_class.from_config(
            CONFIG_MAPPING[model_type](**fields), **{"attn_implementation": "sdpa", **implementation}
        )
        return frozen(model, dtype)


def frozen(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A fresh model in eval mode. Norm weights and biases start as constants, some projections as zeros: here every
    parameter matters."""
    for parameter in model.parameters():
        if parameter.ndim == 1 or not parameter.any():
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval().requires_grad_(False)


def tiny_llama(**kwargs) -> PreTrainedModel:
    return tiny_target("llama", **kwargs)


def tiny_qwen2(**kwargs) -> PreTrainedModel:
    return tiny_target("qwen2", **kwargs)


def tiny_qwen3(**kwargs) -> PreTrainedModel:
    return tiny_target("qwen3", **kwargs)


def tiny_mistral(**kwargs) -> PreTrainedModel:
    return tiny_target("mistral", **{"sliding_window": SLIDING_WINDOW, **kwargs})


def tiny_gemma2(**kwargs) -> PreTrainedModel:
    """Soft-capped attention (eager only) and logits, alternating sliding and full layers."""
    fields = {
        "attn_implementation": "eager",
        "sliding_window": SLIDING_WINDOW,
        "layer_types": SLIDING_AND_FULL,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    }
    return tiny_target("gemma2", **{**fields, **kwargs})


def tiny_gemma3(**kwargs) -> PreTrainedModel:
    """Two rotary bases, one for sliding and one for full layers."""
    fields = {"sliding_window": SLIDING_WINDOW, "layer_types": SLIDING_AND_FULL, "query_pre_attn_scalar": 8}
    return tiny_target("gemma3_text", **{**fields, **kwargs})


def tiny_phi3(**kwargs) -> PreTrainedModel:
    """Fused query, key and value projections."""
    return tiny_target("phi3", **kwargs)


def tiny_olmo2(**kwargs) -> PreTrainedModel:
    """Norms behind the layers, on queries and keys."""
    return tiny_target("olmo2", **kwargs)


def tiny_granite(**kwargs) -> PreTrainedModel:
    """Multipliers on embeddings (applied to inputs_embeds inside the model), residuals and logits."""
    fields = {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.3,
    }
    return tiny_target("granite", **{**fields, **kwargs})


def keep_softmax_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager attention takes its softmax in float32 even in a float64 model: that hides errors below 1e-7 and overflows
    on masks of the size of the float64 minimum."""
    softmax = torch.nn.functional.softmax

    def precise(states, dim=None, dtype=None, **kwargs):
        return softmax(states, dim=dim, dtype=None if states.dtype == torch.float64 else dtype, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "softmax", precise)


def tiny_mixtral(**kwargs) -> PreTrainedModel:
    """Routed experts, sliding window everywhere."""
    fields = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": SLIDING_WINDOW}
    # The default grouped product of experts knows no float64.
    return tiny_target("mixtral", **{"experts_implementation": "eager", **fields, **kwargs})


ARCHITECTURES = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
    "gemma2": tiny_gemma2,
    "gemma3": tiny_gemma3,
    "phi3": tiny_phi3,
    "olmo2": tiny_olmo2,
    "granite": tiny_granite,
    "mixtral": tiny_mixtral,
}
