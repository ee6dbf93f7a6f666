"""The assistant's life: into and out of a target, to disk and back."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import shutil

import pytest
import torch
from assisted_calls import DRAFT, PROMPT, assisted, plain
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from tiny_models import tiny_llama
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
)

from confu_hf import ConFuAdapterConfig, ConFuAssistant, ConFuConfig, ConFuGenerationConfig
from confu_hf.adapter.tuner import remove_adapter


def snapshot(target):
    return (
        type(target),
        dict(target.__dict__.get("_hf_hook", {})),
        {name: parameter.clone() for name, parameter in target.state_dict().items()},
        {name: parameter.requires_grad for name, parameter in target.named_parameters()},
        hasattr(target, "peft_config"),
        target._hf_peft_config_loaded,
        set(target._keys_to_ignore_on_save or ()),
        target(PROMPT).logits,
    )


def assert_same_snapshot(left, right):
    assert left[2].keys() == right[2].keys()
    assert all(torch.equal(left[2][key], right[2][key]) for key in left[2])
    assert torch.equal(left[-1], right[-1])
    assert left[:2] + left[3:-1] == right[:2] + right[3:-1]


@pytest.mark.parametrize("contemplate", [True, False])
def test_attach_and_detach_leave_no_trace(contemplate):
    target = tiny_llama().requires_grad_(True)
    target.model.norm.requires_grad_(False)
    before = snapshot(target)
    confu = ConFuAssistant.from_target(target, contemplate=contemplate, **DRAFT)
    assert torch.equal(target(PROMPT).logits, before[-1])
    assert type(target) is not before[0] and type(target).__qualname__ == before[0].__qualname__
    assert isinstance(target, before[0]) and hasattr(target, "confu") == contemplate
    assert confu.attach(target) is confu, "attaching again changes nothing"
    assert confu.target is target
    assert confu.detach() is target
    assert_same_snapshot(snapshot(target), before)
    assert confu.detach() is None


def test_attaching_again_brings_the_same_adapter(target, confu):
    weights = target.confu.adapter_weights("contemplate")
    confu.detach()
    other = tiny_llama(seed=1)
    confu.attach(other)
    for name, weight in weights.items():
        assert torch.equal(other.confu.adapter_weights("contemplate")[name], weight)
    with pytest.raises(
        ValueError, match=r"attached to another model, expected a free one. Call confu.detach\(\) first"
    ):
        confu.attach(target)


def test_the_adapter_outlives_its_target():
    target = tiny_llama()
    confu = ConFuAssistant.from_target(target, **DRAFT)
    experts = target.confu.adapter_weights("contemplate")["confu_experts"].clone()
    del target
    gc.collect()
    assert confu.target is None, "an assistant does not keep its target in memory"
    other = tiny_llama()
    confu.attach(other)
    assert torch.equal(other.confu.adapter_weights("contemplate")["confu_experts"], experts)


def test_two_assistants_share_a_target(target, confu):
    expected = plain(target)
    second = ConFuAssistant.from_target(target, num_virtual_tokens=2, draft_vocab_size=40)
    eagle = ConFuAssistant.from_target(target, contemplate=False, draft_vocab_size=40)
    assert set(target.confu.configs) == {"contemplate", "contemplate_1"}
    names = []
    target.confu.register_forward_hook(lambda layer, inputs, _: names.append(inputs[1]))
    for assistant in (confu, second, eagle):
        assert torch.equal(
            assisted(target, assistant, max_new_tokens=4, policy="fixed"), expected[:, : PROMPT.shape[1] + 4]
        )
    assert set(names) == {"contemplate", "contemplate_1"}, "each contemplates with its own adapter"
    confu.detach()
    assert torch.equal(assisted(target, second), expected)
    second.detach()
    assert torch.equal(assisted(target, eagle), expected)
    eagle.detach()
    assert type(target) is type(tiny_llama())


def test_next_to_a_lora(target):
    model = get_peft_model(target, LoraConfig(init_lora_weights=False))
    expected = plain(model)
    confu = ConFuAssistant.from_target(model, **DRAFT)
    assert torch.equal(plain(model), expected)
    assert torch.equal(assisted(model, confu), expected)
    lora = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    assert all(parameter.requires_grad for parameter in lora)
    confu.detach()
    assert set(model.peft_config) == {"default"} and torch.equal(plain(model), expected)
    merged = model.merge_and_unload()
    confu.attach(merged)
    assert confu.detach() is merged


def test_a_lora_added_later_under_pefts_default_name(target, confu, tmp_path):
    model = get_peft_model(target, LoraConfig(init_lora_weights=False))
    expected = plain(model)
    model.save_pretrained(tmp_path)
    assert not [key for key in load_file(tmp_path / "adapter_model.safetensors") if "confu" in key]
    model.merge_adapter()
    assert torch.equal(assisted(model, confu), plain(model))
    model.unmerge_adapter()
    torch.testing.assert_close(assisted(model, confu), expected)
    assert confu.detach() is target
    assert set(model.peft_config) == {"default"} and model.peft_config["default"].peft_type == "LORA"
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    assert torch.equal(plain(again), expected)


def test_a_lora_of_the_same_name_keeps_its_configuration(target):
    """Both injected as "default": PEFT keeps one configuration per name, and it is the later one's."""
    inject_adapter_in_model(ConFuAdapterConfig(), target)
    model = get_peft_model(target, LoraConfig(init_lora_weights=False))
    remove_adapter(target, "default")
    assert not hasattr(target, "confu") and model.peft_config["default"].peft_type == "LORA"


