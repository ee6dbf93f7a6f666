"""The adapter's weights on disk: reads, checks and writes `adapter_config.json` and `adapter_model.safetensors`.

Names and keys are PEFT's, so its own loaders read the same folder. What the weights mean and where they go is
`adapter.py`'s. Everything is checked before any target is touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..errors import refusal
from .config import ConFuAdapterConfig

CHILD_NAME = "confu"
WEIGHT_NAMES = ("confu_prompts", "confu_experts", "confu_router")
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"


def short_name(key: str) -> str:
    """`base_model.model.confu.confu_prompts.weight` -> `confu_prompts`; keys of no ConFu weight stay whole."""
    return next((part for part in key.split(".") if part in WEIGHT_NAMES), key)


def state_dict_keys(adapter_name: str) -> set[str]:
    """The keys of an adapter in its target's state dict."""
    return {f"{CHILD_NAME}.{name}.{adapter_name}.weight" for name in WEIGHT_NAMES}


def check_adapter_weights(config: ConFuAdapterConfig, weights: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Raise a `ValueError` unless `weights` (by short name) are the three that `config` asks for, finite."""
    fix = "Download the adapter again, or save it again with `save_pretrained`."
    shapes = config.shapes()
    if set(weights) != set(shapes):
        raise refusal(f"Weights of {source}", got=sorted(weights), expected=sorted(shapes), fix=fix)
    for name, shape in shapes.items():
        if tuple(weights[name].shape) != shape:
            raise refusal(
                f"`{name}` of {source}",
                got=f"shape {tuple(weights[name].shape)}",
                expected=f"{shape}, as its configuration says",
                fix="It was saved for another target or configuration: use the adapter made for this target.",
            )
        if not weights[name].isfinite().all():
            raise refusal(f"`{name}` of {source}", got="NaN or infinite weights", expected="finite numbers", fix=fix)


def load_adapter_folder(folder: str | Path) -> tuple[ConFuAdapterConfig, dict[str, torch.Tensor]]:
    """Read and check a folder.

    Returns:
        The configuration, and the weights by short name, in the dtype of the file.

    Raises:
        FileNotFoundError: the weights are missing.
        ValueError: they are corrupted, incomplete, misshapen or not finite, or the adapter is none of ConFu's.
    """
    folder = Path(folder)
    config = PeftConfig.from_pretrained(str(folder))
    if config.peft_type != "CONFU":
        raise refusal(
            f"The adapter in {folder}",
            got=f"peft_type {config.peft_type}",
            expected="CONFU",
            fix="Pass a folder with a ConFu adapter.",
        )
    if None in (config.target_hidden_size, config.target_num_hidden_layers):
        raise refusal(
            f"The adapter in {folder}",
            got="a configuration without target_hidden_size or target_num_hidden_layers",
            expected="the geometry of its target",
            fix="Save it again from a target that it is attached to.",
        )
    path = folder / ADAPTER_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"The adapter in {folder}: got {sorted(file.name for file in folder.iterdir())}, expected "
            f"{ADAPTER_WEIGHTS_NAME} among them. Download the adapter again."
        )
    try:
        weights = {short_name(key): value for key, value in load_file(path).items()}
    except SafetensorError as error:
        raise corrupted(path, error) from error
    check_adapter_weights(config, weights, source=str(path))
    return config, weights


def corrupted(path: str | Path, error: Exception) -> ValueError:
    """What to say of a safetensors file that cannot be read."""
    return refusal(
        f"Reading {path}",
        got=f"a corrupted or truncated file ({error})",
        expected="a complete safetensors file",
        fix="Delete it and download it again.",
    )


def save_adapter_folder(folder: str | Path, config: ConFuAdapterConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Write what [`load_adapter_folder`] and every loader of PEFT read."""
    config.save_pretrained(str(folder))
    tensors = {f"base_model.model.{CHILD_NAME}.{name}.weight": weights[name].contiguous() for name in WEIGHT_NAMES}
    save_file(tensors, Path(folder) / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
