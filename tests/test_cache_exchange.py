"""A user's cache in and out of a TreeCache; which caches are refused."""

from __future__ import annotations

import pytest
import torch
from tiny_caches import LAYERS, PROMPTS, filled, prompt_ids, soft_prompts, states
from tiny_models import (
    LAYER_IDS,
    NUM_LAYERS,
    keep_softmax_in_float64,
    tiny_gemma3,
    tiny_llama,
    tiny_mistral,
)
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from confu_hf.compat import DynamicLayer
from confu_hf.target.cache import TreeCache
from confu_hf.target.exchange import check_cache, export_cache, import_cache
from confu_hf.target.passes import prefill


@pytest.fixture(autouse=True)
def _exact_softmax(monkeypatch):
    keep_softmax_in_float64(monkeypatch)


@pytest.mark.parametrize("make", [tiny_llama, tiny_mistral, tiny_gemma3])
def test_import_from_and_export_to_a_users_cache(make):
    model, ids = make(), prompt_ids()
    users = DynamicCache(config=model.config)  # sliding layers drop old rows
    prefill(model, ids, users, LAYER_IDS)
    cache = import_cache(users, NUM_LAYERS, torch.randn(NUM_LAYERS, 2, PROMPTS, 2, 8))
    assert cache.get_seq_length() == ids.shape[1]
    for layer, source in zip(cache.layers, users.layers, strict=True):
        stored = source.keys.shape[2]
        assert torch.equal(layer.keys[:, :, -stored:], source.keys)
        assert not layer.keys[:, :, :-stored].any()

    more = prompt_ids(length=4)
    for target in (cache, users):
        continued = prefill(model, more, target, LAYER_IDS)
    ours, exported = DynamicCache(config=model.config), DynamicCache()
    for target in (ours, exported):
        export_cache(cache, target)
    for layer, reference in zip(ours.layers, users.layers, strict=True):
        torch.testing.assert_close(layer.keys, reference.keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.values, reference.values, rtol=0, atol=1e-12)
        assert layer.get_seq_length() == reference.get_seq_length() and type(layer) is type(reference)
    assert exported.layers[0].keys.shape[2] == cache.get_seq_length()
    again = [prefill(model, more, target, LAYER_IDS).logits for target in (ours, users, exported)]
    torch.testing.assert_close(again[0], again[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(again[0], again[2], rtol=0, atol=1e-12)
    assert not torch.equal(again[0], continued.logits)


def test_export_overwrites_what_the_cache_held_and_shares_no_memory():
    cache, users = filled(5), DynamicCache()
    for i in range(LAYERS):
        users.update(*states(9), i)
    export_cache(cache, users)
    exported = users.layers[0].keys.clone()
    assert torch.equal(exported, cache.layers[0].keys)
    cache.layers[0].keys.zero_()
    assert torch.equal(users.layers[0].keys, exported)


def test_a_tree_cache_can_be_exported_to_and_imported_again():
    cache, users = filled(5), filled(9, batch=2, prompts=soft_prompts())
    export_cache(cache, users)
    assert torch.equal(users.layers[2].keys, cache.layers[2].keys) and users.soft_prompt_length == PROMPTS
    copy = import_cache(cache, LAYERS, soft_prompts())
    assert torch.equal(copy.layers[1].values, cache.layers[1].values) and copy.soft_prompt_length == PROMPTS


def test_foreign_caches_are_refused():
    """By name, and before anything is copied."""
    model = tiny_llama()
    quantized, offloaded = DynamicCache(config=model.config), DynamicCache(config=model.config)
    quantized.layers[3] = type("QuantoQuantizedLayer", (DynamicLayer,), {})()
    offloaded.offloading = True
    messages = {
        r"got a DynamicCache of layers \['QuantoQuantizedLayer'\], expected plain dynamic or static layers": quantized,
        "got a DynamicCache that offloads its layers, expected one whose layers stay where the model is": offloaded,
        "got 3 layers, expected 8, the model's": TreeCache(3),
        "got a EncoderDecoderCache, expected a cache of a decoder": EncoderDecoderCache(
            DynamicCache(), DynamicCache()
        ),
    }
    for message, cache in messages.items():
        with pytest.raises(ValueError, match=message):
            import_cache(cache, NUM_LAYERS)
        with pytest.raises(ValueError, match=message):
            export_cache(TreeCache(NUM_LAYERS), cache)
    with pytest.raises(ValueError, match="got 8 layers, expected 3"):
        import_cache(DynamicCache(config=model.config), LAYERS)
    check_cache(StaticCache(config=model.config, max_cache_len=16), NUM_LAYERS, slots=16)
    with pytest.raises(ValueError, match="got a StaticCache for 16 tokens, expected room for 17, prompt and answer"):
        check_cache(StaticCache(config=model.config, max_cache_len=16), NUM_LAYERS, slots=17)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
@pytest.mark.parametrize(("length", "early"), [(4, False), (11, False), (11, True)])
def test_static_caches_in_and_out(make, length, early):
    """As a plain pass fills one, windows that are full included; in the memory that it had."""
    model, ids, more = make(), prompt_ids(length=length), prompt_ids(length=3)
    users, ours = (StaticCache(config=model.config, max_cache_len=20) for _ in range(2))
    if early:
        for cache in (users, ours):
            cache.early_initialization(1, 2, 8, torch.float64, "cpu")
    prefill(model, ids, users, LAYER_IDS)
    cache = import_cache(users, NUM_LAYERS)
    assert cache.get_seq_length() == length
    prefill(model, more, cache, LAYER_IDS)
    buffers = [layer.keys for layer in ours.layers]
    export_cache(cache, ours)
    prefill(model, more, users, LAYER_IDS)
    for layer, reference, buffer in zip(ours.layers, users.layers, buffers, strict=True):
        assert int(layer.get_seq_length()) == int(reference.get_seq_length()) == length + 3
        torch.testing.assert_close(layer.keys, reference.keys, rtol=0, atol=1e-12)
        torch.testing.assert_close(layer.values, reference.values, rtol=0, atol=1e-12)
        assert buffer is None or layer.keys is buffer
    again = [prefill(model, more, target, LAYER_IDS).logits for target in (ours, users, cache)]
    torch.testing.assert_close(again[0], again[1], rtol=0, atol=1e-12)
    torch.testing.assert_close(again[0], again[2], rtol=0, atol=1e-12)
