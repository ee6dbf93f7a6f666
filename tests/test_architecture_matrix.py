"""Every architecture of the table in examples/models.md: the text of plain `generate`, or a refusal before anything is computed."""

from __future__ import annotations

import pytest
import torch
from architectures import ARCHITECTURES, MODELS, written
from oracles import make_oracle
from tiny_vision import VISION

from confu_hf import ConFuAssistant

PROMPTS = torch.tensor([[5, 17, 33, 8, 61, 12, 90, 44, 23], [0, 0, 0, 0, 11, 7, 3, 20, 65]])
MASK = (PROMPTS != 0).long()
TREE = {"total_tokens": 6, "depth": 3, "draft_top_k": 3}
SUPPORTED = [one for one in ARCHITECTURES if one.refusal is None]
REFUSED = [one for one in ARCHITECTURES if one.refusal is not None]


@pytest.mark.parametrize("architecture", SUPPORTED, ids=lambda one: one.name)
def test_same_text_as_plain_generate(architecture):
    """A padded batch, greedy, and one row sampled; longer than the windows."""
    model = architecture.model()
    assistant = make_oracle(model)
    arguments = {"pad_token_id": 0, "eos_token_id": 96, "max_new_tokens": 14}
    expected = model.generate(PROMPTS, attention_mask=MASK, do_sample=False, **arguments)
    got = model.generate(PROMPTS, attention_mask=MASK, do_sample=False, assistant_model=assistant, **TREE, **arguments)
    assert got.tolist() == expected.tolist()
    assert assistant.stats.mean_accepted_length > 1.3
    texts = []
    for more in ({}, {"assistant_model": assistant, **TREE}):
        torch.manual_seed(5)
        texts.append(model.generate(PROMPTS[:1], do_sample=True, temperature=1.2, **more, **arguments).tolist())
    assert texts[0] == texts[1]


@pytest.mark.parametrize("architecture", REFUSED, ids=lambda one: one.name)
def test_refused_by_name(architecture):
    model = architecture.model()
    with pytest.raises(ValueError, match=architecture.refusal):
        ConFuAssistant.from_target(model)


def test_the_table_in_the_guide_is_this_list():
    text = MODELS.read_text(encoding="utf-8")
    assert text == written(text), "run `python tests/architectures.py`"
    assert all(f"| {name} |" in text for name in [*VISION, *(one.name for one in ARCHITECTURES)])
