"""The draft network: an EAGLE-3 decoder layer that can also read a future token.

    features F_i (3 d) -- fc --> h_i (d) -------+
                                                +--> [norm(emb) ; norm(h)] --> decoder layer --> h'_i
    embedding of x_{i+1} (the target's) --------+                                                 |
                                                                                   norm --> lm_head --> x_{i+2}
    h'_i is fed back in place of h for the next drafted row, as it is or (feedback_after_norm) after the norm.
    With `future_words`, those of the last accepted node's contemplate tokens join what the head reads of a round's first rows.

Row `i` holds position `i`: it knows `x_{i+1}` and the features at `i`, and predicts `x_{i+2}`. Example: prompt `a b c`,
the target has just emitted `d`. The features of `c` (i = 2) and the token `d` (x_3) form row 2, which drafts x_4.

The module knows nothing of trees, of `generate` or of training: callers give it token embeddings, hidden states,
positions, a mask and a cache. Which variant of EAGLE-3 it is (`ConFuConfig`) shows in none of its methods: callers feed
back what `forward` returns. Its weights are named as in EAGLE-3 checkpoints (`fc`, `midlayer`, `norm`, `lm_head`, `d2t`,
`t2d`; with the variants `fc_norm.{0,1,2}` or `input_norm`, `self_attn.{q,k}_norm`, `embed_tokens`); `future_*` is ConFu's.
"""

from __future__ import annotations

import uuid

import torch
from torch import nn
from torch.nn import functional as F
from transformers import Cache, PreTrainedModel
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .configuration_confu import ConFuConfig
from .errors import refusal
from .experts import ExpertMixture


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, Llama's half-split layout.

    `states` `(B, heads, W, head_dim)`, `cos` and `sin` `(B, 1, W, head_dim)`.
    """
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin


class DraftRMSNorm(nn.RMSNorm):
    """RMS norm in the dtype of its input: under autocast the weights are float32 and the states are not."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(states, self.normalized_shape, self.weight.to(states.dtype), self.eps)


