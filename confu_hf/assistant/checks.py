"""What `generate` is asked, checked before it starts: a refusal says what was got, what was expected, what to do.

Public names of Transformers only; where in `generate` these are called is `routing.py`'s, whether files are sound was
`hub/pair.py`'s. Nothing here changes a model, so the target is usable after every refusal.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import fields
from typing import Any

from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .. import compat
from ..adapter.files import CHILD_NAME
from ..adapter.layer import ConFuLayer
from ..configuration_confu import ConFuConfig
from ..decoding.prompt import Prompt
from ..errors import refusal
from ..options import TreeOptions, check_options
from ..target.exchange import batch_of, check_cache, is_static, length_of

# Inputs of a target that the loop hands on, or derives. Any other would be lost, and the text would change.
LOOP_INPUTS = {
    "attention_mask",
    "cache_position",
    "inputs_embeds",
    "logits_to_keep",
    "output_attentions",
    "output_hidden_states",
    "position_ids",
    "use_cache",
}
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


def check_strategy(config: GenerationConfig, target: PreTrainedModel) -> None:
    """Raise a `ValueError` for decoding strategies, caches and outputs that a tree of drafts cannot serve."""
    kind = str(config.cache_implementation)
    weights = bool(config.return_dict_in_generate and config.output_attentions)
    attention = compat.attention_implementation(target.config.get_text_config(decoder=True))
    static = "Leave out cache_implementation: with a dynamic cache they are those of plain generate."
    refused = [
        ("num_beams", config.num_beams not in (None, 1), 1, "Set num_beams=1, or leave out the assistant."),
        ("use_cache", config.use_cache is False, True, "Set use_cache=True, or leave out the assistant."),
        (
            "cache_implementation",
            kind == "quantized" or "offloaded" in kind,
            "None, 'dynamic' or 'static', since every round reads and moves keys and values where they are",
            "Leave out cache_implementation.",
        ),
        (
            "output_attentions",
            weights and attention != "eager",
            f"attn_implementation='eager', since {attention!r} computes no attention weights that could be returned",
            'Call model.set_attn_implementation("eager"), or leave out output_attentions.',
        ),
        ("cache_implementation", weights and kind not in ("None", "dynamic"), "None with output_attentions", static),
        (
            "prefill_chunk_size",
            config.prefill_chunk_size is not None and config.prefill_chunk_size < 1,
            "1 or more, or None",
            "Leave it out to read the prompt in one pass.",
        ),
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
    prompt: Prompt,
    model_kwargs: Mapping[str, Any],
    config: GenerationConfig,
    num_layers: int,
    *,
    synced_gpus: bool = False,
    streamer: BaseStreamer | None = None,
    prompt_inputs: Set[str] = frozenset(),
) -> None:
    """Raise a `ValueError` for inputs that the decoding loop cannot start from, or would silently leave out.

    `prompt_inputs` are those of [`prompt_inputs_of`] the target.
    """
    batch_size, length = prompt.input_ids.shape[0], prompt.length
    if length == 0:
        fix = "Pass at least one token, such as the target's bos_token_id."
        raise _refused_call("an empty prompt (input_ids without a token)", "a token to go on from", fix)
    if streamer is not None and batch_size > 1:
        fix = "Leave out the streamer, or call generate once per prompt."
        raise _refused_call(f"a streamer with a batch of {batch_size}", "one prompt, whose tokens come in order", fix)
    if synced_gpus:
        fix = "Leave out the assistant under ZeRO-3 and FSDP."
        raise _refused_call("synced_gpus=True", "a target that each process holds whole", fix)
    if prompt.chunk_size is not None and prompt.prompt_inputs:
        fix = "Leave out prefill_chunk_size: images are read with the whole prompt."
        raise _refused_call(f"prefill_chunk_size={prompt.chunk_size} with images", None, fix)
    if prompt.cache is not None:
        _check_cache(prompt, config, num_layers)
    _check_shapes(prompt, config, channels=bool(prompt_inputs))
    known = LOOP_INPUTS | prompt_inputs
    unknown = [name for name, value in model_kwargs.items() if value is not None and name not in known]
    if unknown:
        fix = "Leave them out, or leave out the assistant."
        raise _refused_call(f"model inputs {unknown}", f"none but {sorted(known)}", fix)


def _check_channels(position_ids: Tensor) -> None:
    """Of a target that places images in several dimensions: `(channels, B, N)`; the last three are time, height, width."""
    last = position_ids[-3:, :, -1]
    if not bool((last == last[-1]).all()):
        fix = "End the prompt with text, such as the chat template's generation prompt."
        raise _refused_call("a prompt that ends with an image", "one whose last token is text", fix)


def _check_cache(prompt: Prompt, config: GenerationConfig, num_layers: int) -> None:
    """Whether a prompt goes with the cache that it is to be read behind."""
    cache, batch_size, length = prompt.cache, prompt.input_ids.shape[0], prompt.length
    # The last token is written, but not read.
    check_cache(cache, num_layers, None if config.max_length is None else config.max_length - 1 + prompt.without_ids)
    past_length, held = length_of(cache), batch_of(cache)
    if is_static(cache) and config.return_dict_in_generate and config.output_attentions:
        fix = "Pass DynamicCache(config=model.config), or leave out the cache."
        raise _refused_call("output_attentions=True with a static cache", "a dynamic one", fix)
    if held not in (0, batch_size) and (past_length or is_static(cache)):
        fix = "Repeat the cache with cache.batch_repeat_interleave(n), or leave it out."
        raise _refused_call(f"a cache of {held} rows with a batch of {batch_size}", "as many", fix)
    if past_length >= length:
        raise _refused_call(
            f"{length} {prompt.name} on top of a cache of {past_length} tokens",
            f"the whole prompt in {prompt.name}, those in the cache included",
            "Pass the conversation so far, as for a call without a cache; or new ids with an attention_mask of all tokens.",
        )


def _check_shapes(prompt: Prompt, config: GenerationConfig, channels: bool) -> None:
    """Whether mask and positions belong to the prompt. `channels`: these may be of several dimensions."""
    batch_size, length, mask = len(prompt.input_ids), prompt.length, prompt.attention_mask
    shape = (batch_size, compat.mask_length(mask, config, length)) if mask is None else tuple(mask.shape)
    if shape != (batch_size, length):
        fix = "Pass the one that belongs to them, or leave it out."
        raise _refused_call(f"an attention_mask of shape {shape}", f"{(batch_size, length)}, as {prompt.name}", fix)
    positions = prompt.position_ids
    if positions is None:
        return
    lengths = {length, length - length_of(prompt.cache)}
    fits = positions.ndim == 2 or (channels and positions.ndim == 3)
    if not fits or positions.shape[-2] not in (1, batch_size) or positions.shape[-1] not in lengths:
        got = f"position_ids of shape {tuple(positions.shape)}"
        fix = "Pass those that belong to the prompt, or leave them out."
        raise _refused_call(got, f"{(batch_size, length)}, as {prompt.name}", fix)
    if positions.ndim == 3:
        _check_channels(positions)


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
