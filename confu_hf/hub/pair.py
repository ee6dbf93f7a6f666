"""The only reader and the only writer of a pair: the draft at the root of a folder or a Hub repository, its adapter below.

    README.md                            card
    config.json, model.safetensors       draft; config.json holds a checksum of the weights
    generation_config.json               tree options
    adapter/adapter_config.json          the same for the adapter
    adapter/adapter_model.safetensors

The assistant, the trainer and converters of foreign checkpoints come here. Everything is read and checked (complete,
the right shapes, finite, the checksum where there is one) before a model is built or touched; building the draft in a
dtype, on a device, is Transformers', putting the adapter on a target is `adapter/attachment.py`'s.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..adapter.attachment import LooseAdapter
from ..adapter.checksum import CHECKSUM, check_checksum, read_tensors, record_checksum
from ..adapter.files import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, load_adapter_folder, save_adapter_folder
from ..compat import cached_file
from ..configuration_confu import ConFuConfig
from ..errors import refusal
from ..modeling_confu import ConFuDraftModel
from ..options import ConFuGenerationConfig

logger = logging.get_logger(__name__)

ADAPTER_FOLDER = "adapter"
HUB_ARGUMENTS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
MODEL_ARGUMENTS = ("dtype", "torch_dtype")  # they are in a saved config too, but say how to load


@dataclass(frozen=True)
class SavedPair:
    """What a folder or repository holds, checked.

    Attributes:
        config, weights: of the draft; all of its state dict, on the CPU, in the dtypes of the file.
        generation_config: the tree options, the defaults if there is no file.
        adapter: None for an EAGLE-3 draft, or where the adapter may be missing and is.
        arguments: what `read_pair` was given and has no use for.
    """

    config: ConFuConfig
    weights: dict[str, torch.Tensor]
    generation_config: ConFuGenerationConfig
    adapter: LooseAdapter | None
    arguments: dict[str, Any] = field(default_factory=dict)


def read_pair(
    path: str | os.PathLike,
    *,
    config: ConFuConfig | str | os.PathLike | None = None,
    adapter_required: bool = True,
    **kwargs: Any,
) -> SavedPair:
    """Read and check a pair.

    Args:
        path: a folder, or a repository on the Hub.
        config: instead of the one beside the weights, as in `PreTrainedModel.from_pretrained`.
        adapter_required: refuse a draft that contemplates and comes without an adapter.
        **kwargs: where files come from (`revision`, `subfolder`, `token`, `cache_dir`, ...); fields of the config to
            override; others are handed back in `arguments`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files are corrupted, incomplete, not finite, or not those that a checksum was taken of.
    """
    hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
    hub = {name: value for name, value in hub.items() if value is not None}
    _check_folder(path, hub.get("subfolder", ""))
    config, checksum, arguments = _read_config(path, config, hub, kwargs)
    weights = _read_draft(path, hub)
    source = f"The ConFu draft in {path}"
    _check_draft(config, weights, source)
    check_checksum(checksum, weights, source=path)
    try:
        generation_config = ConFuGenerationConfig.from_pretrained(path, **hub)
    except OSError:
        logger.info(f"{path} has no generation_config.json: default tree options.")
        generation_config = ConFuGenerationConfig(contemplate=config.contemplate)
    adapter = _read_adapter(path, hub, required=adapter_required) if config.contemplate else None
    return SavedPair(config, weights, generation_config, adapter, arguments)


def write_pair(
    folder: str | os.PathLike, draft: ConFuDraftModel, adapter: LooseAdapter | None, **save_arguments: Any
) -> None:
    """Write what [`read_pair`] reads, checksums included: the layout of a Hub repository without its card.

    Args:
        draft: with its `generation_config`, if it has one.
        adapter: None leaves the folder without one; so does one that was never initialised.
        **save_arguments: of `PreTrainedModel.save_pretrained`.
    """
    # By its class: an assistant's own `save_pretrained` ends up here.
    ConFuDraftModel.save_pretrained(draft, folder, **save_arguments)
    if not save_arguments.get("is_main_process", True):
        return
    folder = Path(folder)
    # Of what lies there now: which tensors, and under which names, was Transformers' business.
    record_checksum(folder / CONFIG_NAME, _read_draft(folder, {}))
    if isinstance(getattr(draft, "generation_config", None), ConFuGenerationConfig):
        draft.generation_config.save_pretrained(folder)
    if adapter is not None and adapter.weights is not None:
        save_adapter_folder(folder / ADAPTER_FOLDER, adapter.config, adapter.weights)
    elif draft.config.contemplate:
        logger.warning(f"{folder} gets a draft without its adapter: none is loaded or attached.")


def _check_folder(path: str | os.PathLike, subfolder: str) -> None:
    """Name what a folder lacks; repositories on the Hub are left to the download."""
    folder = Path(path) / subfolder
    if not Path(path).is_dir():
        return
    files = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else "no such folder"
    if CONFIG_NAME not in files or not {SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME} & set(files):
        raise refusal(
            f"The ConFu draft in {folder}",
            got=files,
            expected=f"{CONFIG_NAME} and {SAFE_WEIGHTS_NAME} among them",
            fix="Pass the folder that `save_pretrained` wrote (its root, not `adapter/`), or download it again.",
            error=FileNotFoundError,
        )


def _read_config(
    path: str | os.PathLike,
    config: ConFuConfig | str | os.PathLike | None,
    hub: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> tuple[ConFuConfig, str | None, dict[str, Any]]:
    """The draft's config without the checksum, the checksum, and the arguments that are no fields of the config."""
    # The checksum is of the weights beside it, whichever config is asked for.
    saved, _ = ConFuConfig.get_config_dict(path, **hub)
    if saved.get("model_type") != ConFuConfig.model_type:
        raise refusal(
            f"{CONFIG_NAME} of {path}",
            got=f"model_type {saved.get('model_type')!r}",
            expected=f"{ConFuConfig.model_type!r}",
            fix="Pass a ConFu pair, or convert the checkpoint first.",
        )
    if isinstance(config, ConFuConfig):
        fields = {}
    else:
        known = saved.keys() | inspect.signature(ConFuConfig.__init__).parameters.keys()
        fields = {name: value for name, value in arguments.items() if name in known and name not in MODEL_ARGUMENTS}
        try:
            config = ConFuConfig.from_pretrained(config or path, **hub, **fields)
        except (AttributeError, TypeError, ZeroDivisionError) as error:
            raise _no_draft(path, error) from error
    config.__dict__.pop(CHECKSUM, None)
    others = {name: value for name, value in arguments.items() if name not in fields}
    return config, saved.get(CHECKSUM), others


