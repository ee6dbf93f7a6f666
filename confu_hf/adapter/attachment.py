"""Puts an assistant's adapter on a target, and takes it off again without a trace.

Knows PEFT and nothing of decoding or of files: the route of `generate` is `assistant/routing.py`'s, injection
`tuner.py`'s, a pair on disk `hub/pair.py`'s.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from peft import PeftModel, inject_adapter_in_model
from torch import nn
from transformers import PreTrainedModel

from .. import compat
from ..errors import refusal
from .config import ConFuAdapterConfig
from .files import CHILD_NAME, check_adapter_weights
from .layer import ConFuLayer
from .tuner import remove_adapter

ADAPTER_NAME = "contemplate"


@dataclass(frozen=True)
class LooseAdapter:
    """An adapter that is on no target. `weights` by short name; None for an adapter that is yet to be initialised."""

    config: ConFuAdapterConfig
    weights: dict[str, torch.Tensor] | None = None

    @classmethod
    def of_layer(cls, layer: ConFuLayer, adapter_name: str) -> LooseAdapter:
        """A view of an adapter on a target: its weights are the layer's own."""
        return cls(layer.configs[adapter_name], layer.adapter_weights(adapter_name))


@dataclass(frozen=True)
class Attachment:
    """What attaching did to a target.

    Attributes:
        target_reference: the target, not kept alive by its assistant.
        layer, adapter_name: where the adapter is; None for an EAGLE-3 draft.
        owned: whether attaching put it there, so that detaching takes it off.
        trainable: names of the target's parameters that required gradients before.
    """

    target_reference: Callable[[], PreTrainedModel | None]
    layer: ConFuLayer | None = None
    adapter_name: str | None = None
    owned: bool = False
    trainable: frozenset[str] = field(default_factory=frozenset)

    @property
    def target(self) -> PreTrainedModel | None:
        return self.target_reference()

    def loose_adapter(self) -> LooseAdapter | None:
        """The adapter as it is now, with the target or after it is gone; None if it was deleted, or never was."""
        if self.layer is None or self.adapter_name not in self.layer.configs:
            return None
        return LooseAdapter.of_layer(self.layer, self.adapter_name)

    def undo(self) -> None:
        """Take off what [`attach_adapter`] put on, and let train what trained before."""
        target = self.target
        if target is None:
            return
        compat.forget_output_capturing(target)
        if not self.owned:
            return
        if self.adapter_name in self.layer.configs:
            remove_adapter(target, self.adapter_name)
        compat.forget_adapters(target)
        for name, parameter in target.named_parameters():
            if name in self.trainable:
                parameter.requires_grad_(True)


def base_model(model: nn.Module) -> PreTrainedModel:
    """The Transformers model inside a `PeftModel` or a compiled model."""
    model = compat.uncompiled(model)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(model, PreTrainedModel):
        raise refusal(
            "The target of a ConFu assistant",
            got=f"a {type(model).__name__}",
            expected="a Transformers model or a PeftModel around one",
            fix="Load it with AutoModelForCausalLM.from_pretrained.",
        )
    return model


def attach_adapter(target: PreTrainedModel, adapter: LooseAdapter) -> Attachment:
    """Inject an adapter under a free name; on a misfit the target stays as it was."""
    if adapter.weights is not None:
        check_adapter_weights(adapter.config, adapter.weights, source="the assistant's adapter")
    taken = getattr(target, "peft_config", {})
    # Not PEFT's "default": a LoRA that is added later, with PEFT's defaults, would overwrite this one's configuration.
    names = [ADAPTER_NAME, *(f"{ADAPTER_NAME}_{number}" for number in range(1, len(taken) + 1))]
    name = next(name for name in names if name not in taken)
    trainable = frozenset(key for key, parameter in target.named_parameters() if parameter.requires_grad)
    with warnings.catch_warnings():
        # PEFT warns of a second adapter on the model; here that is what is wanted.
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        inject_adapter_in_model(copy.deepcopy(adapter.config), target, name)
    layer = getattr(target, CHILD_NAME)
    if adapter.weights is not None:
        layer.set_adapter_weights(name, adapter.weights)
    layer.owned.add(name)
    return Attachment(weakref.ref(target), layer, name, owned=True, trainable=trainable)
