"""`ConFuConfig`: the geometry of a draft and of the target it was made for. All validation of numbers happens here, once.

What a target's config says of its shapes, and which of its layers are read where nobody chose, is derived here for all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from .errors import refusal

# Rotary scalings whose frequencies do not depend on how long the text has become: keys in a cache stay valid.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class TargetGeometry:
    """The shapes of a target that drafts, adapters and caches depend on."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    caches_latents: bool = False  # multi-head latent attention: keys and values of different width in the cache

    @classmethod
    def of(cls, target_config: PreTrainedConfig) -> TargetGeometry:
        """Read from the text part of a target's config; a config without attention is refused."""
        text = target_config.get_text_config(decoder=True)
        heads, layers = (getattr(text, name, None) for name in ("num_attention_heads", "num_hidden_layers"))
        if heads is None or layers is None:
            raise refusal(
                "A draft needs an attention-based target",
                got=f"a {text.model_type} config without num_attention_heads or num_hidden_layers",
                expected="a decoder-only Transformer",
                fix="Use another target.",
            )
        # Falcon's configs do not say it: with its new decoder, keys are repeated before they come into the cache.
        multi_query = getattr(text, "multi_query", False) and not getattr(text, "new_decoder_architecture", False)
        latents = bool(getattr(text, "kv_lora_rank", None))
        # With latents, `head_dim` is that of the rotated part alone.
        head_dim = getattr(text, "v_head_dim" if latents else "head_dim", None)
        return cls(
            vocab_size=text.vocab_size,
            hidden_size=text.hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or (1 if multi_query else heads),
            head_dim=head_dim or text.hidden_size // heads,
            caches_latents=latents,
        )

    @property
    def soft_prompt_types(self) -> tuple[str, ...]:
        """How soft prompts can be given, the default first."""
        return ("embedding",) if self.caches_latents else ("kv", "embedding")


