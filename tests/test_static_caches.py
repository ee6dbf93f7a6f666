"""Static caches, handed in or made by `generate`: the text and the contents that plain `generate` gives them."""

from __future__ import annotations

import pytest
import torch
from oracles import make_oracle
from tiny_models import keep_softmax_in_float64, tiny_gemma3, tiny_llama
from transformers import StaticCache

from confu_hf.compat import OUTPUT_CACHE, cache_keyword

PROMPTS = torch.tensor([[5, 17, 33, 8, 61, 12, 90, 44], [0, 0, 0, 11, 7, 3, 20, 65]])
MASK = (PROMPTS != 0).long()
TREE = {"total_tokens": 6, "depth": 3, "draft_top_k": 3}
LENGTHS = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}


@pytest.fixture(autouse=True)
def _exact_softmax(monkeypatch):
    keep_softmax_in_float64(monkeypatch)


def check_same_contents(ours, theirs):
    for layer, reference in zip(ours.layers, theirs.layers, strict=True):
        assert type(layer) is type(reference)
        length = int(reference.get_seq_length())
        assert int(layer.get_seq_length()) == length
        for mine, other in ((layer.keys, reference.keys), (layer.values, reference.values)):
            torch.testing.assert_close(mine[:, :, :length], other[:, :, :length], rtol=0, atol=1e-9)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
@pytest.mark.parametrize("rows", [1, 2])
def test_turns_on_a_static_cache(make, rows):
    """Two turns of a chat, the second one beyond the windows; then plain `generate` goes on with it."""
    model, ids, mask = make(), PROMPTS[:rows], MASK[:rows]
    assistant, caches, texts = make_oracle(model), [], []
    for more in ({}, {"assistant_model": assistant, **TREE}):
        cache = StaticCache(config=model.config, max_cache_len=40)
        cache.early_initialization(rows, 2, 8, torch.float64, "cpu")
        address = cache.layers[-1].keys.data_ptr()
        text, seen = ids, mask
        for turn in range(3):
            more = {} if turn == 2 else more
            arguments = {**cache_keyword(model, cache), **LENGTHS, "attention_mask": seen}
            text = torch.cat([model.generate(text, **arguments, **more), ids[:, -3:]], dim=1)
            seen = torch.cat([mask, torch.ones_like(text[:, 8:])], dim=1)
        assert cache.layers[-1].keys.data_ptr() == address
        texts.append(text.tolist())
        caches.append(cache)
    assert texts[0] == texts[1]
    check_same_contents(*caches)
    assert assistant.stats.mean_accepted_length > 1.3


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
def test_a_static_cache_that_generate_makes(make):
    """It is returned as plain `generate` returns it, and not filled where nobody would see it."""
    model = make()
    assistant = make_oracle(model)
    arguments = {"cache_implementation": "static", "attention_mask": MASK, **LENGTHS}
    expected = model.generate(PROMPTS, **arguments, return_dict_in_generate=True)
    got = model.generate(PROMPTS, **arguments, return_dict_in_generate=True, assistant_model=assistant, **TREE)
    assert got.sequences.tolist() == expected.sequences.tolist()
    assert type(got[OUTPUT_CACHE]) is StaticCache
    check_same_contents(got[OUTPUT_CACHE], expected[OUTPUT_CACHE])
    alone = model.generate(PROMPTS, **arguments, assistant_model=assistant, **TREE)
    assert alone.tolist() == expected.sequences.tolist()
    texts = []
    for more in ({}, {"assistant_model": assistant, **TREE}):
        torch.manual_seed(5)
        sampled = {**LENGTHS, "do_sample": True, "cache_implementation": "static"}
        texts.append(model.generate(PROMPTS[:1], **sampled, **more).tolist())
    assert texts[0] == texts[1]
