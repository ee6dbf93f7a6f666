"""What goes wrong in the middle of a call, or lies at the edge: target, adapter, assistant and the caller's cache stay
usable, and the text stays that of plain `generate`."""

from __future__ import annotations

import copy
import gc
import os
from pathlib import Path

import pytest
import torch
from oracles import make_assistant
from tiny_models import VOCAB_SIZE, tiny_llama, tiny_target
from tokenizers import Tokenizer, decoders, models
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from confu_hf import ConFuAssistant
from confu_hf.compat import OUTPUT_CACHE, cache_keyword

PROMPT = torch.tensor([[5, 17, 33, 8, 61, 12, 90, 44]])
LENGTHS = {"max_new_tokens": 8, "pad_token_id": 0, "do_sample": False}


class _Countdown:
    """Raises at its n-th call; told so by whoever is asked in a round."""

    def __init__(self, calls: int, error: BaseException):
        self.calls, self.error = calls, error

    def tick(self) -> None:
        self.calls -= 1
        if self.calls == 0:
            raise self.error


class _Streamer(_Countdown, BaseStreamer):
    def put(self, value):
        self.tick()

    def end(self):
        """Never comes to it."""


class _Processor(_Countdown, LogitsProcessor):
    def __call__(self, input_ids, scores):
        self.tick()
        return scores


class _Criterion(_Countdown, StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool)


def _raising(where, calls, error, model):
    """The arguments of a call in which `error` is raised, and how to undo it."""
    if where == "streamer":
        return {"streamer": _Streamer(calls, error)}, lambda: None
    if where == "processor":
        return {"logits_processor": LogitsProcessorList([_Processor(calls, error)])}, lambda: None
    if where == "criterion":
        return {"stopping_criteria": StoppingCriteriaList([_Criterion(calls, error)])}, lambda: None
    countdown = _Countdown(calls, error)  # in the middle of a forward pass: some layers have written, others have not
    return {}, model.model.layers[5].register_forward_pre_hook(lambda *_: countdown.tick()).remove


FAULTS = [
    ("streamer", 2, KeyboardInterrupt()),
    ("processor", 1, ValueError("mine")),
    ("processor", 6, KeyboardInterrupt()),
    ("criterion", 3, ValueError("mine")),
    ("verify", 1, torch.OutOfMemoryError("out of memory")),
    ("verify", 2, torch.OutOfMemoryError("out of memory")),
    ("verify", 5, RuntimeError("out of memory")),
]


@pytest.mark.parametrize(("where", "calls", "error"), FAULTS)
def test_an_error_in_the_middle_of_a_call(where, calls, error):
    """At several rounds, on a cache of the caller: it holds what it held, and a second attempt goes as if nothing had been."""
    model = tiny_llama(dtype=torch.float32)
    plain = model(PROMPT).logits
    assistant = make_assistant(model, lora_rank=2)
    model.confu.eval()
    first = model.generate(PROMPT, assistant_model=assistant, return_dict_in_generate=True, **LENGTHS)
    cache = first[OUTPUT_CACHE]
    ids = torch.cat([first.sequences, torch.tensor([[9, 31]])], dim=1)
    kept, expected = copy.deepcopy(cache), model.generate(ids, **LENGTHS)
    arguments, undo = _raising(where, calls, error, model)
    with pytest.raises(type(error)) as raised:
        model.generate(ids, **cache_keyword(model, cache), assistant_model=assistant, **arguments, **LENGTHS)
    undo()
    assert raised.value is error
    assert cache.get_seq_length() == kept.get_seq_length()
    assert all(torch.equal(ours, old) for ours, old in zip(cache.layers[2].keys, kept.layers[2].keys, strict=True))
    assert torch.equal(model(PROMPT).logits, plain), "the target alone is as it was, bit for bit"
    assert not any("forward" in module.__dict__ for module in model.modules())
    got = model.generate(ids, **cache_keyword(model, cache), assistant_model=assistant, **LENGTHS)
    assert got.tolist() == expected.tolist()


def test_the_last_positions_that_a_target_has():
    """Learned positions end somewhere: trees and contemplate tokens stay within."""
    model = tiny_target("gpt2", without=("num_key_value_heads",), max_position_embeddings=16)
    expected = model.generate(PROMPT, max_length=16, do_sample=False, pad_token_id=0, eos_token_id=-1)
    assert expected.shape[1] == 16
    for policy in ("fixed", "auto"):
        got = model.generate(
            PROMPT,
            max_length=16,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=-1,
            assistant_model=make_assistant(model),
            policy=policy,
        )
        assert got.tolist() == expected.tolist()


def test_a_vocabulary_that_is_padded_beyond_the_tokenizers():
    """Logits have more columns than there are tokens; the draft may well propose one of those."""
    words = {word: index for index, word in enumerate(map(chr, range(33, 113)))}
    raw = Tokenizer(models.BPE(words, merges=[]))
    raw.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert len(tokenizer) < VOCAB_SIZE
    model = tiny_llama()
    assistant = make_assistant(model)
    arguments = {**LENGTHS, "suppress_tokens": list(range(len(tokenizer), VOCAB_SIZE))}
    text = model.generate(PROMPT.clamp(max=79), **arguments)
    arguments |= {"tokenizer": tokenizer, "stop_strings": [tokenizer.decode(text[0, -4:-2])]}
    expected = model.generate(PROMPT.clamp(max=79), **arguments)
    got = model.generate(PROMPT.clamp(max=79), **arguments, assistant_model=assistant)
    assert got.tolist() == expected.tolist()
    assert PROMPT.shape[1] < got.shape[1] < text.shape[1]


def test_a_draft_vocabulary_that_lacks_every_token_of_the_text():
    model = tiny_llama()
    expected = model.generate(PROMPT, **LENGTHS)
    others = [token for token in range(VOCAB_SIZE) if token not in expected[0, 8:].tolist()]
    lacking = ConFuAssistant.from_target(model, draft_vocab_size=len(others))
    lacking.set_draft_vocabulary(torch.tensor(others))
    got = model.generate(PROMPT, assistant_model=lacking, policy="fixed", lookup=False, **LENGTHS)
    assert got.tolist() == expected.tolist()
    assert lacking.stats.mean_accepted_length == 1.0


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_calls_in_a_row_leak_nothing():
    """Neither objects nor memory grow from the 20th call on; what comes once may come before."""
    model = tiny_llama(num_hidden_layers=2)
    arguments = {"total_tokens": 3, "depth": 1, "max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    arguments["assistant_model"] = make_assistant(model)
    arguments["lookup_memory"] = 0  # what was written is remembered up to a limit: tests/test_memory.py

    def state(calls):
        for _ in range(calls):
            model.generate(PROMPT, **arguments)
        gc.collect()
        return len(gc.get_objects()), _resident()

    objects, memory = state(20)
    more_objects, more_memory = state(150)
    assert more_objects - objects < 75, "an object kept by every second call"
    assert more_memory - memory < 150 * 40_000, "40 kB a call: a tenth of what its cache takes"
