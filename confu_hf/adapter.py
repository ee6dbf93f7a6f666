"""ConFu as a PEFT method: weights of the contemplate tokens, kept on the target as an adapter its forward never runs.

Importing this module registers the method (`peft_type="CONFU"`), so that `get_peft_model`, `PeftModel.from_pretrained`
and `target.load_adapter` know it. Injection adds ONE passive child, `target.confu`, and replaces no layer: the target
computes, bit for bit, what it computed before. Who reads the child is left to others: `target.py` runs its soft
prompts, `generation.py` embeds contemplate tokens with it, `assisted.py` asks (through [`on_injection`]) to be told of
every target that gets one. Files are `adapter_weights.py`'s.

    target
      model ...                             untouched, frozen
      confu                                 ConFuLayer
        confu_prompts.<adapter>.weight      (L, 2, S, kv_heads, head_dim) for "kv", (S, d) for "embedding"
        confu_experts.<adapter>.weight      (E, d)
        confu_router.<adapter>.weight       (E, 3 d)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedConfig

from . import compat
from .adapter_weights import CHILD_NAME, WEIGHT_NAMES, check_adapter_weights, short_name, state_dict_keys
from .compat import BaseTuner, BaseTunerLayer
from .configuration_confu import ConFuConfig
from .contemplate import mix_experts
from .errors import refusal


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
    soft_prompt_type: str = field(
        default="kv",
        metadata={"help": "'kv' learns keys and values per layer, 'embedding' runs S vectors through the target."},
    )
    num_experts: int = field(default=8, metadata={"help": "Embeddings that a contemplate token is mixed from."})
    num_experts_per_token: int = field(default=2, metadata={"help": "How many of them the router keeps."})
    initializer_range: float = field(default=0.02, metadata={"help": "Standard deviation of the initial weights."})
    target_hidden_size: int | None = field(default=None, metadata={"help": "d of the target."})
    target_num_hidden_layers: int | None = field(default=None, metadata={"help": "L of the target."})
    num_key_value_heads: int | None = field(default=None, metadata={"help": "Of the target's attention."})
    head_dim: int | None = field(default=None, metadata={"help": "Of the target's attention."})
    target_layer_ids: list[int] | None = field(
        default=None, metadata={"help": "The three layers whose entering hidden states are the features."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = ConFuPeftType.CONFU
        self.task_type = self.task_type or "CAUSAL_LM"
        if self.soft_prompt_type not in ("kv", "embedding"):
            self._refuse("soft_prompt_type", "'kv' or 'embedding'")
        for name in ("num_virtual_tokens", "num_experts", "num_experts_per_token"):
            if not _is_positive_int(getattr(self, name)):
                self._refuse(name, "an integer of at least 1")
        if self.num_experts_per_token > self.num_experts:
            self._refuse("num_experts_per_token", f"at most num_experts={self.num_experts}")
        for name in ("target_hidden_size", "target_num_hidden_layers", "num_key_value_heads", "head_dim"):
            if getattr(self, name) is not None and not _is_positive_int(getattr(self, name)):
                self._refuse(name, "an integer of at least 1, or None to take the target's")
        if self.target_layer_ids is not None:
            self.target_layer_ids = list(self.target_layer_ids)
            ids, layers = self.target_layer_ids, self.target_num_hidden_layers
            if len(ids) != 3 or sorted(set(ids)) != ids or ids[0] < 0 or (layers is not None and ids[-1] >= layers):
                self._refuse(
                    "target_layer_ids", f"three increasing layer indices below {layers or 'the number of layers'}"
                )

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
        return {
            "confu_prompts": per_layer if kv else (self.num_virtual_tokens, width),
            "confu_experts": (self.num_experts, width),
            "confu_router": (self.num_experts, 3 * width),
        }

    def fit(self, target_config: PreTrainedConfig) -> None:
        """Fill in the geometry that is missing; raise a `ValueError` where what is given is another target's."""
        geometry = target_geometry(target_config)
        for name, expected in geometry.items():
            if getattr(self, name) not in (None, expected):
                raise refusal(
                    "The ConFu adapter was made for another target",
                    got=f"{name}={getattr(self, name)}",
                    expected=f"{expected} (of this {target_config.model_type} model)",
                    fix="Load the adapter trained for this target, or train one: `ConFuAssistant.from_target(model)`.",
                )
        for name, expected in geometry.items():
            setattr(self, name, expected)
        if self.target_layer_ids is None:
            self.target_layer_ids = list(ConFuConfig.from_target_config(target_config).target_layer_ids)
        self.__post_init__()


