"""Names of Transformers, PEFT and torch that are private or differ between versions; no other file uses one.

What is there is found by looking (signatures, fields), not by comparing version strings. A shim says when it goes.
`RELIED_ON` lists the methods that the package overrides or calls by a private name; `tests/test_compat.py` looks for
each of them and says which one is gone.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from transformers import Cache, LlamaConfig, LlamaModel, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import (
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)
from transformers.generation import GenerateDecoderOnlyOutput, PrefixConstrainedLogitsProcessor
from transformers.utils import cached_file

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "BaseTuner",
    "BaseTunerLayer",
    "CacheLayerMixin",
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "StaticLayer",
    "StaticSlidingWindowLayer",
    "cached_file",
]

RELIED_ON = {
    "transformers.GenerationMixin": (
        "_assisted_decoding",
        "_extract_generation_mode_kwargs",
        "_supports_logits_to_keep",
        "_validate_generation_mode",
    ),
    "transformers.PreTrainedModel": ("_init_weights", "_keys_to_ignore_on_save", "_is_stateful"),
    "transformers.PreTrainedConfig": ("_attn_implementation",),
    "transformers.Trainer": ("_get_train_sampler", "_load_best_model", "_load_from_checkpoint", "_save"),
    "transformers.trainer_pt_utils.LengthGroupedSampler": ("__iter__",),
    "peft.tuners.tuners_utils.BaseTuner": (
        "_create_and_replace",
        "_mark_only_adapters_as_trainable",
        "_remap_adapter_state_dict_for_load",
    ),
    "peft.tuners.tuners_utils.BaseTunerLayer": ("_move_adapter_to_device_of_base_layer",),
}

# The names a cache goes by, newest first: `cache` came with Transformers 5.24. Drop the second one when 5.24 is the
# least version supported.
_CACHE_NAMES = ("cache", "past_key_values")
_OUTPUT_FIELDS = {field.name for field in fields(GenerateDecoderOnlyOutput)}
OUTPUT_CACHE = next(name for name in _CACHE_NAMES if name in _OUTPUT_FIELDS)


def cache_argument(module: nn.Module) -> str | None:
    """What the forward pass of a model calls its cache; None if it takes none."""
    return _cache_argument(type(module))


@functools.cache
def _cache_argument(module_class: type[nn.Module]) -> str | None:
    parameters = inspect.signature(module_class.forward).parameters
    return next((name for name in _CACHE_NAMES if name in parameters), None)


def cache_keyword(module: nn.Module, cache: Cache | None) -> dict[str, Cache | None]:
    """The keyword argument that hands `cache` to `module`."""
    return {cache_argument(module) or _CACHE_NAMES[-1]: cache}


def prompt_pass_inputs(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What the model makes of its inputs for the pass that reads the prompt, images included."""
    return model.prepare_inputs_for_generation(is_first_iteration=True, **inputs)


def decoder_only_output(*, cache: Cache, **values: Any) -> GenerateDecoderOnlyOutput:
    """The output of `generate`, the cache under the name that this version of Transformers uses."""
    return GenerateDecoderOnlyOutput(**values, **{OUTPUT_CACHE: cache})


def split_cache(model_kwargs: Mapping[str, Any]) -> tuple[Cache | None, dict[str, Any]]:
    """The cache out of the model inputs of `generate`, and the other inputs."""
    cache = next((model_kwargs[name] for name in _CACHE_NAMES if model_kwargs.get(name) is not None), None)
    return cache, {name: value for name, value in model_kwargs.items() if name not in _CACHE_NAMES}


def is_handed_in(cache: Cache | None) -> bool:
    """Whether a cache in the model inputs of `generate` is the user's; else `generate` made it."""
    return bool(getattr(cache, "_is_user_defined", False))


def mask_length(attention_mask: Tensor | None, generation_config: Any, default: int) -> int:
    """Tokens that the attention mask of a call is of. Since Transformers 5.23 `generate` drops one that hides nothing,
    and notes its length."""
    if attention_mask is not None:
        return attention_mask.shape[-1]
    noted = getattr(generation_config, "_mask_length", None)
    return default if noted is None else noted