class DraftAttention(nn.Module):
    """Self-attention whose query, key and value read `2 d` inputs (EAGLE-3)."""

    def __init__(self, config: ConFuConfig):
        super().__init__()
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        width, bias = 2 * config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(width, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, self.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=bias)
        if config.qk_norm:
            self.q_norm = DraftRMSNorm(self.head_dim, eps=config.rms_norm_eps)
            self.k_norm = DraftRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def query(self, inputs: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`(B, W, 2 d)` -> `(B, heads, W, head_dim)`."""
        query = self._split(self.q_proj(inputs))
        return rotate(self.q_norm(query) if self.qk_norm else query, cos, sin)

    def key_value(
        self, inputs: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`(B, W, 2 d)` -> keys and values, each `(B, kv_heads, W, head_dim)`."""
        key = self._split(self.k_proj(inputs))
        return rotate(self.k_norm(key) if self.qk_norm else key, cos, sin), self._split(self.v_proj(inputs))

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Softmax attention under a boolean or additive mask `(B, 1, W, keys)` -> `(B, W, d)`."""
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return self.merge(context)

    def merge(self, context: torch.Tensor) -> torch.Tensor:
        """`(B, heads, W, head_dim)` -> `(B, W, d)`."""
        return self.o_proj(context.transpose(1, 2).flatten(2))

    def _split(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class DraftMLP(nn.Module):
    """Gated MLP as in Llama."""

    def __init__(self, config: ConFuConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.activation(self.gate_proj(states)) * self.up_proj(states))


class DraftLayer(nn.Module):
    """EAGLE-3's decoder layer, in the pieces that decoding and training both put together."""

    def __init__(self, config: ConFuConfig):
        super().__init__()
        self.input_layernorm = DraftRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = DraftRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = DraftAttention(config)
        self.post_attention_layernorm = DraftRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = DraftMLP(config)
        self.norm_before_residual = config.norm_before_residual

    def attention_inputs(self, token_embeds: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`[norm(emb) ; norm(h)]`, `(B, W, 2 d)`."""
        return torch.cat((self.input_layernorm(token_embeds), self.hidden_norm(hidden_states)), dim=-1)

    def residual(self, inputs: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(B, W, d)` where the residual stream starts: `hidden_states`, or their normed half of `attention_inputs`."""
        return inputs[..., -hidden_states.shape[-1] :] if self.norm_before_residual else hidden_states

    def finish(self, residual: torch.Tensor, attention_output: torch.Tensor) -> torch.Tensor:
        """Everything after attention: both residual connections and the MLP."""
        hidden_states = residual + attention_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class ClosedLinear(nn.Linear):
    """Starts as zero: a fresh future token changes neither residual stream nor logits; training opens these paths."""


class ConFuDraftModel(PreTrainedModel):
    """The draft of ConFu, and, with `config.contemplate=False`, of EAGLE-3.

    [`ConFuAssistant`] is this plus what `generate` needs.
    """

    config_class = ConFuConfig
    base_model_prefix = "confu_draft"
    main_input_name = "hidden_states"
    _supports_sdpa = True
    _no_split_modules = ["DraftLayer"]

    def __init__(self, config: ConFuConfig):
        super().__init__(config)
        width, features = config.hidden_size, config.num_features * config.target_hidden_size
        if config.own_embeddings:
            self.embed_tokens = nn.Embedding(config.vocab_size, width)
        if config.fc_norm:
            norms = (DraftRMSNorm(config.target_hidden_size, eps=config.rms_norm_eps) for _ in config.target_layer_ids)
            self.fc_norm = nn.ModuleList(norms)
        if config.norm_before_fc:
            self.input_norm = DraftRMSNorm(features, eps=config.rms_norm_eps)
        self.fc = nn.Linear(features, width, bias=False)
        self.midlayer = DraftLayer(config)
        self.norm = DraftRMSNorm(width, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(width, config.draft_vocab_size, bias=False)
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.long))
        self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab_size)
        if config.contemplate:
            self.future_fc = nn.Linear(features, width, bias=False)
            self.future_mixture = ExpertMixture(
                width, width, config.num_future_experts, config.num_future_experts_per_token
            )
            self.future_skip = ClosedLinear(width, width, bias=False)
            if config.future_words:
                self.future_word = ClosedLinear(config.target_hidden_size, config.future_words * width, bias=False)
        # Caches outlive calls: by this a draft knows its own again, and so does its copy.
        self.instance_key = uuid.uuid4().hex
        self._frequencies: dict[torch.device, tuple[torch.Tensor, float]] = {}
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Through `init` all of it: this also runs after loading, and there `init` leaves alone what the file gave.
        super()._init_weights(module)
        if isinstance(module, ExpertMixture):
            init.normal_(module.experts, std=self.config.initializer_range)
        elif isinstance(module, ClosedLinear):
            init.zeros_(module.weight)
        elif isinstance(module, ConFuDraftModel):
            init.zeros_(module.d2t)
            init.copy_(module.t2d, torch.arange(module.config.vocab_size) < module.config.draft_vocab_size)

    def set_draft_vocabulary(self, token_ids: torch.Tensor) -> None:
        """Choose the target ids that the draft can propose.

        Args:
            token_ids: `(draft_vocab_size,)` long, distinct target ids. They are sorted: draft id `i` stands for the
                `i`-th smallest, stored as EAGLE does, `d2t[i] = token_ids[i] - i`.
        """
        token_ids = torch.as_tensor(token_ids, dtype=torch.long, device=self.d2t.device).unique()
        if token_ids.numel() != self.config.draft_vocab_size:
            raise refusal(
                "set_draft_vocabulary",
                got=f"{token_ids.numel()} distinct token ids",
                expected=f"draft_vocab_size={self.config.draft_vocab_size}",
                fix="Pass as many ids as the draft's head has rows.",
            )
        if token_ids[0] < 0 or token_ids[-1] >= self.config.vocab_size:
            raise refusal(
                "set_draft_vocabulary",
                got=f"token ids from {token_ids[0]} to {token_ids[-1]}",
                expected=f"ids in [0, vocab_size={self.config.vocab_size})",
                fix="Take them from this target's tokenizer.",
            )
        self.d2t.copy_(token_ids - torch.arange(token_ids.numel(), device=token_ids.device))
        self.t2d.zero_().index_fill_(0, token_ids, True)

    @property
    def draft_token_ids(self) -> torch.Tensor:
        """`(draft_vocab_size,)` long: the target id of each draft id."""
        return self.d2t + torch.arange(self.d2t.numel(), device=self.d2t.device)

    def input_embeddings(self, target_embeddings: nn.Module) -> nn.Module:
        """Which embeddings the rows read: the draft's own where it has any, else `target_embeddings`.

        Both map token ids of the target `(...)` to `(..., d)`; the target's may be on another device, in another dtype.
        """
        return self.embed_tokens if self.config.own_embeddings else target_embeddings

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """`features` of the target `(..., 3 d)` -> hidden states `h` `(..., d)` of verified rows."""
        return self.fc(self._normed(features))

    def fuse_future(self, futures: torch.Tensor) -> torch.Tensor:
        """`futures`, of which the features of contemplate tokens `(..., 3 d)`, -> `W_f f` `(..., d)`; normed as all
        features are."""
        return self.future_fc(self._normed(futures[..., : self.fc.in_features]))

    def words(self, futures: torch.Tensor) -> torch.Tensor | None:
        """What contemplate tokens say next, as [`logits`] reads it: `(..., n, d)`, word `k` for the rows of depth `k`; None
        without `config.future_words`.

        `futures` `(..., 3 d + n d)`, behind the features the states that the target's head would read, zeros for none.
        """
        count = self.config.future_words
        if not count:
            return None
        states = futures[..., self.fc.in_features :].unflatten(-1, (count, -1))
        every = self.future_word(states).unflatten(-1, (count, -1))  # (..., token, word, d); a token has its own map
        return every.diagonal(dim1=-3, dim2=-2).movedim(-1, -2)

    def _normed(self, features: torch.Tensor) -> torch.Tensor:
        if self.config.norm_before_fc:
            return self.input_norm(features)
        if not self.config.fc_norm:
            return features
        parts = features.split(self.config.target_hidden_size, dim=-1)
        return torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)

    def rotary(self, position_ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """`position_ids` `(B, W)` -> `cos`, `sin` in `dtype`, each `(B, 1, W, head_dim)`."""
        frequencies, scale = self._rope(position_ids.device)
        angles = position_ids[:, None, :, None].to(torch.float64) * frequencies  # (B, 1, W, head_dim / 2)
        angles = torch.cat((angles, angles), dim=-1)
        return (scale * angles.cos()).to(dtype), (scale * angles.sin()).to(dtype)

    def _rope(self, device: torch.device) -> tuple[torch.Tensor, float]:
        """`(head_dim / 2,)` rotary frequencies, and what cosine and sine are multiplied by."""
        if device not in self._frequencies:
            kind, width = self.config.rope_parameters["rope_type"], self.config.head_dim
            if kind == "default":
                half = torch.arange(0, width, 2, dtype=torch.float64, device=device)
                self._frequencies[device] = self.config.rope_theta ** (-half / width), 1.0
            else:
                frequencies, scale = ROPE_INIT_FUNCTIONS[kind](self.config, device)
                self._frequencies[device] = frequencies.to(torch.float64), scale
        return self._frequencies[device]

    def write_rows(
        self,
        token_embeds: torch.Tensor,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Cache,
    ) -> None:
        """Put the keys and values of verified rows into the cache; with one layer their outputs are never needed.

        Args:
            token_embeds: `(B, W, d)` embeddings of `x_{i+1}`.
            hidden_states: `(B, W, d)` `h_i`.
            position_ids: `(B, W)`, row `i` at position `i`.
        """
        inputs = self.midlayer.attention_inputs(token_embeds, hidden_states)
        cache.update(*self.midlayer.self_attn.key_value(inputs, *self.rotary(position_ids, inputs.dtype)), 0)

    def future_inputs(self, hidden_states: torch.Tensor, futures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the future token is made of.

        Args:
            hidden_states: `(..., d)` `h_v` of the last verified row.
            futures: `(..., 3 d)` the contemplate token's features `f_v` (with `config.future_words`, more behind them).

        Returns:
            `MoE_f(h_v)` and `W_f f_v`, each `(..., d)`: they take the places of the token embedding and of the hidden
            state.
        """
        return self.future_mixture(hidden_states), self.fuse_future(futures)

    def forward(
        self,
        token_embeds: torch.Tensor,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        skip: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One draft step over `W` rows.

        Args:
            token_embeds: `(B, W, d)` embeddings of `x_{i+1}`, from [`input_embeddings`].
            hidden_states: `(B, W, d)` `h_i` of verified rows, or what the step before returned.
            position_ids: `(B, W)` long.
            attention_mask: `(B, 1, W, keys)` boolean (True = may attend) or additive; None = attend to everything
                given.
            cache: cache of this one layer; the new keys and values go through its `update`.
            skip: `(B, W, d)` added to the residual stream: `future_skip(W_f f)` of the row that starts a round.

        Returns:
            `(B, W, d)`: fed back as `hidden_states` of the next step, and input of [`logits`]. Before the final norm, or
            behind it with `config.feedback_after_norm`.
        """
        inputs = self.midlayer.attention_inputs(token_embeds, hidden_states)
        rotary = self.rotary(position_ids, inputs.dtype)
        attention = self.midlayer.self_attn
        query = attention.query(inputs, *rotary)
        key, value = attention.key_value(inputs, *rotary)
        if cache is not None:
            key, value = cache.update(key, value, 0)
        residual = self.midlayer.residual(inputs, hidden_states)
        if skip is not None:
            residual = residual + skip
        return self.fed_back(self.midlayer.finish(residual, attention.attend(query, key, value, attention_mask)))

    def fed_back(self, states: torch.Tensor) -> torch.Tensor:
        """The layer's output, `states` `(..., d)`, as the next step reads it."""
        return self.norm(states) if self.config.feedback_after_norm else states

    def head_inputs(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What [`forward`] returned, `hidden_states` `(..., d)`, as the LM head reads it: normed, once."""
        return hidden_states if self.config.feedback_after_norm else self.norm(hidden_states)

    def logits(self, hidden_states: torch.Tensor, word: torch.Tensor | None = None) -> torch.Tensor:
        """`hidden_states` `(..., d)` -> `(..., draft_vocab_size)` over draft ids; map with [`draft_token_ids`].

        `word` `(..., d)`, the one of [`words`] that belongs to these rows: its logits are added.
        """
        states = self.head_inputs(hidden_states)
        return self.lm_head(states if word is None else states + word)
