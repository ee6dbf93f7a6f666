"""What `generate` is asked, checked before it starts: a refusal says what was got, what was expected, what to do.

Public names of Transformers only; where in `generate` these are called is `routing.py`'s, whether files are sound was
`hub/pair.py`'s. Nothing here changes a model, so the target is usable after every refusal.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationConfig, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

from ..adapter.files import CHILD_NAME
from ..adapter.layer import ConFuLayer
from ..configuration_confu import ConFuConfig
from ..errors import refusal
from ..options import TreeOptions, check_options
from ..target.exchange import batch_of

# Inputs of a target that the loop hands on, or derives. Any other would be lost, and the text would change.
LOOP_INPUTS = {"attention_mask", "position_ids", "use_cache", "logits_to_keep", "cache_position"}
# What a target that sees reads with the prompt alone: plain decoding gives the passes behind it none of these, or makes
# nothing of them there.
IMAGE_INPUTS = {
    "pixel_values",
    "pixel_values_videos",
    "pixel_attention_mask",
    "image_sizes",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "mm_token_type_ids",
    "token_type_ids",
    "mm_encoder_outputs",
}


def is_confu(assistant: Any) -> bool:
    """Whether an `assistant_model` is ours; any other goes the way of Transformers."""
    return getattr(getattr(assistant, "config", None), "model_type", None) == ConFuConfig.model_type


def confu_layer(target: nn.Module) -> ConFuLayer | None:
    """The adapters on a target, if it has any."""
    layer = getattr(target, CHILD_NAME, None)
    return layer if isinstance(layer, ConFuLayer) and layer.configs else None


def check_pair(config: ConFuConfig, target: PreTrainedModel) -> None:
    """Raise a `ValueError` unless the draft was made for targets of this geometry."""
    text = target.config.get_text_config(decoder=True)
    expected = {
        "target_hidden_size": text.hidden_size,
        "target_num_hidden_layers": text.num_hidden_layers,
        "vocab_size": text.vocab_size,
        "target_model_type": text.model_type,
    }
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise refusal(
                "The ConFu draft was made for another target",
                got=f"{name}={getattr(config, name)!r}",
                expected=f"{value!r} (of this {type(target).__name__})",
                fix="Load the pair trained for this target, or train one: `ConFuAssistant.from_target(model)`.",
            )


def check_adapter(config: ConFuConfig, target: PreTrainedModel, adapter_name: str | None = None) -> None:
    """Raise a `ValueError` unless the target carries an active, complete adapter that fits the draft."""
    layer = confu_layer(target)
    name = adapter_name or (layer.current if layer is not None else None)
    if name is None:
        state = "one without a ConFu adapter" if layer is None else "one whose ConFu adapters are not active"
        raise refusal(
            "No ConFu adapter is attached to the target",
            got=state,
            expected="the adapter that this draft was trained with",
            fix=(
                "Call ConFuAssistant.from_pretrained(path, target=model) or confu.attach(model); "
                "or pass contemplate=False to draft without it."
            ),
        )
    adapter = layer.configs[name]
    if list(adapter.target_layer_ids) != list(config.target_layer_ids):
        raise refusal(
            "The ConFu adapter belongs to another draft",
            got=f"target_layer_ids={adapter.target_layer_ids}",
            expected=f"{config.target_layer_ids}, those of the draft",
            fix="Load draft and adapter from the same repository.",
        )
    if adapter_name is None and name in layer.owned:
        raise refusal(
            "An assistant that is not attached to the target",
            got=f"an active adapter ({name!r}) that another assistant brought",
            expected="its own, or one that PEFT loaded",
            fix="Call confu.attach(model) with the assistant that you pass, or set_adapter(name) if PEFT loaded its own.",
        )
    layer.check_weights(name)


def check_placement(draft: PreTrainedModel, target: PreTrainedModel) -> None:
    """Raise a `ValueError` unless draft and target share dtype and device, those of the target's embeddings."""
    embedding = target.get_input_embeddings().weight
    if embedding.is_floating_point() and draft.dtype != embedding.dtype:
        raise refusal(
            "Draft and target differ in dtype",
            got=f"a draft in {draft.dtype}",
            expected=f"{embedding.dtype}, as the target's embeddings",
            fix=f"Call confu.to({embedding.dtype}), or load it with `target=model`.",
        )
    if not embedding.is_meta and draft.device != embedding.device:
        raise refusal(
            "Draft and target are on different devices",
            got=f"a draft on {draft.device}",
            expected=f"{embedding.device}, as the target's embeddings",
            fix=f'Call confu.to("{embedding.device}"), or load it with `target=model`.',
        )


