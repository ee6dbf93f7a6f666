"""Measured costs on disk, one small JSON file per model and way of running it, in the cache folder of Hugging Face.

`HF_HOME` moves the folder, `CONFU_DISABLE_COST_CACHE=1` switches it off. A file that cannot be read or written costs a
measurement, never a generation.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import PreTrainedModel

from .costs import CostModel

logger = logging.getLogger(__name__)

SWITCH = "CONFU_DISABLE_COST_CACHE"


@dataclass(frozen=True)
class CostKey:
    """What seconds depend on, beside rows and context.

    Attributes:
        model: class and geometry of the target; its weights do not matter. draft: of the draft, "" without a network.
        device: the processor's or accelerator's name. dtype: of the target. threads: of torch, on the host.
        execution: how the passes run: packed, compiled, ...
    """

    model: str
    draft: str
    device: str
    dtype: str
    threads: int
    execution: str

    @classmethod
    def of(cls, target: PreTrainedModel, draft: PreTrainedModel | None, execution: str) -> CostKey:
        """That of these models as they are now."""
        return cls(
            model=_geometry(target),
            draft="" if draft is None else _geometry(draft),
            device=_device_name(target.device),
            dtype=str(target.dtype),
            threads=torch.get_num_threads(),
            execution=execution,
        )

    @property
    def file_name(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:24] + ".json"


def cost_folder() -> Path | None:
    """Where costs are kept; None if they are not."""
    if os.environ.get(SWITCH, "").lower() in ("1", "true", "yes", "on"):
        return None
    return Path(constants.HF_HOME) / "confu_hf" / "costs"


def load_costs(key: CostKey) -> CostModel | None:
    """What was kept for this key, if anything that can be read."""
    folder = cost_folder()
    if folder is None or not (folder / key.file_name).is_file():
        return None
    try:
        data = json.loads((folder / key.file_name).read_text(encoding="utf-8"))
        if data["key"] != asdict(key):
            raise ValueError(f"costs of {data['key']}")
        return CostModel.from_dict(data["costs"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning(f"Costs in {folder / key.file_name} cannot be read, they are measured anew: {error}")
        return None


def save_costs(key: CostKey, costs: CostModel) -> None:
    """Keep them for the next process, if the folder can be written. Replaced in one step: no half-written file."""
    folder = cost_folder()
    if folder is None:
        return
    partial = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".part", delete=False, encoding="utf-8") as file:
            partial = Path(file.name)
            json.dump({"key": asdict(key), "costs": costs.to_dict()}, file, indent=1)
        partial.replace(folder / key.file_name)
    except OSError as error:
        logger.info(f"Costs are not kept in {folder}: {error}")
        if partial is not None:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def _geometry(model: PreTrainedModel) -> str:
    """Class and configuration, without the fields that name files and versions."""
    config = {name: value for name, value in model.config.to_dict().items() if "version" not in name}
    for name in ("_name_or_path", "name_or_path", "weights_sha256"):
        config.pop(name, None)
    text = json.dumps(config, sort_keys=True, default=str)
    return f"{type(model).__name__} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} cores"
