"""Safetensors files, and the checksum of a file's weights: kept in the configuration beside it, it shows a flipped bit.

It is taken of what the file holds (names, dtypes, shapes, bytes), before any conversion to another dtype or device.
Which file, and which configuration, are `files.py`'s for adapters and `hub/pair.py`'s for drafts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..errors import refusal

CHECKSUM = "weights_sha256"


def weights_checksum(weights: Mapping[str, torch.Tensor]) -> str:
    """sha256 over the tensors of a file in the order of their names, as hexadecimal digits."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def check_checksum(expected: str | None, weights: Mapping[str, torch.Tensor], *, source: str | Path) -> None:
    """Raise a `ValueError` unless `weights` are those that `expected` was taken of; None checks nothing."""
    if expected is None:
        return
    got = weights_checksum(weights)
    if got != expected:
        raise refusal(
            f"The weights in {source}",
            got=f"the checksum {got}",
            expected=f"{expected}, the {CHECKSUM} of their configuration: the file is damaged, or is another one's",
            fix=f"Download both again. If you changed the weights yourself, remove {CHECKSUM} from the configuration.",
        )


def record_checksum(config_file: str | Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Note the checksum of `weights` in a configuration that was just written."""
    path = Path(config_file)
    fields = {**json.loads(path.read_text(encoding="utf-8")), CHECKSUM: weights_checksum(weights)}
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file; a `ValueError` if it cannot be read."""
    try:
        # Not mapped into memory: what was checked stays what is used, whatever becomes of the file.
        return load(Path(path).read_bytes())
    except (SafetensorError, OSError) as error:
        raise refusal(
            f"Reading {path}",
            got=f"a corrupted or truncated file ({error})",
            expected="a complete safetensors file",
            fix="Delete it and download it again.",
        ) from error
