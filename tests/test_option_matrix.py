"""Every row of the table in examples/options.md: the ids and outputs of plain `generate`, or a refusal before it starts.

The processors of the table are test_options.py's, those with a batch test_batches.py's.
"""

from __future__ import annotations

import pytest
import torch
from options import ONCE, PAGE, PROCESSORS, REFUSED, ROWS, SAMPLED, SERVED, WARPERS, written
from oracles import make_assistant
from tiny_models import keep_softmax_in_float64, tiny_llama

PROMPTS = torch.tensor([[5, 17, 33, 8, 61, 12], [0, 0, 11, 7, 3, 20]])
TREE = {"total_tokens": 6, "depth": 2, "draft_top_k": 3}
CALLS = {
    ONCE: {"input_ids": PROMPTS[:1], "do_sample": False},
    ROWS: {"input_ids": PROMPTS, "do_sample": False},
    SAMPLED: {"input_ids": PROMPTS[:1], "do_sample": True, "temperature": 1.2},
}


@pytest.fixture(autouse=True)
def _exact_softmax(monkeypatch):
    keep_softmax_in_float64(monkeypatch)


def call(option, model, inputs, **more):
    inputs = {**inputs, "attention_mask": (inputs["input_ids"] != 0).long()}
    sampled = {name: inputs.pop(name) for name in ("do_sample", "temperature") if name in inputs}
    arguments = {"max_new_tokens": 6, "pad_token_id": 0, **sampled, **option.change(model, inputs), **more}
    torch.manual_seed(3)
    return model.generate(**arguments)


def leaves(value):
    return [leaf for part in value for leaf in leaves(part)] if isinstance(value, tuple) else [value]


@pytest.mark.parametrize("option", SERVED, ids=lambda one: one.name)
def test_same_as_plain_generate(option):
    model = tiny_llama(attn_implementation=option.attention, num_hidden_layers=3)
    assistant = make_assistant(model)
    for run in option.runs:
        plain = call(option, model, CALLS[run])
        assistant.stats = None
        ours = call(option, model, CALLS[run], assistant_model=assistant, **TREE)
        assert assistant.stats is not None, "the call went past the loop"
        ids = [output if torch.is_tensor(output) else output.sequences for output in (plain, ours)]
        assert ids[0].tolist() == ids[1].tolist(), run
        for name in option.returned:
            pairs = list(zip(leaves(plain[name]), leaves(ours[name]), strict=True))
            assert pairs
            for theirs, mine in pairs:
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5 if theirs.dtype == torch.float32 else 1e-9)


@pytest.mark.parametrize("option", REFUSED, ids=lambda one: one.name)
def test_refused_before_it_starts(option):
    model = tiny_llama(attn_implementation=option.attention, num_hidden_layers=3)
    assistant = make_assistant(model)
    passes = []
    model.model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    with pytest.raises(ValueError, match=option.refusal):
        call(option, model, CALLS[ONCE], assistant_model=assistant)
    assert not passes


def test_the_page_is_this_list():
    text = PAGE.read_text(encoding="utf-8")
    assert text == written(text), "run `python tests/options.py`"
    assert all(name in text for name in [*PROCESSORS, *WARPERS])