def default_layer_ids(num_layers: int) -> list[int]:
    """The layers whose entering hidden states are the features where nobody chose: EAGLE-3's `[2, L // 2, L - 3]`.

    Targets of fewer than 7 layers have no such three; they are read as early, in the middle and as late as they can be:
    6 layers [1, 3, 5], 4 layers [1, 2, 3], 3 layers [0, 1, 2], 2 layers [0, 1], 1 layer [0].
    """
    if num_layers >= 7:
        return [2, num_layers // 2, num_layers - 3]
    return [1, num_layers // 2, num_layers - 1] if num_layers >= 4 else list(range(num_layers))


class ConFuConfig(PreTrainedConfig):
    """Configuration of a ConFu draft model ([`ConFuAssistant`]).

    The draft is one EAGLE-3 decoder layer between a fusion of hidden states of the target and a language-model head over
    a reduced vocabulary. `contemplate=True` adds the modules that read the future token `f` (ConFu); with
    `contemplate=False` it is an EAGLE-3 draft.

    Args:
        vocab_size: vocabulary of the target.
        target_model_type: `model_type` of the target's text config, e.g. `"llama"`.
        target_hidden_size: `d` of the target.
        target_num_hidden_layers: `L` of the target.
        target_layer_ids: the layers whose *entering* hidden states are the features: `hidden_states[i]` of
            Transformers. As many as wanted; default three, [`default_layer_ids`].
        hidden_size: width of the draft; default that of the target.
        own_embeddings: whether the draft has token embeddings of its own instead of reading the target's. Default: only
            where its width is another one, for then it must.
        intermediate_size, num_attention_heads, num_key_value_heads, head_dim, hidden_act, rms_norm_eps,
        max_position_embeddings, attention_bias: of the draft's decoder layer, named as in Llama.
        rope_parameters: rotary embeddings as in Transformers, `rope_type` one of `ROPE_TYPES`.
        rope_theta: the base alone, for rotary embeddings without scaling; always `rope_parameters["rope_theta"]`.
        fc_norm: one RMS norm per feature before `fc` (EAGLE-3.1).
        norm_before_fc: one RMS norm over all features together before `fc`, instead of one for each.
        feedback_after_norm: what a drafted row hands to the next one is its state after the final norm (EAGLE-3.1), not
            before it.
        norm_before_residual: the residual stream of the layer starts at the normed hidden state, not at the hidden state.
        qk_norm: RMS norms over each head of queries and keys, before the rotation.
        draft_vocab_size: rows of the draft's LM head; `d2t`/`t2d` map between draft and target ids.
        contemplate: whether the draft has the future-token modules and comes with an adapter.
        num_future_experts, num_future_experts_per_token: the mixture `MoE_f` of the future token.
        future_words: contemplate tokens in a row behind a node, each of which speaks: what token `k` itself would say next
            joins the logits of the drafted rows of depth `k`. The future then carries their last hidden states, too. 0 =
            one token, and its features alone. `future_word=True`, as older files have it, is 1.
        initializer_range: standard deviation of the initial weights.
        base_model_name_or_path: name of the target that the draft was made for, where known.
        target_fingerprint, tokenizer_fingerprint: of that target's weights and of its vocabulary (`hub/fingerprint.py`).
    """

    model_type = "confu"

    vocab_size: int = 32000
    target_model_type: str = "llama"
    target_hidden_size: int = 4096
    target_num_hidden_layers: int = 32
    target_layer_ids: list[int] | None = None
    hidden_size: int | None = None
    own_embeddings: bool | None = None
    intermediate_size: int = 11008
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    hidden_act: str = "silu"
    rms_norm_eps: float = 1e-6
    rope_theta: float | None = None
    rope_parameters: dict | None = None
    max_position_embeddings: int = 2048
    attention_bias: bool = False
    fc_norm: bool = False
    norm_before_fc: bool = False
    feedback_after_norm: bool = False
    norm_before_residual: bool = False
    qk_norm: bool = False
    draft_vocab_size: int | None = None
    contemplate: bool = True
    num_future_experts: int = 8
    num_future_experts_per_token: int = 2
    future_words: int = 0
    initializer_range: float = 0.02
    base_model_name_or_path: str | None = None
    target_fingerprint: str | None = None
    tokenizer_fingerprint: str | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any):
        layers = self.target_num_hidden_layers
        self.target_layer_ids = (
            default_layer_ids(layers) if self.target_layer_ids is None else [*self.target_layer_ids]
        )
        if self.hidden_size is None:
            self.hidden_size = self.target_hidden_size
        if self.own_embeddings is None:
            self.own_embeddings = self.hidden_size != self.target_hidden_size
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.draft_vocab_size is None:
            self.draft_vocab_size = self.vocab_size
        if kwargs.pop("future_word", False):
            self.future_words = max(self.future_words, 1)
        self._check_geometry()
        self._set_rope(kwargs.pop("rope_scaling", None))
        super().__post_init__(**kwargs)

    @property
    def num_features(self) -> int:
        """Hidden states of the target that make one feature vector."""
        return len(self.target_layer_ids)

    @property
    def future_layer_ids(self) -> list[int]:
        """The hidden states of a contemplate token that make a future: the features, and with `future_words` the last."""
        return self.target_layer_ids + [self.target_num_hidden_layers] * (self.future_words > 0)

    @property
    def contemplate_length(self) -> int:
        """Contemplate tokens in a row behind a node."""
        return max(1, self.future_words)

    def _set_rope(self, rope_scaling: dict | None) -> None:
        """Bring `rope_theta`, `rope_parameters` and the older `rope_scaling` to one form, and check it."""
        given = dict(self.rope_parameters or rope_scaling or {})
        kind = given.pop("type", None)
        kind = given.setdefault("rope_type", kind or "default")
        theta = given.setdefault("rope_theta", 10000.0 if self.rope_theta is None else self.rope_theta)
        if self.rope_theta not in (None, theta):
            _refuse(
                f"rope_theta={self.rope_theta} and rope_parameters={given}", "one base", "Give rope_parameters alone."
            )
        if kind not in ROPE_TYPES or given.get("partial_rotary_factor", 1.0) != 1.0:
            _refuse(
                f"rope_parameters={given}",
                f"a rope_type out of {', '.join(ROPE_TYPES)}, over whole heads",
                "Give the draft rotary embeddings of its own: they need not be the target's.",
            )
        self.rope_theta, self.rope_parameters = theta, given
        try:
            self.standardize_rope_params()
            self.validate_rope()
        except KeyError as error:
            _refuse(f"rope_parameters={given}", f"all that rope_type={kind!r} needs", f"{error.args[0]}.")

    def _check_geometry(self) -> None:
        ids, layers = self.target_layer_ids, self.target_num_hidden_layers
        if not ids or sorted(set(ids)) != ids or ids[0] < 0 or ids[-1] >= layers:
            _refuse(
                f"target_layer_ids={ids} for a target of {layers} layers",
                f"increasing indices in [0, {layers - 1}], one at least",
                "Leave them out for the default.",
            )
        if self.hidden_size != self.target_hidden_size and not self.own_embeddings:
            _refuse(
                f"hidden_size={self.hidden_size} and own_embeddings=False",
                f"target_hidden_size={self.target_hidden_size} for a draft that reads the target's embeddings",
                "Set own_embeddings=True.",
            )
        if self.num_attention_heads % self.num_key_value_heads:
            _refuse(
                f"num_key_value_heads={self.num_key_value_heads}",
                f"a divisor of num_attention_heads={self.num_attention_heads}",
            )
        if self.head_dim < 2 or self.head_dim % 2:
            _refuse(f"head_dim={self.head_dim}", "an even number (rotary embeddings)")
        if self.fc_norm and self.norm_before_fc:
            _refuse("fc_norm=True and norm_before_fc=True", "one of them: norms apart, or one norm over all features")
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            _refuse(f"draft_vocab_size={self.draft_vocab_size}", f"a number in [1, vocab_size={self.vocab_size}]")
        if self.future_words < 0:
            _refuse(f"future_words={self.future_words}", "0 or more")
        if not 1 <= self.num_future_experts_per_token <= self.num_future_experts:
            _refuse(
                f"num_future_experts_per_token={self.num_future_experts_per_token}",
                f"a number in [1, num_future_experts={self.num_future_experts}]",
            )

    @classmethod
    def from_target_config(cls, target_config: PreTrainedConfig, **overrides: Any) -> ConFuConfig:
        """A draft shaped like one decoder layer of the target.

        Args:
            target_config: of a decoder-only Transformer, or of a model with a text part that is one.
            **overrides: fields of this config in place of those taken from the target.

        Raises:
            ValueError: the target has no attention, or a field makes no sense.
        """
        text, geometry = target_config.get_text_config(decoder=True), TargetGeometry.of(target_config)
        fields = {
            "vocab_size": geometry.vocab_size,
            "target_model_type": text.model_type,
            "target_hidden_size": geometry.hidden_size,
            "target_num_hidden_layers": geometry.num_hidden_layers,
            "intermediate_size": text.intermediate_size,
            "num_attention_heads": geometry.num_attention_heads,
            "num_key_value_heads": geometry.num_key_value_heads,
            "head_dim": geometry.head_dim,
            "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-6),
            "max_position_embeddings": text.max_position_embeddings,
            "bos_token_id": text.bos_token_id,
            "eos_token_id": text.eos_token_id,
            "pad_token_id": text.pad_token_id,
        }
        if not {"rope_parameters", "rope_scaling"} & set(overrides):
            fields["rope_theta"] = _rope_theta(text)
        return cls(**{**fields, **overrides})


def _refuse(got: str, expected: str, fix: str = "Correct it, or leave it out for the default.") -> None:
    raise refusal("ConFuConfig", got=got, expected=expected, fix=fix)


def _rope_theta(text_config: PreTrainedConfig) -> float:
    """The base of the target's rotary embeddings: flat in old configs, in `rope_parameters` (perhaps per layer type) in
    new ones."""
    parameters = getattr(text_config, "rope_parameters", None) or {}
    if "rope_theta" not in parameters:
        parameters = next((value for value in parameters.values() if isinstance(value, dict)), {})
    return float(parameters.get("rope_theta", getattr(text_config, "rope_theta", None) or 10000.0))
