"""A page as a browser shows it: a picture, or the document once its scripts have run. Needs Chromium on the machine."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from confu_hf.errors import refusal

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# No sandbox, since containers have none to give; nothing else than the page is to be fetched or kept.
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def find_browser() -> str | None:
    """The first Chromium of the path."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def screenshot(page: Path, picture: Path, width: int, height: int) -> Path:
    """The upper part of a page as a PNG."""
    picture.parent.mkdir(parents=True, exist_ok=True)
    _run(page, f"--screenshot={picture.resolve()}", f"--window-size={width},{height}")
    return picture


def document(page: Path) -> str:
    """The page's HTML as the browser understood it."""
    return _run(page, "--dump-dom")


def _run(page: Path, *flags: str) -> str:
    browser = find_browser()
    if browser is None:
        raise refusal(
            "A picture of the page",
            got="no Chromium on the path",
            expected=f"one of {', '.join(NAMES)}",
            fix="Install one (Debian: apt-get install chromium), or open the page yourself.",
        )
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", *flags, page.resolve().as_uri()]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout
