"""`ConFuAdapterConfig`: what an adapter looks like and which target it fits. Where its weights are is `layer.py`'s."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from peft import PeftConfig
from transformers import PreTrainedConfig, PreTrainedModel

from ..configuration_confu import TargetGeometry, default_layer_ids
from ..errors import refusal
from .checksum import CHECKSUM
from .low_rank import projection_widths

LORA_SCALE = 16.0


class ConFuPeftType(str, Enum):  # noqa: UP042 - StrEnum needs Python 3.11
    """PEFT's own enum is closed; its mappings are keyed by string hash, so an enum of our own serves without it."""

    CONFU = "CONFU"


@dataclass
class ConFuAdapterConfig(PeftConfig):
    """Configuration of the ConFu adapter.

    The geometry (`target_*`, `num_key_value_heads`, `head_dim`) may be left out: injection takes it from the target.
    Where it is given, as in every saved adapter, it must fit the target.
    """

    num_virtual_tokens: int = field(default=16, metadata={"help": "Length S of the soft prompt."})
    soft_prompt_type: str | None = field(
        default=None,
        metadata={
            "help": "'kv' learns keys and values per layer, 'embedding' runs S vectors through the target; None = 'kv', or "
            "'embedding' for a target that caches latents."
        },
    )
    num_experts: int = field(default=8, metadata={"help": "Embeddings that a contemplate token is mixed from."})
    num_experts_per_token: int = field(default=2, metadata={"help": "How many of them the router keeps."})
    lora_rank: int = field(
        default=0,
        metadata={"help": "Rank of what contemplate tokens, and they alone, add to projections; 0 = nothing."},
    )
    lora_alpha: float | None = field(default=None, metadata={"help": "It is scaled by alpha / rank; None = by 16."})
    lora_target_modules: list[str] | None = field(
        default=None, metadata={"help": "Names of the projections; None = all of attention and MLP that there are."}
    )
    lora_widths: dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Inputs and outputs of each, by name below the layer."}
    )
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the initial weights."})
    target_hidden_size: int | None = field(default=None, metadata={"help": "d of the target."})
    target_num_hidden_layers: int | None = field(default=None, metadata={"help": "L of the target."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Of the target's attention."})
    head_dim: int | None = field(default=None, metadata={"help": "Of the target's attention."})
    target_layer_ids: list[int] | None = field(
        default=None, metadata={"help": "The layers whose entering hidden states are the features."}
    )
    weights_sha256: str | None = field(
        default=None,
        metadata={"help": "Checksum of the file that was saved with this configuration, until it is read."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = ConFuPeftType.CONFU
        self.task_type = self.task_type or "CAUSAL_LM"
        if self.soft_prompt_type not in (None, "kv", "embedding"):
            self._refuse("soft_prompt_type", "'kv' or 'embedding', or None for the target's default")
        for name in ("num_virtual_tokens", "num_experts", "num_experts_per_token"):
            if not _is_positive_int(getattr(self, name)):
                self._refuse(name, "an integer of at least 1")
        if isinstance(self.lora_rank, bool) or not isinstance(self.lora_rank, int) or self.lora_rank < 0:
            self._refuse("lora_rank", "an integer of at least 0")
        if self.lora_alpha is not None and not self.lora_alpha > 0:
            self._refuse("lora_alpha", "a number above 0, or None")
        if self.num_experts_per_token > self.num_experts:
            self._refuse("num_experts_per_token", f"at most num_experts={self.num_experts}")
        for name in ("target_hidden_size", "target_num_hidden_layers", "num_key_value_heads", "head_dim"):
            if getattr(self, name) is not None and not _is_positive_int(getattr(self, name)):
                self._refuse(name, "an integer of at least 1, or None to take the target's")
        if self.target_layer_ids is not None:
            self.target_layer_ids = list(self.target_layer_ids)
            ids, layers = self.target_layer_ids, self.target_num_hidden_layers
            if not ids or sorted(set(ids)) != ids or ids[0] < 0 or (layers is not None and ids[-1] >= layers):
                self._refuse("target_layer_ids", f"increasing layer indices below {layers or 'the number of layers'}")

    def to_dict(self) -> dict[str, Any]:
        """Without the checksum: it is of one file, and whoever writes another one has to take it anew."""
        fields = super().to_dict()
        fields.pop(CHECKSUM)
        return fields

    def _refuse(self, name: str, expected: str) -> None:
        raise refusal(
            "ConFuAdapterConfig", got=f"{name}={getattr(self, name)!r}", expected=expected, fix=f"Correct `{name}`."
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each weight; needs the geometry."""
        width, kv = self.target_hidden_size, self.soft_prompt_type == "kv"
        per_layer = (
            self.target_num_hidden_layers,
            2,
            self.num_virtual_tokens,
            self.num_key_value_heads,
            self.head_dim,
        )
        shapes = {
            "confu_prompts": per_layer if kv else (self.num_virtual_tokens, width),
            "confu_experts": (self.num_experts, width),
            "confu_router": (self.num_experts, len(self.target_layer_ids) * width),
        }
        if self.lora_rank:
            inputs, outputs = map(sum, zip(*self.lora_widths.values(), strict=True))
            shapes["confu_lora_down"] = (self.target_num_hidden_layers, self.lora_rank, inputs)
            shapes["confu_lora_up"] = (self.target_num_hidden_layers, outputs, self.lora_rank)
        return shapes

    @property
    def lora_scale(self) -> float:
        """What the product of the gated LoRA is multiplied by."""
        return LORA_SCALE if self.lora_alpha is None else self.lora_alpha / self.lora_rank

    def fit(self, target: PreTrainedModel) -> None:
        """Fill in the geometry that is missing; raise a `ValueError` where what is given is another target's."""
        geometry = target_geometry(target.config)
        if self.lora_rank:
            geometry["lora_widths"] = projection_widths(target, self.lora_target_modules)
        for name, expected in geometry.items():
            if getattr(self, name) not in (None, expected):
                raise refusal(
                    "The ConFu adapter was made for another target",
                    got=f"{name}={getattr(self, name)}",
                    expected=f"{expected} (of this {target.config.model_type} model)",
                    fix="Load the adapter trained for this target, or train one: `ConFuAssistant.from_target(model)`.",
                )
        for name, expected in geometry.items():
            setattr(self, name, expected)
        self._choose_soft_prompt_type(TargetGeometry.of(target.config).soft_prompt_types)
        if self.target_layer_ids is None:
            self.target_layer_ids = default_layer_ids(self.target_num_hidden_layers)
        self.__post_init__()

    def _choose_soft_prompt_type(self, possible: tuple[str, ...]) -> None:
        self.soft_prompt_type = self.soft_prompt_type or possible[0]
        if self.soft_prompt_type not in possible:
            raise refusal(
                "Soft prompts of a target that caches latents",
                got=f"soft_prompt_type={self.soft_prompt_type!r}",
                expected=" or ".join(map(repr, possible)),
                fix="Leave it out for the default.",
            )


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def target_geometry(target_config: PreTrainedConfig) -> dict[str, Any]:
    """What an adapter's shapes depend on, by the names of its own fields."""
    geometry = TargetGeometry.of(target_config)
    return {
        "target_hidden_size": geometry.hidden_size,
        "target_num_hidden_layers": geometry.num_hidden_layers,
        "num_key_value_heads": geometry.num_key_value_heads,
        "head_dim": geometry.head_dim,
    }
