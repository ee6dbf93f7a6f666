"""Calls of `generate` on the target of the fixtures `target` and `confu`, with an assistant and without."""

from __future__ import annotations

import torch

from confu_hf.compat import OUTPUT_CACHE

PROMPT = torch.arange(3, 14)[None]
# What this version of Transformers lets a cache be called: as an argument of `generate`, as a field of outputs.
CACHE_NAMES = sorted({OUTPUT_CACHE, "past_key_values"})
DRAFT = {"draft_vocab_size": 50, "num_virtual_tokens": 4}


def plain(target, **kwargs):
    return target.generate(PROMPT, **{"max_new_tokens": 24, **kwargs})


def assisted(target, confu, **kwargs):
    confu.stats = None
    output = target.generate(PROMPT, assistant_model=confu, **{"max_new_tokens": 24, **kwargs})
    assert confu.stats is not None, "the call went past the loop"
    return output
