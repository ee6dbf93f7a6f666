"""The route of `generate(assistant_model=confu)` into ConFu's decoding loop.

A target with an adapter, or with an assistant attached, gets a subclass of its class (same name, module and qualified
name) that changes three steps of `generate`; one path then serves `model.generate`, `PeftModel.generate` and
`pipeline`. Other assistants pass through unchanged.
The loop is `decoding/loop.py`'s, the checks are `checks.py`'s, the steps' private names `compat.py`'s.
"""

from __future__ import annotations

import copyreg
import functools
import weakref
from collections.abc import Set
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel

from .. import compat
from ..decoding.drafting import Drafter
from ..decoding.drawing import DrawingDrafter
from ..decoding.loop import Decoder, confu_generate
from ..decoding.policy import Policy
from ..decoding.prompt import Prompt
from ..errors import refusal
from ..options import OPTION_ARGUMENTS, TreeOptions
from ..target.exchange import is_static, length_of, windows_of
from ..target.soft_prompts import check_no_checkpointing
from ..target.support import check_supported
from .checks import (
    check_adapter,
    check_inputs,
    check_pair,
    check_placement,
    check_strategy,
    confu_layer,
    is_confu,
    prompt_inputs_of,
    resolve_options,
)

# Which assistants a target serves: the last to leave takes the route away.
_assistants: weakref.WeakKeyDictionary[PreTrainedModel, weakref.WeakSet] = weakref.WeakKeyDictionary()


class ConFuGenerationMixin(compat.GenerateSteps):
    """What a target's class gets in front of it."""

    def is_routed(self, assistant: Any) -> bool:
        return is_confu(assistant)

    def take_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The tree options, by their names as fields of `TreeOptions`."""
        names = OPTION_ARGUMENTS
        return {field: arguments.pop(name) for field, name in names.items() if name in arguments}

    def check_call(self, assistant: Any, generation_config: GenerationConfig, taken: dict[str, Any]):
        """The generation config is complete, nothing is computed yet: everything but the prompt is checked here."""
        if not isinstance(assistant, compat.OnlyRouted):
            raise refusal(
                "assistant_model",
                got=f"a {type(assistant).__name__}",
                expected="a ConFuAssistant",
                fix="Load it with ConFuAssistant.from_pretrained.",
            )
        check_supported(self)
        check_no_checkpointing(self)
        check_pair(assistant.config, self)
        if isinstance(assistant, nn.Module):  # a LookupAssistant has no weights to place
            check_placement(assistant, self)
        check_strategy(generation_config, self)
        options = resolve_options(assistant, self, generation_config, taken)
        if options.draft_sampling and not isinstance(assistant, nn.Module):
            raise refusal(
                "draft_sampling",
                got=f"a {type(assistant).__name__}, which looks tokens up",
                expected="a draft network, which has a distribution to draw from",
                fix="Leave it out.",
            )
        if options.contemplate:
            check_adapter(assistant.config, self, assistant.adapter_name(self))
        return options

    def decode(
        self,
        assistant,
        checked: TreeOptions,
        inputs: dict[str, Any],
        *,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus,
        streamer,
    ):
        """`inputs` may hold a cache of the user; a dynamic one that `generate` made gives way to the loop's own."""
        cache, inputs = compat.split_cache(inputs)
        drafter, policy = _deciders(assistant, self, checked, generation_config)
        seen = prompt_inputs_of(self)
        prompt = _prompt(input_ids, cache, inputs, generation_config, seen)
        num_layers = self.config.get_text_config(decoder=True).num_hidden_layers
        more = {"synced_gpus": synced_gpus, "streamer": streamer, "prompt_inputs": seen}
        check_inputs(prompt, inputs, generation_config, num_layers, **more)
        decoder = Decoder(
            self,
            assistant.config.target_layer_ids,
            drafter,
            policy,
            assistant.contemplator(self) if checked.contemplate else None,
            logits_processor,
            stopping_criteria,
            generation_config,
            windows_of(cache, num_layers),
        )
        pack = {"pack_weights": checked.pack_weights, "products": assistant.products}
        output, assistant.stats = confu_generate(decoder, prompt, generation_config, streamer, **pack)
        return output

    def __reduce_ex__(self, protocol):
        """Pickle and copy by the target's own class: the routed one cannot be imported by its name."""
        constructor, arguments, *rest = super().__reduce_ex__(protocol)
        if constructor is copyreg.__newobj__:
            constructor, arguments = _new_routed, (type(self)._target_class, *arguments[1:])
        return (constructor, arguments, *rest)


def _prompt(
    input_ids: Tensor, cache: Any, inputs: dict[str, Any], generation_config: GenerationConfig, seen: Set[str]
) -> Prompt:
    """What a call starts from. `seen`: the inputs that go with the prompt alone."""
    keeps = compat.is_handed_in(cache) or (is_static(cache) and generation_config.return_dict_in_generate)
    prompt = Prompt(
        input_ids,
        **{name: inputs.get(name) for name in ("attention_mask", "position_ids", "inputs_embeds")},
        cache=cache if keeps else None,
        chunk_size=generation_config.prefill_chunk_size,
        prompt_inputs={name: inputs[name] for name in sorted(seen) if inputs.get(name) is not None},
    )
    past, width = length_of(prompt.cache), compat.mask_length(prompt.attention_mask, generation_config, 0)
    left_out = prompt.inputs_embeds is None and width == past + prompt.length
    return replace(prompt, left_out=past) if left_out else prompt


def _deciders(
    assistant: Any, target: PreTrainedModel, options: TreeOptions, generation_config: GenerationConfig
) -> tuple[Drafter, Policy]:
    """Who drafts in a call, and who decides what a round may spend."""
    if not (options.draft_sampling and generation_config.do_sample):
        return assistant.new_drafter(target, options), assistant.new_policy(options)
    options = replace(options, lookup=False, policy="fixed")
    drafter = DrawingDrafter(assistant.new_drafter(target, options), generation_config.temperature or 1.0)
    return drafter, assistant.new_policy(options)


@functools.cache
def _routed_class(target_class: type) -> type:
    namespace = {
        "__module__": target_class.__module__,
        "__qualname__": target_class.__qualname__,
        "__doc__": target_class.__doc__,
        "_target_class": target_class,
    }
    return type(target_class.__name__, (ConFuGenerationMixin, target_class), namespace)


def _new_routed(target_class: type, *arguments: Any) -> PreTrainedModel:
    routed = _routed_class(target_class)
    return routed.__new__(routed, *arguments)


def route(target: nn.Module) -> None:
    if isinstance(target, GenerationMixin) and not isinstance(target, ConFuGenerationMixin):
        target.__class__ = _routed_class(type(target))


def serve(target: PreTrainedModel, assistant: object) -> None:
    """Route a target for an assistant that was attached to it."""
    route(target)
    _assistants.setdefault(target, weakref.WeakSet()).add(assistant)


def release(target: PreTrainedModel, assistant: object) -> None:
    """Undo [`serve`]. The route stays for other assistants, and for adapters that PEFT loaded."""
    _assistants[target].discard(assistant)
    if not _assistants[target] and confu_layer(target) is None and isinstance(target, ConFuGenerationMixin):
        target.__class__ = type(target)._target_class
