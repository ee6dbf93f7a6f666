"""`return_dict_in_generate`: scores, logits, hidden states and attention weights of every token, as plain `generate` has them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES
from oracles import make_oracle
from tiny_models import keep_softmax_in_float64, tiny_gemma3, tiny_llama
from transformers import DynamicCache

from confu_hf.compat import cache_keyword

PROMPTS = torch.tensor([[5, 17, 33, 8, 61, 12, 90, 44, 23], [0, 0, 0, 0, 11, 7, 3, 20, 65]])
MASK = (PROMPTS != 0).long()
TREE = {"total_tokens": 6, "depth": 3, "draft_top_k": 3}
FIELDS = ("scores", "logits", "hidden_states", "attentions")
ALL = {"return_dict_in_generate": True, "do_sample": False, **{f"output_{name}": True for name in FIELDS}}
LENGTHS = {"pad_token_id": 0, "max_new_tokens": 10}


@pytest.fixture(autouse=True)
def _exact_softmax(monkeypatch):
    keep_softmax_in_float64(monkeypatch)


def leaves(value):
    """Shapes and tensors of nested tuples, flat."""
    if not isinstance(value, tuple):
        return [value]
    return [len(value), *(leaf for part in value for leaf in leaves(part))]


def check_same(ours, theirs):
    """Ids, structure, shapes, values. Weights and states of masked rows are the model's own, and compared too."""
    assert ours.sequences.tolist() == theirs.sequences.tolist()
    for name in FIELDS:
        if getattr(theirs, name) is None:
            assert getattr(ours, name) is None
            continue
        flat = leaves(ours[name]), leaves(theirs[name])
        assert [getattr(leaf, "shape", leaf) for leaf in flat[0]] == [getattr(leaf, "shape", leaf) for leaf in flat[1]]
        for mine, other in zip(*flat, strict=True):
            if torch.is_tensor(other):
                atol = 1e-5 if other.dtype == torch.float32 else 1e-9
                torch.testing.assert_close(
                    mine, other, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
                )


def both(model, assistant, **arguments):
    outputs = []
    for more in ({}, {"assistant_model": assistant, **TREE}):
        torch.manual_seed(7)
        outputs.append(model.generate(**{**LENGTHS, **ALL, **arguments}, **more))
    check_same(outputs[1], outputs[0])
    return outputs


NAMES = ["Llama", "Gemma 3 (text)", "GPT-2", "gpt-oss", "Falcon, new decoder"]


@pytest.mark.parametrize("architecture", [one for one in ARCHITECTURES if one.name in NAMES], ids=lambda one: one.name)
def test_a_padded_batch_and_a_sampled_row(architecture):
    """Longer than the windows; the rows end at different tokens, and the shorter one goes on with its padding."""
    model = replace(architecture, config={**architecture.config, "attn_implementation": "eager"}).model()
    assistant = make_oracle(model)
    free = model.generate(PROMPTS, attention_mask=MASK, do_sample=False, eos_token_id=-1, **LENGTHS)[0, 9:].tolist()
    both(model, assistant, input_ids=PROMPTS, attention_mask=MASK, eos_token_id=free[4])
    assert assistant.stats.mean_accepted_length > 1.3
    both(model, assistant, input_ids=PROMPTS[:1], eos_token_id=96, do_sample=True, temperature=1.2)


@pytest.mark.parametrize("field", FIELDS)
def test_only_what_is_asked_for(field):
    model = tiny_llama(attn_implementation="eager")
    arguments = {f"output_{name}": name == field for name in FIELDS}
    _, ours = both(model, make_oracle(model), input_ids=PROMPTS[:1], **arguments)
    assert [name for name in FIELDS if getattr(ours, name) is not None] == [field]


def test_asked_for_and_not_returned():
    """Without `return_dict_in_generate` they are not kept, whatever the attention computes."""
    model = tiny_llama()
    arguments = {**ALL, **LENGTHS, "return_dict_in_generate": False}
    expected = model.generate(PROMPTS, attention_mask=MASK, **arguments)
    got = model.generate(PROMPTS, attention_mask=MASK, assistant_model=make_oracle(model), **arguments)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3])
@pytest.mark.parametrize("chunk", [None, 4])
def test_behind_a_cache_and_in_pieces(make, chunk):
    """The first entry is that of the last pass over the prompt.

    Before 5.23 plain `generate` in pieces reads once more, behind the cache, what the cache holds, and so writes another
    text than in one pass; ours stays that of one pass.
    """
    model = make(attn_implementation="eager")

    def second_turn(chunk, **more):
        """The second turn of a conversation, and the tokens that the cache holds after it."""
        cache = cache_keyword(model, DynamicCache(config=model.config))
        first = model.generate(PROMPTS, attention_mask=MASK, do_sample=False, **cache, **more, **LENGTHS)
        again = torch.cat([first, PROMPTS[:, :7]], dim=1)
        mask = torch.cat([MASK, torch.ones_like(again[:, 9:])], dim=1)
        arguments = {**ALL, **LENGTHS, **cache, **more, "prefill_chunk_size": chunk}
        output = model.generate(again, attention_mask=mask, **arguments)
        (held,) = cache.values()
        return output, held.get_seq_length()

    theirs, held = second_turn(chunk)
    ours, held_by_ours = second_turn(chunk, assistant_model=make_oracle(model), **TREE)
    written = ours.sequences.shape[1]
    assert held_by_ours == written - 1
    if held == written - 1:
        check_same(ours, theirs)
    else:  # read twice
        assert ours.sequences.tolist() == second_turn(None)[0].sequences.tolist() != theirs.sequences.tolist()


@pytest.mark.parametrize("with_ids", [False, True])
def test_from_embeddings(with_ids):
    model = tiny_llama(attn_implementation="eager")
    prompts = [row[row != 0].tolist() for row in PROMPTS]
    inputs = {"inputs_embeds": model.get_input_embeddings()(PROMPTS), "attention_mask": MASK}
    assistant = make_oracle(model, unseen=None if with_ids else prompts)
    both(model, assistant, **inputs, **({"input_ids": PROMPTS} if with_ids else {}))
    assert assistant.stats.mean_accepted_length > 1.3


def test_what_is_kept_is_no_view_of_whole_passes():
    """Entries of a token hold that token's memory alone."""
    model = tiny_llama(attn_implementation="eager")
    output = model.generate(PROMPTS[:1], assistant_model=make_oracle(model), **TREE, **ALL, **LENGTHS)
    for name in ("hidden_states", "attentions"):
        for entry in output[name][1:]:
            assert all(state.untyped_storage().nbytes() == state.nbytes for state in entry)
