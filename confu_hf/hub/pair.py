"""The only reader and the only writer of a pair: the draft at the root of a folder or a Hub repository, its adapter below.

    README.md                            card
    config.json, model.safetensors       draft; config.json holds a checksum of the weights
    generation_config.json               tree options
    adapter/adapter_config.json          the same for the adapter
    adapter/adapter_model.safetensors

An EAGLE-3 draft of another project is told by its `config.json` and brought to our form on the way (`conversion/`). The assistant, the trainer and converters come here. Everything is read and checked (complete,
the right shapes, finite, the checksum where there is one) before a model is built or touched; building the draft in a
dtype, on a device, is Transformers', putting the adapter on a target is `adapter/attachment.py`'s.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

from ..adapter.attachment import LooseAdapter
from ..adapter.checksum import CHECKSUM, check_checksum, record_checksum
from ..adapter.files import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME, load_adapter_folder, save_adapter_folder
from ..compat import cached_file
from ..configuration_confu import ConFuConfig
from ..errors import refusal
from ..modeling_confu import ConFuDraftModel
from ..options import ConFuGenerationConfig
from .conversion.formats import convert, find_format
from .conversion.layer import Foreign
from .files import check_folder, read_config, read_weights, take_hub_arguments

logger = logging.get_logger(__name__)

ADAPTER_FOLDER = "adapter"
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
    target: PreTrainedModel | PreTrainedConfig | None = None,
    allow_pickle: bool = False,
    **kwargs: Any,
) -> SavedPair:
    """Read and check a pair, or an EAGLE-3 draft of another project.

    Args:
        path: a folder, or a repository on the Hub.
        target: the model, or its config, that a foreign draft is for; ConFu's own say it themselves.
        allow_pickle: read a foreign draft's `pytorch_model.bin` where there is no safetensors file.
        config: instead of the one beside the weights, as in `PreTrainedModel.from_pretrained`.
        adapter_required: refuse a draft that contemplates and comes without an adapter.
        **kwargs: where files come from (`revision`, `subfolder`, `token`, `cache_dir`, ...); fields of the config to
            override; others are handed back in `arguments`.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: files are corrupted, incomplete, not finite, or not those that a checksum was taken of.
    """
    hub = take_hub_arguments(kwargs)
    check_folder(path, hub.get("subfolder", ""))
    saved = read_config(path, hub)
    if saved.get("model_type") != ConFuConfig.model_type:
        if find_format(saved) is None:
            raise refusal(
                f"{CONFIG_NAME} of {path}",
                got=f"model_type {saved.get('model_type')!r}",
                expected=f"{ConFuConfig.model_type!r}, or an EAGLE-3 draft of SafeAILab, SpecForge, speculators or ModelOpt",
                fix="Pass a ConFu pair or such a draft.",
            )
        if config is not None:
            raise refusal(
                f"The EAGLE-3 checkpoint {path}",
                got="a config beside it",
                expected="its own, which says how it is to be read",
                fix="Pass single fields by keyword instead.",
            )
        weights = read_weights(path, hub, allow_pickle=allow_pickle)
        return _read_foreign(path, saved, weights, target, kwargs)
    config, arguments = _read_config(path, config, saved, hub, kwargs)
    weights = read_weights(path, hub)
    _check_draft(config, weights, f"The ConFu draft in {path}")
    # The checksum is of the weights beside it, whichever config is asked for.
    check_checksum(saved.get(CHECKSUM), weights, source=path)
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
    record_checksum(folder / CONFIG_NAME, read_weights(folder, {}))
    if isinstance(getattr(draft, "generation_config", None), ConFuGenerationConfig):
        draft.generation_config.save_pretrained(folder)
    if adapter is not None and adapter.weights is not None:
        save_adapter_folder(folder / ADAPTER_FOLDER, adapter.config, adapter.weights)
    elif draft.config.contemplate:
        logger.warning(f"{folder} gets a draft without its adapter: none is loaded or attached.")


def _read_config(
    path: str | os.PathLike,
    config: ConFuConfig | str | os.PathLike | None,
    saved: Mapping[str, Any],
    hub: Mapping[str, Any],
    arguments: Mapping[str, Any],
) -> tuple[ConFuConfig, dict[str, Any]]:
    """The draft's config without the checksum, and the arguments that are no fields of the config."""
    if isinstance(config, ConFuConfig):
        fields = {}
    else:
        fields = _config_fields(arguments, saved)
        try:
            config = ConFuConfig.from_pretrained(config or path, **hub, **fields)
        except (AttributeError, TypeError, ZeroDivisionError) as error:
            raise _no_draft(path, error) from error
    config.__dict__.pop(CHECKSUM, None)
    return config, {name: value for name, value in arguments.items() if name not in fields}


def _config_fields(arguments: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `arguments` that are fields of a draft's config."""
    known = saved.keys() | inspect.signature(ConFuConfig.__init__).parameters.keys()
    return {name: value for name, value in arguments.items() if name in known and name not in MODEL_ARGUMENTS}


def _read_foreign(
    path: str | os.PathLike, saved: dict[str, Any], weights: dict[str, torch.Tensor], target: Any, arguments: Mapping
) -> SavedPair:
    """An EAGLE-3 draft of another project, for `target`."""
    if target is None:
        raise refusal(
            f"The EAGLE-3 checkpoint {path}",
            got="no target",
            expected="the model that it drafts for: the checkpoint does not say all of its shapes",
            fix="Pass `target=model`, or convert it once with examples/convert.py.",
        )
    fields = _config_fields(arguments, {})
    target_config, embeddings = target, None
    if not isinstance(target, PreTrainedConfig):
        target_config, embeddings = target.config, target.get_input_embeddings().weight
    config, weights = convert(Foreign(str(path), saved, weights), target_config, fields, embeddings)
    _check_draft(config, weights, f"The EAGLE-3 checkpoint {path}")
    others = {name: value for name, value in arguments.items() if name not in fields}
    return SavedPair(config, weights, ConFuGenerationConfig(contemplate=False), None, others)


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
