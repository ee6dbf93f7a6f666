"""What a call may start from besides ids: embeddings, positions, pieces of a prompt; the text stays that of plain `generate`."""

from __future__ import annotations

import pytest
import torch
from oracles import make_assistant, make_oracle
from tiny_models import ARCHITECTURES, tiny_llama
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from confu_hf import LookupAssistant
from confu_hf.compat import OUTPUT_CACHE, cache_keyword
from confu_hf.decoding import loop
from confu_hf.decoding.drafting import NetworkDrafter

PROMPTS = [[5, 17, 33, 8, 61, 12, 90, 44], [7, 3, 20], [9, 9, 31, 4, 66]]
LENGTHS = {"max_new_tokens": 10, "pad_token_id": 0}
TREE = {"total_tokens": 8, "depth": 4, "draft_top_k": 3}
NAMES = ["llama", "gemma3"]


def padded(prompts):
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    return ids, (torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]))


def same(model, assistant, **arguments):
    """The text of plain `generate`, held against the assistant's; and the tokens of a round."""
    texts = []
    for more in ({}, {"assistant_model": assistant, **TREE}):
        torch.manual_seed(3)
        texts.append(model.generate(**{"do_sample": False, **LENGTHS, **arguments}, **more))
    assert texts[0].tolist() == texts[1].tolist()
    return texts[0], assistant.stats.mean_accepted_length


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("with_ids", [False, True])
def test_embeddings_in_place_of_ids(name, rows, with_ids):
    """Without ids only what is new is returned, and it is the text that follows the ids."""
    model = ARCHITECTURES[name]()
    ids, mask = padded(PROMPTS[:rows])
    assistant = make_oracle(model, unseen=None if with_ids else PROMPTS[:rows])
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    inputs |= {"input_ids": ids} if with_ids else {}
    text, accepted = same(model, assistant, **inputs)
    assert accepted > 1.8
    whole = model.generate(ids, attention_mask=mask, do_sample=False, **LENGTHS)
    assert whole[:, 0 if with_ids else ids.shape[1] :].tolist() == text.tolist()
    if rows == 1:
        same(model, assistant, **inputs, do_sample=True, temperature=1.2)


@pytest.mark.parametrize("returned", [True, False])
def test_rows_of_embeddings_end_where_they_end(returned):
    model, (ids, mask) = tiny_llama(), padded(PROMPTS)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask}
    free = model.generate(**inputs, do_sample=False, eos_token_id=-1, **LENGTHS)
    for end in free[0, 3:5].tolist():
        arguments = {**inputs, **LENGTHS, "do_sample": False, "eos_token_id": end}
        arguments["return_dict_in_generate"] = returned
        assistant = make_oracle(model, unseen=PROMPTS)
        outputs = [model.generate(**arguments, **more) for more in ({}, {"assistant_model": assistant, **TREE})]
        if returned:
            lengths = [output[OUTPUT_CACHE].get_seq_length() for output in outputs]
            assert lengths[0] == lengths[1] == ids.shape[1] + outputs[0].sequences.shape[1] - 1
            keys = [output[OUTPUT_CACHE].layers[-1].keys for output in outputs]
            torch.testing.assert_close(*keys, rtol=0, atol=1e-9)
            outputs = [output.sequences for output in outputs]
        assert outputs[0].tolist() == outputs[1].tolist()


def test_other_ids_beside_embeddings():
    """Ids of another text, of another length: processors see them, the target does not."""
    model, ids = tiny_llama(), torch.tensor([PROMPTS[0]])
    embeds, other = model.get_input_embeddings()(ids), torch.tensor([[20, 7, 20]])
    inputs = {"inputs_embeds": embeds, "input_ids": other, "attention_mask": torch.ones_like(ids)}
    plain, _ = same(model, make_oracle(model), **inputs)
    assert plain[0, :3].tolist() == [20, 7, 20]
    banned, _ = same(model, make_oracle(model), **inputs, repetition_penalty=1.8, no_repeat_ngram_size=1)
    assert plain.tolist() != banned.tolist()


class _Seen(LogitsProcessor):
    def __init__(self):
        self.ids = []

    def __call__(self, input_ids, scores):
        self.ids.append(input_ids.tolist())
        return scores


