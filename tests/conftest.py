"""Set up for all tests: offline, nothing kept of measured costs, one thread (the models are tiny), and `tests/` importable for `tiny_models`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CONFU_DISABLE_COST_CACHE"] = "1"  # what tiny models cost is of no use to anyone
sys.path.insert(0, str(Path(__file__).parent))

# The environment is read on import.
import pytest  # noqa: E402
import torch  # noqa: E402
from assisted_calls import DRAFT  # noqa: E402
from tiny_models import tiny_llama  # noqa: E402
from tiny_tokenizer import characters_tokenizer  # noqa: E402
from transformers.integrations.peft import MIN_PEFT_VERSION  # noqa: E402
from transformers.utils.peft_utils import check_peft_version  # noqa: E402

from confu_hf import ConFuAssistant  # noqa: E402

torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Transformers' own adapter methods ask for a least version of PEFT, at times for one that is not out yet."""
    try:
        check_peft_version(min_version=MIN_PEFT_VERSION)
    except ValueError as error:
        for item in items:
            if item.get_closest_marker("native_peft"):
                item.add_marker(pytest.mark.skip(reason=f"target.load_adapter: {error} ({MIN_PEFT_VERSION})"))


@pytest.fixture
def target():
    return tiny_llama()


@pytest.fixture
def confu(target):
    """An untrained assistant, attached."""
    return ConFuAssistant.from_target(target, **DRAFT)


@pytest.fixture
def folder(confu, tmp_path):
    """The assistant, saved."""
    confu.generation_config.total_tokens = 7
    confu.save_pretrained(tmp_path / "pair")
    return tmp_path / "pair"


@pytest.fixture
def tokenizer():
    """One token per printable character."""
    return characters_tokenizer()