def test_merging_a_lora_for_good_leaves_the_assistant(target):
    model = get_peft_model(target, LoraConfig(init_lora_weights=False))
    confu = ConFuAssistant.from_target(model, **DRAFT)
    merged = model.merge_and_unload()
    assert torch.equal(assisted(merged, confu), plain(merged))
    assert confu.detach() is merged and not hasattr(merged, "confu")


@pytest.mark.parametrize("contemplate", [False, True])
@pytest.mark.parametrize("detached", [False, True])
def test_a_used_target_can_be_pickled_and_saved_whole(target, contemplate, detached, tmp_path):
    confu = ConFuAssistant.from_target(target, contemplate=contemplate, draft_vocab_size=50)
    expected = assisted(target, confu)
    if detached:
        confu.detach()
    twin = pickle.loads(pickle.dumps(target))
    assert torch.equal(plain(twin), expected)
    torch.save(target, tmp_path / "target.pt")
    assert torch.equal(plain(torch.load(tmp_path / "target.pt", weights_only=False)), expected)
    assert torch.equal(assisted(target, confu.attach(target)), expected)
    assert len(target(PROMPT, output_hidden_states=True).hidden_states) == target.config.num_hidden_layers + 1


def test_trains_when_fresh_and_not_when_loaded(target, confu, folder):
    assert all(parameter.requires_grad for parameter in target.confu.parameters())
    assert not any(p.requires_grad for name, p in target.named_parameters() if not name.startswith("confu."))
    other = tiny_llama()
    ConFuAssistant.from_pretrained(folder, target=other)
    assert not any(parameter.requires_grad for parameter in other.confu.parameters())


def test_layout_on_disk(folder, confu):
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "config.json",
        "model.safetensors",
        "generation_config.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    keys = set(load_file(folder / "model.safetensors"))
    assert keys == set(confu.state_dict()) and not any("embed" in key for key in keys)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "CONFU" and config["inference_mode"]


def assert_same_pair(left, right, left_target, right_target):
    assert all(torch.equal(value, right.state_dict()[name]) for name, value in left.state_dict().items())
    weights = right_target.confu.adapter_weights("contemplate")
    for name, weight in left_target.confu.adapter_weights("contemplate").items():
        assert torch.equal(weight, weights[name])


