"""Which architectures can be targets: the list behind the tests and behind the table in examples/models.md.

python tests/architectures.py  # writes the table anew
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import torch  # noqa: E402
from tiny_models import SLIDING_WINDOW, tiny_target  # noqa: E402
from tiny_vision import VISION  # noqa: E402
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel  # noqa: E402

MODELS = Path(__file__).parent.parent / "examples" / "models.md"
BEGIN, END = "<!-- architectures: begin -->", "<!-- architectures: end -->"
_MIXED = ["sliding_attention", "full_attention"] * 4
_EXPERTS = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
_NO_GROUPS = ("num_key_value_heads",)


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: for people. model_type: of Transformers.
        remark: what is special about it. refusal: for those that cannot be targets, what the refusal says (a pattern).
        config: fields of its configuration. without: common fields that it does not know. auto_class: loads it.
    """

    name: str
    model_type: str
    remark: str
    config: dict[str, Any] = field(default_factory=dict)
    without: tuple[str, ...] = ()
    refusal: str | None = None
    auto_class: type = AutoModelForCausalLM

    def model(self, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        """A tiny random one."""
        return tiny_target(
            self.model_type, without=self.without, auto_class=self.auto_class, dtype=dtype, **self.config
        )


_WINDOW = {"sliding_window": SLIDING_WINDOW}
_MLA = {
    "kv_lora_rank": 12,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 6,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_ROUTED = {**_EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 24}
_GEMMA = {**_WINDOW, "layer_types": _MIXED, "query_pre_attn_scalar": 8}
ARCHITECTURES = [
    Architecture("Llama", "llama", "grouped queries"),
    Architecture("Mistral", "mistral", "sliding window", _WINDOW),
    Architecture("Mixtral", "mixtral", "experts, sliding window", {**_EXPERTS, **_WINDOW, "num_local_experts": 4}),
    Architecture("Qwen2", "qwen2", "biases"),
    Architecture("Qwen3", "qwen3", "norms of queries and keys"),
    Architecture("Qwen3-MoE", "qwen3_moe", "experts", {**_EXPERTS, "num_experts": 4, "moe_intermediate_size": 24}),
    Architecture(
        "Gemma 2",
        "gemma2",
        "soft-capped scores (eager) and logits, mixed windows",
        {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 30.0, "attn_implementation": "eager"},
    ),
    Architecture("Gemma 3 (text)", "gemma3_text", "two rotary bases, mixed windows", _GEMMA),
    Architecture("Phi", "phi", "partial rotary positions", {"partial_rotary_factor": 0.5}),
    Architecture("Phi-3", "phi3", "fused projections"),
    Architecture("OLMo 2", "olmo2", "norms behind the layers"),
    Architecture("Granite", "granite", "multipliers", {"embedding_multiplier": 3.0, "logits_scaling": 2.0}),
    Architecture("Cohere", "cohere", "parallel layers, scaled logits"),
    Architecture("Cohere 2", "cohere2", "layers without positions, mixed windows", _WINDOW),
    Architecture("SmolLM3", "smollm3", "layers without positions"),
    Architecture("StableLM", "stablelm", "partial rotary positions"),
    Architecture("GLM-4", "glm4", "four norms a layer", {"partial_rotary_factor": 0.5}),
    Architecture("EXAONE 4", "exaone4", "mixed windows", {**_WINDOW, "layer_types": _MIXED}),
    Architecture("StarCoder 2", "starcoder2", "sliding window, biases", _WINDOW),
    Architecture("GPT-NeoX", "gpt_neox", "parallel layers", without=_NO_GROUPS),
    Architecture("GPT-2", "gpt2", "learned positions", without=_NO_GROUPS),
    Architecture("OPT", "opt", "learned positions", {"ffn_dim": 48, "word_embed_proj_dim": 32}, _NO_GROUPS),
    Architecture("Falcon", "falcon", "one key head", {"multi_query": True}, (*_NO_GROUPS, "head_dim")),
    Architecture(
        "Falcon, new decoder",
        "falcon",
        "keys repeated in the cache",
        {"new_decoder_architecture": True, "num_kv_heads": 2},
        (*_NO_GROUPS, "head_dim"),
    ),
    Architecture(
        "gpt-oss",
        "gpt_oss",
        "attention sinks (eager), experts, mixed windows",
        {**_EXPERTS, **_WINDOW, "layer_types": _MIXED, "num_local_experts": 4, "attn_implementation": "eager"},
    ),
    Architecture("DeepSeek-V2", "deepseek_v2", "latent attention, experts", {**_MLA, **_ROUTED}, ("head_dim",)),
    Architecture("DeepSeek-V3", "deepseek_v3", "latent attention, experts", {**_MLA, **_ROUTED}, ("head_dim",)),
    Architecture("GLM-4.7-Flash", "glm4_moe_lite", "latent attention, experts", {**_MLA, **_ROUTED}, ("head_dim",)),
    Architecture("MiniCPM 3", "minicpm3", "latent attention", _MLA, ("head_dim",)),
    Architecture(
        "DeepSeek-V3.2",
        "deepseek_v32",
        "sparse attention by an index",
        {**_MLA, **_ROUTED},
        ("head_dim",),
        # its name before Transformers 5.24, and since
        refusal="layers with recurrent or unsupported state \\((deepseek_sparse|indexed)_attention\\)",
    ),
    Architecture(
        "LongCat-Flash",
        "longcat_flash",
        "two latent attentions a layer, experts",
        {
            **_MLA,
            "num_layers": 2,
            "ffn_hidden_size": 32,
            "expert_ffn_hidden_size": 16,
            "n_routed_experts": 4,
            "zero_expert_num": 2,
            "moe_topk": 2,
        },
        ("head_dim",),
        refusal="two attentions in every layer",
    ),
    Architecture(
        "Gemma 3n (text)",
        "gemma3n_text",
        "embeddings for every layer",
        {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 2},
        refusal="embeddings of tokens for every layer",
    ),
    Architecture(
        "BLOOM",
        "bloom",
        "ALiBi",
        {"n_layer": 8, "n_head": 4, "attn_implementation": "eager"},
        refusal="a forward\\(\\) that does not take position_ids",
    ),
    Architecture(
        "Falcon with ALiBi",
        "falcon",
        "ALiBi",
        {"alibi": True},
        (*_NO_GROUPS, "head_dim"),
        "ALiBi, which takes positions from slots",
    ),
    Architecture(
        "Mamba",
        "mamba",
        "state space",
        {"state_size": 4, "attn_implementation": "eager"},
        refusal="does not take attention_mask|num_attention_heads|recurrent",
    ),
    Architecture(
        "T5",
        "t5",
        "encoder and decoder",
        {"attn_implementation": "eager"},
        refusal="an encoder-decoder",
        auto_class=AutoModelForSeq2SeqLM,
    ),
]


def table() -> str:
    """The table in Markdown."""
    lines = ["| target | what is special | same as plain `generate` |", "|---|---|---|"]
    lines += [f"| {one.name} | {one.remark} | yes |" for one in ARCHITECTURES if one.refusal is None]
    lines += [f"| {name} | {one.remark} | yes |" for name, one in VISION.items()]
    refused = [one for one in ARCHITECTURES if one.refusal is not None]
    lines += [f"| {one.name} | {one.remark} | refused before it starts |" for one in refused]
    return "\n".join(lines)


def written(text: str) -> str:
    """`text` with the table between its marks."""
    return re.sub(f"{BEGIN}.*?{END}", f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)


if __name__ == "__main__":
    MODELS.write_text(written(MODELS.read_text(encoding="utf-8")), encoding="utf-8")
