"""The wheel: all modules, the sources that are compiled on the user's machine, the templates of cards; nothing else."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import confu_hf

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as `python -m build` does, from a copy: building writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.cfg", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "confu_hf", folder / "confu_hf", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests").mkdir()
    (folder / "tests" / "__init__.py").touch()
    command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('dist')"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=300)
    with zipfile.ZipFile(next((folder / "dist").glob("*.whl"))) as archive:
        yield archive


def test_everything_of_the_package_is_in_it(wheel):
    files = {path for path in (ROOT / "confu_hf").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    assert {Path(name).suffix for name in expected} >= {".py", ".cpp", ".h", ".md"}
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected


def test_what_it_says_of_itself(wheel):
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = wheel.read(name).decode()
    assert f"\nVersion: {confu_hf.__version__}\n" in metadata
    assert re.search(r"^License(-Expression)?: Apache-2.0$", metadata, re.MULTILINE)
    required = set(re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra)", metadata, re.MULTILINE))
    assert required == {"torch", "transformers", "accelerate", "peft"}
    assert "from confu_hf import LookupAssistant" in metadata, "the README is its description"


def test_the_changelog_knows_the_version():
    """A development version stands above the last release; a release has its own heading."""
    headings = re.findall(r"^## \[([^\]]+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    version = confu_hf.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", version)
    assert headings[0] == "Unreleased"
    assert ".dev" in version or headings[1] == version
