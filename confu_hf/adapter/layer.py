"""`ConFuLayer`: the weights of the adapters of a target, by name. Passive: no module of the target calls it.

It says what the active adapter is and mixes the contemplate token's embedding. Injection is `tuner.py`'s, files are
`files.py`'s, soft prompts are run by `target/soft_prompts.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..compat import BaseTunerLayer
from ..errors import refusal
from ..experts import mix_experts
from .config import ConFuAdapterConfig
from .files import ALL_NAMES, check_adapter_weights
from .low_rank import LowRank


class ConFuWeight(nn.Module):
    """One weight of one adapter: PEFT wants `.weight` below the adapter's name, and offloading hooks want a call."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def forward(self) -> torch.Tensor:
        return self.weight


class ConFuLayer(nn.Module, BaseTunerLayer):
    """The adapters of a target, by name. Passive: no module of the target calls it."""

    adapter_layer_names = ALL_NAMES
    other_param_names = ("configs",)

    def __init__(self, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.confu_prompts = nn.ModuleDict()
        self.confu_experts = nn.ModuleDict()
        self.confu_router = nn.ModuleDict()
        self.confu_lora_down = nn.ModuleDict()
        self.confu_lora_up = nn.ModuleDict()
        self.configs: dict[str, ConFuAdapterConfig] = {}
        self.merged_adapters = []
        self._active_adapter = []
        # Adapters that an assistant put here, for itself alone. Copies belong to nobody.
        self.owned: set[str] = set()
        # By adapter: its weights, and their versions, when they were last found to be complete and finite.
        self._checked: dict[str, tuple[list[nn.Parameter], list[tuple]]] = {}
        # Empty; it follows `target.to(...)` and so says where weights that arrive later belong.
        self.register_buffer("placement", torch.empty(0, device=device, dtype=dtype), persistent=False)

    @property
    def weight(self) -> torch.Tensor:
        """PEFT's own `weight` is that of the wrapped layer; here nothing is wrapped."""
        raise AttributeError("ConFuLayer wraps no layer")

    bias = weight

    def update_layer(self, adapter_name: str, config: ConFuAdapterConfig, *, low_cpu_mem_usage: bool = False) -> None:
        """Add the weights of an adapter: random, or NaN if `config.inference_mode` says that they will be loaded."""
        device = torch.device("meta") if low_cpu_mem_usage else self.placement.device
        for name, shape in config.shapes().items():
            module = ConFuWeight(shape, device, self.placement.dtype)
            getattr(self, name)[adapter_name] = module
            if config.inference_mode:
                nn.init.constant_(module.weight, float("nan"))  # a weight that a file forgets is seen, not made up
            elif name == "confu_lora_up":
                nn.init.zeros_(module.weight)  # so that it starts as no change
            elif name == "confu_lora_down":
                nn.init.normal_(module.weight, std=config.target_hidden_size**-0.5)
            else:
                nn.init.normal_(module.weight, std=config.initializer_range)
        self.configs[adapter_name] = config

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters. Names of other methods (a LoRA's) keep ours active: ConFu changes no output of theirs."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        own = [name for name in names if name in self.configs]
        kept = [name for name in self.active_adapters if name in self.configs]
        super().set_adapter(own or kept, inference_mode=inference_mode or not own)

    @property
    def current(self) -> str | None:
        """Name of the adapter in use; None if there is none, or if adapters are disabled."""
        names = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.configs]
        return names[0] if names else None

    @property
    def config(self) -> ConFuAdapterConfig:
        """Configuration of the active adapter."""
        return self.configs[self._current()]

    @property
    def soft_prompt_type(self) -> str:
        return self.config.soft_prompt_type

    @property
    def soft_prompt_length(self) -> int:
        return self.config.num_virtual_tokens

    def prompt_weight(self, adapter_name: str | None = None) -> torch.Tensor:
        """Soft prompts in the adapter's dtype: `(L, 2, S, kv_heads, head_dim)` for "kv", `(S, d)` for "embedding".

        `adapter_name`: None = the active one, here and below.
        """
        return self.confu_prompts[adapter_name or self._current()]()

    def router_weight(self) -> torch.Tensor:
        """`(n_expert, 3 d)`, of the active adapter's mixture."""
        return self.confu_router[self._current()]()

    def contemplate_embedding(self, features: torch.Tensor, adapter_name: str | None = None) -> torch.Tensor:
        """Features `(..., 3 d)` -> input embedding of the contemplate token `(..., d)`, in the dtype of `features`."""
        return self(features, adapter_name)

    def forward(self, features: torch.Tensor, adapter_name: str | None = None) -> torch.Tensor:
        name = adapter_name or self._current()
        top_k = self.configs[name].num_experts_per_token
        mixed = mix_experts(features, self.confu_router[name](), self.confu_experts[name](), top_k)
        return mixed.to(features.dtype)

    def low_rank(self, target: nn.Module, adapter_name: str | None = None) -> LowRank | None:
        """What contemplate tokens add to the projections of `target`, differentiable; None without a `lora_rank`."""
        name = adapter_name or self._current()
        config = self.configs[name]
        if not config.lora_rank:
            return None
        down, up = self.confu_lora_down[name](), self.confu_lora_up[name]()
        return LowRank(target, config.lora_widths, down, up, config.lora_scale)

    def adapter_weights(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The weights of an adapter, by short name, detached."""
        return {
            name: getattr(self, name)[adapter_name].weight.detach() for name in self.configs[adapter_name].shapes()
        }

    @torch.no_grad()
    def set_adapter_weights(self, adapter_name: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy weights, by short name, into an adapter; nothing is copied unless they fit."""
        check_adapter_weights(self.configs[adapter_name], weights, source=f"adapter {adapter_name!r}")
        for name in self.configs[adapter_name].shapes():
            getattr(self, name)[adapter_name].weight.copy_(weights[name])

    def check_weights(self, adapter_name: str) -> None:
        """Raise a `ValueError` if an adapter has weights that are missing, misshapen or not finite.

        Adapters that PEFT or Transformers loaded pass through here alone. Every version of the weights is looked at
        once; those that an offloading hook keeps elsewhere are not.
        """
        weights = [getattr(self, name)[adapter_name].weight for name in self.configs[adapter_name].shapes()]
        versions = [_version(weight) for weight in weights]
        known, known_versions = self._checked.get(adapter_name, ((), ()))
        unchanged = len(known) == len(weights) and all(old is new for old, new in zip(known, weights, strict=True))
        if any(weight.is_meta for weight in weights) or (
            unchanged and versions == known_versions and None not in versions
        ):
            return
        found = self.adapter_weights(adapter_name)
        check_adapter_weights(self.configs[adapter_name], found, source=f"adapter {adapter_name!r} on the target")
        self._checked[adapter_name] = (weights, versions)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.owned.discard(adapter_name)
        self._checked.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to merge: no weight of the target depends on ConFu. PEFT asks every layer when a LoRA is merged."""

    def unmerge(self) -> None:
        """See [`merge`]."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "owned": set(), "_checked": {}}

    def _current(self) -> str:
        if self.current is None:
            state = "disabled adapters" if self.disable_adapters else f"no active adapter among {list(self.configs)}"
            raise refusal(
                "ConFu",
                got=state,
                expected="an active ConFu adapter",
                fix="Call `enable_adapters()` or `set_adapter(name)`.",
            )
        return self.current

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        for name in ALL_NAMES:
            weights = getattr(self, name)
            if adapter_name in weights and not weights[adapter_name].weight.is_meta:
                weights[adapter_name].to(device or self.placement.device, dtype=self.placement.dtype)


def _version(weight: nn.Parameter) -> tuple | None:
    """Differs after every change that PyTorch sees; None for a weight that keeps no count (made in inference mode)."""
    if weight.is_inference():
        return None
    return weight._version, weight.data_ptr(), weight.dtype, weight.device
