"""The names that `confu_hf` relies on are there in this version of Transformers and PEFT, and it says where it was run."""

from __future__ import annotations

import importlib
import importlib.metadata

import pytest
import torch
from assisted_calls import PROMPT, plain
from torch import nn
from transformers import DynamicCache, GenerationMixin
from transformers.generation import GenerateDecoderOnlyOutput

from confu_hf import compat

NAMES = [(owner, name) for owner, names in compat.RELIED_ON.items() for name in names]


@pytest.mark.parametrize(("owner", "name"), NAMES, ids=lambda value: value.rsplit(".", 1)[-1])
def test_a_private_name_is_still_there(owner, name):
    module, class_name = owner.rsplit(".", 1)
    found = getattr(importlib.import_module(module), class_name, None)
    assert found is not None, f"{owner} is gone: mend confu_hf/compat.py"
    assert hasattr(found, name), f"{owner}.{name} is gone: mend confu_hf/compat.py"


def test_the_steps_of_generate_are_called_in_the_order_that_the_route_needs():
    source = importlib.import_module("inspect").getsource(GenerationMixin.generate)
    steps = ["_extract_generation_mode_kwargs", "_validate_generation_mode", "decoding_method("]
    places = [source.index(step) for step in steps]
    assert places == sorted(places)


def test_the_cache_goes_by_the_name_that_this_version_uses(target):
    name = compat.cache_argument(target)
    assert name == compat.OUTPUT_CACHE
    cache = DynamicCache(config=target.config)
    assert target(PROMPT, **compat.cache_keyword(target, cache))[compat.OUTPUT_CACHE] is cache
    assert compat.decoder_only_output(sequences=PROMPT, cache=cache)[name] is cache
    assert isinstance(compat.decoder_only_output(sequences=PROMPT, cache=cache), GenerateDecoderOnlyOutput)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_model_that_uses_the_other_name_gets_its_own(name):
    class Remote(nn.Module):
        def forward(self, input_ids, cache=None):
            return cache

    class Older(nn.Module):
        def forward(self, input_ids, past_key_values=None):
            return past_key_values

    module = {"cache": Remote, "past_key_values": Older}[name]()
    cache = DynamicCache()
    assert compat.cache_argument(module) == name
    assert module(None, **compat.cache_keyword(module, cache)) is cache
    assert compat.cache_argument(nn.Linear(1, 1)) is None


@pytest.mark.parametrize("ids", [(2, 4, 5), (0, 3, 7), (1, 8)])
def test_layer_states_are_the_entering_ones(target, ids):
    """`hidden_states[i]` of a full capture; its last is behind the final norm."""
    everything = target(PROMPT, output_hidden_states=True).hidden_states
    random = torch.random.get_rng_state()
    compat._lists_entering_states.cache_clear()
    output = target(PROMPT, output_hidden_states=compat.layer_states_request(ids))
    assert all(
        torch.equal(state, everything[i]) for i, state in zip(ids, compat.layer_states(output, ids), strict=True)
    )
    assert torch.equal(torch.random.get_rng_state(), random)


def test_other_assistants_still_go_the_way_of_transformers(target, confu):
    """The overridden steps pass everything on, under the names that Transformers has for it."""
    assert torch.equal(target.generate(PROMPT, max_new_tokens=24, prompt_lookup_num_tokens=3), plain(target))
