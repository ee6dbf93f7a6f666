"""Which target a draft was made for, as its config remembers it: a name, a fingerprint of weights, one of the vocabulary.

A target of other shapes is refused when it is attached (`assistant/checks.py`). Here: another vocabulary is refused, for
then token ids mean something else; a fine-tune is warned of, for texts stay exact and accepted lengths do not. Drafts
that remember nothing are taken for anybody's.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import compat
from ..configuration_confu import ConFuConfig
from ..errors import refusal

SAMPLES = 16  # numbers of each weight
# Loaded in one of these, a checkpoint has the same numbers once they are rounded to bfloat16.
COMPARABLE = (torch.float64, torch.float32, torch.bfloat16)


def target_fingerprint(target: nn.Module) -> str | None:
    """sha256 over some numbers of every weight, rounded to bfloat16: the same however the checkpoint was loaded.

    Adapters on the model do not count. None for weights that say nothing of the checkpoint's: quantized, in float16, not
    in memory, or in shards over several processes.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(_base_weights(target).items()):
        if weight.is_meta or isinstance(weight, DTensor) or weight.dtype not in COMPARABLE:
            return None
        numbers = weight.detach().reshape(-1)
        numbers = numbers[:: max(1, len(numbers) // SAMPLES)][:SAMPLES].to("cpu", torch.bfloat16)
        digest.update(f"{name}\0{tuple(weight.shape)}\0".encode())
        digest.update(numbers.contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _base_weights(target: nn.Module) -> dict[str, torch.Tensor]:
    """Weights of the checkpoint by its names: those of adapters left out, those that an adapter wraps found again."""
    named = {name.replace(".base_layer.", "."): weight for name, weight in target.named_parameters()}
    return {name: weight for name, weight in named.items() if not {"confu", "lora_A", "lora_B"} & set(name.split("."))}


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the vocabulary and its ids; added tokens do not count, for fine-tunes add some."""
    added = set(tokenizer.get_added_vocab())
    vocabulary = sorted((index, token) for token, index in tokenizer.get_vocab().items() if token not in added)
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()


def remember_target(
    config: ConFuConfig, target: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Note in a draft's config what it was made for, unless it says so already."""
    if target is not None and config.target_fingerprint is None:
        config.target_fingerprint = target_fingerprint(target)
        name = compat.name_or_path(target.config)
        if config.base_model_name_or_path is None and name is not None and not Path(name).is_dir():
            config.base_model_name_or_path = name  # a folder of this machine means nothing to others
    if tokenizer is not None and config.tokenizer_fingerprint is None:
        config.tokenizer_fingerprint = tokenizer_fingerprint(tokenizer)


def check_identity(
    config: ConFuConfig, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Raise a `ValueError` for another vocabulary than the draft's, warn of another model than it was made for."""
    if tokenizer is not None and config.tokenizer_fingerprint is not None:
        got = tokenizer_fingerprint(tokenizer)
        if got != config.tokenizer_fingerprint:
            raise refusal(
                "The ConFu draft was made for another vocabulary",
                got=f"a tokenizer with the fingerprint {got}",
                expected=config.tokenizer_fingerprint,
                fix="Load the pair trained for this target, or train one: `ConFuAssistant.from_target(model)`.",
            )
    if config.target_fingerprint is None:
        return
    got = target_fingerprint(target)
    if got not in (None, config.target_fingerprint):
        warnings.warn(
            f"This draft was made for {config.base_model_name_or_path or 'another model'}; the target "
            f"({compat.name_or_path(target.config) or type(target).__name__}) has the same shapes but other weights: a "
            "fine-tune? Texts stay those of the target, accepted lengths may be shorter.",
            stacklevel=4,
        )
