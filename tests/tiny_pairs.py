"""Tiny drafts and adapters whose every weight matters, and batches to train them on."""

from __future__ import annotations

import torch
from tiny_models import VOCAB_SIZE
from transformers import PreTrainedModel

from confu_hf import ConFuAssistant
from confu_hf.training.data import IGNORED

DRAFT_VOCAB_SIZE = 64


def tiny_pair(target: PreTrainedModel, *, seed: int = 0, **config) -> ConFuAssistant:
    """An untrained draft (and adapter, unless `contemplate=False`) attached to `target`; no weight is zero or one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fields = {"draft_vocab_size": DRAFT_VOCAB_SIZE, "initializer_range": 0.2, **config}
        if fields.get("contemplate", True):
            fields = {"num_virtual_tokens": 3, "num_experts": 4, **fields}
        confu = ConFuAssistant.from_target(target, **fields)
        confu.set_draft_vocabulary(torch.randperm(VOCAB_SIZE)[: fields["draft_vocab_size"]])
        if confu.config.contemplate:
            torch.nn.init.normal_(confu.future_skip.weight, std=0.2)
            if confu.config.future_words:
                torch.nn.init.normal_(confu.future_word.weight, std=0.2)
        for parameter in confu.parameters():
            if parameter.ndim == 1:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return confu


def conversations(*lengths: tuple[int, int], seed: int = 0) -> list[dict]:
    """Random rows of `data.load_conversations`; each of `lengths` is (prompt tokens, all tokens)."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index, (prompt, length) in enumerate(lengths):
        ids = torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist()
        labels = [IGNORED] * prompt + ids[prompt:]
        rows.append({"input_ids": ids, "labels": labels, "length": length, "index": index})
    return rows
