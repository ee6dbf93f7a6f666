"""What the draft is told in `generate`: every decided token, the future of the last accepted node, and over turns what it knew."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from oracles import make_assistant
from tiny_models import tiny_llama
from transformers import DynamicCache

from confu_hf import ConFuAssistant
from confu_hf.compat import OUTPUT_CACHE, cache_keyword
from confu_hf.decoding.drafting import NetworkDrafter
from confu_hf.decoding.policy import FixedPolicy, RoundPlan

PROMPT = torch.tensor([[5, 17, 33, 8, 61, 12, 90, 44, 23, 7, 3]])
LENGTHS = {"max_new_tokens": 32, "pad_token_id": 0}


class WatchedDrafter(NetworkDrafter):
    """Notes what it had been told, and what its cache held, whenever a tree was started."""

    def __init__(self, *args):
        super().__init__(*args)
        self.futures, self.rows = [], []

    def step(self, tokens, parents, top_k):
        future = self.waiting[-1].future
        children = super().step(tokens, parents, top_k)
        if parents is None:
            self.futures.append(future)
            self.rows.append((self.cache.lengths[0], self.position_ids.item()))
        return children


class WatchedAssistant(ConFuAssistant):
    def new_drafter(self, target, options):
        self.watched = WatchedDrafter(self, target.get_input_embeddings())
        return self.watched


def test_the_future_of_the_last_accepted_node_reaches_the_draft():
    """Without a contemplate token on the node itself, its nearest ancestor's future is used; in EAGLE-3 mode none."""
    model = tiny_llama()
    assistant = make_assistant(model, assistant_class=WatchedAssistant)
    model.generate(PROMPT, do_sample=False, assistant_model=assistant, **LENGTHS)
    seen = assistant.watched.futures
    assert seen[0] is None
    assert all(future is not None and future.shape == (1, 96) for future in seen[1:])
    assert not torch.equal(seen[1], seen[2])
    model.generate(PROMPT, do_sample=False, assistant_model=assistant, contemplate=False, **LENGTHS)
    seen = assistant.watched.futures
    assert seen and all(future is None for future in seen)


@dataclass(frozen=True)
class EveryThird(FixedPolicy):
    """Drafts in every third round only."""

    def plan(self, state, history):
        plan = super().plan(state, history)
        return plan if len(history) % 3 == 0 else RoundPlan(0, 0, plan.top_k)


@pytest.mark.parametrize("contemplate", [True, False])
@pytest.mark.parametrize("policy", [FixedPolicy, EveryThird])
def test_the_draft_remembers_every_decided_token(policy, contemplate):
    """Its cache has no hole: each round leaves the row it drafted from and all accepted ones, drafting or not."""
    model = tiny_llama()
    expected = model.generate(PROMPT, do_sample=False, **LENGTHS)
    assistant = make_assistant(model, assistant_class=WatchedAssistant)
    assistant.new_policy = policy
    got = model.generate(PROMPT, do_sample=False, assistant_model=assistant, contemplate=contemplate, **LENGTHS)
    assert got.tolist() == expected.tolist()
    rows = assistant.watched.rows
    assert len(rows) > 3
    assert all(committed == start for committed, start in rows), "rows 0 .. start - 1 lie in the draft's cache"
    if policy is EveryThird:
        drafted = [record.nodes > 1 for record in assistant.stats.records]
        assert drafted == [number % 3 == 0 for number in range(len(drafted))][: len(drafted) - 1] + drafted[-1:]


@pytest.mark.parametrize("passed_in", [False, True])
def test_a_second_turn_starts_the_draft_with_what_it_knew(passed_in):
    model = tiny_llama()
    assistant = make_assistant(model, assistant_class=WatchedAssistant)
    arguments = {"do_sample": False, "assistant_model": assistant, "return_dict_in_generate": True, **LENGTHS}
    cache = DynamicCache(config=model.config) if passed_in else None
    first = model.generate(PROMPT, **cache_keyword(model, cache), **arguments)
    returned = first[OUTPUT_CACHE]
    kept = copy.deepcopy(returned)
    again = torch.cat([first.sequences, torch.tensor([[9, 31, 4]])], dim=1)
    model.generate(again, **cache_keyword(model, returned), **arguments)
    assert assistant.watched.rows[0] == (again.shape[1] - 1,) * 2, "every row of both turns"
    other = torch.cat([first.sequences[:, 1:], torch.tensor([[9, 31, 4, 5]])], dim=1)
    model.generate(other, **cache_keyword(model, kept), **arguments)
    assert assistant.watched.rows[0][0] < 8, "of other ids it knows nothing"
