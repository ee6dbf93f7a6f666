"""The adapter as a PEFT method: every way in and out, and a target that does not notice."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file, save_file
from tiny_models import ARCHITECTURES, tiny_llama

from confu_hf import ConFuAdapterConfig
from confu_hf.adapter.files import WEIGHT_NAMES, load_adapter_folder
from confu_hf.adapter.layer import ConFuLayer
from confu_hf.adapter.tuner import on_injection
from confu_hf.experts import mix_experts

PROMPT = torch.arange(3, 14)[None]


def adapter_weights(target, name="default"):
    return target.confu.adapter_weights(name)


def assert_same_weights(left, right):
    assert left.keys() == right.keys() == set(WEIGHT_NAMES)
    for name in WEIGHT_NAMES:
        assert torch.equal(left[name], right[name])


@pytest.fixture
def saved(tmp_path):
    """A folder with an adapter, and its weights."""
    model = get_peft_model(tiny_llama(), ConFuAdapterConfig())
    model.save_pretrained(tmp_path)
    return tmp_path, adapter_weights(model.get_base_model())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_logits_are_bit_identical_with_the_adapter(architecture, kind):
    target = ARCHITECTURES[architecture]()
    before = target(PROMPT, output_hidden_states=True)
    inject_adapter_in_model(ConFuAdapterConfig(soft_prompt_type=kind), target)
    after = target(PROMPT, output_hidden_states=True)
    assert torch.equal(before.logits, after.logits)
    assert all(torch.equal(*pair) for pair in zip(before.hidden_states, after.hidden_states, strict=True))


@pytest.mark.parametrize("kind", ["kv", "embedding"])
def test_shapes_and_initial_scale(kind):
    target = tiny_llama(dtype=torch.float32)
    config = ConFuAdapterConfig(num_virtual_tokens=5, num_experts=64, soft_prompt_type=kind)
    inject_adapter_in_model(config, target)
    layer = target.confu
    text = target.config
    prompts = (text.num_hidden_layers, 2, 5, 2, 8) if kind == "kv" else (5, 32)
    assert layer.prompt_weight().shape == prompts
    assert layer.soft_prompt_type == kind and layer.soft_prompt_length == 5
    for name, weight in adapter_weights(target).items():
        assert weight.shape == config.shapes()[name] and weight.dtype == torch.float32
        assert 0.015 < weight.std() < 0.025


def test_contemplate_embedding_mixes_experts_and_keeps_the_dtype_of_its_input():
    target = tiny_llama()
    inject_adapter_in_model(ConFuAdapterConfig(), target)
    features = torch.randn(2, 3, 96, dtype=torch.float32)
    layer = target.confu
    weights = adapter_weights(target)
    expected = mix_experts(features, weights["confu_router"], weights["confu_experts"], 2)
    result = layer.contemplate_embedding(features)
    assert result.shape == (2, 3, 32) and result.dtype == torch.float32
    torch.testing.assert_close(result, expected.float())


def test_only_the_adapter_trains():
    model = get_peft_model(tiny_llama().requires_grad_(True), ConFuAdapterConfig())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"base_model.model.confu.{name}.default.weight" for name in WEIGHT_NAMES}


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_peft_model_from_pretrained(saved, low_cpu_mem_usage):
    folder, weights = saved
    model = PeftModel.from_pretrained(tiny_llama(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    assert_same_weights(adapter_weights(model.get_base_model()), weights)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert PeftConfig.from_pretrained(folder).target_hidden_size == 32


def test_bf16_adapter_is_cast_at_its_edges(tmp_path):
    model = get_peft_model(tiny_llama(dtype=torch.bfloat16), ConFuAdapterConfig())
    layer = model.get_base_model().confu
    assert layer.prompt_weight().dtype == torch.float32  # PEFT upcasts
    assert layer.contemplate_embedding(torch.randn(1, 96, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.native_peft
def test_native_life_cycle(saved):
    folder, weights = saved
    target = tiny_llama()
    logits = target(PROMPT).logits
    info = target.load_adapter(str(folder))
    assert not info.missing_keys and not info.unexpected_keys
    assert_same_weights(adapter_weights(target), weights)
    target.add_adapter(ConFuAdapterConfig(num_virtual_tokens=3), "second")
    assert target.confu.current == "second" and target.confu.soft_prompt_length == 3
    target.set_adapter("default")
    assert target.confu.current == "default" and target.confu.soft_prompt_length == 16
    target.disable_adapters()
    assert target.confu.current is None
    with pytest.raises(ValueError, match="got disabled adapters, expected an active ConFu adapter. Call"):
        target.confu.prompt_weight()
    target.enable_adapters()
    assert target.confu.current == "default"
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        target.delete_adapter("default")
    assert target.confu.current == "second"
    target.delete_adapter("second")
    assert target.confu.current is None
    assert torch.equal(target(PROMPT).logits, logits)


def test_state_dict_round_trip():
    source, other = (get_peft_model(tiny_llama(), ConFuAdapterConfig()) for _ in range(2))
    state = get_peft_model_state_dict(source)
    assert set(state) == {f"base_model.model.confu.{name}.weight" for name in WEIGHT_NAMES}
    result = set_peft_model_state_dict(other, state)
    assert not result.unexpected_keys
    assert_same_weights(adapter_weights(source.get_base_model()), adapter_weights(other.get_base_model()))
    target = tiny_llama()
    inject_adapter_in_model(ConFuAdapterConfig(), target)
    set_peft_model_state_dict(target, state)
    assert_same_weights(adapter_weights(source.get_base_model()), adapter_weights(target))


@pytest.mark.native_peft
def test_lora_and_confu_on_one_model():
    target = tiny_llama()
    logits = target(PROMPT).logits
    target.add_adapter(LoraConfig(init_lora_weights=False), "lora")
    changed = target(PROMPT).logits
    assert not torch.equal(changed, logits)
    with pytest.warns(UserWarning, match="Already found"):
        inject_adapter_in_model(ConFuAdapterConfig(), target, "default")
    assert torch.equal(target(PROMPT).logits, changed)
    assert target.confu.current == "default"
    target.set_adapter("lora")
    assert target.confu.current == "default", "another method's adapter does not switch ConFu off"
    assert torch.equal(target(PROMPT).logits, changed)
    lora = {name: p.requires_grad for name, p in target.named_parameters() if "lora_" in name}
    assert lora and all(lora.values())
    target.delete_adapter("default")
    assert torch.equal(target(PROMPT).logits, changed)


def test_confu_first_then_lora_through_peft_model():
    model = get_peft_model(tiny_llama(), ConFuAdapterConfig())
    model.add_adapter("second", ConFuAdapterConfig(num_virtual_tokens=2))
    assert model.get_base_model().confu.current == "default"
    model.set_adapter("second")
    assert model.get_base_model().confu.current == "second"
    with model.disable_adapter():
        assert model.get_base_model().confu.current is None
    assert model.get_base_model().confu.current == "second"


def test_unload_gives_the_target_back_and_merging_is_refused():
    target = tiny_llama()
    keys = set(target.state_dict())
    model = get_peft_model(target, ConFuAdapterConfig())
    with pytest.raises(NotImplementedError, match="cannot be merged"):
        model.merge_and_unload()
    assert model.unload() is target
    assert set(target.state_dict()) == keys
    assert not hasattr(target, "confu") and not hasattr(target, "peft_config")


def test_target_saves_its_own_weights_only(tmp_path):
    target = tiny_llama()
    keys = set(target.state_dict())
    inject_adapter_in_model(ConFuAdapterConfig(), target)
    target.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == keys
    assert not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_keep_the_adapter(duplicate):
    target = tiny_llama()
    inject_adapter_in_model(ConFuAdapterConfig(), target)
    twin = duplicate(target)
    assert_same_weights(adapter_weights(twin), adapter_weights(target))
    assert type(twin) is type(target)
    assert torch.equal(twin(PROMPT).logits, target(PROMPT).logits)


def test_injection_callbacks_get_the_target(monkeypatch):
    seen = []
    monkeypatch.setattr("confu_hf.adapter.tuner._injection_callbacks", [])
    on_injection(seen.append)
    target = tiny_llama()
    model = get_peft_model(target, ConFuAdapterConfig())
    assert seen == [target] and isinstance(target.confu, ConFuLayer)
    assert model.get_base_model() is target


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"soft_prompt_type": "prefix"}, "got soft_prompt_type='prefix', expected 'kv' or 'embedding'"),
        ({"num_virtual_tokens": 0}, "got num_virtual_tokens=0, expected an integer of at least 1"),
        ({"num_experts": 2.0}, "got num_experts=2.0, expected an integer of at least 1"),
        ({"num_experts_per_token": 9}, "got num_experts_per_token=9, expected at most num_experts=8"),
        ({"head_dim": -1}, "got head_dim=-1, expected an integer of at least 1, or None"),
        ({"target_layer_ids": [3, 2, 1]}, r"got target_layer_ids=\[3, 2, 1\], expected increasing"),
    ],
)
def test_config_refuses_nonsense(fields, message):
    with pytest.raises(ValueError, match=message):
        ConFuAdapterConfig(**fields)


def test_loading_starts_from_nan_so_that_a_forgotten_weight_is_seen():
    target = tiny_llama()
    inject_adapter_in_model(ConFuAdapterConfig(inference_mode=True), target)
    assert all(weight.isnan().all() for weight in adapter_weights(target).values())


def rewrite(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


PROMPTS_KEY = "base_model.model.confu.confu_prompts.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop(PROMPTS_KEY), "expected .*confu_experts.*confu_prompts.*confu_router.* Download"),
        (
            lambda w: w.update({PROMPTS_KEY: w[PROMPTS_KEY][:, :, :3].clone()}),
            r"got shape .* expected .* made for this",
        ),
        (lambda w: w[PROMPTS_KEY].fill_(float("nan")), "got NaN or infinite weights, expected finite numbers"),
        (lambda w: w.update(extra=torch.zeros(1)), "got .*extra.*, expected"),
    ],
)
def test_bad_weights_are_refused(saved, change, message):
    folder, _ = saved
    rewrite(folder, change)
    with pytest.raises(ValueError, match=message):
        load_adapter_folder(folder)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(tiny_llama(), folder)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hidden_size": 48}, "got target_hidden_size=32, expected 48"),
        ({"num_hidden_layers": 10}, "got target_num_hidden_layers=8, expected 10"),
        ({"num_key_value_heads": 4}, "got num_key_value_heads=2, expected 4"),
        ({"head_dim": 16}, "got head_dim=8, expected 16"),
    ],
)
@pytest.mark.parametrize(
    "route",
    [
        pytest.param("native", marks=pytest.mark.native_peft),
        "peft",
        pytest.param("add", marks=pytest.mark.native_peft),
    ],
)
def test_adapter_of_another_target_leaves_this_one_as_it_was(saved, other, message, route):
    folder, _ = saved
    target = tiny_llama(**other)
    logits = target(PROMPT).logits
    with pytest.raises(ValueError, match=message):
        if route == "native":
            target.load_adapter(str(folder))
        elif route == "peft":
            PeftModel.from_pretrained(target, folder)
        else:
            target.add_adapter(PeftConfig.from_pretrained(folder))
    assert not hasattr(target, "confu") and not getattr(target, "peft_config", {})
    assert not target._hf_peft_config_loaded
    assert torch.equal(target(PROMPT).logits, logits)
