"""The shipped pairs: small, complete, finite, and loadable without their target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from confu_hf import ConFuAssistant
from confu_hf.adapter.checksum import weights_checksum

CARDS = sorted(path for path in (Path(__file__).parent.parent / "hub_cards").iterdir() if path.is_dir())


@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_a_card_is_complete(folder):
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    if folder.name.startswith("confu-"):
        expected |= {"adapter/README.md", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    assert names == expected
    assert sum((folder / name).stat().st_size for name in names) < 25 * 2**20


@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_a_card_holds_the_checksums_of_its_weights(folder):
    parts = [(folder / "config.json", folder / "model.safetensors")]
    if folder.name.startswith("confu-"):
        parts.append((folder / "adapter" / "adapter_config.json", folder / "adapter" / "adapter_model.safetensors"))
    for config, weights in parts:
        assert json.loads(config.read_text())["weights_sha256"] == weights_checksum(load_file(weights))


@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_a_card_loads(folder):
    assistant = ConFuAssistant.from_pretrained(folder)
    assert assistant.config.contemplate == folder.name.startswith("confu-")
    assert assistant.config.target_layer_ids == [2, 15, 27]
    token_ids = assistant.draft_token_ids
    assert token_ids.unique().numel() == assistant.config.draft_vocab_size
    assert torch.equal(assistant.t2d.nonzero()[:, 0], token_ids)
    assert all(parameter.isfinite().all() for parameter in assistant.parameters())
