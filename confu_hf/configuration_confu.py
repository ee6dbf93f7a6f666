"""`ConFuConfig`: the geometry of a draft and of the target it was made for. All validation of numbers happens here,
once."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class ConFuConfig(PreTrainedConfig):
    """Configuration of a ConFu draft model ([`ConFuAssistant`]).

    The draft is one EAGLE-3 decoder layer between a fusion of three target hidden states and a language-model head
    over a reduced vocabulary.
    `contemplate=True` adds the modules that read the future token `f` (ConFu); with `contemplate=False` it is an
    EAGLE-3 draft.

    Args:
        vocab_size: vocabulary of the target.
        target_model_type: `model_type` of the target's text config, e.g. `"llama"`.
        target_hidden_size: `d` of the target.
        target_num_hidden_layers: `L` of the target.
        target_layer_ids: the three layers whose *entering* hidden states are the features: `hidden_states[i]` of
            Transformers. Default `[2, L // 2, L - 3]`.
        hidden_size: width of the draft. It must equal `target_hidden_size`: the draft reads the target's own
            embeddings.
        intermediate_size, num_attention_heads, num_key_value_heads, head_dim, hidden_act, rms_norm_eps, rope_theta,
        max_position_embeddings,
        attention_bias: of the draft's decoder layer, named as in Llama.
        draft_vocab_size: rows of the draft's LM head; `d2t`/`t2d` map between draft and target ids.
        contemplate: whether the draft has the future-token modules and comes with an adapter.
        num_future_experts, num_future_experts_per_token: the mixture `MoE_f` of the future token.
        initializer_range: standard deviation of the initial weights.
    """

    model_type = "confu"

    def __init__(
        self,
        vocab_size: int = 32000,
        target_model_type: str = "llama",
        target_hidden_size: int = 4096,
        target_num_hidden_layers: int = 32,
        target_layer_ids: list[int] | None = None,
        hidden_size: int | None = None,
        intermediate_size: int = 11008,
        num_attention_heads: int = 32,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        max_position_embeddings: int = 2048,
        attention_bias: bool = False,
        draft_vocab_size: int | None = None,
        contemplate: bool = True,
        num_future_experts: int = 8,
        num_future_experts_per_token: int = 2,
        initializer_range: float = 0.02,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ):
        self.vocab_size = vocab_size
        self.target_model_type = target_model_type
        self.target_hidden_size = target_hidden_size
        self.target_num_hidden_layers = target_num_hidden_layers
        layers = target_num_hidden_layers
        self.target_layer_ids = [2, layers // 2, layers - 3] if target_layer_ids is None else list(target_layer_ids)
        self.hidden_size = target_hidden_size if hidden_size is None else hidden_size
        self.intermediate_size = intermediate_size
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.head_dim = self.hidden_size // num_attention_heads if head_dim is None else head_dim
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.attention_bias = attention_bias
        self.draft_vocab_size = vocab_size if draft_vocab_size is None else draft_vocab_size
        self.contemplate = contemplate
        self.num_future_experts = num_future_experts
        self.num_future_experts_per_token = num_future_experts_per_token
        self.initializer_range = initializer_range
        self._check_geometry()
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def _check_geometry(self) -> None:
        def refuse(got: str, expected: str) -> None:
            raise ValueError(f"ConFuConfig: got {got}, expected {expected}.")

        ids, layers = self.target_layer_ids, self.target_num_hidden_layers
        if len(ids) != 3 or sorted(set(ids)) != ids or ids[0] < 0 or ids[-1] >= layers:
            refuse(
                f"target_layer_ids={ids} for a target of {layers} layers",
                f"three increasing indices in [0, {layers - 1}]; "
                "a target of fewer than 7 layers needs them given explicitly",
            )
        if self.hidden_size != self.target_hidden_size:
            refuse(
                f"hidden_size={self.hidden_size}",
                f"target_hidden_size={self.target_hidden_size}, since the draft reads the target's embeddings",
            )
        if self.num_attention_heads % self.num_key_value_heads:
            refuse(
                f"num_key_value_heads={self.num_key_value_heads}",
                f"a divisor of num_attention_heads={self.num_attention_heads}",
            )
        if self.head_dim % 2:
            refuse(f"head_dim={self.head_dim}", "an even number (rotary embeddings)")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            refuse(f"draft_vocab_size={self.draft_vocab_size}", f"a number in [1, vocab_size={self.vocab_size}]")
        if not 1 <= self.num_future_experts_per_token <= self.num_future_experts:
            refuse(
                f"num_future_experts_per_token={self.num_future_experts_per_token}",
                f"a number in [1, num_future_experts={self.num_future_experts}]",
            )

    @classmethod
    def from_target_config(cls, target_config: PreTrainedConfig, **overrides: Any) -> ConFuConfig:
        """A draft shaped like one decoder layer of the target; every field can be overridden by keyword."""
        text = target_config.get_text_config(decoder=True)
        fields = {
            "vocab_size": text.vocab_size,
            "target_model_type": text.model_type,
            "target_hidden_size": text.hidden_size,
            "target_num_hidden_layers": text.num_hidden_layers,
            "intermediate_size": text.intermediate_size,
            "num_attention_heads": text.num_attention_heads,
            "num_key_value_heads": getattr(text, "num_key_value_heads", None),
            "head_dim": getattr(text, "head_dim", None),
            "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-6),
            "rope_theta": _rope_theta(text),
            "max_position_embeddings": text.max_position_embeddings,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": text.pad_token_id,
        }
        return cls(**{**fields, **overrides})


def _rope_theta(text_config: PreTrainedConfig) -> float:
    """The base of the target's rotary embeddings: flat in old configs, in `rope_parameters` (perhaps per layer type)
    in new ones."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    if "rope_theta" not in parameters:
        parameters = next((value for value in parameters.values() if isinstance(value, dict)), {})
    return float(parameters.get("rope_theta", getattr(text_config, "rope_theta", None) or 10000.0))
