"""README, guides and cards: their code runs, their commands are understood, their links lead somewhere.

The pages name `org/target` and the like: folders of these names, with tiny models in them, are where the code runs.
"""

from __future__ import annotations

import configparser
import functools
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import foreign_drafts
import pytest
import torch
from doc_blocks import PAGES, ROOT, anchors, blocks, commands, links, parser_of, prose
from tiny_models import tiny_llama
from tiny_pairs import tiny_pair
from tiny_tokenizer import characters_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from confu_hf.assistant import assistant as assistant_module

README = ROOT / "README.md"
EXAMPLES = ROOT / "examples"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
# Tools that are not ours: their command lines are parsed as shell, and no more.
FOREIGN = {"hf", "vllm", "pre-commit", "git"}
FOREIGN_MODULES = {"sglang.launch_server", "build", "venv"}


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def with_language(*languages: str) -> list:
    """The pages that have such blocks."""
    pages = [page for page in PAGES if any(block.language in languages for block in blocks(page.read_text()))]
    return [pytest.param(page, id=name(page)) for page in pages]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with everything that the pages name, as the working directory."""
    root = tmp_path_factory.mktemp("docs")
    target = tiny_llama(dtype=torch.float32)
    tokenizer = characters_tokenizer()
    tokenizer.chat_template = CHAT
    for target_id in ("org/target", SMOLLM2):
        target.save_pretrained(root / target_id)
        tokenizer.save_pretrained(root / target_id)
    for folder in ("org/confu-target", "runs/confu", "hub_cards/confu-smollm2-135m-instruct"):
        pair = tiny_pair(target)
        pair.save_pretrained(root / folder, tokenizer=tokenizer)
        pair.detach()
    eagle3 = tiny_pair(target, contemplate=False)
    eagle3.save_pretrained(root / "hub_cards/eagle3-smollm2-135m-instruct")
    case = foreign_drafts.CASES["safeailab"]
    foreign_drafts.save(root / "somebody/eagle3-draft-for-target", case.config, foreign_drafts.tensors(case, None))
    return root


@pytest.mark.parametrize("page", with_language("python"))
def test_python_runs(page, models, monkeypatch, tmp_path):
    """Block after block in one namespace, as a reader goes on; a page that starts with a model finds one."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    uploads = []
    monkeypatch.setattr(assistant_module, "publish", lambda folder, repo_id, **_: uploads.append(repo_id))
    model, tokenizer = AutoModelForCausalLM.from_pretrained("org/target"), AutoTokenizer.from_pretrained("org/target")
    namespace = {"model": model, "tokenizer": tokenizer, "inputs": tokenizer("Once", return_tensors="pt")}
    code = [block for block in blocks(page.read_text()) if block.language == "python" and block.quoted is None]
    for block in code:
        # The line numbers of a traceback are those of the page.
        exec(compile("\n" * (block.line - 1) + block.code, name(page), "exec"), namespace)
    if "out" in namespace and not isinstance(namespace["out"], str):
        assert namespace["out"].shape[1] > 1
    assert uploads == ["org/confu-target"] * sum("push_to_hub(" in block.code for block in code)


