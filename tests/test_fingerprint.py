"""Which target a draft was made for: remembered, refused where token ids mean something else, warned of for fine-tunes."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from hub_client import tokenizer
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_llama
from tiny_pairs import tiny_pair

from confu_hf import ConFuAssistant
from confu_hf.hub.fingerprint import target_fingerprint, tokenizer_fingerprint

CARDS = Path(__file__).parent.parent / "hub_cards"


@pytest.fixture
def saved(tmp_path):
    target = tiny_llama()
    tiny_pair(target).save_pretrained(tmp_path, tokenizer=tokenizer())
    return tmp_path


def test_a_fingerprint_is_the_checkpoints_however_it_was_loaded(tmp_path):
    model = tiny_llama(dtype=torch.float32)
    expected = target_fingerprint(model)
    assert target_fingerprint(tiny_llama(dtype=torch.bfloat16)) == expected
    assert target_fingerprint(tiny_llama(dtype=torch.float32, seed=1)) != expected
    tiny_pair(model)
    assert target_fingerprint(model) == expected, "our own adapter does not count"
    lora = get_peft_model(tiny_llama(dtype=torch.float32), LoraConfig(target_modules=["q_proj", "down_proj"]))
    assert target_fingerprint(lora.get_base_model()) == expected, "nor does anybody else's"
    assert target_fingerprint(tiny_llama(dtype=torch.float16)) is None
    with torch.device("meta"):
        assert target_fingerprint(type(model)(model.config)) is None


def test_one_weight_makes_a_fine_tune(saved):
    target = tiny_llama()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ConFuAssistant.from_pretrained(saved, target=target, tokenizer=tokenizer()).detach()
    target.model.layers[3].mlp.up_proj.weight.data.mul_(1.02)
    with pytest.warns(UserWarning, match="has the same shapes but other weights: a fine-tune"):
        pair = ConFuAssistant.from_pretrained(saved, target=target)
    prompt = torch.arange(3, 10)[None]
    plain = target.generate(prompt, max_new_tokens=8)
    assert torch.equal(target.generate(prompt, max_new_tokens=8, assistant_model=pair), plain)


def test_another_vocabulary_is_refused_and_added_tokens_are_not(saved):
    target = tiny_llama()
    with pytest.raises(ValueError, match="made for another vocabulary: got a tokenizer with the fingerprint"):
        ConFuAssistant.from_pretrained(saved, target=target, tokenizer=tokenizer("b"))
    assert type(target) is type(tiny_llama()), "untouched"
    more = tokenizer()
    more.add_tokens(["<one>"])
    assert tokenizer_fingerprint(more) == tokenizer_fingerprint(tokenizer())
    ConFuAssistant.from_pretrained(saved, target=target, tokenizer=more)


def test_the_first_target_is_remembered(saved, tmp_path):
    fine_tune = tiny_llama(seed=1)
    with pytest.warns(UserWarning, match="a fine-tune"):
        pair = ConFuAssistant.from_pretrained(saved, target=fine_tune)
    before = pair.config.target_fingerprint
    pair.save_pretrained(tmp_path / "again")
    again = ConFuAssistant.from_pretrained(tmp_path / "again")
    assert again.config.target_fingerprint == before == target_fingerprint(tiny_llama())


def test_a_folder_of_this_machine_is_no_name(tmp_path):
    target = tiny_llama()
    target.config._name_or_path = str(tmp_path)
    pair = tiny_pair(target)
    pair.save_pretrained(tmp_path / "a")
    assert pair.config.base_model_name_or_path is None
    pair.detach()
    target.config._name_or_path = "org/target"
    tiny_pair(target).save_pretrained(tmp_path / "b")
    assert ConFuAssistant.from_pretrained(tmp_path / "b").config.base_model_name_or_path == "org/target"


@pytest.mark.parametrize("name", ["confu-smollm2-135m-instruct", "eagle3-smollm2-135m-instruct"])
def test_pairs_that_remember_nothing_load_as_before(name):
    config = ConFuAssistant.from_pretrained(CARDS / name).config
    assert config.target_fingerprint is None and config.tokenizer_fingerprint is None
