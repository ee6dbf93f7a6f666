"""ConFu as a PEFT method: weights of the contemplate tokens, kept on the target as an adapter its forward never runs.

Importing this module registers the method (`peft_type="CONFU"`), so that `get_peft_model`, `PeftModel.from_pretrained`
and `target.load_adapter` know it. Injection adds ONE passive child, `target.confu`, and replaces no layer: the target
computes, bit for bit, what it computed before. Who reads the child is left to others: `target/soft_prompts.py` runs
its soft prompts, `decoding/` embeds contemplate tokens with it, `assistant/assistant.py` asks (through
[`on_injection`]) to be told of every target that gets one. Files are `files.py`'s, an assistant's own adapter is
`attachment.py`'s.

    target
      model ...                             untouched, frozen
      confu                                 ConFuLayer
        confu_prompts.<adapter>.weight      (L, 2, S, kv_heads, head_dim) for "kv", (S, d) for "embedding"
        confu_experts.<adapter>.weight      (E, d)
        confu_router.<adapter>.weight       (E, 3 d)
        confu_lora_{down,up}.<adapter>.weight   with `lora_rank` alone, see low_rank.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from .. import compat
from ..compat import BaseTuner, BaseTunerLayer
from ..errors import refusal
from .checksum import check_checksum
from .config import ConFuAdapterConfig, ConFuPeftType
from .files import CHILD_NAME, by_short_name, check_adapter_weights, state_dict_keys
from .layer import ConFuLayer

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
            config.fit(model)
        except ValueError:
            self.peft_config.pop(adapter_name)
            compat.forget_adapters(model)
            raise
        if not config.inference_mode:
            config.weights_sha256 = None  # it is of a file; what trains here becomes something else
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
            layer = ConFuLayer(compat.working_device(parent), dtype)
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
        raise refusal(
            "A ConFu adapter cannot be merged",
            got="a request to merge weights that only contemplate tokens read",
            expected="an adapter that changes weights of the target, such as a LoRA",
            fix="Call `unload()` to take it off.",
            error=NotImplementedError,
        )

    merge_adapter = merge_and_unload

    @classmethod
    def _remap_adapter_state_dict_for_load(cls, model, config, adapter_name, state_dict):
        source = "the loaded adapter"
        check_adapter_weights(config, by_short_name(state_dict), source=source)
        check_checksum(config.weights_sha256, state_dict, source=source)
        config.weights_sha256 = None  # of the file that was just read; the next one may be another
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def remove_adapter(target: nn.Module, adapter_name: str) -> None:
    """Take an adapter off a target, and `target.confu` with the last of them."""
    layer: ConFuLayer = getattr(target, CHILD_NAME)
    layer.set_adapter([name for name in layer.configs if name != adapter_name][:1])
    layer.delete_adapter(adapter_name)
    compat.no_longer_ignore_on_save(target, state_dict_keys(adapter_name))
    configs = getattr(target, "peft_config", {})
    if adapter_name in configs and configs[adapter_name].peft_type == ConFuPeftType.CONFU:
        del configs[adapter_name]  # PEFT may have given the name to another method's adapter since
    if not layer.configs:
        delattr(target, CHILD_NAME)
        getattr(target, "hf_device_map", {}).pop(CHILD_NAME, None)


def _register() -> None:
    known = compat.PEFT_TYPE_TO_CONFIG_MAPPING.get(ConFuPeftType.CONFU)
    if known is not None and known.__module__ != __name__:
        raise refusal(
            "Registering ConFu with PEFT",
            got=f"a method of that name, of {known.__module__}",
            expected="none",
            fix="Import only one package that brings ConFu.",
            error=KeyError,
        )
    compat.PEFT_TYPE_TO_CONFIG_MAPPING[ConFuPeftType.CONFU] = ConFuAdapterConfig
    compat.PEFT_TYPE_TO_TUNER_MAPPING[ConFuPeftType.CONFU] = ConFuTuner
    compat.PEFT_TYPE_TO_PREFIX_MAPPING[ConFuPeftType.CONFU] = ConFuTuner.prefix


_register()
