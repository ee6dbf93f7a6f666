"""ConFuConfig follows the target, survives its file, and refuses what cannot be."""

from __future__ import annotations

import pytest
from tiny_models import ARCHITECTURES, tiny_gemma3, tiny_llama
from transformers import MambaConfig

from confu_hf import ConFuConfig
from confu_hf.configuration_confu import TargetGeometry


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_draft_is_shaped_like_a_layer_of_the_target(architecture):
    target = ARCHITECTURES[architecture]().config
    config = ConFuConfig.from_target_config(target, draft_vocab_size=64)
    assert config.target_model_type == target.model_type
    assert config.hidden_size == config.target_hidden_size == target.hidden_size
    assert config.num_key_value_heads == target.num_key_value_heads
    assert config.head_dim == 8 and config.vocab_size == 97 and config.draft_vocab_size == 64
    assert config.target_layer_ids == [2, 4, 5]  # L = 8: 2, L // 2, L - 3
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)


def test_rope_theta_comes_from_wherever_the_target_keeps_it():
    flat = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).config
    assert ConFuConfig.from_target_config(flat).rope_theta == 5e5
    per_kind = tiny_gemma3().config
    known = {part["rope_theta"] for part in per_kind.rope_parameters.values()}
    assert ConFuConfig.from_target_config(per_kind).rope_theta in known


def test_round_trip_through_a_file(tmp_path):
    config = ConFuConfig.from_target_config(
        tiny_llama().config, draft_vocab_size=50, target_layer_ids=[1, 3, 6], rope_theta=123.0, num_future_experts=3
    )
    config.save_pretrained(tmp_path)
    loaded = ConFuConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.target_layer_ids == [1, 3, 6] and loaded.rope_theta == 123.0


def test_config_with_another_kind_of_draft_keeps_the_rest():
    eagle3 = ConFuConfig.from_target_config(tiny_llama().config, contemplate=False)
    confu = ConFuConfig.from_dict({**eagle3.to_dict(), "contemplate": True})
    differing = {name for name, value in confu.to_dict().items() if value != eagle3.to_dict().get(name)}
    assert differing == {"contemplate"}


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (
            {"target_layer_ids": []},
            r"got target_layer_ids=\[\].*expected increasing indices in \[0, 31\], one at least",
        ),
        ({"target_layer_ids": [2, 2, 4]}, "expected increasing"),
        ({"target_layer_ids": [2, 4, 32]}, "expected increasing"),
        ({"target_layer_ids": [-1, 4, 5]}, "expected increasing"),
        (
            {"hidden_size": 64, "own_embeddings": False},
            "got hidden_size=64 and own_embeddings=False, expected target_hidden_size=4096.*Set own_embeddings=True",
        ),
        ({"num_key_value_heads": 5}, "got num_key_value_heads=5, expected a divisor of num_attention_heads=32"),
        ({"head_dim": 7}, "got head_dim=7, expected an even number"),
        ({"draft_vocab_size": 0}, r"got draft_vocab_size=0, expected a number in \[1, vocab_size=32000\]"),
        ({"draft_vocab_size": 32001}, "got draft_vocab_size=32001"),
        ({"num_future_experts_per_token": 9}, "got num_future_experts_per_token=9, expected a number in"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}},
            "expected a rope_type out of default, linear, llama3",
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, "expected all that rope_type='llama3' needs.*factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "over whole heads"),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "got rope_theta=5.0 and .*expected one base"),
    ],
)
def test_what_cannot_be_is_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        ConFuConfig(**fields)


@pytest.mark.parametrize("layers", range(1, 40))
def test_default_features_of_any_depth(layers):
    ids = ConFuConfig(target_num_hidden_layers=layers).target_layer_ids
    assert len(ids) == min(layers, 3) and ids == sorted(set(ids)) and ids[0] >= 0 and ids[-1] < layers
    if layers >= 7:
        assert ids == [2, layers // 2, layers - 3]


def test_a_width_of_its_own_means_embeddings_of_its_own():
    assert not ConFuConfig().own_embeddings and ConFuConfig(own_embeddings=True).own_embeddings
    narrow = ConFuConfig.from_target_config(tiny_llama().config, hidden_size=16)
    assert narrow.own_embeddings and narrow.target_hidden_size == 32 and narrow.head_dim == 8


def test_rotary_parameters_in_all_their_spellings(tmp_path):
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    spellings = [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **llama3}},
        {"rope_parameters": {"rope_type": "llama3", **llama3}, "rope_theta": 5e5},
        {"rope_scaling": {"type": "llama3", **llama3}, "rope_theta": 5e5},
    ]
    configs = [ConFuConfig.from_target_config(tiny_llama().config, **fields) for fields in spellings]
    configs[0].save_pretrained(tmp_path)
    for config in (*configs, ConFuConfig.from_pretrained(tmp_path)):
        assert config.rope_parameters == {"rope_type": "llama3", "rope_theta": 5e5, **llama3}
        assert config.rope_theta == 5e5


def test_a_config_from_before_the_variants_is_what_it_was():
    fields = {"hidden_size": 576, "target_hidden_size": 576, "rope_theta": 1e5, "head_dim": 64}
    config = ConFuConfig(**fields, num_attention_heads=9, num_key_value_heads=3)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 1e5} and config.num_features == 3
    new = (
        config.own_embeddings,
        config.fc_norm,
        config.feedback_after_norm,
        config.norm_before_residual,
        config.qk_norm,
    )
    assert not any(new)


def test_what_has_no_attention_is_refused():
    with pytest.raises(ValueError, match="got a mamba config without num_attention_heads.*Use another target"):
        TargetGeometry.of(MambaConfig())
