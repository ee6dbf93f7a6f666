"""What a round costs beside attention grows as the context does, not faster; and nothing of a prompt is held on to."""

from __future__ import annotations

import statistics

import pytest
import torch
from oracles import make_assistant
from tiny_models import VOCAB_SIZE, tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from confu_hf.decoding.loop import Decoder

CONTEXTS = (256, 512, 1024)
TREE = {"total_tokens": 7, "depth": 2, "draft_top_k": 4, "policy": "fixed"}
LIMITS = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None}


class Allocated(TorchDispatchMode):
    """Counts the bytes of all tensors that operators make, views left out."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if torch.is_tensor(leaf)}
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if torch.is_tensor(leaf) and leaf.untyped_storage().data_ptr() not in given:
                self.bytes += leaf.untyped_storage().nbytes()
        return output


@pytest.fixture
def model():
    return tiny_llama(num_hidden_layers=2, max_position_embeddings=2048, dtype=torch.float32)


def prompt(length: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(3, VOCAB_SIZE, (1, length), generator=generator)


def bytes_of_rounds(model, assistant, monkeypatch, **options) -> list[float]:
    """Median of the rounds behind the first two, in which the draft reads the prompt and numbers are looked up anew."""
    medians = []
    run = Decoder.round
    for context in CONTEXTS:
        seen = []

        def counted(self, state, seen=seen):
            with Allocated() as allocated:
                result = run(self, state)
            seen.append(allocated.bytes)
            return result

        with monkeypatch.context() as patch:
            patch.setattr(Decoder, "round", counted)
            model.generate(prompt(context), assistant_model=assistant, **LIMITS, **TREE | options)
        medians.append(statistics.median(seen[2:]))
    return medians


@pytest.mark.parametrize("options", [{}, {"contemplate": False, "lookup": False}, {"total_tokens": 0}])
def test_what_a_round_allocates_grows_with_the_context_and_not_faster(model, monkeypatch, options):
    assistant = make_assistant(model)
    short, middle, long = bytes_of_rounds(model, assistant, monkeypatch, **options)
    slopes = (middle - short) / 256, (long - middle) / 512
    assert slopes[1] < 1.1 * slopes[0]
    # Of each key: a few numbers of 8 bytes; and masks, as float32 and a few times as bool, for every row of a pass.
    rows = 0 if options.get("total_tokens") == 0 else 2 * (1 + TREE["total_tokens"])
    steps = TREE["depth"] * TREE["draft_top_k"]
    assert slopes[1] < 8 * 16 + (rows + steps) * 12
    keys_and_values = 2 * 2 * 2 * 8 * 4  # of both layers
    features = 3 * 32 * 4
    assert slopes[1] < keys_and_values + features or rows, "no copy of the cache, none of the rows that wait"


def test_the_counter_sees_a_copy():
    states = torch.zeros(10, dtype=torch.float32)
    with Allocated() as allocated:
        states[:5].add_(1)
        assert allocated.bytes == 0
        torch.cat([states, states])
    assert allocated.bytes == 80


def test_nothing_holds_on_to_the_features_of_a_prompt(model, monkeypatch):
    """Once the draft has read them: neither the rows that wait for it nor the state of the generation."""
    held, run = [], Decoder.round

    def watched(self, state):
        result = run(self, state)
        kept = [part.features for part in self.drafter.drafter.waiting] + [result[0].features]
        held.append(sum(states.untyped_storage().nbytes() for states in kept))
        return result

    monkeypatch.setattr(Decoder, "round", watched)
    model.generate(prompt(512), assistant_model=make_assistant(model), **LIMITS, **TREE)
    row = 3 * 32 * 4
    assert max(held) < 2 * (2 + TREE["depth"]) * row * (1 + TREE["total_tokens"])
    assert max(held) < 512 * row / 2