def test_save_and_load_round_trip(folder, target, confu):
    other = tiny_llama()
    loaded = ConFuAssistant.from_pretrained(folder, target=other)
    assert_same_pair(confu, loaded, target, other)
    assert loaded.generation_config.total_tokens == 7 and isinstance(loaded.generation_config, ConFuGenerationConfig)
    assert loaded.config.to_diff_dict() == confu.config.to_diff_dict()
    assert loaded.dtype == torch.float64
    assert torch.equal(assisted(other, loaded), plain(other))


def test_load_first_attach_later(folder, target, confu):
    loaded = ConFuAssistant.from_pretrained(folder, dtype="float64")
    other = tiny_llama()
    assert loaded.attach(other) is loaded
    assert_same_pair(confu, loaded, target, other)


def test_load_a_subfolder(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "repository" / "nested")
    target = tiny_llama()
    confu = ConFuAssistant.from_pretrained(tmp_path / "repository", subfolder="nested", target=target)
    assert confu.generation_config.total_tokens == 7 and target.confu.soft_prompt_length == 4


def test_load_by_hub_id(folder, tmp_path):
    """A repository in the Hub's cache, as a download leaves it."""
    repository = tmp_path / "cache" / "models--org--pair"
    (repository / "refs").mkdir(parents=True)
    commit = "0123456789" * 4
    for revision in ("main", "v1"):
        (repository / "refs" / revision).write_text(commit)
    shutil.copytree(folder, repository / "snapshots" / commit)
    for kwargs in ({}, {"revision": "v1", "token": "unused"}):
        target = tiny_llama()
        confu = ConFuAssistant.from_pretrained("org/pair", target=target, cache_dir=tmp_path / "cache", **kwargs)
        assert confu.generation_config.total_tokens == 7 and target.confu.soft_prompt_length == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_draft_takes_the_targets_dtype(folder, dtype):
    target = tiny_llama(dtype=dtype)
    confu = ConFuAssistant.from_pretrained(folder, target=target)
    assert confu.dtype == dtype and target.confu.prompt_weight().dtype == dtype
    assert assisted(target, confu).shape == (1, PROMPT.shape[1] + 24)


def test_auto_classes(folder):
    assert isinstance(AutoConfig.from_pretrained(folder), ConFuConfig)
    for auto in (AutoModel, AutoModelForCausalLM):
        assert isinstance(auto.from_pretrained(folder), ConFuAssistant)


def test_loading_info(folder):
    confu, info = ConFuAssistant.from_pretrained(folder, output_loading_info=True)
    assert isinstance(confu, ConFuAssistant) and not info["missing_keys"]


def test_eagle_checkpoint_has_no_adapter(target, tmp_path):
    confu = ConFuAssistant.from_target(target, contemplate=False, draft_vocab_size=50)
    confu.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter").exists()
    other = tiny_llama()
    loaded = ConFuAssistant.from_pretrained(tmp_path, target=other)
    assert loaded.generation_config.contemplate is False
    assert torch.equal(assisted(other, loaded), plain(other)) and loaded.stats.contemplate_tokens == 0


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_of_both(target, confu, duplicate):
    expected = plain(target)
    twin_target, twin = duplicate(target), duplicate(confu)
    assert type(twin_target) is type(target) and twin.target is None
    assert torch.equal(assisted(twin_target, confu), expected), "an adapter that came along serves"
    del twin_target
    other = tiny_llama()
    twin.attach(other)
    assert_same_pair(confu, twin, target, other)
    assert torch.equal(assisted(other, twin), expected)


def test_target_saves_and_loads_as_ever(target, confu, tmp_path):
    keys = set(tiny_llama().state_dict())
    target.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == keys
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    again = type(target).from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(again(PROMPT).logits, target(PROMPT).logits)
