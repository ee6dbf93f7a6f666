"""Every command of examples/tour.md, in its order, in miniature; and that examples/README.md leaves nothing out.

Replaced are: SmolLM2 by a tiny random target, the shipped pairs by tiny ones for it, the clock of the recipe by one that
moves whenever somebody looks, long answers by short ones, what is typed into the chat; and nothing is installed.
"""

from __future__ import annotations

import configparser
import importlib.util
import io
import json
import re
import shlex
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_llama
from tiny_pairs import tiny_pair

from confu_hf.training.budget import Budget
from confu_hf.training.module import ConFuTrainingObjective
from confu_hf.training.pair import DraftShape
from confu_hf.training.recipe import RecipeOptions

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
TEMPLATE = "{% for message in messages %}<s>{{ message['content'][:40] }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}"
SMALL = {
    "max_new_tokens": 12,
    "max_length": 72,
    "held_out": 3,
    "draft": DraftShape(draft_vocab_size=40),
    "objective": ConFuTrainingObjective(ttt_steps=2, num_anchors=4, max_lag=3),
}


class Clock:
    """Seconds that pass when somebody looks: five minutes are few steps, on a busy machine as on any."""

    def __init__(self, step: float = 1.5):
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def commands(page: Path) -> list[list[str]]:
    """The words of every line in the page's bash blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M)
    return [shlex.split(line, comments=True) for block in blocks for line in block.splitlines() if line.strip()]


def load_script(name: str):
    # Not by its name: `trace` is in the standard library, too.
    spec = importlib.util.spec_from_file_location(f"tour_{Path(name).stem}", ROOT / name)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where dataclasses look for their module
    spec.loader.exec_module(script)
    return script


@pytest.fixture
def run(tmp_path, monkeypatch, tokenizer):
    """Runs one of the tour's python commands in an empty folder."""
    pytest.importorskip("datasets")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _methods

    tokenizer.chat_template = TEMPLATE
    folders = {"DEFAULT_CONFU": tmp_path / "confu", "DEFAULT_EAGLE3": tmp_path / "eagle3"}
    tiny_pair(new_target()).save_pretrained(folders["DEFAULT_CONFU"])
    tiny_pair(new_target(), contemplate=False).save_pretrained(folders["DEFAULT_EAGLE3"])
    monkeypatch.setattr("confu_hf.training.recipe.product_dtype", lambda device: torch.float32)
    monkeypatch.setattr("confu_hf.training.recipe.Budget", partial(Budget, clock=Clock()))
    monkeypatch.setattr(sys, "stdin", io.StringIO("abcabcabc\n/quit\n"))
    monkeypatch.chdir(tmp_path)

    def run(name: str, *arguments: str) -> None:
        for folder, path in folders.items():
            monkeypatch.setattr(_methods, folder, path)
        script = load_script(name)
        monkeypatch.setattr(script, "load_target", lambda *_: (new_target(), tokenizer))
        if hasattr(script, "RecipeOptions"):
            monkeypatch.setattr(script, "RecipeOptions", partial(RecipeOptions, **SMALL))
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        script.main()

    return run


def new_target():
    target = tiny_llama(dtype=torch.float32, max_position_embeddings=1024)
    # Never the likeliest: answers that end where they begin teach a draft nothing.
    target.lm_head.weight.data[target.config.eos_token_id].zero_()
    return target


def test_every_command_of_the_tour(run, tmp_path, capsys):
    done = []
    for program, *words in commands(EXAMPLES / "tour.md"):
        if program == "pip":
            continue
        assert program == "python"
        run(*words)
        done.append((Path(words[0]).stem, capsys.readouterr().out))
    assert [name for name, _ in done] == ["quickstart", "chat", "train", "quickstart", "trace", "trace"]
    for output in (done[0][1], done[3][1]):
        assert re.search(r"^all +confu +1/1 ", output, re.M), output
    assert re.search(r"^> abcabcabc\n.*\nconfu: \d+ tokens", done[1][1], re.M | re.S)
    assert "confu: tree_accepted_length" in done[2][1]
    found = json.loads((tmp_path / "runs/tour/recipe.json").read_text())
    assert all(stage["done"] for stage in found["stages"].values())
    for folder in ("trace", "shipped"):
        assert '<section class="round"' in (tmp_path / "runs/tour" / folder / "trace.html").read_text()


def test_what_the_tour_installs_exists():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    installs = [words for words in commands(EXAMPLES / "tour.md") if words[0] == "pip"]
    extras = [re.fullmatch(r"\.\[(.*)\]", words[-1]) for words in installs]
    named = [name for match in extras if match for name in match[1].split(",")]
    assert named and set(named) <= set(config["options.extras_require"])
    smollm2 = (EXAMPLES / "_smollm2.py").read_text(encoding="utf-8")
    assert all(words[-1] in smollm2 for words, match in zip(installs, extras, strict=True) if not match)


def test_the_index_of_the_examples_leaves_nothing_out():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    links = set(re.findall(r"\]\(([^)#]+)\)", page))
    assert all((EXAMPLES / link).exists() for link in links)
    named = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".md") and path.name[0] != "_"}
    assert named - {"README.md"} <= links
    for program, script, *words in commands(EXAMPLES / "README.md"):
        options = (EXAMPLES.parent / script).read_text() + (EXAMPLES / "_methods.py").read_text()
        assert program == "python" and all(f'"{word}"' in options for word in words if word.startswith("--"))