def check_strategy(config: GenerationConfig) -> None:
    """Raise a `ValueError` for decoding strategies, caches and outputs that a tree of drafts cannot serve."""
    call_the_model = "Call the model on the generated sequence."
    refused = [
        ("num_beams", config.num_beams not in (None, 1), 1, "Set num_beams=1, or leave out the assistant."),
        ("use_cache", config.use_cache is False, True, "Set use_cache=True, or leave out the assistant."),
        (
            "cache_implementation",
            config.cache_implementation not in (None, "dynamic"),
            "None or 'dynamic' (a static, quantized or offloaded cache cannot hold a tree)",
            "Leave out cache_implementation.",
        ),
        ("output_attentions", bool(config.output_attentions), False, call_the_model),
        ("output_hidden_states", bool(config.output_hidden_states), False, call_the_model),
        ("prompt_lookup_num_tokens", config.prompt_lookup_num_tokens is not None, None, "Use one way of drafting."),
        ("dola_layers", getattr(config, "dola_layers", None) is not None, None, "Leave out the assistant for DoLa."),
        ("penalty_alpha", bool(config.penalty_alpha), None, "Leave out the assistant for contrastive search."),
    ]
    for name, is_refused, expected, fix in refused:
        if is_refused:
            raise _refused_call(f"{name}={getattr(config, name)!r}", expected, fix)


def prompt_inputs_of(target: PreTrainedModel) -> set[str]:
    """What the target may be given with the prompt: images, if it sees."""
    return IMAGE_INPUTS if getattr(target.config, "vision_config", None) is not None else set()