def _read_draft(path: str | os.PathLike, hub: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of the draft, of one file or of several with an index."""
    try:
        return read_tensors(cached_file(path, SAFE_WEIGHTS_NAME, **hub))
    except OSError as missing:
        try:
            index = Path(cached_file(path, SAFE_WEIGHTS_INDEX_NAME, **hub))
        except OSError:
            raise missing from None
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise refusal(
            f"{SAFE_WEIGHTS_INDEX_NAME} of {path}",
            got=f"a file that cannot be understood ({type(error).__name__}: {error})",
            expected="the index of a draft saved in several files",
            fix="Download it again.",
        ) from error
    files = [cached_file(path, name, **hub) for name in names]
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


def _check_draft(config: ConFuConfig, weights: Mapping[str, torch.Tensor], source: str) -> None:
    """Raise a `ValueError` unless `weights` are exactly those that the config asks for, finite."""
    try:
        with torch.device("meta"):
            expected = ConFuDraftModel(config).state_dict()
    except (AttributeError, KeyError, OverflowError, RuntimeError, TypeError) as error:
        raise _no_draft(source, error) from error
    misfits = [
        f"{name} {tuple(weights[name].shape)} {weights[name].dtype}, not {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in weights and (weights[name].shape != tensor.shape or _kind(weights[name]) != _kind(tensor))
    ]
    differences = {
        "missing keys": expected.keys() - weights.keys(),
        "unexpected keys": weights.keys() - expected.keys(),
        "mismatched keys": misfits,
    }
    for kind, names in differences.items():
        if names:
            raise refusal(
                source,
                got=f"{kind}: {sorted(names)}",
                expected="exactly the weights that its config asks for",
                fix="Download it again, or convert the checkpoint if it is not ConFu's.",
            )
    for name, weight in weights.items():
        if weight.is_floating_point() and not weight.isfinite().all():
            raise refusal(
                f"`{name}` of {source[0].lower()}{source[1:]}",
                got="NaN or infinite weights",
                expected="finite numbers",
                fix="Download it again; if it was trained here, go back to an earlier checkpoint.",
            )
    _check_vocabulary(config, weights["d2t"], source)


def _kind(tensor: torch.Tensor) -> str:
    """Floating-point weights may be stored in any of their dtypes; what counts or marks tokens may not."""
    return "float" if tensor.is_floating_point() else str(tensor.dtype)


def _check_vocabulary(config: ConFuConfig, d2t: torch.Tensor, source: str) -> None:
    token_ids = d2t + torch.arange(d2t.numel())
    if token_ids.min() < 0 or token_ids.max() >= config.vocab_size:
        raise refusal(
            f"`d2t` of {source[0].lower()}{source[1:]}",
            got=f"token ids from {int(token_ids.min())} to {int(token_ids.max())}",
            expected=f"ids in [0, vocab_size={config.vocab_size})",
            fix="Download it again, or set its vocabulary with `set_draft_vocabulary`.",
        )


def _no_draft(source: object, error: Exception) -> ValueError:
    return refusal(
        f"{CONFIG_NAME} of {source}",
        got=f"fields that no draft can be built from ({type(error).__name__}: {error})",
        expected="the config of a ConFu draft",
        fix="Download it again.",
    )


def _read_adapter(path: str | os.PathLike, hub: Mapping[str, Any], *, required: bool) -> LooseAdapter | None:
    subfolder = "/".join(part for part in (hub.get("subfolder", ""), ADAPTER_FOLDER) if part)
    arguments = {**hub, "subfolder": subfolder}
    try:
        files = [cached_file(path, name, **arguments) for name in (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)]
    except OSError as error:
        if not required:
            return None
        raise refusal(
            f"The ConFu adapter of {path}",
            got=f"no {subfolder}/ with {ADAPTER_CONFIG_NAME} and {ADAPTER_WEIGHTS_NAME} ({error})",
            expected="both, since the draft's config has contemplate=True",
            fix="Download the repository again, or pass a draft that was saved with its adapter.",
            error=FileNotFoundError,
        ) from error
    config, weights = load_adapter_folder(Path(files[0]).parent)
    config.inference_mode = True  # whoever wants to train it says so
    return LooseAdapter(config, weights)
