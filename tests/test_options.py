"""Every option of `generate` that changes logits or ends a text: seed for seed the text of plain `generate`.

The processors are those of options.py, held against those that Transformers ships: a new one must be added there.
"""

from __future__ import annotations

import inspect

import pytest
import torch
from options import ELSEWHERE, PROCESSORS, WARPERS
from oracles import make_oracle
from tiny_models import tiny_llama
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.generation import logits_process

from confu_hf.compat import OUTPUT_CACHE, cache_keyword

PROMPT = torch.tensor([[5, 17, 33, 8, 61, 12, 90, 44, 23, 17, 33]])
TREE = {"total_tokens": 8, "depth": 4, "draft_top_k": 3}
LENGTHS = {"max_new_tokens": 14, "pad_token_id": 0}


def same(model, assistant, ids=PROMPT, **arguments):
    """The text of plain `generate`, after holding that with an assistant against it."""
    texts = []
    for more in ({}, {"assistant_model": assistant, **TREE}):
        torch.manual_seed(3)
        texts.append(model.generate(ids, **more, **{**LENGTHS, **arguments}))
    assert texts[0].tolist() == texts[1].tolist()
    return texts[0]


# The oldest versions lack the newest; warpers are for sampling.
CASES = [(name, True) for name in [*PROCESSORS, *WARPERS] if hasattr(logits_process, name)]
CASES += [(name, False) for name, _ in CASES if name in PROCESSORS]


@pytest.mark.parametrize(("name", "do_sample"), CASES)
def test_processors_and_warpers(name, do_sample, monkeypatch):
    options = {**PROCESSORS, **WARPERS}[name]
    processor, called = getattr(logits_process, name), []
    call = processor.__call__
    monkeypatch.setattr(processor, "__call__", lambda self, *args: (called.append(1), call(self, *args))[1])
    model = tiny_llama()
    same(model, make_oracle(model), do_sample=do_sample, **options)
    assert called, "the option switches the processor on"


def test_no_processor_is_forgotten():
    shipped = {
        name
        for name, member in inspect.getmembers(logits_process, inspect.isclass)
        if issubclass(member, LogitsProcessor) and member is not LogitsProcessor
    }
    assert shipped <= {*PROCESSORS, *WARPERS, *ELSEWHERE}


class _Counting(LogitsProcessor):
    """Keeps a state: every third call bans the likeliest token."""

    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls % 3 == 0:
            scores = scores.scatter(1, scores.argmax(-1, keepdim=True), -torch.inf)
        return scores


@pytest.mark.parametrize("do_sample", [False, True])
def test_a_processor_with_a_state(do_sample):
    model = tiny_llama()
    plain, ours = _Counting(), _Counting()
    texts = []
    for processor, more in ((plain, {}), (ours, {"assistant_model": make_oracle(model), **TREE})):
        torch.manual_seed(3)
        processors = LogitsProcessorList([processor])
        texts.append(model.generate(PROMPT, do_sample=do_sample, logits_processor=processors, **more, **LENGTHS))
    assert texts[0].tolist() == texts[1].tolist()
    assert plain.calls == ours.calls, "once for every token"


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_no_numbers(value):
    """As plain decoding: greedy takes what argmax gives, sampling raises its error, and both go on to work."""
    model = tiny_llama()
    assistant = make_oracle(model)
    healthy = same(model, assistant, do_sample=False)
    weight = model.lm_head.weight
    kept = weight.detach().clone()
    weight[40] = value
    same(model, assistant, do_sample=False)
    for more in ({}, {"assistant_model": assistant}):
        with pytest.raises(RuntimeError, match="probability tensor contains"):
            model.generate(PROMPT, do_sample=True, **more, **LENGTHS)
    weight.copy_(kept)
    assert same(model, assistant, do_sample=False).tolist() == healthy.tolist()


class _Raises(StoppingCriteria):
    def __init__(self, after):
        self.after = after

    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] >= PROMPT.shape[1] + self.after:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize("after", [1, 2, 5, 9])
def test_an_interruption_leaves_everything_usable(after):
    model = tiny_llama(dtype=torch.float32)
    assistant = make_oracle(model)
    expected = model.generate(PROMPT, do_sample=False, **LENGTHS)
    first = model.generate(
        PROMPT,
        do_sample=False,
        assistant_model=assistant,
        return_dict_in_generate=True,
        pad_token_id=0,
        max_new_tokens=4,
    )
    cache = first[OUTPUT_CACHE]
    length = cache.get_seq_length()
    ids = torch.cat([first.sequences, torch.tensor([[9, 31]])], dim=1)
    fresh = model.generate(ids, do_sample=False, **LENGTHS)
    with pytest.raises(KeyboardInterrupt):
        model.generate(
            ids,
            **cache_keyword(model, cache),
            assistant_model=assistant,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([_Raises(6 + after)]),
            **LENGTHS,
        )
    assert cache.get_seq_length() == length
    got = model.generate(ids, **cache_keyword(model, cache), assistant_model=assistant, do_sample=False, **LENGTHS)
    assert got.tolist() == fresh.tolist()
    assert model.generate(PROMPT, do_sample=False, assistant_model=assistant, **LENGTHS).tolist() == expected.tolist()
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_gradient_checkpointing_in_training_mode_is_refused():
    """Layers drop their cache then."""
    model = tiny_llama()
    assistant = make_oracle(model)
    model.gradient_checkpointing_enable()
    model.train()
    for contemplate in (True, False):
        with pytest.raises(ValueError, match=r"gradient checkpointing.*Call model.eval\(\)"):
            model.generate(PROMPT, assistant_model=assistant, contemplate=contemplate, max_new_tokens=4)
    model.eval()
    same(model, assistant, do_sample=False)


def test_max_time_ends_a_text():
    model = tiny_llama()
    got = model.generate(PROMPT, assistant_model=make_oracle(model), max_time=0.0, max_new_tokens=200)
    assert PROMPT.shape[1] < got.shape[1] < PROMPT.shape[1] + 20
