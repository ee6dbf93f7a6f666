"""What tests of refusals share: the table's one assertion, and a way to damage a file."""

from __future__ import annotations

import re

import pytest
import torch
from assisted_calls import PROMPT
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama


def refused(message, call, target, error=ValueError):
    """`call()` raises `error` with all of `message` (got, expected, fix); the target still generates as before."""
    with pytest.raises(error) as caught:
        call()
    text = " ".join(str(caught.value).split())
    for part in message:
        assert re.search(part, text), f"{part!r} is not in: {text}"
    plain = tiny_llama().generate(PROMPT, max_new_tokens=6)
    if type(target).__name__ == "LlamaForCausalLM" and target.config.to_dict() == tiny_llama().config.to_dict():
        if target.dtype == torch.float64:
            assert torch.equal(target.generate(PROMPT, max_new_tokens=6), plain)
    else:
        target(PROMPT)


def rewrite(path, change):
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})
