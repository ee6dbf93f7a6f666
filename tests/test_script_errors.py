"""What a script refuses is one line on stderr and exit status 1; what goes wrong unforeseen keeps its traceback."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import tiny_llama

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
CARD = ROOT / "hub_cards" / "confu-smollm2-135m-instruct"
CALCULATIONS = {"plan_decoding.py", "plan_training.py"}  # need no package, read no file


def run(*command: object) -> tuple[int, str]:
    """Exit status and stderr of a Python process that finds this checkout."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *map(str, command)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(EXAMPLES)]),
            "TRANSFORMERS_VERBOSITY": "error",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stderr


def refused(text: str, *command: object) -> None:
    """Ended by a line with `text`; bars of loading and the like may come before it."""
    status, told = run(*command)
    assert status == 1 and told.endswith("\n"), told
    line = told.rstrip("\n").split("\n")[-1]
    assert text in line and "Traceback" not in told and "Error" not in told, told


@pytest.fixture
def target(tokenizer, tmp_path):
    """A folder that `--target` takes."""
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "target")
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "target")
    return tmp_path / "target"


@pytest.mark.parametrize("script", sorted(file.name for file in EXAMPLES.glob("[!_]*.py")))
def test_every_script_explains_itself(script, monkeypatch):
    """argparse formats help texts with `%`: a bare one in any of them ends `--help` with a traceback."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(EXAMPLES / script), run_name="explained")["main"]()
    assert ended.value.code == 0


def test_every_script_begins_alike():
    scripts = {file.name: file.read_text(encoding="utf-8") for file in EXAMPLES.glob("[!_]*.py")}
    assert scripts.keys() > CALCULATIONS
    without = {name for name, text in scripts.items() if "    import _script\n\n    _script.begin(" not in text}
    assert without == CALCULATIONS


def test_a_bug_keeps_its_traceback():
    status, told = run("-c", "import _script; _script.begin(); raise ValueError('a bug')")
    assert status == 1 and told.startswith("Traceback") and told.endswith("ValueError: a bug\n")


@pytest.mark.parametrize("error", ["ValueError", "KeyError", "FileNotFoundError", "ImportError"])
def test_a_refusal_is_one_line(error):
    code = (
        "import importlib.util, _script; _script.begin(); "
        f"spec = importlib.util.spec_from_file_location('errors', {str(ROOT / 'confu_hf' / 'errors.py')!r}); "
        "errors = importlib.util.module_from_spec(spec); spec.loader.exec_module(errors); "
        f"raise errors.refusal('x', got=1, expected='2', fix='Do it.', error={error})"
    )
    assert run("-c", code) == (1, "x: got 1, expected 2. Do it.\n")


def test_a_missing_package_is_one_line():
    code = "import _script, sys; _script.begin(); sys.modules['torch'] = None; import confu_hf"
    status, told = run("-c", code)
    assert status == 1 and told.startswith("confu_hf needs PyTorch, which is not installed.") and told.count("\n") == 1


def test_prompts_that_are_not_there(tmp_path):
    file = tmp_path / "nonesuch.jsonl"
    status, told = run(EXAMPLES / "join_prompts.py", "--prompts", file, "--output", tmp_path / "out.jsonl")
    expected = f"{file}: got no such file, expected a file of prompts"
    assert status == 1 and told.startswith(expected) and told.count("\n") == 1, told


def test_a_pair_of_another_model(target):
    refused("made for another target: got", EXAMPLES / "chat.py", "--target", target, "--confu", CARD)


def test_a_recipe_without_time(target, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": "why?"}) + "\n")
    refused(
        "got no answers, expected `messages` files with answers of at least 4 tokens. Give --max_minutes more",
        *[EXAMPLES / "train.py", "--recipe", "confu", "--max_minutes", 1e-9, "--target", target, "--use_cpu"],
        *["--prompts", prompts, "--output_dir", tmp_path / "run"],
    )
