"""Attention without copies computes what `sdpa` does, only while it is asked for and where it helps."""

from __future__ import annotations

import pytest
import torch
from oracles import make_oracle
from tiny_models import tiny_gemma2, tiny_gemma3, tiny_llama
from transformers import AttentionInterface

from confu_hf.acceleration.attention import GROUPED, folded_attention, grouped_attention, grouped_queries

SDPA = AttentionInterface()["sdpa"]

PROMPT = torch.arange(3, 12)[None]


def states(rows: int, groups: int):
    """Query, key, value of two rows of a batch, and a mask that hides a third of the slots but never a row's own."""
    torch.manual_seed(rows)
    query = torch.randn(2, 2 * groups, rows, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, 2, 20, 8, dtype=torch.float64)
    mask = torch.zeros(2, 1, rows, 20, dtype=torch.float64)
    hidden = torch.rand(mask.shape) < 0.3
    hidden[..., -1] = False
    return query, key, value, mask.masked_fill(hidden, torch.finfo(torch.float64).min)


def module(groups: int):
    layer = torch.nn.Module()
    layer.num_key_value_groups, layer.is_causal = groups, True
    return layer


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("scaling", [None, 0.2])
@pytest.mark.parametrize("masked", [True, False])
def test_equal_to_sdpa(rows, groups, scaling, masked):
    query, key, value, mask = states(rows, groups)
    arguments = (module(groups), query, key, value, mask if masked else None)
    got, weights = grouped_attention(*arguments, scaling=scaling)
    expected, _ = SDPA(*arguments, scaling=scaling)
    assert weights is None and got.shape == (2, rows, 2 * groups, 8)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("boolean", [True, False])
def test_heads_as_rows_are_equal_to_sdpa(rows, batch, boolean):
    """What a GPU computes; the mask may be one for all rows of the batch."""
    query, key, value, mask = states(rows, 3)
    mask = mask[:batch]
    got = folded_attention(query, key, value, mask == 0 if boolean else mask, scale=0.2)
    expected, _ = SDPA(module(3), query, key, value, mask, scaling=0.2)
    torch.testing.assert_close(got.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)


def outcome(attention, *arguments, **keywords):
    """Values or the message of a refusal: `sdpa` refuses a softcap in some versions of Transformers, in others it is deaf to it."""
    try:
        return attention(*arguments, **keywords)[0].tolist()
    except ValueError as error:
        return str(error)


def test_more_than_a_mask_is_left_to_sdpa():
    query, key, value, mask = states(4, 3)
    bias = torch.randn(1, 6, 4, 20, dtype=torch.float64)
    softcapped = [outcome(one, module(3), query, key, value, mask, softcap=2.0) for one in (SDPA, grouped_attention)]
    assert softcapped[0] == softcapped[1]
    got = grouped_attention(module(3), query, key, value, mask, position_bias=bias)[0]
    torch.testing.assert_close(got, SDPA(module(3), query, key, value, mask + bias)[0])


@pytest.mark.parametrize("make_target", [tiny_llama, tiny_gemma3])
def test_verify_passes_use_it_and_nothing_else_does(make_target, monkeypatch):
    model, calls = make_target(), []

    def spy(*arguments, **keywords):
        calls.append(arguments[4] is not None)
        return grouped_attention(*arguments, **keywords)

    monkeypatch.setitem(AttentionInterface._global_mapping, GROUPED, spy)
    assistant = make_oracle(model)
    plain = model.generate(PROMPT, max_new_tokens=12)
    assert not calls and torch.equal(model.generate(PROMPT, assistant_model=assistant, max_new_tokens=12), plain)
    assert any(calls) and model.config._attn_implementation == "sdpa"


def test_put_back_after_an_exception_and_eager_left_alone():
    model = tiny_llama()
    with pytest.raises(RuntimeError, match="stop"), grouped_queries(model):
        assert model.config._attn_implementation == GROUPED
        raise RuntimeError("stop")
    assert model.config._attn_implementation == "sdpa"
    eager = tiny_gemma2()
    with grouped_queries(eager):
        assert eager.config._attn_implementation == "eager"
