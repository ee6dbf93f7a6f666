"""Finds and reads the files of a checkpoint, in a folder or on the Hub: its config, and its tensors in one file or several.

What the tensors are is not known here. Pickled files are opened only for a caller who says so, and then with
`weights_only=True`: unpickling can run code.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
)

from ..adapter.checksum import read_tensors
from ..compat import cached_file
from ..errors import refusal

HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
SAFE, PICKLED = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)


def take_hub_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Take what says where files come from out of `arguments`; None is no argument."""
    taken = {name: arguments.pop(name) for name in HUB_ARGUMENTS if name in arguments}
    return {name: value for name, value in taken.items() if value is not None}


def check_folder(path: str | os.PathLike, subfolder: str) -> None:
    """Raise a `FileNotFoundError` that names what a folder lacks; repositories on the Hub are left to the download."""
    folder = Path(path) / subfolder
    if not Path(path).is_dir():
        return
    files = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else "no such folder"
    if CONFIG_NAME not in files or not {*SAFE, *PICKLED} & set(files):
        raise refusal(
            f"The draft in {folder}",
            got=files,
            expected=f"{CONFIG_NAME} and {SAFE_WEIGHTS_NAME} among them",
            fix="Pass the folder that `save_pretrained` wrote (its root, not `adapter/`), or download it again.",
            error=FileNotFoundError,
        )


def read_config(path: str | os.PathLike, hub: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `config.json`; a `FileNotFoundError` without one, an `OSError` where a name leads nowhere."""
    try:
        fields = PreTrainedConfig.get_config_dict(path, **hub)[0]
    except OSError as error:
        if isinstance(error.__cause__, (LocalEntryNotFoundError, HFValidationError)):
            raise _nowhere(path, error.__cause__) from error
        raise
    if not fields:
        where = f"{path}, {hub['subfolder']}" if "subfolder" in hub else path
        raise refusal(
            f"The draft in {where}",
            got=f"no {CONFIG_NAME}",
            expected="the files that `push_to_hub` or `save_pretrained` wrote",
            fix="Look for a misspelt name, `revision` or `subfolder`.",
            error=FileNotFoundError,
        )
    return fields


def _nowhere(path: str | os.PathLike, cause: Exception) -> OSError:
    """Of a name that is no folder: Transformers tells of the connection, and does not say the name."""
    if isinstance(cause, HFValidationError):
        got, fix = "what is neither an existing folder nor the name of a repository", "Look for a misspelt path."
    else:
        got = "no folder, and nothing in the cache of this machine, with no way to the Hub (offline mode is on, or no connection)"
        fix = f"Look for a misspelt path; or run `hf download {path}` once, online and without HF_HUB_OFFLINE=1."
    expected = "a folder that `save_pretrained` wrote, or a repository on the Hub"
    return refusal(f"The draft {path}", got=got, expected=expected, fix=fix, error=OSError)


def read_weights(path: str | os.PathLike, hub: Mapping[str, Any], *, allow_pickle: bool = False) -> dict[str, Tensor]:
    """All tensors of a checkpoint, of one file or of several with an index, safetensors if there are any.

    Args:
        allow_pickle: read `pytorch_model.bin` where there is nothing else.
    """
    try:
        return _read(path, SAFE, hub)
    except OSError as missing:
        pickled = _first(path, PICKLED, hub)
        if pickled is None:
            raise missing
        if not allow_pickle:
            raise refusal(
                f"The weights of {path}",
                got=f"pickled weights only ({pickled})",
                expected=f"{SAFE_WEIGHTS_NAME}",
                fix="Convert them with examples/convert.py, or pass `allow_pickle=True` if you trust their author.",
            ) from missing
    return _read(path, PICKLED, hub)


def _first(path: str | os.PathLike, names: tuple[str, str], hub: Mapping[str, Any]) -> str | None:
    for name in names:
        try:
            cached_file(path, name, **hub)
        except OSError:
            continue
        return name
    return None


def _read(path: str | os.PathLike, names: tuple[str, str], hub: Mapping[str, Any]) -> dict[str, Tensor]:
    single, several = names
    read = read_tensors if names == SAFE else _unpickle
    try:
        return read(cached_file(path, single, **hub))
    except OSError as missing:
        try:
            index = Path(cached_file(path, several, **hub))
        except OSError:
            raise missing from None
    try:
        parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise refusal(
            f"{several} of {path}",
            got=f"a file that cannot be understood ({type(error).__name__}: {error})",
            expected="the index of a draft saved in several files",
            fix="Download it again.",
        ) from error
    files = [cached_file(path, part, **hub) for part in parts]
    return {name: tensor for file in files for name, tensor in read(file).items()}


def _unpickle(file: str | Path) -> dict[str, Tensor]:
    """Tensors of a pickled state dict; a `ValueError` for anything else in it."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        state = error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise refusal(
            f"Reading {file}",
            got=f"what is no plain state dict ({str(state)[:200]})",
            expected="tensors by name, and nothing else",
            fix="Do not load it in another way unless you trust its author: unpickling can run code.",
        )
    return state
