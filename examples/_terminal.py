"""How a chat looks in a terminal: tokens coloured, or marked, by how they came, and a line of figures at the bottom."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Mapping, Sequence
from typing import TextIO

from _rounds import DRAFTED, LOOKED_UP, TARGET

SHOWS = ("color", "marks", "none")
COLORS = {DRAFTED: "32", LOOKED_UP: "33", TARGET: "1"}
MARKS = {DRAFTED: "[]", LOOKED_UP: "{}", TARGET: ("", "")}
LEGENDS = {
    "color": "\x1b[32mdrafted by the network\x1b[0m  \x1b[33mlooked up in the text\x1b[0m  \x1b[1mthe target's own\x1b[0m",
    "marks": "[drafted by the network] {looked up in the text} the target's own",
    "none": "",
}
DIM = "2"


def default_show(out: TextIO, environment: Mapping[str, str] = os.environ) -> str:
    """Colours on a terminal that has them, unless NO_COLOR says otherwise (no-color.org)."""
    colors = out.isatty() and environment.get("TERM") != "dumb" and not environment.get("NO_COLOR")
    return "color" if colors else "none"


class Screen:
    """Writes pieces of text, each with how it came.

    Args:
        show: one of [`SHOWS`]. With colours on a terminal, the bottom line is kept for figures.
    """

    def __init__(self, out: TextIO, show: str):
        self.out, self.show = out, show
        self.has_status = show == "color" and out.isatty()
        self.size: tuple[int, int] | None = None

    def write(self, pieces: Sequence[tuple[str, str]]) -> None:
        """One round's (text, origin); neighbours of one origin are shown together."""
        for origin, group in itertools.groupby(pieces, key=lambda piece: piece[1]):
            text = "".join(text for text, _ in group)
            if text:
                self.out.write(self._styled(text, origin))
        self.out.flush()

    def note(self, text: str) -> None:
        """A line of its own that is no part of the conversation."""
        self.out.write(f"\x1b[{DIM}m{text}\x1b[0m\n" if self.show == "color" else f"{text}\n")
        self.out.flush()

    def status(self, text: str) -> None:
        """Put `text` on the bottom line, if it is kept for that."""
        if not self.has_status:
            return
        columns, rows = shutil.get_terminal_size()
        if self.size is None:  # at the start of a line: a newline makes room, should it be the last one
            self.out.write("\n\x1b[1A")
        if self.size != (columns, rows):  # the first time, or the window has another size now
            self.size = (columns, rows)
            self.out.write(f"\x1b7\x1b[1;{rows - 1}r\x1b8")  # scroll only above the last line
        self.out.write(f"\x1b7\x1b[{rows};1H\x1b[2K\x1b[7m {text[: columns - 2]} \x1b[0m\x1b8")
        self.out.flush()

    def close(self) -> None:
        """Give the whole window back."""
        if self.size is not None:
            rows = self.size[1]
            self.out.write(f"\x1b7\x1b[r\x1b[{rows};1H\x1b[2K\x1b8")
            self.out.flush()
            self.size = None

    def _styled(self, text: str, origin: str) -> str:
        if self.show == "color":
            return f"\x1b[{COLORS[origin]}m{text}\x1b[0m"
        if self.show == "marks":
            before, after = MARKS[origin]
            return f"{before}{text}{after}"
        return text
