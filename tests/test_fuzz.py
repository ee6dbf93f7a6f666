"""Random calls of `generate` against plain `generate`: prompts, batch layouts, trees, processors, ends.

A few in every run of the tests; `make fuzz` runs 2,000 of them (`CONFU_FUZZ_CASES`).
"""

from __future__ import annotations

import functools
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import make_assistant, make_oracle
from tiny_models import ARCHITECTURES, VOCAB_SIZE
from transformers import LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from confu_hf import LookupAssistant
from confu_hf.decoding import acceptance

CASES = int(os.environ.get("CONFU_FUZZ_CASES", "12"))
NAMES = ["llama", "mistral", "gemma3", "qwen3"]
ASSISTANTS = {"network": make_assistant, "oracle": make_oracle, "lookup": lambda model: LookupAssistant(target=model)}

prompts = st.lists(st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=12), min_size=1, max_size=4)
trees = st.fixed_dictionaries(
    {
        "total_tokens": st.integers(0, 12),
        "depth": st.integers(1, 6),
        "draft_top_k": st.integers(1, 6),
        "confidence_threshold": st.sampled_from([0.0, 0.01, 0.3]),
        "policy": st.sampled_from(["auto", "fixed"]),
        "lookup": st.booleans(),
    }
)
contemplation = st.fixed_dictionaries(
    {}, optional={"contemplate": st.booleans(), "contemplate_tokens": st.sampled_from([1, 3, None])}
)
processors = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.sampled_from([0.8, 1.3]),
        "no_repeat_ngram_size": st.integers(1, 3),
        "encoder_no_repeat_ngram_size": st.integers(1, 2),
        "min_new_tokens": st.integers(1, 12),
        "suppress_tokens": st.lists(st.integers(0, VOCAB_SIZE - 1), min_size=1, max_size=5),
        "sequence_bias": st.sampled_from([[[[3], 2.0], [[9, 31], -4.0]]]),
        "guidance_scale": st.sampled_from([1.5]),
    },
)
sampling = st.fixed_dictionaries(
    {"do_sample": st.just(True)},
    optional={
        "temperature": st.sampled_from([0.3, 1.5]),
        "top_k": st.integers(1, 20),
        "top_p": st.sampled_from([0.5, 0.95]),
    },
)
ends = st.fixed_dictionaries(
    {"eos_token_id": st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=40, unique=True)},
    optional={"return_dict_in_generate": st.just(True)},
)


class _Sum(StoppingCriteria):
    """Rows stop where their newest tokens add up to a multiple of a number."""

    def __init__(self, number):
        self.number = number

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -2:].sum(-1) % self.number == 0


@functools.cache
def pair(name, assistant):
    """A target and one assistant on it, made once."""
    model = ARCHITECTURES[name]()
    return model, ASSISTANTS[assistant](model)


def padded(rows, extra):
    """Ids and mask, padded on the left, by `extra` more than needed."""
    width = max(map(len, rows)) + extra
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return {
        "input_ids": ids,
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


@settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=CASES < 100)
@given(
    name=st.sampled_from(NAMES),
    assistant=st.sampled_from(list(ASSISTANTS)),
    rows=prompts,
    extra=st.integers(0, 2),
    tree=trees,
    more=contemplation,
    options=processors,
    sampled=st.none() | sampling,
    stops=ends,
    number=st.none() | st.integers(2, 40),
    new_tokens=st.integers(1, 24),
    seed=st.integers(0, 2**31),
)
def test_any_call(name, assistant, rows, extra, tree, more, options, sampled, stops, number, new_tokens, seed):
    """Greedy batches row by row, and one row sampled by the same random numbers."""
    model, confu = pair(name, assistant)
    rows = rows if sampled is None else rows[:1]
    arguments = {**padded(rows, extra), **options, **stops, **(sampled or {"do_sample": False})}
    arguments |= {"max_new_tokens": new_tokens, "pad_token_id": 0, "logits_processor": LogitsProcessorList()}
    if number is not None:
        arguments["stopping_criteria"] = StoppingCriteriaList([_Sum(number)])
    more = {} if assistant == "lookup" else more
    texts = []
    for drafted in ({}, {"assistant_model": confu, **tree, **more}):
        torch.manual_seed(seed)
        output = model.generate(**arguments, **drafted)
        texts.append((output if torch.is_tensor(output) else output.sequences).tolist())
    assert texts[0] == texts[1]


def test_a_wrong_text_would_be_found(monkeypatch):
    """Negative control: a walk that draws another token than plain decoding."""
    choose = acceptance.Sampler.__call__
    monkeypatch.setattr(acceptance.Sampler, "__call__", lambda self, scores: choose(self, scores.roll(1, dims=-1)))
    call = {"rows": [[5, 17], [3]], "extra": 0, "tree": {}, "more": {}, "options": {}, "stops": {"eos_token_id": [96]}}
    with pytest.raises(AssertionError):
        test_any_call.hypothesis.inner_test(
            "llama", "network", **call, sampled=None, number=None, new_tokens=4, seed=0
        )