def check_inputs(
    input_ids: Tensor,
    cache: Cache | None,
    model_kwargs: Mapping[str, Any],
    synced_gpus: bool,
    streamer: BaseStreamer | None = None,
    prompt_inputs: Set[str] = frozenset(),
) -> None:
    """Raise a `ValueError` for inputs that the decoding loop cannot start from, or would silently leave out.

    `prompt_inputs` are those of [`prompt_inputs_of`] the target.
    """
    batch_size, length = input_ids.shape
    mask = model_kwargs.get("attention_mask")
    position_ids = model_kwargs.get("position_ids")
    if model_kwargs.get("inputs_embeds") is not None:
        raise _refused_call("inputs_embeds", "input_ids", "Pass token ids.")
    if length == 0:
        fix = "Pass at least one token, such as the target's bos_token_id."
        raise _refused_call("an empty prompt (input_ids without a token)", "a token to go on from", fix)
    if isinstance(cache, StaticCache):
        fix = "Pass DynamicCache(config=model.config), or leave out the cache."
        raise _refused_call("a cache of type StaticCache", "a DynamicCache, or none", fix)
    if streamer is not None and batch_size > 1:
        fix = "Leave out the streamer, or call generate once per prompt."
        raise _refused_call(f"a streamer with a batch of {batch_size}", "one prompt, whose tokens come in order", fix)
    if synced_gpus:
        fix = "Leave out the assistant under ZeRO-3 and FSDP."
        raise _refused_call("synced_gpus=True", "a target that each process holds whole", fix)
    past_length = 0 if cache is None else cache.get_seq_length()
    held = batch_of(cache)
    if past_length and held != batch_size:
        fix = "Repeat the cache with cache.batch_repeat_interleave(n), or leave it out."
        raise _refused_call(f"a cache of {held} rows with a batch of {batch_size}", "as many", fix)
    only_new = past_length > 0 and position_ids is not None and position_ids.shape[-1] == past_length + length
    if past_length >= length or only_new:
        raise _refused_call(
            f"{length} input_ids on top of a cache of {past_length} tokens",
            "the whole prompt in input_ids, those in the cache included",
            "Pass the ids of the conversation so far, as for a call without a cache.",
        )
    for given in (mask, position_ids):
        if given is not None and given.shape[-2:] != input_ids.shape:
            # `generate` counts positions by the mask, and then drops a mask that hides nothing.
            got = f"an attention_mask (or position_ids) of shape {tuple(given.shape)}"
            fix = "Pass the one that belongs to these input_ids, or leave it out."
            raise _refused_call(got, f"{tuple(input_ids.shape)}, as input_ids", fix)
    real = torch.ones_like(input_ids).bool() if mask is None else mask.bool()
    known = LOOP_INPUTS | prompt_inputs
    unknown = [name for name, value in model_kwargs.items() if value is not None and name not in known]
    if position_ids is not None and position_ids.ndim == 3 and prompt_inputs:
        _check_channels(position_ids)
    elif position_ids is not None and not torch.equal(position_ids[real], (real.cumsum(-1) - 1)[real]):
        unknown.append("position_ids other than those of the attention mask")
    if unknown:
        fix = "Leave them out, or leave out the assistant."
        raise _refused_call(f"model inputs {unknown}", f"none but {sorted(known)}", fix)


def _check_channels(position_ids: Tensor) -> None:
    """Of a target that places images in several dimensions: `(channels, B, N)`; the last three are time, height, width."""
    last = position_ids[-3:, :, -1]
    if not bool((last == last[-1]).all()):
        fix = "End the prompt with text, such as the chat template's generation prompt."
        raise _refused_call("a prompt that ends with an image", "one whose last token is text", fix)


def _refused_call(got: str, expected: object, fix: str) -> ValueError:
    return refusal("generate with a ConFu assistant", got=got, expected=expected, fix=fix)


def resolve_options(
    assistant: PreTrainedModel,
    target: PreTrainedModel,
    generation_config: GenerationConfig,
    arguments: Mapping[str, Any],
) -> TreeOptions:
    """Tree options of a call: arguments of `generate`, else its generation config's, the assistant's, the defaults.

    Args:
        arguments: the options given to `generate`, by their names as fields of `TreeOptions`.
    """
    values = {}
    for field in fields(TreeOptions):
        own = None if field.name == "top_k" else getattr(generation_config, field.name, None)
        given = arguments.get(field.name, own)
        kept = getattr(assistant.generation_config, field.name, None) if given is None else given
        default = assistant.config.contemplate if field.name == "contemplate" else field.default
        values[field.name] = default if kept is None else kept
    if arguments.get("contemplate_tokens", 0) is None:
        values["contemplate_tokens"] = None  # None has a meaning: one for every node
    values["contemplate"] = _contemplates(assistant, target, values["contemplate"], arguments)
    options = TreeOptions(**values)
    check_options(options, assistant.config)
    return options


def _contemplates(assistant: PreTrainedModel, target: PreTrainedModel, wanted: bool, arguments: Mapping) -> bool:
    """Whether this call contemplates. Disabled adapters turn it off, unless it is asked for by name."""
    if wanted and not assistant.config.contemplate:
        raise refusal(
            "This draft cannot contemplate",
            got="contemplate=True for an EAGLE-3 draft (config.contemplate is False)",
            expected="contemplate=False",
            fix="Load a ConFu pair, or leave out `contemplate`.",
        )
    layer = confu_layer(target)
    if wanted and layer is not None and layer.disable_adapters and not arguments.get("contemplate"):
        return False
    return wanted
