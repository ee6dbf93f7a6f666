"""Batches: every row has its own tree, its own acceptance and its own end, and reads as in plain `generate`."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from options import BATCHED
from oracles import make_assistant, make_oracle
from tiny_models import ARCHITECTURES, VOCAB_SIZE, tiny_llama
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList

from confu_hf import LookupAssistant
from confu_hf.compat import OUTPUT_CACHE, cache_keyword

PROMPTS = [[5, 17, 33, 8, 61, 12, 90, 44], [7, 3, 20], [9, 9, 31, 4, 66], [50]]


def batch(prompts=PROMPTS):
    """Ids and mask, padded on the left."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return {"input_ids": ids, "attention_mask": mask}


def free_ends(model, inputs, new_tokens, **arguments):
    """End tokens with which rows of the batch end at different places."""
    answers = model.generate(**inputs, max_new_tokens=new_tokens, eos_token_id=-1, pad_token_id=0, **arguments)
    counts = Counter(answers[:, inputs["input_ids"].shape[1] :].flatten().tolist())
    return [token for token, _ in counts.most_common() if token][:6]


@pytest.mark.parametrize(
    ("name", "options", "returned"),
    [
        ("llama", {}, False),
        ("llama", {"contemplate": False}, True),
        ("mistral", {"contemplate_tokens": 2}, False),
        ("gemma3", {"contemplate_tokens": 2}, True),
        ("mixtral", {"contemplate": False}, False),
    ],
)
def test_rows_are_those_of_plain_generate(name, options, returned):
    model, inputs = ARCHITECTURES[name](), batch()
    assistant = make_oracle(model)
    accepted = []
    for end in free_ends(model, inputs, 24)[:2]:
        lengths = {
            "max_new_tokens": 24,
            "eos_token_id": end,
            "pad_token_id": 0,
            "do_sample": False,
            "return_dict_in_generate": returned,
        }
        expected = model.generate(**inputs, **lengths)
        tree = {"total_tokens": 8, "depth": 4, "draft_top_k": 3}
        got = model.generate(**inputs, assistant_model=assistant, **tree, **options, **lengths)
        if returned:
            expected, got = expected.sequences, got.sequences
        assert got.tolist() == expected.tolist()
        accepted.append(assistant.stats.mean_accepted_length)
        ends = [(row == end).nonzero() for row in expected[:, inputs["input_ids"].shape[1] :]]
        if not returned and any(len(row) for row in ends) and not all(len(row) for row in ends):
            rows = [len(record.accepted) for record in assistant.stats.records]
            assert rows[-1] < 4, "rows that have ended leave the verify pass"
    assert max(accepted) > 1.8


@pytest.mark.parametrize("policy", ["auto", "fixed"])
@pytest.mark.parametrize("lookup", [True, False])
def test_the_real_draft_and_both_policies(policy, lookup):
    model, inputs = tiny_llama(), batch()
    assistant = make_assistant(model)
    for end in free_ends(model, inputs, 40)[:2]:
        arguments = {"max_new_tokens": 40, "eos_token_id": end, "pad_token_id": 0, "do_sample": False}
        expected = model.generate(**inputs, **arguments)
        got = model.generate(**inputs, assistant_model=assistant, policy=policy, lookup=lookup, **arguments)
        assert got.tolist() == expected.tolist()
        written = sum(
            record.accepted[row] for record in assistant.stats.records for row in range(len(record.accepted))
        )
        assert assistant.stats.new_tokens == 4 + written, "one token of each row comes out of prefill"


def test_lookup_alone():
    model, inputs = tiny_llama(), batch([[5, 6, 7, 5, 6, 7, 5, 6], [7, 3, 20], [9, 9, 31, 4, 66]])
    expected = model.generate(**inputs, max_new_tokens=40, do_sample=False)
    assistant = LookupAssistant(target=model)
    assert model.generate(**inputs, max_new_tokens=40, do_sample=False, assistant_model=assistant).tolist() == (
        expected.tolist()
    )


@pytest.mark.parametrize("name", BATCHED)
def test_processors_see_their_own_row(name):
    """Some hold something for each row of the batch."""
    model, inputs = tiny_llama(), batch()
    arguments = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, name: BATCHED[name]}
    expected = model.generate(**inputs, **arguments)
    got = model.generate(**inputs, assistant_model=make_oracle(model), **arguments)
    assert got.tolist() == expected.tolist()
    bare = model.generate(**inputs, max_new_tokens=16, do_sample=False, pad_token_id=0)
    assert expected.tolist() != bare.tolist() or name == "min_new_tokens"


class _Sum(StoppingCriteria):
    """A criterion that looks at the batch: rows stop where the newest tokens of all rows add up to a multiple."""

    def __init__(self, number, rows):
        self.number, self.rows, self.asked = number, rows, []

    def __call__(self, input_ids, scores, **kwargs):
        self.asked.append(input_ids.shape)
        whole = input_ids[:, -1].sum() % self.number == 0
        alone = input_ids[:, -3:].sum(-1) % self.number == 0
        return whole.expand(len(input_ids)) if self.rows == "all" else alone


