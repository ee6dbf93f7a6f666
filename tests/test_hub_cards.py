"""The shipped pairs: small, complete, finite, and loadable without their target."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
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
    plots = {name for name in names if name.endswith(".png")}
    assert names - plots == expected
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert all(f"({name})" in card for name in plots), "a plot that the card does not show"
    assert sum((folder / name).stat().st_size for name in names) < 44 * 2**20


@pytest.mark.parametrize("folder", CARDS, ids=lambda path: path.name)
def test_the_hub_understands_a_card(folder):
    data = ModelCard((folder / "README.md").read_text(encoding="utf-8")).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and data.base_model_relation == "adapter"
    assert folder.with_suffix(".yaml").is_file(), "what its author says of it, for examples/make_card.py"


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
