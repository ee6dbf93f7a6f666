"""EAGLE-3's variants, each against the same layer computed anew from the weights, without the modules under test."""

from __future__ import annotations

import math

import pytest
import torch
from tiny_models import tiny_llama
from tiny_pairs import tiny_pair
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "plain": {},
    "feedback_after_norm": {"feedback_after_norm": True},
    "norm_before_residual": {"norm_before_residual": True},
    "fc_norm": {"fc_norm": True},
    "norm_before_fc": {"norm_before_fc": True},
    "qk_norm": {"qk_norm": True},
    "own_embeddings": {"own_embeddings": True},
    "narrow": {"hidden_size": 16},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
    "one_feature": {"target_layer_ids": [5]},
    "four_features": {"target_layer_ids": [0, 2, 4, 7]},
    "all": {
        "hidden_size": 24,
        "fc_norm": True,
        "qk_norm": True,
        "feedback_after_norm": True,
        "norm_before_residual": True,
        "rope_parameters": LLAMA3,
        "target_layer_ids": [1, 6],
    },
}
ROWS = 6


def rms(states, weight, eps):
    return states / (states.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(states, positions, config):
    """Rotation of `(heads, N, head_dim)` by Llama's own frequencies, pair by pair as complex numbers."""
    fields = {"head_dim": config.head_dim, "max_position_embeddings": config.max_position_embeddings}
    rope = LlamaRotaryEmbedding(LlamaConfig(rope_parameters=dict(config.rope_parameters), **fields))
    first, second = states.chunk(2, dim=-1)
    angles = positions[:, None].double() * rope.inv_freq.double()
    turned = torch.complex(first, second) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1) * rope.attention_scaling


def recomputed(weights, config, embeds, features, futures, positions):
    """First-step rows under a causal mask: fed-back states and logits, `(N, d)` and `(N, K)`; and `W_f f`."""
    eps, width = config.rms_norm_eps, config.hidden_size

    def fused(name, states):
        if config.norm_before_fc:
            states = rms(states, weights["input_norm.weight"], eps)
        parts = states.chunk(len(config.target_layer_ids), dim=-1)
        if config.fc_norm:
            parts = [rms(part, weights[f"fc_norm.{i}.weight"], eps) for i, part in enumerate(parts)]
        return torch.cat(list(parts), dim=-1) @ weights[f"{name}.weight"].T

    states = fused("fc", features)
    normed = rms(states, weights["midlayer.hidden_norm.weight"], eps)
    inputs = torch.cat([rms(embeds, weights["midlayer.input_layernorm.weight"], eps), normed], dim=-1)

    def heads(name):
        projected = inputs @ weights[f"midlayer.self_attn.{name}_proj.weight"].T
        projected = projected + weights.get(f"midlayer.self_attn.{name}_proj.bias", 0.0)
        projected = projected.view(len(inputs), -1, config.head_dim).transpose(0, 1)
        if name != "v" and config.qk_norm:
            projected = rms(projected, weights[f"midlayer.self_attn.{name}_norm.weight"], eps)
        return projected if name == "v" else rotated(projected, positions, config)

    query, key, value = (heads(name) for name in "qkv")
    groups = config.num_attention_heads // config.num_key_value_heads
    key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
    scores = query @ key.transpose(1, 2) / math.sqrt(config.head_dim)
    scores = scores.masked_fill(torch.ones(len(inputs), len(inputs)).triu(1).bool(), float("-inf"))
    context = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
    stream = (normed if config.norm_before_residual else states) + context @ weights[
        "midlayer.self_attn.o_proj.weight"
    ].T
    mid = rms(stream, weights["midlayer.post_attention_layernorm.weight"], eps)
    gate, up, down = (weights[f"midlayer.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    stream = stream + (F.silu(mid @ gate.T) * (mid @ up.T)) @ down.T
    normed = rms(stream, weights["norm.weight"], eps)
    assert stream.shape[-1] == width
    fed_back = normed if config.feedback_after_norm else stream
    return fed_back, normed @ weights["lm_head.weight"].T, fused("future_fc", futures)


@pytest.mark.parametrize("name", VARIANTS)
def test_each_variant_is_the_layer_computed_anew(name):
    target = tiny_llama()
    draft = tiny_pair(target, contemplate=False, **VARIANTS[name]).to(torch.float64)
    config = type(draft.config).from_dict({**draft.config.to_dict(), "contemplate": True})
    torch.manual_seed(0)
    confu = type(draft)(config).double()
    confu.load_state_dict(draft.state_dict(), strict=False)
    features, futures = torch.randn(2, ROWS, config.num_features * 32, dtype=torch.float64)
    tokens, positions = torch.randint(97, (1, ROWS)), torch.arange(3, 3 + ROWS)
    embeds = confu.input_embeddings(target.get_input_embeddings())(tokens)
    with torch.no_grad():
        mask = torch.ones(ROWS, ROWS).tril().bool()[None, None]
        states = confu(embeds, confu.fuse(features)[None], positions[None], attention_mask=mask)
        expected = recomputed(confu.state_dict(), config, embeds[0], features, futures, positions)
        tolerance = {"rtol": 1e-6, "atol": 1e-6}  # Llama's frequencies are float32
        torch.testing.assert_close(states[0], expected[0], **tolerance)
        torch.testing.assert_close(confu.logits(states)[0], expected[1], **tolerance)
        torch.testing.assert_close(confu.fuse_future(futures), expected[2], **tolerance)


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "plain"])
def test_each_variant_is_another_network(name):
    """The negative control: the switch alone, with the weights that both have, changes the logits."""
    target = tiny_llama()
    draft = tiny_pair(target, contemplate=False, **VARIANTS[name])
    plain = {**draft.config.to_dict(), **tiny_pair(target, contemplate=False).config.to_dict()}
    other = type(draft)(type(draft.config).from_dict(plain)).double()
    weights = {k: w for k, w in draft.state_dict().items() if other.state_dict().get(k, w[:0]).shape == w.shape}
    other.load_state_dict(weights, strict=False)
    torch.manual_seed(0)
    features = [torch.randn(1, ROWS, model.config.num_features * 32, dtype=torch.float64) for model in (draft, other)]
    tokens, positions = torch.randint(97, (1, ROWS)), 8 * torch.arange(ROWS)[None]
    outputs = []
    for model, feature in zip((draft, other), features, strict=True):
        embeds = model.input_embeddings(target.get_input_embeddings())(tokens)
        with torch.no_grad():
            states = model(embeds, model.fuse(feature), positions)
            outputs.append(model.logits(model(embeds, states, positions + 1)))
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["own_embeddings", "narrow"])
def test_own_embeddings_are_the_drafts(name, tmp_path):
    target = tiny_llama(dtype=torch.float32)
    draft = tiny_pair(target, **VARIANTS[name])
    assert draft.input_embeddings(target.get_input_embeddings()) is draft.embed_tokens
    draft.save_pretrained(tmp_path)
    loaded = type(draft).from_pretrained(tmp_path)
    assert torch.equal(loaded.embed_tokens.weight, draft.embed_tokens.weight)
    shared = tiny_pair(target)
    assert shared.input_embeddings(target.get_input_embeddings()) is target.get_input_embeddings()
    assert not any("embed" in key for key in shared.state_dict())