@pytest.mark.parametrize("with_ids", [False, True])
def test_processors_see_the_ids_that_plain_generate_sees(with_ids):
    model, ids = tiny_llama(), torch.tensor([PROMPTS[0]])
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), **({"input_ids": ids} if with_ids else {})}
    seen = []
    for more in ({}, {"assistant_model": make_oracle(model, unseen=PROMPTS[:1]), **TREE}):
        processor = _Seen()
        model.generate(**inputs, do_sample=False, logits_processor=LogitsProcessorList([processor]), **more, **LENGTHS)
        seen.append(processor.ids)
    assert seen[0] == seen[1] and len(seen[0]) == 10


@pytest.mark.parametrize("with_ids", [False, True])
def test_lookups_read_ids_alone(with_ids):
    model, ids = tiny_llama(), torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), **({"input_ids": ids} if with_ids else {})}
    same(model, LookupAssistant(target=model), **inputs, max_new_tokens=30)


class _Watched(NetworkDrafter):
    """Notes how many rows its cache held when it started its first tree, and the features it made of it."""

    def step(self, tokens, parents, top_k):
        children = super().step(tokens, parents, top_k)
        if not hasattr(self, "first"):
            self.first = (self.cache.lengths, self.hidden_states.clone(), children)
        return children


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_the_draft_reads_embeddings_as_it_reads_ids(own, rows):
    """Its first step is the same; a draft with embeddings of its own starts from the newest row alone."""
    model, (ids, mask) = tiny_llama(), padded(PROMPTS[:rows])
    confu = make_assistant(model, own_embeddings=own)
    watched = []
    confu.new_drafter = lambda target, options: (
        watched.append(_Watched(confu, confu.input_embeddings(target.get_input_embeddings()))) or watched[-1]
    )
    arguments = {"attention_mask": mask, "do_sample": False, "assistant_model": confu, **TREE, **LENGTHS}
    texts = [model.generate(ids, **arguments)[:, ids.shape[1] :]]
    texts.append(model.generate(inputs_embeds=model.get_input_embeddings()(ids), **arguments))
    assert texts[0].tolist() == texts[1].tolist()
    (by_ids, states, _), (by_embeds, others, _) = (drafter.first for drafter in watched)
    assert by_ids == [len(prompt) - 1 for prompt in PROMPTS[:rows]]
    if own:
        assert not sum(by_embeds)
    else:
        assert by_embeds == by_ids
        torch.testing.assert_close(states, others, rtol=0, atol=1e-9)


def test_embeddings_behind_a_cache():
    """Those of the whole conversation, as ids would be; the part in the cache is not read again."""
    model, ids = tiny_llama(), torch.tensor([PROMPTS[0]])
    confu = make_oracle(model)
    first = model.generate(ids, do_sample=False, assistant_model=confu, return_dict_in_generate=True, **LENGTHS)
    again = torch.cat([first.sequences, torch.tensor([[9, 31, 4]])], dim=1)
    fresh = model.generate(again, do_sample=False, **LENGTHS)
    embeds = model.get_input_embeddings()(again)
    cache = cache_keyword(model, first[OUTPUT_CACHE])
    got = model.generate(inputs_embeds=embeds, do_sample=False, assistant_model=confu, **cache, **LENGTHS)
    assert got.tolist() == fresh[:, again.shape[1] :].tolist()


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("own_positions", [False, True])
def test_new_ids_alone_behind_a_cache(rows, own_positions):
    """The mask is of all tokens; what is returned are the new ids and what follows them."""
    model, (ids, mask) = tiny_llama(), padded(PROMPTS[:rows])
    texts = []
    for more in ({}, {"assistant_model": make_oracle(model), **TREE}):
        cache = cache_keyword(model, DynamicCache(config=model.config))
        whole = model.generate(ids, attention_mask=mask, do_sample=False, **cache, **more, **LENGTHS)
        for turn in range(2):  # the newest token is not in the cache yet
            new = torch.cat([whole[:, -1:], ids[:, -2:]], dim=1)
            past = next(iter(cache.values())).get_seq_length()
            seen = torch.cat([mask, mask.new_ones(rows, past + 3 - mask.shape[1])], dim=1)
            positions = (
                {"position_ids": torch.arange(3).expand(rows, -1) * 2 + 40 * (turn + 1)} if own_positions else {}
            )
            arguments = {"attention_mask": seen, "do_sample": False, **positions, **cache, **LENGTHS}
            whole = model.generate(new, repetition_penalty=1.5, **arguments, **more)
            texts.append(whole.tolist())
    assert texts[:2] == texts[2:]


