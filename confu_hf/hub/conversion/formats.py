"""The formats of EAGLE-3 drafts: which one a checkpoint is of, into our names, and back into theirs.

Finding and reading the files is `hub/files.py`'s, checking weights against the config `hub/pair.py`'s.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from ...configuration_confu import ConFuConfig
from ...errors import refusal
from ...modeling_confu import ConFuDraftModel
from . import modelopt, safeailab, specforge, speculators
from .layer import ExportTarget, Foreign, Format, build_config, our_names, refuse, with_vocabulary

# The first that matches: a config of ModelOpt's would match SpecForge's, and all match SafeAILab's.
FORMATS = (speculators.FORMAT, modelopt.FORMAT, specforge.FORMAT, safeailab.FORMAT)
WRITABLE = {layout.name: layout for layout in FORMATS if layout.write is not None}
FUTURE = "future_"  # what ConFu adds to an EAGLE-3 draft


def find_format(config: Mapping[str, Any]) -> Format | None:
    """The format of a `config.json`; None if it is none of these."""
    return next((layout for layout in FORMATS if layout.matches(config)), None)


def convert(
    checkpoint: Foreign,
    target: PreTrainedConfig,
    overrides: Mapping[str, Any] | None = None,
    target_embeddings: Tensor | None = None,
) -> tuple[ConFuConfig, dict[str, Tensor]]:
    """A foreign draft as ours, in EAGLE-3 mode.

    Args:
        target: config of the model that the draft was made for.
        overrides: fields of [`ConFuConfig`] where the checkpoint says nothing, or something wrong.
        target_embeddings: `(V, d)`; embeddings in the checkpoint that equal them are left out and shared instead.
    """
    layout, source = find_format(checkpoint.config), checkpoint.source
    if layout is None:
        known = ", ".join(layout.name for layout in FORMATS)
        raise refuse(source, f"model_type {checkpoint.config.get('model_type')!r}", f"one of the formats {known}")
    weights = our_names(checkpoint.weights, source)
    fields = {**layout.fields(checkpoint), **(overrides or {})}
    for name in ("norm_before_residual", "feedback_after_norm"):
        if name in fields and fields[name] is None:
            raise refuse(
                source,
                f"a config in the form of {layout.name} that does not tell {name}",
                "true or false: readers differ in what they take it for",
                f"Pass `{name}=True` or `{name}=False` (`--set {name}=...` in examples/convert.py).",
            )
    embeddings = weights.get("embed_tokens.weight")
    if embeddings is not None and target_embeddings is not None and _equal(embeddings, target_embeddings):
        del weights["embed_tokens.weight"]
        fields["own_embeddings"] = False
    config = build_config(fields, weights, target, source)
    return config, with_vocabulary(weights, config, source)


def write_eagle3(
    folder: str | os.PathLike, draft: ConFuDraftModel, format_name: str, target: ExportTarget | None = None
) -> None:
    """Write the EAGLE-3 part of a draft in a foreign format: `config.json` and `model.safetensors`.

    Args:
        format_name: one of `WRITABLE`.
        target: what the format may need of the target; speculators need its embeddings.
    """
    if format_name not in WRITABLE:
        raise refusal("write_eagle3", got=format_name, expected=f"one of {sorted(WRITABLE)}", fix="Pass one of them.")
    weights = {name: tensor for name, tensor in draft.state_dict().items() if not name.startswith(FUTURE)}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    config, weights = WRITABLE[format_name].write(draft.config, weights, target or ExportTarget())
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _equal(a: Tensor, b: Tensor) -> bool:
    """The same numbers, in the coarser of the two dtypes."""
    if a.shape != b.shape or b.is_meta:
        return False
    dtype = min((a.dtype, b.dtype), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.equal(a.to(dtype), b.detach().cpu().to(dtype))
