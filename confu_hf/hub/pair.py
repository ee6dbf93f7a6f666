"""The layout of a repository, local or on the Hub: the draft at the root, its adapter in `adapter/`.

    README.md                            card
    config.json, model.safetensors       draft
    generation_config.json               tree options
    adapter/adapter_config.json
    adapter/adapter_model.safetensors

Finds files and says what is missing; what is in them is `adapter_weights.py`'s and `assisted.py`'s.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..adapter.files import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME
from ..compat import cached_file

ADAPTER_FOLDER = "adapter"
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


def hub_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say where files come from."""
    return {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}


def check_draft_files(path: str | os.PathLike, subfolder: str = "") -> None:
    """Raise a `FileNotFoundError` if `path` is a folder without a draft; Hub ids are left to the download."""
    folder = Path(path) / subfolder
    if not Path(path).is_dir():
        return
    files = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else "no such folder"
    weights = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if CONFIG_NAME not in files or not any(name in files for name in weights):
        raise FileNotFoundError(
            f"The ConFu draft in {folder}: got {files}, expected {CONFIG_NAME} and {SAFE_WEIGHTS_NAME} among them. "
            "Pass the folder that `save_pretrained` wrote (its root, not `adapter/`), or download it again."
        )


def find_adapter(path: str | os.PathLike, *, subfolder: str = "", **hub_kwargs: Any) -> Path:
    """The local folder of a repository's adapter, downloaded if need be.

    Raises:
        FileNotFoundError: there is none.
    """
    subfolder = "/".join(part for part in (subfolder, ADAPTER_FOLDER) if part)
    try:
        files = [
            cached_file(path, name, subfolder=subfolder, **hub_kwargs)
            for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)
        ]
    except OSError as error:
        raise FileNotFoundError(
            f"The ConFu adapter of {path}: got no {subfolder}/ with {ADAPTER_CONFIG_NAME} and {ADAPTER_WEIGHTS_NAME}, "
            "expected both, since the draft's config has contemplate=True. Download the repository again, or pass a "
            f"draft that was saved with its adapter. ({error})"
        ) from error
    return Path(files[0]).parent
