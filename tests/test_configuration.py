"""ConFuConfig follows the target, survives its file, and refuses what cannot be."""

from __future__ import annotations

import pytest
from tiny_models import ARCHITECTURES, tiny_gemma3, tiny_llama

from confu_hf import ConFuConfig


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
            {"target_layer_ids": [2, 4]},
            r"got target_layer_ids=\[2, 4\].*expected three increasing indices in \[0, 31\]",
        ),
        ({"target_layer_ids": [2, 2, 4]}, "three increasing"),
        ({"target_layer_ids": [2, 4, 32]}, "three increasing"),
        ({"target_layer_ids": [-1, 4, 5]}, "three increasing"),
        ({"target_num_hidden_layers": 6}, "fewer than 7 layers needs them given"),
        ({"hidden_size": 64}, "got hidden_size=64, expected target_hidden_size=4096"),
        ({"num_key_value_heads": 5}, "got num_key_value_heads=5, expected a divisor of num_attention_heads=32"),
        ({"head_dim": 7}, "got head_dim=7, expected an even number"),
        ({"draft_vocab_size": 0}, r"got draft_vocab_size=0, expected a number in \[1, vocab_size=32000\]"),
        ({"draft_vocab_size": 32001}, "got draft_vocab_size=32001"),
        ({"num_future_experts_per_token": 9}, "got num_future_experts_per_token=9, expected a number in"),
    ],
)
def test_what_cannot_be_is_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        ConFuConfig(**fields)


def test_seven_layers_are_enough_for_the_default_features():
    assert ConFuConfig(target_num_hidden_layers=7).target_layer_ids == [2, 3, 4]
