"""Reads Markdown: its code blocks, its links and headings; splits what a shell would run, and finds scripts' parsers."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").glob("*.md"))]
PAGES += sorted((ROOT / "hub_cards").rglob("README.md"))
QUOTED = re.compile(r"<!-- quoted from (\S+) -->\s*\Z")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.DOTALL | re.MULTILINE)
_OPERATORS = {"&&", "||", ";", "|", "&"}


@dataclass(frozen=True)
class Block:
    """A fenced block: where its code starts, its language, its code, and the file that it is a quotation of."""

    line: int
    language: str
    code: str
    quoted: str | None = None


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a page, those inside lists without their indentation."""
    found = []
    for match in _FENCE.finditer(text):
        before = text[: match.start()]
        quoted = QUOTED.search(before)
        code = textwrap.dedent(match[3])
        found.append(Block(before.count("\n") + 2, match[2], code, quoted[1] if quoted else None))
    return found


def prose(text: str) -> str:
    """A page without its blocks."""
    return _FENCE.sub("", text)


def links(text: str) -> list[tuple[str, bool]]:
    """(address, whether it is a picture) of every link in the prose."""
    return [(match[2], match[1] == "!") for match in re.finditer(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", prose(text))]


def anchors(text: str) -> set[str]:
    """The names that headings have in an address, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(code: str) -> list[list[str]]:
    """The commands of a shell block as words, without comments and assignments in front."""
    found: list[list[str]] = []
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word not in _OPERATORS:
                words.append(word)
                continue
            while words and re.match(r"\w+=", words[0]):
                words.pop(0)
            if words:
                found.append(words)
            words = []
    return found


class _Captured(Exception):
    def __init__(self, parser: argparse.ArgumentParser):
        self.parser = parser


def parser_of(script: str) -> argparse.ArgumentParser:
    """The parser that `examples/<script>.py` reads its command line with: the script runs until it does."""

    def capture(parser, *args, **kwargs):
        raise _Captured(parser)

    module = importlib.import_module(script)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", capture)
        try:
            module.main()
        except _Captured as captured:
            return captured.parser
    raise AssertionError(f"examples/{script}.py reads no command line")