@functools.cache
def _lists_entering_states() -> bool:
    """Whether `output_hidden_states=[i]` gives the state entering layer `i`, as `hidden_states[i]` is with True.

    Before Transformers 5.23 it gave the state leaving layer `i`, one on. Nothing but a forward pass tells. Drop this
    when 5.23 is the least version supported.
    """
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        model = LlamaModel(LlamaConfig(vocab_size=8, num_hidden_layers=2, **sizes))
        return len(model(torch.zeros(1, 1, dtype=torch.long), output_hidden_states=[2]).hidden_states) == 3


def layer_states_request(layer_ids: Sequence[int]) -> list[int] | bool:
    """What `output_hidden_states` must be so that [`layer_states`] finds the states entering layers `layer_ids`; the number
    of layers asks for what leaves the last one, behind the last norm."""
    if _lists_entering_states():
        return list(layer_ids)
    return [layer_id - 1 for layer_id in layer_ids] if min(layer_ids) > 0 else True


def layer_states(output: Any, layer_ids: Sequence[int], all_layers: bool = False) -> list[Tensor]:
    """The hidden states `(B, N, d)` entering layers `layer_ids`, of a pass with [`layer_states_request`], or with all
    hidden states."""
    shift = 0 if all_layers or _lists_entering_states() or min(layer_ids) == 0 else 1
    return [output.hidden_states[layer_id - shift] for layer_id in layer_ids]


# In front of the name of the implementation that one of ours stands in for.
OWN_ATTENTION = "confu_grouped_"


def attention_implementation(config: PreTrainedConfig) -> str:
    """`sdpa`, `eager`, ...: what the user chose, also while a call in another thread attends in its own way."""
    return config._attn_implementation.removeprefix(OWN_ATTENTION)


def pad_token(generation_config: Any) -> int | None:
    """What `generate` pads rows with that have ended; None if it knows of nothing."""
    token = getattr(generation_config, "_pad_token_tensor", None)
    return generation_config.pad_token_id if token is None else int(token)


def prefix_rule(processor: PrefixConstrainedLogitsProcessor) -> tuple[Callable[[int, Tensor], list[int]], int]:
    """Which tokens it allows after the ids of a prompt's number, and how many rows belong to a prompt."""
    return processor._prefix_allowed_tokens_fn, processor._num_beams


def set_attention_implementation(config: PreTrainedConfig, name: str) -> None:
    """Have the layers of a model with this config attend by a registered function, unchecked."""
    config._attn_implementation = name


def is_stateful(model: PreTrainedModel) -> bool:
    """Whether a model keeps a state that no cache holds (state-space models)."""
    return bool(getattr(model, "_is_stateful", False))


def name_or_path(config: PreTrainedConfig) -> str | None:
    """Where a model was loaded from."""
    return getattr(config, "_name_or_path", None) or None


def ignore_on_save(model: PreTrainedModel, keys: set[str]) -> None:
    """Have `save_pretrained` leave out these keys of the state dict."""
    model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) | keys


def no_longer_ignore_on_save(model: PreTrainedModel, keys: set[str]) -> None:
    """Undo [`ignore_on_save`]."""
    model._keys_to_ignore_on_save = set(model._keys_to_ignore_on_save or ()) - keys


def forget_adapters(model: PreTrainedModel) -> None:
    """Have a model look as if PEFT had never been there: `add_adapter` leaves a mark."""
    if getattr(model, "peft_config", None) == {}:
        del model.peft_config
    if not hasattr(model, "peft_config"):
        model._hf_peft_config_loaded = False


def captures_outputs(hook: Any) -> bool:
    """Whether a forward hook is one that Transformers leaves behind when hidden states were asked for. It changes nothing,
    and of an attention it keeps weights, which only the eager one has."""
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