def test_a_block_that_fails_is_seen(models, monkeypatch, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Text\n\n```python\nfrom confu_hf import Nonesuch\n```\n")
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    with pytest.raises(ImportError, match="Nonesuch"):
        test_python_runs(page, models, monkeypatch, tmp_path)


QUOTATIONS = [(page, block) for page in PAGES for block in blocks(page.read_text()) if block.quoted]


@pytest.mark.parametrize(
    ("page", "block"), QUOTATIONS, ids=lambda value: name(value) if isinstance(value, Path) else ""
)
def test_quotations_are_what_the_file_says(page, block):
    source = {line.strip() for line in (ROOT / block.quoted).read_text().splitlines()}
    lines = [line.strip() for line in block.code.splitlines() if line.strip()]
    assert not [line for line in lines if line not in source], f"{name(page)}: {block.quoted} has changed"


@pytest.fixture(scope="module")
def parsers():
    """Gives the parser of a script by its name; each is made once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield functools.cache(parser_of)


@pytest.mark.parametrize("page", with_language("bash", "sh", "console"))
def test_commands_are_understood(page, parsers, capsys):
    for block in blocks(page.read_text()):
        if block.language not in ("bash", "sh", "console"):
            continue
        subprocess.run(["bash", "-n"], input=block.code, text=True, check=True)
        for words in commands(block.code):
            where = f"{name(page)}:{block.line}: {' '.join(words)}"
            try:
                check_command(words, parsers)
            except SystemExit:
                pytest.fail(f"{where}\n{capsys.readouterr().err}")
            except AssertionError as error:
                pytest.fail(f"{where}\n{error}")


def check_command(words: list[str], parsers) -> None:
    """Raise unless what a command names is there: scripts and their flags, extras, targets of make, files."""
    program, *rest = words
    if program in ("python", "python3") and rest[0] == "-m":
        module, *rest = rest[1:]
        assert module in FOREIGN_MODULES | {"pytest"}, f"python -m {module}: unknown"
        paths = [word for word in rest if word.startswith("tests/")] if module == "pytest" else []
        assert all((ROOT / path).exists() for path in paths), f"not there: {paths}"
    elif program in ("python", "python3"):
        check_script(rest, parsers)
    elif program == "accelerate":
        assert rest[:2] == ["launch", "--config_file"] and (ROOT / rest[2]).is_file(), "no such configuration"
        check_script(rest[3:], parsers)
    elif program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extras = {extra for word in rest if (found := re.match(r"\.\[(.+)\]$", word)) for extra in found[1].split(",")}
        assert extras <= set(setup["options.extras_require"]), f"no such extra: {extras}"
    elif program == "make":
        targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        assert set(rest) <= targets, f"no such target: {rest}"
    elif program.startswith("."):
        assert os.access(ROOT / program, os.X_OK), f"{program} cannot be run"
    else:
        assert program in FOREIGN, f"{program}: unknown"


def check_script(words: list[str], parsers) -> None:
    """Have a script's own parser read its command line."""
    script, *arguments = words
    path = ROOT / script
    assert path.is_file(), f"{script} is not there"
    if path.parent == EXAMPLES:
        parsers(path.stem).parse_args(arguments)


@pytest.mark.parametrize(
    "line",
    [
        "python examples/quickstart.py --nonesuch",
        "python examples/benchmark.py --methods magic --output runs/x",
        "python examples/benchmark.py --limit 3",
        "python examples/train.py --stage eagle3 --max_stepz 3",
        "python examples/nonesuch.py",
        'pip install -e ".[nonesuch]"',
        "make nonesuch",
        "frobnicate",
    ],
)
def test_a_command_that_is_wrong_is_seen(line, parsers):
    with pytest.raises((SystemExit, AssertionError)):
        check_command(*commands(line), parsers)


def test_flags_in_the_prose_are_flags_of_a_script(parsers):
    scripts = [path.stem for path in sorted(EXAMPLES.glob("[a-z]*.py"))]
    known = {flag for script in scripts for flag in parsers(script)._option_string_actions}
    for page in (README, EXAMPLES / "guide.md", EXAMPLES / "training.md"):
        told = set(
            itertools.chain(
                *(re.findall(r"--[a-z][\w-]*", code) for code in re.findall(r"`([^`]+)`", prose(page.read_text())))
            )
        )
        assert told <= known | {"--no-deps"}, name(page)


LINKS = [(page, *link) for page in PAGES for link in links(page.read_text()) if not re.match(r"\w+:", link[0])]


@pytest.mark.parametrize(("page", "address", "is_picture"), LINKS, ids=lambda value: str(value).rsplit("/", 1)[-1])
def test_links_lead_somewhere(page, address, is_picture):
    path, _, anchor = address.partition("#")
    file = (page.parent / path).resolve() if path else page
    if is_picture and not file.with_suffix(".py").exists():
        pytest.skip(f"{file.name} is drawn by {file.with_suffix('.py').name}, which is not here")
    assert file.exists(), f"{name(page)}: {address}"
    if anchor:
        assert anchor in anchors(file.read_text()), f"{name(page)}: {address}"


def test_the_readme_is_a_landing_page():
    text = README.read_text()
    assert len(text.splitlines()) < 150
    first, second = [block.code for block in blocks(text) if block.language == "python"][:2]
    assert "LookupAssistant" in first and "ConFuAssistant" in second
    assert all(len([line for line in code.splitlines() if line]) == 3 for code in (first, second))
    figures = re.search(r"<!-- figures: begin -->(.*?)<!-- figures: end -->", text, re.DOTALL)[1]
    for told in ("python examples/", "commit ", "torch ", "transformers ", "cores"):
        assert told in figures, "no figure without command, commit, versions and processor"
    outside = text.replace(figures, "")
    assert not re.findall(r"\|\s*\d+\.\d+", outside), "figures stand between their marks"


def test_every_guide_is_linked_from_the_readme():
    linked = {(ROOT / address.partition("#")[0]).resolve() for address, _ in links(README.read_text())}
    missing = {page.name for page in EXAMPLES.glob("*.md") if page.resolve() not in linked}
    assert not missing


def test_the_file_tree_is_that_of_the_repository():
    """Every name of the tree in internals.md is there, and every folder and file at the top of the package has its
    line."""
    code = [block.code for block in blocks((EXAMPLES / "internals.md").read_text())]
    tree = next(text for text in code if text.startswith("confu_hf/"))
    folders: list[str] = []
    told = set()
    for line in tree.splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        for entry in itertools.takewhile(lambda word: re.search(r"(\.py|\.md|/)$", word), line.split()):
            path = "/".join([*folders[:depth], entry.rstrip("/")])
            assert "*" in entry or (ROOT / path).exists(), f"{path} is not there"
            told.add(path)
            if entry.endswith("/"):
                folders[depth:] = [entry.rstrip("/")]
    package = [
        *(ROOT / "confu_hf").glob("[a-z]*.py"),
        *(path.parent for path in (ROOT / "confu_hf").glob("*/__init__.py")),
    ]
    assert {path.relative_to(ROOT).as_posix() for path in package} <= told
