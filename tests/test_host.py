"""How often the host waits for the device in a greedy round, counted on a CPU that is taken for a GPU."""

from __future__ import annotations

import traceback

import pytest
import torch
from assisted_calls import PROMPT, plain
from oracles import make_assistant
from tiny_models import tiny_llama
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from confu_hf import LookupAssistant, host
from confu_hf.acceleration.costs import CostModel
from confu_hf.decoding.loop import Decoder
from confu_hf.tree.draft_tree import TENSORS, DraftTree

READS = {"tolist", "item", "numpy", "cpu", "nonzero", "is_nonzero", "equal", "masked_select", "allclose"}
READS |= {f"__{name}__" for name in ("bool", "int", "float", "index", "contains")}
LIMITS = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": 96, "pad_token_id": 0}


class Watch(TorchFunctionMode):
    """Notes what is read of tensors that do not lie on the host: those that it neither holds nor has read together, nor
    made of such."""

    def __init__(self):
        super().__init__()
        self.read: list[torch.Tensor] = []
        self.waits, self.others = 0, []

    def known(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in {known.untyped_storage().data_ptr() for known in self.read}

    def read_together(self, *columns: torch.Tensor) -> list[torch.Tensor]:
        self.waits += not all(map(self.known, columns))
        copies = [column.clone() for column in columns]
        self.read += copies
        return copies

    def hold(self, values, dtype=None) -> torch.Tensor:
        self.read.append(torch.tensor(values, dtype=dtype))
        return self.read[-1]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in READS and torch.is_tensor(args[0]) and not self.known(args[0]):
            caller = traceback.extract_stack()[-2]
            self.others.append(f"{name} in {caller.filename}:{caller.lineno}")
        output = func(*args, **(kwargs or {}))
        if any(torch.is_tensor(leaf) and self.known(leaf) for leaf in tree_leaves((args, kwargs))):
            self.read += [leaf for leaf in tree_leaves(output) if torch.is_tensor(leaf)]
        return output


def moved(tree: DraftTree, device: torch.device) -> DraftTree:
    """`DraftTree.to` with a copy in every case: what it returns is not the host's."""
    with torch._C.DisableTorchFunction():
        return DraftTree(*(getattr(tree, name).clone() for name in TENSORS))


@pytest.fixture
def watches(monkeypatch):
    """One for every round."""
    seen, run = [], Decoder.round

    def watched(self, state):
        with Watch() as watch, monkeypatch.context() as patch:
            patch.setattr(host, "read", watch.read_together)
            patch.setattr(host, "hold", watch.hold)
            patch.setattr(DraftTree, "to", moved)
            result = run(self, state)
        seen.append(watch)
        return result

    monkeypatch.setattr(host, "waits", lambda device: True)
    monkeypatch.setattr(Decoder, "round", watched)
    return seen


@pytest.mark.parametrize(
    "options, most",
    [
        ({"lookup": False}, 1),
        ({"lookup": False, "contemplate": False}, 1),
        ({"lookup": False, "contemplate_tokens": 1}, 1),
        ({"total_tokens": 0}, 1),
        ({}, 2),
        ({"lookup": False, "policy": "auto"}, 2),
    ],
    ids=["all", "eagle3", "one", "none", "lookup", "auto"],
)
def test_the_host_waits_for_the_word_of_the_target(watches, options, most):
    model = tiny_llama()
    assistant = make_assistant(model)
    assistant.costs = CostModel({1: 1.0, 16: 1.01}, draft_step=0.001, learns=False)
    got = model.generate(PROMPT, assistant_model=assistant, **LIMITS, **{"total_tokens": 7, "depth": 2, **options})
    assert torch.equal(got, plain(model, **LIMITS))
    assert len(watches) > 5
    assert {name for watch in watches for name in watch.others} == set()
    assert max(watch.waits for watch in watches) == most


def test_a_lookup_alone_waits_once(watches):
    model = tiny_llama()
    lookup = LookupAssistant(target=model, policy="fixed")
    got = model.generate(PROMPT, assistant_model=lookup, **LIMITS)
    assert torch.equal(got, plain(model, **LIMITS)) and lookup.stats.verified_nodes > lookup.stats.rounds
    assert {watch.waits for watch in watches} == {1} and not any(watch.others for watch in watches)


def test_stop_strings_are_looked_for_on_the_host(watches, tokenizer):
    model = tiny_llama()
    assistant = make_assistant(model)
    text = tokenizer.decode(plain(model, **LIMITS)[0, PROMPT.shape[1] :])
    rules = {**LIMITS, "stop_strings": [text[8:10]], "tokenizer": tokenizer}
    got = model.generate(PROMPT, assistant_model=assistant, lookup=False, **rules)
    assert torch.equal(got, plain(model, **rules)) and got.shape[1] < PROMPT.shape[1] + 24
    assert max(watch.waits for watch in watches) == 1


def test_numbers_read_together_keep_their_kinds(monkeypatch):
    monkeypatch.setattr(host, "waits", lambda device: True)
    columns = torch.tensor([[1, -(2**40)]]), torch.tensor([[True, False, True]]), torch.tensor([[-0.1]])
    for column, copy in zip(columns, host.read(*columns), strict=True):
        assert torch.equal(column, copy) and column.dtype == copy.dtype


def test_the_watch_sees_a_read():
    with Watch() as watch:
        if torch.ones(1).sum():
            torch.arange(3).tolist()
    assert [other.split()[0] for other in watch.others] == ["__bool__", "tolist"]
