"""A draft that starts from its target, or from an EAGLE-3 draft (whose outputs test_modeling.py compares)."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_gemma2, tiny_llama, tiny_olmo2, tiny_phi3
from tiny_pairs import tiny_pair

from confu_hf import ConFuAssistant, ConFuConfig
from confu_hf.training.warm_start import warm_start_from_eagle3, warm_start_from_target


def test_what_is_copied_from_a_llama():
    target = tiny_llama()
    draft = tiny_pair(target)
    before = {name: weight.clone() for name, weight in draft.state_dict().items()}
    done = warm_start_from_target(draft, target)
    layer, copied = target.model.layers[-2], draft.midlayer
    features = torch.randn(4, 96, dtype=torch.float64)
    assert torch.equal(draft.fuse(features), features[:, 64:])  # the highest of the three
    for name in "qkv":
        weight = getattr(copied.self_attn, f"{name}_proj").weight
        assert not weight[:, :32].any()  # columns of the token's embedding
        assert torch.equal(weight[:, 32:], getattr(layer.self_attn, f"{name}_proj").weight)
    assert torch.equal(copied.self_attn.o_proj.weight, layer.self_attn.o_proj.weight)
    assert torch.equal(copied.hidden_norm.weight, layer.input_layernorm.weight)
    assert torch.equal(copied.post_attention_layernorm.weight, layer.post_attention_layernorm.weight)
    for name in ("gate", "up", "down"):
        assert torch.equal(getattr(copied.mlp, f"{name}_proj").weight, getattr(layer.mlp, f"{name}_proj").weight)
    assert torch.equal(draft.norm.weight, target.model.norm.weight)
    assert torch.equal(draft.lm_head.weight, target.lm_head.weight[draft.draft_token_ids])
    changed = {name for name, weight in draft.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed == set(done)


def test_without_attention_the_started_draft_is_the_targets_last_layers():
    """Layer -2's MLP, final norm and head on the fused features: the same numbers as with the target's own modules."""
    target = tiny_llama()
    draft = tiny_pair(target, contemplate=False)
    warm_start_from_target(draft, target)
    states = torch.randn(5, 32, dtype=torch.float64)
    layer = target.model.layers[-2]
    expected = states + layer.mlp(layer.post_attention_layernorm(states))
    expected = target.lm_head(target.model.norm(expected))[:, draft.draft_token_ids]
    # The target's norms compute in float32.
    torch.testing.assert_close(
        draft.logits(draft.midlayer.finish(states, torch.zeros_like(states))), expected, rtol=1e-5, atol=1e-5
    )


def test_norms_that_store_their_weight_minus_one():
    target = tiny_gemma2()
    draft = tiny_pair(target, contemplate=False)
    warm_start_from_target(draft, target)
    layer = target.model.layers[-2]
    for mine, theirs in (
        (draft.norm, target.model.norm),
        (draft.midlayer.hidden_norm, layer.input_layernorm),
        (draft.midlayer.post_attention_layernorm, layer.pre_feedforward_layernorm),
    ):
        torch.testing.assert_close(mine.weight, 1 + theirs.weight)


@pytest.mark.parametrize(
    ("make", "fresh"),
    [
        (tiny_phi3, ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]),  # fused in the target
        (tiny_olmo2, ["hidden_norm", "post_attention_layernorm"]),  # its norms stand behind the layers
    ],
)
def test_what_does_not_fit_keeps_its_start(make, fresh):
    target = make()
    draft = tiny_pair(target, contemplate=False)
    before = {name: weight.clone() for name, weight in draft.named_parameters()}
    done = warm_start_from_target(draft, target)
    for name, weight in draft.named_parameters():
        untouched = any(part in name for part in (*fresh, "input_layernorm"))
        assert torch.equal(weight, before[name]) == untouched == (name not in done), name


def test_an_eagle3_checkpoint_of_another_geometry_is_refused():
    target = tiny_llama()
    biased = tiny_pair(target, contemplate=False, attention_bias=True)
    config = ConFuConfig.from_dict({**biased.config.to_dict(), "contemplate": True, "attention_bias": False})
    with pytest.raises(ValueError, match=r"got unexpected weights \['midlayer.self_attn.*Create the ConFu draft from"):
        warm_start_from_eagle3(ConFuAssistant(config), biased)
