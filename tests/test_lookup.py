"""Prompt lookup: what it finds, what it says it is worth, and that no text changes by it."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from assisted_calls import PROMPT, assisted, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import OracleDrafter, make_assistant, make_oracle
from tiny_models import ARCHITECTURES, tiny_llama, tiny_qwen3
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer, pipeline

from confu_hf import LookupAssistant
from confu_hf.acceleration.costs import CostModel
from confu_hf.compat import cache_keyword
from confu_hf.decoding.lookup import CombinedDrafter, LookupText
from confu_hf.decoding.matches import LENGTHS, MAX_CONTINUATIONS, Match, MatchRates, NgramIndex

# Greedy answers of random models run into loops sooner or later: there is something to look up.
LENGTH = {"max_new_tokens": 48, "do_sample": False, "pad_token_id": 0}
# Text of few words, so that matches are long and many.
TEXTS = st.lists(st.integers(0, 3), max_size=60)


def agreement(text: list[int], place: int) -> int:
    """How many tokens in front of `place` are those at the end of the text."""
    count = 0
    while count < place and text[place - 1 - count] == text[len(text) - 1 - count]:
        count += 1
    return count


@settings(deadline=None)
@given(TEXTS)
def test_matches_are_the_longest_and_among_these_the_latest(text):
    matches = NgramIndex(text).matches()
    best = {}  # the best place for every token that may follow
    for place in range(1, len(text)):
        length = max((known for known in LENGTHS if known <= agreement(text, place)), default=0)
        if length and (length, place) > best.get(text[place], (0, 0)):
            best[text[place]] = (length, place)
    expected = sorted(best.values(), reverse=True)[:MAX_CONTINUATIONS]
    assert matches == [Match(place, length, rank) for rank, (length, place) in enumerate(expected)]


@settings(deadline=None)
@given(TEXTS.filter(lambda text: len(text) > 1), st.data())
def test_a_copy_goes_on_with_itself(text, data):
    position = data.draw(st.integers(0, len(text) - 1))
    endless = list(text)
    for place in range(position, position + 20):
        endless.append(endless[place])
    assert NgramIndex(text).copy(position, 20) == endless[len(text) :]


def test_a_probability_is_the_prior_and_what_was_seen():
    rates = MatchRates()
    prior = rates.probability(3, 0)
    assert rates.probability(6, 0) == rates.probability(5, 0), "the longest known length not above it"
    for _ in range(1000):
        rates.learn(Match(0, 3, 0), False)
    assert rates.probability(3, 0) < 0.02 < prior
    assert rates.probability(4, 0) == MatchRates().probability(4, 0), "the others know nothing of it"


def test_chains_tell_what_they_are_worth():
    text = LookupText([1, 2, 3, 4, 9, 9, 1, 2, 3, 5, 9, 8, 1, 2])
    text.append([3])
    recent, older = text.chains(4, 4)
    assert recent.tokens == (5, 9, 8, 1) and older.tokens == (4, 9, 9, 1)
    assert recent.log_probs[0] > older.log_probs[0]
    rates = [first - second for first, second in zip((0.0, *recent.log_probs), recent.log_probs, strict=False)]
    assert rates == sorted(rates, reverse=True), "the longer the match, the surer"


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_identical(name):
    target = ARCHITECTURES[name]()
    lookup = LookupAssistant(target=target, confidence_threshold=0.0, policy="fixed")
    assert torch.equal(assisted(target, lookup, **LENGTH), plain(target, **LENGTH))
    assert lookup.stats.verified_nodes > lookup.stats.rounds


def test_a_text_that_repeats_itself_is_written_in_few_passes():
    target = ARCHITECTURES["gemma2"]()
    lookup = LookupAssistant(target=target, policy="fixed")
    assisted(target, lookup, **LENGTH)
    assert lookup.stats.mean_accepted_length > 3


def test_sampling_is_seed_exact(target):
    lookup = LookupAssistant(target=target, confidence_threshold=0.0, total_tokens=20, policy="fixed")
    accepted = []
    for seed in range(30):
        options = {"do_sample": True, "temperature": 0.5, "top_k": 3, "repetition_penalty": 0.8, "max_new_tokens": 24}
        torch.manual_seed(seed)
        expected, after = plain(target, **options), torch.rand(())
        torch.manual_seed(seed)
        assert torch.equal(assisted(target, lookup, **options), expected)
        assert torch.rand(()) == after, "the global random stream was used differently"
        accepted.append(lookup.stats.mean_accepted_length)
    assert max(accepted) > 1.5


def test_stops_caches_and_outputs(target):
    class Longer(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return torch.tensor([input_ids.shape[1] > PROMPT.shape[1] + 30])

    lookup = LookupAssistant(target=target)
    criteria = {**LENGTH, "stopping_criteria": StoppingCriteriaList([Longer()])}
    assert torch.equal(assisted(target, lookup, **criteria), plain(target, **criteria))
    eos = int(plain(target)[0, PROMPT.shape[1] + 9])
    assert torch.equal(assisted(target, lookup, eos_token_id=eos), plain(target, eos_token_id=eos))
    flags = {"return_dict_in_generate": True, "output_logits": True}
    left, right = plain(target, **flags), assisted(target, lookup, **flags)
    torch.testing.assert_close(torch.stack(left.logits), torch.stack(right.logits))


def test_second_turn_on_a_returned_cache(target):
    lookup, cache = LookupAssistant(target=target), DynamicCache(config=target.config)
    first = assisted(target, lookup, max_new_tokens=8, **cache_keyword(target, cache))
    prompt = torch.cat([first, torch.tensor([[5, 6, 7]])], dim=1)
    again = target.generate(prompt, max_new_tokens=12, assistant_model=lookup, **cache_keyword(target, cache))
    assert torch.equal(again, target.generate(prompt, max_new_tokens=12))


def test_pipeline_and_streamer(target, tokenizer):
    lookup, arguments = LookupAssistant(target=target), {"max_new_tokens": 12, "do_sample": False}
    expected = pipeline("text-generation", model=target, tokenizer=tokenizer)("hello", **arguments)
    assert (
        pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=lookup)("hello", **arguments)
        == expected
    )
    assert lookup.stats.new_tokens == 12
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    answer = assisted(target, lookup, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(answer[0, PROMPT.shape[1] :])


def test_a_life():
    target, other = tiny_llama(), tiny_qwen3()
    usual = type(target)
    lookup = LookupAssistant(target=target, total_tokens=5)
    assert lookup.attach(target) is lookup and lookup.generation_config.total_tokens == 5
    confu = make_assistant(target)
    for twin in (copy.deepcopy(lookup), pickle.loads(pickle.dumps(lookup))):
        assert twin.target is None and twin.generation_config.total_tokens == 5
    with pytest.raises(ValueError, match="lookup.attach: got an assistant that is attached .* Call lookup.detach"):
        lookup.attach(other)
    assert lookup.detach() is target and lookup.detach() is None
    assert torch.equal(assisted(target, confu), plain(target)), "the other assistant is served on"
    confu.detach()
    assert type(target) is usual
    lookup.attach(other)
    assert torch.equal(assisted(other, lookup), plain(other))


def test_without_its_target_it_is_refused_by_name(target):
    with pytest.raises(ValueError, match="LookupAssistant: got one that is attached to no model, .*attach"):
        target.generate(PROMPT, assistant_model=LookupAssistant())
    lookup = LookupAssistant(target=tiny_llama())
    gc.collect()
    with pytest.raises(ValueError, match="attached to no model"):
        target.generate(PROMPT, assistant_model=lookup)
    other = tiny_llama(seed=1)
    lookup.attach(other)
    with pytest.raises(ValueError, match="got another model than its own, expected the one it is attached to"):
        target.generate(PROMPT, assistant_model=lookup)
    with pytest.raises(ValueError, match="got contemplate=True for an EAGLE-3 draft"):
        other.generate(PROMPT, assistant_model=lookup, contemplate=True)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3"])
def test_branches_beside_a_network_change_no_text(name):
    target = ARCHITECTURES[name]()
    expected, passes = plain(target, **LENGTH), {}
    confu = make_assistant(target)
    for lookup in (True, False):
        assert torch.equal(assisted(target, confu, lookup=lookup, **LENGTH), expected)
        passes[lookup] = confu.stats.rounds
    assert passes[True] <= passes[False]


def test_records_tell_what_was_looked_up(target):
    """Of an assistant without a network all accepted tokens but a round's last one are; without lookup none is."""
    lookup, confu = LookupAssistant(target=target), make_oracle(target)
    lookup.costs = CostModel({1: 1.0, 32: 1.01}, learns=False)
    assisted(target, lookup, policy="auto", **LENGTH)
    for record in lookup.stats.records:
        assert record.looked_up == tuple(count - 1 for count in record.accepted)
    assert lookup.stats.looked_up_tokens == sum(record.looked_up[0] for record in lookup.stats.records) > 5
    assert lookup.stats.lookup_reliability and not lookup.stats.reliability
    confu.new_drafter = lambda target, options: CombinedDrafter(OracleDrafter(confu, target))
    assisted(target, confu, **LENGTH)
    both = [record.looked_up[0] for record in confu.stats.records]
    assert 0 < sum(both) < sum(record.accepted[0] - 1 for record in confu.stats.records)
    assert sum(both) == confu.stats.looked_up_tokens
    confu.new_drafter = lambda target, options: OracleDrafter(confu, target)
    assisted(target, confu, **LENGTH)
    assert confu.stats.looked_up_tokens == 0 < confu.stats.mean_accepted_length - 1


def test_a_network_is_not_asked_where_the_text_is_sure_and_loses_nothing_by_it():
    """The oracle's network drafts at times only, and its cache must then hold what it would have held."""
    target = ARCHITECTURES["gemma2"]()
    length = {**LENGTH, "max_new_tokens": 96}
    expected, asked = plain(target, **length), []
    confu = make_oracle(target)
    oracle = confu.new_drafter

    def new_drafter(target, options):
        drafter = oracle(target, options)
        step = drafter.step
        drafter.step = lambda tokens, parents, top_k: (
            asked.append(parents is None),
            step(tokens, parents, top_k),
        )[1]
        return CombinedDrafter(drafter)

    confu.new_drafter = new_drafter
    assert torch.equal(assisted(target, confu, depth=3, **length), expected)
    assert 0 < sum(asked) < confu.stats.rounds