def _is_positive_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def target_geometry(target_config: PreTrainedConfig) -> dict[str, int]:
    """What an adapter's shapes depend on, read from a target's config."""
    text = target_config.get_text_config(decoder=True)
    heads = getattr(text, "num_attention_heads", None)
    if heads is None or getattr(text, "num_hidden_layers", None) is None:
        raise refusal(
            "A ConFu adapter needs an attention-based target",
            got=f"a {text.model_type} config without num_attention_heads or num_hidden_layers",
            expected="a decoder-only Transformer",
            fix="Use another target.",
        )
    return {
        "target_hidden_size": text.hidden_size,
        "target_num_hidden_layers": text.num_hidden_layers,
        "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
    }


class ConFuWeight(nn.Module):
    """One weight of one adapter: PEFT wants `.weight` below the adapter's name, and offloading hooks want a call."""

    def __init__(self, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))

    def forward(self) -> torch.Tensor:
        return self.weight


class ConFuLayer(nn.Module, BaseTunerLayer):
    """The adapters of a target, by name. Passive: no module of the target calls it."""

    adapter_layer_names = WEIGHT_NAMES
    other_param_names = ("configs",)

    def __init__(self, device: torch.device, dtype: torch.dtype):
        super().__init__()
        self.confu_prompts = nn.ModuleDict()
        self.confu_experts = nn.ModuleDict()
        self.confu_router = nn.ModuleDict()
        self.configs: dict[str, ConFuAdapterConfig] = {}
        self.merged_adapters = []
        self._active_adapter = []
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
            else:
                nn.init.normal_(module.weight, std=config.initializer_range)
        self.configs[adapter_name] = config

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters. Names of other methods (a LoRA's) keep ours active: ConFu changes no output of theirs."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        own = [name for name in names if name in self.configs]
        kept = [name for name in self.active_adapters if name in self.configs]
        super().set_adapter(own or kept, inference_mode=inference_mode or not own)

    @contextmanager
    def activated(self, adapter_name: str) -> Iterator[None]:
        """Inside, `adapter_name` is the active adapter; gradients stay as they are."""
        previous, self._active_adapter = self._active_adapter, [adapter_name]
        try:
            yield
        finally:
            self._active_adapter = previous

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

    def prompt_weight(self) -> torch.Tensor:
        """Soft prompts in the adapter's dtype: `(L, 2, S, kv_heads, head_dim)` for "kv", `(S, d)` for "embedding"."""
        return self.confu_prompts[self._current()]()

    def contemplate_embedding(self, features: torch.Tensor) -> torch.Tensor:
        """Features `(..., 3 d)` -> input embedding of the contemplate token `(..., d)`, in the dtype of `features`."""
        return self(features)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        name = self._current()
        top_k = self.configs[name].num_experts_per_token
        mixed = mix_experts(features, self.confu_router[name](), self.confu_experts[name](), top_k)
        return mixed.to(features.dtype)

    def adapter_weights(self, adapter_name: str) -> dict[str, torch.Tensor]:
        """The three weights of an adapter, by short name, detached."""
        return {name: getattr(self, name)[adapter_name].weight.detach() for name in WEIGHT_NAMES}

    @torch.no_grad()
    def set_adapter_weights(self, adapter_name: str, weights: Mapping[str, torch.Tensor]) -> None:
        """Copy checked weights (see [`check_adapter_weights`]) into an adapter."""
        for name in WEIGHT_NAMES:
            getattr(self, name)[adapter_name].weight.copy_(weights[name])

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
        for name in WEIGHT_NAMES:
            weights = getattr(self, name)
            if adapter_name in weights and not weights[adapter_name].weight.is_meta:
                weights[adapter_name].to(device or self.placement.device, dtype=self.placement.dtype)


_injection_callbacks: list[Callable[[nn.Module], None]] = []


def on_injection(callback: Callable[[nn.Module], None]) -> None:
    """Have `callback(target)` called after every injection of a ConFu adapter, whichever way it came."""
    if callback not in _injection_callbacks:
        _injection_callbacks.append(callback)


class ConFuTuner(BaseTuner):
    """PEFT's view of the method: injects [`ConFuLayer`], holds no weights itself."""

    prefix = "confu_"
    tuner_layer_cls = ConFuLayer
    target_module_mapping: dict[str, list[str]] = {}

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Add `model.confu` and freeze the target, as every PEFT method does. On a misfit it stays as it was."""
        config = self.peft_config[adapter_name]
        try:
            config.fit(model.config)
        except ValueError:
            self.peft_config.pop(adapter_name)
            compat.forget_adapters(model)
            raise
        alone = not any(isinstance(module, BaseTunerLayer) for module in model.modules())
        self._create_and_replace(
            config, adapter_name, None, CHILD_NAME, model, CHILD_NAME, low_cpu_mem_usage=low_cpu_mem_usage
        )
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        if alone:  # next to another adapter, what that one trains keeps its gradients
            self._mark_only_adapters_as_trainable(model)
        for callback in _injection_callbacks:
            callback(model)

    def _create_and_replace(
        self,
        peft_config,
        adapter_name,
        target,
        target_name,
        parent,
        current_key,
        parameter_name=None,
        low_cpu_mem_usage=False,
    ) -> None:
        layer = getattr(parent, target_name, None)
        if layer is None:
            embedding = parent.get_input_embeddings().weight
            dtype = embedding.dtype if embedding.is_floating_point() else torch.get_default_dtype()
            layer = ConFuLayer(embedding.device, dtype)
            parent.add_module(target_name, layer)
        layer.update_layer(adapter_name, peft_config, low_cpu_mem_usage=low_cpu_mem_usage)
        # `target.save_pretrained` goes on writing the target's weights only.
        compat.ignore_on_save(parent, state_dict_keys(adapter_name))
        if "" not in getattr(parent, "hf_device_map", {"": None}):
            parent.hf_device_map[target_name] = layer.placement.device

    def unload(self) -> nn.Module:
        """The target without the adapter."""
        layer = getattr(self.model, CHILD_NAME, None)
        for name in list(layer.configs) if layer is not None else []:
            remove_adapter(self.model, name)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model

    def merge_and_unload(self, *args, **kwargs) -> nn.Module:
        raise NotImplementedError(
            "A ConFu adapter cannot be merged: only contemplate tokens read it, it changes no weight. Use `unload()`."
        )

    merge_adapter = merge_and_unload

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        short = {short_name(key): value for key, value in state_dict.items()}
        check_adapter_weights(config, short, source="the loaded adapter")
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def remove_adapter(target: nn.Module, adapter_name: str) -> None:
    """Take an adapter off a target, and `target.confu` with the last of them."""
    layer: ConFuLayer = getattr(target, CHILD_NAME)
    layer.set_adapter([name for name in layer.configs if name != adapter_name][:1])
    layer.delete_adapter(adapter_name)
    compat.no_longer_ignore_on_save(target, state_dict_keys(adapter_name))
    getattr(target, "peft_config", {}).pop(adapter_name, None)
    if not layer.configs:
        delattr(target, CHILD_NAME)
        getattr(target, "hf_device_map", {}).pop(CHILD_NAME, None)


def _register() -> None:
    known = compat.PEFT_TYPE_TO_CONFIG_MAPPING.get(ConFuPeftType.CONFU)
    if known is not None and known.__module__ != __name__:
        raise KeyError(f"PEFT already knows a method named CONFU, of {known.__module__}.")
    compat.PEFT_TYPE_TO_CONFIG_MAPPING[ConFuPeftType.CONFU] = ConFuAdapterConfig
    compat.PEFT_TYPE_TO_TUNER_MAPPING[ConFuPeftType.CONFU] = ConFuTuner
    compat.PEFT_TYPE_TO_PREFIX_MAPPING[ConFuPeftType.CONFU] = ConFuTuner.prefix


_register()
