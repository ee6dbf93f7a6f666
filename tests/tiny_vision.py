"""Tiny random targets that see, and prompts with an image for them, built in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tiny_models import COMMON, SLIDING_AND_FULL, SLIDING_WINDOW, frozen
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

IMAGE, IMAGE_START, IMAGE_END, VIDEO = 95, 94, 93, 92
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
_CLIP = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 2,
}
_QWEN_VISION = {"depth": 2, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "in_channels": 3}
_QWEN = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": IMAGE_START,
    "vision_end_token_id": IMAGE_END,
}
_GEMMA = {
    "model_type": "gemma3_text",
    "sliding_window": SLIDING_WINDOW,
    "layer_types": SLIDING_AND_FULL,
    "query_pre_attn_scalar": 8,
}


@dataclass(frozen=True)
class Vision:
    """A target that sees.

    Attributes:
        model_type: of Transformers. config: fields beside `text_config`. text: fields of that.
        tokens: how many an image has in the prompt. inputs: what else a prompt with one image brings, for its ids.
        remark: what is special about it.
    """

    remark: str
    model_type: str
    config: dict[str, Any]
    text: dict[str, Any]
    tokens: int
    inputs: Callable[[Tensor], dict[str, Tensor]]

    def model(self, dtype: torch.dtype = torch.float64) -> PreTrainedModel:
        """A tiny random one."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = CONFIG_MAPPING[self.model_type](text_config={**COMMON, **self.text}, **self.config)
            return frozen(AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa"), dtype)

    def prompts(self) -> dict[str, Tensor]:
        """Two of different length, padded on the left, each with an image."""
        image = [IMAGE_START, *[IMAGE] * self.tokens, IMAGE_END]
        rows = [[5, 17, *image, 33, 8, 61, 12, 90], [7, *image, 3, 20]]
        ids = torch.tensor([[0] * (len(rows[0]) - len(row)) + row for row in rows])
        generator = torch.Generator().manual_seed(3)
        with torch.random.fork_rng():
            torch.manual_seed(int(torch.randint(100, (), generator=generator)))
            inputs = self.inputs(ids)
        inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        return {"input_ids": ids, "attention_mask": (ids != 0).long(), **inputs}


def _grids(pixels: int) -> Callable[[Tensor], dict[str, Tensor]]:
    """Qwen's: patches of all images in one tensor, four by four of them an image."""

    def inputs(ids: Tensor) -> dict[str, Tensor]:
        grid = torch.tensor([[1, 4, 4]]).repeat(len(ids), 1)
        kinds = (ids == IMAGE).int()
        return {
            "pixel_values": torch.randn(16 * len(ids), pixels),
            "image_grid_thw": grid,
            "mm_token_type_ids": kinds,
        }

    return inputs


def _pixels(*shape: int, kinds: bool = False) -> Callable[[Tensor], dict[str, Tensor]]:
    """One tensor of `shape` for each row; `kinds`: and which tokens are of an image."""

    def inputs(ids: Tensor) -> dict[str, Tensor]:
        values = {"pixel_values": torch.randn(len(ids), *shape)}
        return {**values, "token_type_ids": (ids == IMAGE).long()} if kinds else values

    return inputs


VISION = {
    "Qwen2-VL": Vision(
        "images in the prompt, positions in three dimensions",
        "qwen2_vl",
        {"vision_config": {**_QWEN_VISION, "embed_dim": 16, "mlp_ratio": 2}, **_QWEN},
        _MROPE,
        4,
        _grids(24),
    ),
    "Qwen2.5-VL": Vision(
        "images in the prompt, positions in three dimensions",
        "qwen2_5_vl",
        {
            "vision_config": {
                **_QWEN_VISION,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "window_size": 8,
                "fullatt_block_indexes": [1],
            },
            **_QWEN,
        },
        _MROPE,
        4,
        _grids(24),
    ),
    "Qwen3-VL": Vision(
        "images in the prompt and in early layers",
        "qwen3_vl",
        {
            "vision_config": {
                **_QWEN_VISION,
                "intermediate_size": 24,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            **_QWEN,
        },
        _MROPE,
        4,
        _grids(24),
    ),
    "SmolVLM": Vision(
        "images in the prompt",
        "smolvlm",
        {"vision_config": _CLIP, "scale_factor": 2, "image_token_id": IMAGE, "pad_token_id": 0},
        {"model_type": "llama"},
        4,
        _pixels(1, 3, 8, 8),
    ),
    "Idefics 3": Vision(
        "images in the prompt",
        "idefics3",
        {"vision_config": _CLIP, "scale_factor": 2, "image_token_id": IMAGE, "pad_token_id": 0},
        {"model_type": "llama"},
        4,
        _pixels(1, 3, 8, 8),
    ),
    "LLaVA": Vision(
        "images in the prompt",
        "llava",
        {"vision_config": {**_CLIP, "model_type": "clip_vision_model"}, "image_token_id": IMAGE},
        {"model_type": "llama"},
        16,
        _pixels(3, 8, 8),
    ),
    "Gemma 3": Vision(
        "images in the prompt, read in both directions",
        "gemma3",
        {
            "vision_config": {**_CLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
            "mm_tokens_per_image": 4,
            "image_token_id": IMAGE,
            "boi_token_id": IMAGE_START,
            "eoi_token_id": IMAGE_END,
        },
        _GEMMA,
        4,
        _pixels(3, 8, 8, kinds=True),
    ),
}
