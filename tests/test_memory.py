"""What an assistant wrote before: what is remembered of it, for how long, and that no text changes by it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from assisted_calls import PROMPT, assisted, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import make_assistant
from tiny_models import ARCHITECTURES

from confu_hf import LookupAssistant
from confu_hf.decoding.lookup import LookupText
from confu_hf.decoding.matches import PRIOR_STRENGTH
from confu_hf.decoding.memory import (
    LENGTHS,
    MAX_CONTINUATIONS,
    MAX_FOLLOWERS,
    AnswerMemory,
    Continuation,
)

LENGTH = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0}
TEXTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=30), min_size=1, max_size=5)


def written(*answers: list[int], limit: int = 1000) -> AnswerMemory:
    memory = AnswerMemory(limit)
    for tokens in answers:
        answer = memory.begin([])
        for token in tokens:
            memory.append(answer, token)
    return memory


@settings(deadline=None)
@given(TEXTS, st.lists(st.integers(0, 3), min_size=1, max_size=4))
def test_continuations_are_what_followed_most_often(texts, end):
    expected: dict[int, Continuation] = {}
    for length in (length for length in reversed(LENGTHS) if length <= len(end)):
        gram, counts = end[-length:], dict.fromkeys(range(4), 0)
        for text in texts:
            for place in range(length, len(text)):
                counts[text[place]] += text[place - length : place] == gram
        total = 1 + sum(counts.values())
        for token, count in counts.items():
            if count:
                expected.setdefault(token, Continuation(token, length, count / total))
    found = written(*texts).continuations(end)
    assert {one.token: one for one in found} == expected
    keys = [(-one.length, -one.share) for one in found]
    assert keys == sorted(keys)


def test_a_probability_is_the_prior_and_what_was_seen():
    once = Continuation(token=2, length=1, share=0.5)
    prior, memory = AnswerMemory().probability(once), AnswerMemory(10_000)
    for word in range(300):  # what followed once never follows again
        for token in (1000, 2000):
            memory.append([word], token)
    assert memory.probability(once) == pytest.approx(prior * PRIOR_STRENGTH / (PRIOR_STRENGTH + 300))


def test_chains_are_the_likeliest_paths():
    memory = written(*[[1, 2, 3, 4, 5]] * 3, *[[1, 2, 3, 9, 9]] * 2)
    chains = memory.chains([0, 1], length=3, count=4)
    assert [chain.tokens for chain in chains][0] == (2, 3, 4)
    assert all(len(chain.tokens) <= 3 for chain in chains)
    nodes = {chain.tokens[:depth] for chain in chains for depth in range(1, len(chain.tokens) + 1)}
    assert nodes == {(2,), (2, 3), (2, 3, 4), (2, 3, 9)}
    assert len(memory.chains([0, 1], length=3, count=2)) == 1
    assert memory.chains([0, 8], length=3, count=4) == []


def test_rare_followers_give_way_to_frequent_ones():
    memory = written(*([1, token] for token in range(100)), [1, 7], [1, 7])
    assert len(memory._followers[(1,)]) == MAX_FOLLOWERS
    found = memory.continuations([1])
    assert len(found) == MAX_CONTINUATIONS and found[0].token == 7
    assert found[1].token == 99, "among equals the newest"


def test_the_older_half_is_forgotten():
    memory = written(*([word, word + 1, word + 2] for word in range(0, 300, 3)), limit=150)
    assert len(memory) <= 150 + 3
    assert memory.continuations([297]) and not memory.continuations([0])
    whole = written(*([word, word + 1, word + 2] for word in range(0, 300, 3)))
    for word in range(270, 300, 3):
        assert memory.continuations([word]) == whole.continuations([word])


def test_what_is_forgotten_leaves_the_rest_as_it_was():
    """The end of a prompt tells how answers begin; it is not written, also when the rest is counted anew."""
    memory, last = AnswerMemory(20), [10, 11, 12]
    for first in (1, 2):
        for word in [5, 6, 7, 8, 9]:
            answer = memory.begin(last)
            for token in (first, word):
                memory.append(answer, token)
    assert len(memory) < 10 * 5 and memory.continuations([12])[0].token == 2
    assert not memory.continuations([10]) and not memory.continuations([11])


def test_an_answer_begins_with_the_end_of_its_prompt():
    memory = AnswerMemory(100)
    LookupText([1, 2, 3, 4, 5], memory).append([6])
    assert memory.continuations([4, 5])[0].token == 6 and not memory.continuations([1])
    (chain,) = LookupText([8, 9, 4, 5], memory).chains(4, 4)
    assert chain.tokens == (6,)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_second_time_takes_fewer_passes_and_writes_the_same(name):
    target = ARCHITECTURES[name]()
    expected = plain(target, **LENGTH)
    for assistant in (LookupAssistant(target=target, policy="fixed"), make_assistant(target)):
        rounds = []
        for memory in (0, 0, 1000, 1000):
            assert torch.equal(assisted(target, assistant, lookup_memory=memory, **LENGTH), expected)
            rounds.append(assistant.stats.rounds)
        assert rounds[0] == rounds[1] >= rounds[2] > rounds[3]


def test_sampling_is_seed_exact_with_what_was_written_before(target):
    lookup = LookupAssistant(target=target, confidence_threshold=0.0, policy="fixed")
    options = {"do_sample": True, "temperature": 0.5, "top_k": 3, "max_new_tokens": 24}
    for seed in (1, 2, 1, 2):
        torch.manual_seed(seed)
        expected = plain(target, **options)
        torch.manual_seed(seed)
        assert torch.equal(assisted(target, lookup, **options), expected)
    assert lookup.stats.mean_accepted_length > 2


def test_rows_of_a_batch_write_into_one_memory(target):
    prompts = torch.cat([PROMPT, PROMPT])
    lookup = LookupAssistant(target=target, policy="fixed")
    expected = target.generate(prompts, **LENGTH)
    assert torch.equal(target.generate(prompts, assistant_model=lookup, **LENGTH), expected)
    assert len(lookup.experience.answers) == 2 * (LENGTHS[-1] + LENGTH["max_new_tokens"])


def test_copies_and_files_remember_nothing(target, tmp_path):
    for assistant in (LookupAssistant(target=target), make_assistant(target)):
        assisted(target, assistant, **LENGTH)
        assert len(assistant.experience.answers) > 0
        for twin in (copy.deepcopy(assistant), pickle.loads(pickle.dumps(assistant))):
            assert len(twin.experience.answers) == 0 and twin.experience.answers.limit == 100_000
    assistant.save_pretrained(tmp_path)
    assert len(type(assistant).from_pretrained(tmp_path).experience.answers) == 0


def test_none_is_kept_where_none_is_wanted(target):
    lookup = LookupAssistant(target=target)
    assisted(target, lookup, **LENGTH)
    assisted(target, lookup, lookup_memory=0, **LENGTH)
    assert len(lookup.experience.answers) == 0
    lookup.generation_config.lookup_memory = 0
    assisted(target, lookup, **LENGTH)
    assert len(lookup.experience.answers) == 0
    with pytest.raises(ValueError, match="lookup_memory=-1, expected an integer of at least 0"):
        assisted(target, lookup, lookup_memory=-1, **LENGTH)
