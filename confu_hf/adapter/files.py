"""The adapter's weights on disk: reads, checks and writes `adapter_config.json` and `adapter_model.safetensors`.

Names and keys are PEFT's, so its own loaders read the same folder. Everything is checked before any target is touched.
What the weights mean is `layer.py`'s, where they go `tuner.py`'s and `attachment.py`'s; the folder is found, and put
beside its draft, by `hub/pair.py`.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig
from safetensors.torch import save_file

from ..errors import refusal
from .checksum import check_checksum, read_tensors, record_checksum
from .config import ConFuAdapterConfig

CHILD_NAME = "confu"
WEIGHT_NAMES = ("confu_prompts", "confu_experts", "confu_router")
LORA_NAMES = ("confu_lora_down", "confu_lora_up")  # of adapters with a `lora_rank`
ALL_NAMES = WEIGHT_NAMES + LORA_NAMES
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"

# With the prefix in files and in a `PeftModel`, without it where PEFT injected into the target itself.
_KEY = re.compile(rf"(?:base_model\.model\.)?{CHILD_NAME}\.({'|'.join(ALL_NAMES)})\.weight")


def by_short_name(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`base_model.model.confu.confu_prompts.weight` -> `confu_prompts`. A key that is not exactly one of ConFu's, or
    names a weight a second time, stays whole, for [`check_adapter_weights`] to refuse."""
    short: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        short[match[1] if match and match[1] not in short else key] = tensor
    return short


def state_dict_keys(adapter_name: str) -> set[str]:
    """The keys of an adapter in its target's state dict."""
    return {f"{CHILD_NAME}.{name}.{adapter_name}.weight" for name in ALL_NAMES}


def check_adapter_weights(config: ConFuAdapterConfig, weights: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Raise a `ValueError` unless `weights` (by short name) are those that `config` asks for, finite."""
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
        if not weights[name].is_floating_point():
            raise refusal(f"`{name}` of {source}", got=weights[name].dtype, expected="a floating-point dtype", fix=fix)
        if not weights[name].isfinite().all():
            raise refusal(f"`{name}` of {source}", got="NaN or infinite weights", expected="finite numbers", fix=fix)


def load_adapter_folder(folder: str | Path) -> tuple[ConFuAdapterConfig, dict[str, torch.Tensor]]:
    """Read and check a folder.

    Returns:
        The configuration, and the weights by short name, in the dtype of the file.

    Raises:
        FileNotFoundError: the weights are missing.
        ValueError: they are corrupted, incomplete, misshapen or not finite, are not those that the configuration
            holds a checksum of, or the adapter is none of ConFu's.
    """
    folder = Path(folder)
    config = _read_config(folder)
    path = folder / ADAPTER_WEIGHTS_NAME
    if not path.is_file():
        raise refusal(
            f"The adapter in {folder}",
            got=sorted(file.name for file in folder.iterdir()),
            expected=f"{ADAPTER_WEIGHTS_NAME} among them",
            fix="Download the adapter again.",
            error=FileNotFoundError,
        )
    tensors = read_tensors(path)
    weights = by_short_name(tensors)
    check_adapter_weights(config, weights, source=str(path))
    check_checksum(config.weights_sha256, tensors, source=path)
    config.weights_sha256 = None  # of the file; what becomes of the weights from here on is not its business
    return config, weights


def _read_config(folder: Path) -> ConFuAdapterConfig:
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (AttributeError, KeyError, OSError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise refusal(
            f"Reading {folder / ADAPTER_CONFIG_NAME}",
            got=f"a file that cannot be understood ({type(error).__name__}: {error})",
            expected="the configuration of a ConFu adapter",
            fix="Download the adapter again.",
        ) from error
    if config.peft_type != "CONFU":
        raise refusal(
            f"The adapter in {folder}",
            got=f"peft_type {config.peft_type}",
            expected="CONFU",
            fix="Pass a folder with a ConFu adapter.",
        )
    geometry = (
        "target_hidden_size",
        "target_num_hidden_layers",
        "num_key_value_heads",
        "head_dim",
        "target_layer_ids",
        "soft_prompt_type",
    )
    geometry += ("lora_widths",) if config.lora_rank else ()
    missing = [name for name in geometry if getattr(config, name) is None]
    if missing:
        raise refusal(
            f"The adapter in {folder}",
            got=f"a configuration without {', '.join(missing)}",
            expected="the geometry of its target",
            fix="Save it again from a target that it is attached to.",
        )
    return config


def save_adapter_folder(folder: str | Path, config: ConFuAdapterConfig, weights: Mapping[str, torch.Tensor]) -> None:
    """Write what [`load_adapter_folder`] and every loader of PEFT read."""
    folder = Path(folder)
    config = copy.deepcopy(config)
    config.inference_mode = True  # as PEFT saves: whoever loads it says whether it trains
    config.save_pretrained(str(folder))
    tensors = {
        f"base_model.model.{CHILD_NAME}.{name}.weight": weights[name].detach().cpu().contiguous()
        for name in config.shapes()
    }
    save_file(tensors, folder / ADAPTER_WEIGHTS_NAME, metadata={"format": "pt"})
    record_checksum(folder / ADAPTER_CONFIG_NAME, tensors)