def forget_output_capturing(model: nn.Module) -> None:
    """Take off the hooks that Transformers leaves behind when hidden states were asked for: closures, which cannot be
    pickled. It puts them on again when it needs them."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if captures_outputs(hook):
                for hooks in (
                    module._forward_hooks,
                    module._forward_hooks_with_kwargs,
                    module._forward_hooks_always_called,
                ):
                    hooks.pop(key, None)
        module.__dict__.pop("_output_capturing_hooks_installed", None)


def working_device(model: PreTrainedModel) -> torch.device:
    """Where a model takes its tokens: the device of its embeddings, or, where accelerate keeps these elsewhere between
    passes, the one that it brings them to."""
    embedding = model.get_input_embeddings()
    hook = getattr(embedding, "_hf_hook", None)
    devices = [getattr(part, "execution_device", None) for part in getattr(hook, "hooks", [hook])]
    known = [device for device in devices if device is not None]
    return torch.device(known[0]) if embedding.weight.is_meta and known else embedding.weight.device


def uncompiled(model: nn.Module) -> nn.Module:
    """The module inside what `torch.compile` returns."""
    return getattr(model, "_orig_mod", model)


def has_bfloat16_kernels() -> bool:
    """Whether oneDNN multiplies bfloat16 on this CPU, be it by way of float32."""
    # Asked in this order: a torch without oneDNN has no such operator.
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, as fast as those of float32 or faster."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return has_bfloat16_kernels() and any(getattr(torch.cpu, name, lambda: False)() for name in names)


class GenerateSteps:
    """The steps of `generate` that a routed target changes, under names of our own.

    Goes in front of the target's class. `generate` takes its steps in this order: its own arguments are told from the
    model's, the complete generation config is checked, the decoding method runs.
    """

    def is_routed(self, assistant: Any) -> bool:
        """Whether calls with this assistant take the other way; all others stay with Transformers."""
        raise NotImplementedError

    def take_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Remove from the arguments of `generate` what is neither Transformers' nor the model's, and return it."""
        raise NotImplementedError

    def check_call(self, assistant: Any, generation_config: Any, taken: dict[str, Any]) -> Any:
        """Refuse what cannot work. Returns what [`decode`] needs to know of the arguments taken."""
        raise NotImplementedError

    def decode(self, assistant: Any, checked: Any, inputs: dict[str, Any], **arguments: Any) -> Any:
        """Decode. `inputs` are the model's; the other arguments are those of `generate`'s decoding methods."""
        raise NotImplementedError

    def __getstate__(self):
        """Pickling and copying start from a model without the hooks that a call leaves behind."""
        forget_output_capturing(self)
        return super().__getstate__()

    def _extract_generation_mode_kwargs(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer):
        taken = {}
        if custom_generate is None and self.is_routed(assistant_model):
            taken = self.take_arguments(kwargs)
        mode_kwargs = super()._extract_generation_mode_kwargs(
            custom_generate, kwargs, synced_gpus, assistant_model, streamer
        )
        return {**mode_kwargs, "routed": taken} if taken else mode_kwargs

    def _validate_generation_mode(self, generation_mode, generation_config, generation_mode_kwargs):
        assistant = generation_mode_kwargs.get("assistant_model")
        if self.is_routed(assistant):
            taken = generation_mode_kwargs.get("routed", {})
            generation_mode_kwargs["routed"] = self.check_call(assistant, generation_config, taken)
            # Transformers' own assisted decoding has one row, and what follows refuses more in its name.
            generation_config, wanted = copy.copy(generation_config), generation_config
            generation_config.num_return_sequences = min(wanted.num_return_sequences or 1, 1)
        super()._validate_generation_mode(generation_mode, generation_config, generation_mode_kwargs)

    def _assisted_decoding(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        inputs_tensor=None,
        assistant_model=None,
        assistant_tokenizer=None,
        tokenizer=None,
        routed=None,
        **model_kwargs,
    ):
        # `generate` finds `inputs_tensor` by inspection, so the signature is spelled out as in Transformers.
        arguments = {
            "logits_processor": logits_processor,
            "stopping_criteria": stopping_criteria,
            "generation_config": generation_config,
            "synced_gpus": synced_gpus,
            "streamer": streamer,
        }
        if self.is_routed(assistant_model):
            return self.decode(assistant_model, routed, model_kwargs, input_ids=input_ids, **arguments)
        return super()._assisted_decoding(
            input_ids,
            **arguments,
            inputs_tensor=inputs_tensor,
            assistant_model=assistant_model,
            assistant_tokenizer=assistant_tokenizer,
            tokenizer=tokenizer,
            **model_kwargs,
        )


class OnlyRouted:
    """An assistant that works with a routed target alone: elsewhere its `generate`, which refuses, is called first."""

    def _supports_logits_to_keep(self) -> bool:
        # The first thing that Transformers' own assisted decoding asks of an assistant.
        return self.generate()
