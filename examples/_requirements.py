"""Says in one line what a script lacks, before it imports anything. Standard library only."""

from __future__ import annotations

import importlib.util
import sys

PACKAGE = "confu_hf"
# Of these a checkout can lack any: a package that was not installed, extras, `pip install --no-deps`.
INSTALL = {
    "torch": "Install the build for your machine first; tested with `pip install torch==2.13.0`.",
    PACKAGE: "Run `pip install -e .` in the folder of the checkout.",
    "transformers": "Run `pip install -e .` in the folder of the checkout.",
    "datasets": 'Run `pip install -e ".[train]"` in the folder of the checkout.',
}


def check(*more: str) -> None:
    """End the script unless torch, Transformers, the package and `more` can be imported."""
    for name in ("torch", "transformers", PACKAGE, *more):
        if importlib.util.find_spec(name) is None:
            raise SystemExit(f"{sys.argv[0]} needs {name}, which is not installed. {INSTALL[name]}")
