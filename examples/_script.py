"""How a script begins: what it lacks, and later what it refuses, is said in one line. Standard library only."""

from __future__ import annotations

import importlib.util
import sys
from types import TracebackType

PACKAGE = "confu_hf"
# Of these a checkout can lack any: a package that was not installed, extras, `pip install --no-deps`.
INSTALL = {
    "torch": "Install the build for your machine first; tested with `pip install torch==2.13.0`.",
    PACKAGE: "Run `pip install -e .` in the folder of the checkout.",
    "transformers": "Run `pip install -e .` in the folder of the checkout.",
    "datasets": 'Run `pip install -e ".[train]"` in the folder of the checkout.',
}


def begin(*more: str) -> None:
    """Called before anything else is imported: [`check`], and from here on refusals end the script with their line alone.

    Whatever else goes wrong keeps its traceback. The exit status of both is 1.
    """
    sys.excepthook = _tell
    check(*more)


def check(*more: str) -> None:
    """End the script unless torch, Transformers, the package and `more` can be imported."""
    for name in ("torch", "transformers", PACKAGE, *more):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"{sys.argv[0]} needs {name}, which is not installed. {INSTALL[name]}")


def _tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The mark is `confu_hf/errors.py`'s, read without it: the package may be what cannot be imported."""
    if getattr(error, "is_refusal", False):
        print(error.args[0], file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)