POSITIONS = {
    "shifted": lambda mask: (mask.cumsum(-1) - 1).clamp(min=0) + 9,
    "stretched": lambda mask: (mask.cumsum(-1) - 1).clamp(min=0) * 3,
    "from the right": lambda mask: torch.arange(100 - mask.shape[1], 100).expand_as(mask),
    "starting again": lambda mask: torch.arange(mask.shape[1]).expand_as(mask) % 4,
    "of one row": lambda mask: torch.arange(7, 7 + mask.shape[1])[None],
}


@pytest.mark.parametrize(("name", "positions"), [*(("llama", kind) for kind in POSITIONS), ("gemma3", "stretched")])
@pytest.mark.parametrize("rows", [1, 3])
def test_positions_of_ones_own(name, positions, rows):
    model, (ids, mask) = ARCHITECTURES[name](), padded(PROMPTS[:rows])
    assistant = make_oracle(model)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": POSITIONS[positions](mask)}
    text, accepted = same(model, assistant, **inputs)
    assert accepted > 1.1
    if rows == 1:
        same(model, assistant, **inputs, do_sample=True, temperature=1.2)
    if positions in ("stretched", "starting again"):
        usual = model.generate(ids, attention_mask=mask, do_sample=False, **LENGTHS)
        assert text.tolist() != usual.tolist(), "they matter"


@pytest.mark.parametrize("whole", [True, False])
def test_positions_behind_a_cache(whole):
    """Of the whole conversation, or of what is new."""
    model, ids = tiny_llama(), torch.tensor([PROMPTS[0]])
    texts = []
    for more in ({}, {"assistant_model": make_oracle(model), **TREE}):
        cache = cache_keyword(model, DynamicCache(config=model.config))
        first = model.generate(
            ids, position_ids=torch.arange(8)[None] * 2, do_sample=False, **cache, **more, **LENGTHS
        )
        again = torch.cat([first, torch.tensor([[9, 31, 4]])], dim=1)
        positions = torch.arange(again.shape[1])[None] * 2
        if not whole:
            positions = positions[:, first.shape[1] - 1 :]
        texts.append(
            model.generate(again, position_ids=positions, do_sample=False, **cache, **more, **LENGTHS).tolist()
        )
    assert texts[0] == texts[1]


@pytest.mark.parametrize(("name", "chunk"), [("llama", 1), ("llama", 50), ("gemma3", 3)])
def test_a_prompt_read_in_pieces(name, chunk, monkeypatch):
    model, (ids, mask) = ARCHITECTURES[name](), padded(PROMPTS)
    assistant = make_oracle(model)
    widths, run = [], loop.prefill

    def watched(model, *args, **kwargs):
        with monkeypatch.context() as patch:
            forward = model.forward
            patch.setattr(
                model, "forward", lambda **inputs: (widths.append(inputs["input_ids"].shape[1]), forward(**inputs))[1]
            )
            return run(model, *args, **kwargs)

    monkeypatch.setattr(loop, "prefill", watched)
    for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1]}):
        widths.clear()
        _, accepted = same(model, assistant, **inputs, prefill_chunk_size=chunk)
        assert max(widths) <= chunk and sum(widths) == 8
        assert accepted > 1.8
    same(model, assistant, input_ids=ids[:1], prefill_chunk_size=chunk, do_sample=True)


def test_embeddings_read_in_pieces():
    """Plain `generate` cannot: it splits ids."""
    model, (ids, mask) = tiny_llama(), padded(PROMPTS)
    inputs = {"inputs_embeds": model.get_input_embeddings()(ids), "attention_mask": mask, "do_sample": False}
    expected = model.generate(**inputs, **LENGTHS)
    got = model.generate(**inputs, assistant_model=make_oracle(model), prefill_chunk_size=3, **LENGTHS)
    assert got.tolist() == expected.tolist()