@pytest.mark.parametrize("number", [2, 11])
@pytest.mark.parametrize("rows", ["all", "each"])
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("returned", [True, False])
def test_custom_criteria_are_asked_with_the_whole_batch_step_by_step(number, rows, ends, returned):
    model, inputs = tiny_llama(), batch()
    end = free_ends(model, inputs, 24)[0] if ends else -1
    if not ends:
        model.generation_config.eos_token_id = model.config.eos_token_id = None
    arguments = {"max_new_tokens": 24, "pad_token_id": 0, "do_sample": False, "return_dict_in_generate": returned}
    arguments |= {"eos_token_id": end} if ends else {}
    ours, theirs = _Sum(number, rows), _Sum(number, rows)
    expected = model.generate(**inputs, stopping_criteria=StoppingCriteriaList([theirs]), **arguments)
    got = model.generate(
        **inputs, stopping_criteria=StoppingCriteriaList([ours]), assistant_model=make_oracle(model), **arguments
    )
    if returned:
        expected, got = expected.sequences, got.sequences
    assert got.tolist() == expected.tolist()
    assert ours.asked == theirs.asked, "with the same ids as often as plain decoding does"


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("passed_in", [True, False])
def test_scores_and_cache_of_rows_that_ended(name, passed_in):
    """They read their padding as in plain decoding: scores agree at every step, and the cache carries a next turn."""
    model, inputs = ARCHITECTURES[name](), batch()
    assistant = make_oracle(model)
    for end in free_ends(model, inputs, 24)[:1]:
        arguments = {"max_new_tokens": 24, "eos_token_id": end, "pad_token_id": 0, "do_sample": False}
        arguments |= {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
        arguments |= {"repetition_penalty": 1.1}
        plain_cache, cache = (
            cache_keyword(model, DynamicCache(config=model.config)) if passed_in else {} for _ in range(2)
        )
        expected = model.generate(**inputs, **plain_cache, **arguments)
        got = model.generate(**inputs, **cache, assistant_model=assistant, **arguments)
        assert got.sequences.tolist() == expected.sequences.tolist()
        for kind in ("scores", "logits"):
            assert len(got[kind]) == len(expected[kind])
            for ours, theirs in zip(got[kind], expected[kind], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        if passed_in:
            assert got[OUTPUT_CACHE] is next(iter(cache.values()))
        again = torch.cat([got.sequences, torch.tensor([[9, 31]] * 4)], dim=1)
        real = got.sequences.ne(0).long()
        real[:, : inputs["input_ids"].shape[1]] = inputs["attention_mask"]
        mask = torch.nn.functional.pad(real, (0, 2), value=1)
        second = {
            "input_ids": again,
            "attention_mask": mask,
            "max_new_tokens": 9,
            "do_sample": False,
            "pad_token_id": 0,
        }
        theirs = model.generate(**cache_keyword(model, expected[OUTPUT_CACHE]), **second)
        ours = model.generate(**cache_keyword(model, got[OUTPUT_CACHE]), assistant_model=assistant, **second)
        assert ours.tolist() == theirs.tolist()


def test_returned_sequences_have_the_distribution_of_plain_sampling():
    """Chi-square against the exact distribution of the first two tokens' sum; another temperature would be noticed."""
    model = tiny_llama(vocab_size=VOCAB_SIZE)
    assistant = make_oracle(model)
    prompt = torch.tensor([[5, 17, 33, 8]])
    arguments = {"do_sample": True, "top_k": 4, "temperature": 0.8, "max_new_tokens": 2, "eos_token_id": -1}
    first = torch.softmax(_top(model(prompt).logits[0, -1].float() / 0.8), -1)
    expected: dict[tuple[int, int], float] = {}
    for token in first.nonzero().flatten().tolist():
        ids = torch.cat([prompt, torch.tensor([[token]])], dim=1)
        second = torch.softmax(_top(model(ids).logits[0, -1].float() / 0.8), -1)
        for other in second.nonzero().flatten().tolist():
            expected[token, other] = float(first[token] * second[other])
    torch.manual_seed(0)
    seen = Counter()
    for _ in range(20):
        answers = model.generate(
            prompt,
            assistant_model=assistant,
            num_return_sequences=40,
            total_tokens=4,
            depth=2,
            draft_top_k=2,
            **arguments,
        )
        assert answers.shape == (40, 6)
        seen.update(map(tuple, answers[:, 4:].tolist()))
    assert set(seen) <= set(expected)

    def chi_square(power):
        weights = {key: value**power for key, value in expected.items()}
        total = sum(weights.values())
        pairs = [(800 * weight / total, seen[key]) for key, weight in weights.items()]
        return sum((count - mean) ** 2 / mean for mean, count in pairs)

    limit = len(expected) + 4 * (2 * len(expected)) ** 0.5
    assert chi_square(1) < limit < chi_square(1.6)


def _top(logits):
    return logits.masked_fill(logits < logits.topk(4).values[-1], -torch.inf)


def test_rows_of_a_sampled_batch_differ():
    model, inputs = tiny_llama(), batch([[5, 6, 7]] * 4)
    torch.manual_seed(0)
    arguments = {"do_sample": True, "max_new_tokens": 12, "assistant_model": make_oracle(model)}
    assert len(set(map(tuple, model.generate(**inputs, **arguments).tolist()))) == 4


def test_a_batch_runs_into_the_context_limit():
    model, inputs = tiny_llama(max_position_embeddings=20), batch()
    expected = model.generate(**inputs, max_length=20, do_sample=False, pad_token_id=0)
    got = model.generate(**inputs, max_length=20, do_sample=False, pad_token_id=0, assistant_model=make_oracle(model))
    assert got.tolist() == expected.tolist()
