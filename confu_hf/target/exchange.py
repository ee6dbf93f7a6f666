"""Caches that a user holds, copied into a `TreeCache` and brought up to date from one."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import Cache

from ..compat import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer
from ..errors import refusal
from .cache import TreeCache, TreeLayer

STATIC_LAYERS = (StaticLayer, StaticSlidingWindowLayer)
LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, *STATIC_LAYERS, TreeLayer)


def check_cache(cache: Cache, num_layers: int, slots: int | None = None) -> None:
    """Raise a `ValueError` unless keys and values can be taken out of a cache and put back.

    Args:
        slots: the most tokens that it may have to hold; None = unknown.
    """
    fix = "Pass DynamicCache(config=model.config), a StaticCache, or none."
    kind = type(cache).__name__
    layers = getattr(cache, "layers", None)
    if layers is None:
        raise _misfit(f"a {kind}", "a cache of a decoder", fix)
    foreign = sorted({type(layer).__name__ for layer in layers if type(layer) not in LAYERS})
    if foreign:
        raise _misfit(f"a {kind} of layers {foreign}", "plain dynamic or static layers", fix)
    if getattr(cache, "offloading", False):
        raise _misfit(f"a {kind} that offloads its layers", "one whose layers stay where the model is", fix)
    grows = cache.layer_class_to_replicate is not None
    if len(layers) > num_layers or (len(layers) < num_layers and not grows):
        expected = f"{num_layers}, the model's"
        raise _misfit(f"{len(layers)} layers", expected, "Pass a cache of this model, or DynamicCache().")
    sizes = [layer.max_cache_len for layer in layers if type(layer) is StaticLayer]
    if slots is not None and min(sizes, default=slots) < slots:
        fix = "Pass StaticCache(config=model.config, max_cache_len=...) of that size, or generate fewer tokens."
        raise _misfit(f"a {kind} for {min(sizes)} tokens", f"room for {slots}, prompt and answer", fix)


def length_of(cache: Cache | None) -> int:
    """Tokens that a cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def batch_of(cache: Cache | None) -> int:
    """Rows of a batch that a cache holds, or has room for; 0 if it was never filled."""
    return next((layer.keys.shape[0] for layer in _layers(cache) if layer.is_initialized), 0)


def is_static(cache: Cache | None) -> bool:
    """Whether a cache has its size from the start."""
    return any(isinstance(layer, STATIC_LAYERS) for layer in _layers(cache))


def windows_of(cache: Cache | None, num_layers: int) -> tuple[int | None, ...]:
    """The windows beyond which the layers of a cache drop rows; None = they keep all."""
    windows = [layer.sliding_window if type(layer) is DynamicSlidingWindowLayer else None for layer in _layers(cache)]
    return (*windows, *[None] * (num_layers - len(windows)))


def import_cache(
    cache: Cache,
    num_layers: int,
    soft_prompts: Tensor | Sequence[Sequence[Tensor]] | None = None,
    capacity: int = 256,
) -> TreeCache:
    """Copy a cache. Rows dropped by sliding layers become zeros, out of every later window."""
    check_cache(cache, num_layers)
    new = TreeCache(num_layers, soft_prompts, capacity)
    for source, layer in zip(cache.layers, new.layers, strict=False):
        if source.is_initialized:
            length = int(source.get_seq_length())
            held = slice(length if isinstance(source, STATIC_LAYERS) else None)
            layer.load(source.keys[:, :, held], source.values[:, :, held], length)
    return new


def export_cache(source: TreeCache, cache: Cache) -> None:
    """Overwrite a cache with the committed tokens, as a plain forward pass would fill it."""
    check_cache(cache, len(source.layers))
    while len(cache.layers) < len(source.layers):
        cache.layers.append(cache.layer_class_to_replicate())
    for layer, target in zip(source.layers, cache.layers, strict=True):
        if layer.is_initialized:
            _export_layer(layer, target)


def _layers(cache: Cache | None) -> Sequence[object]:
    return () if cache is None else cache.layers


def _misfit(got: str, expected: str, fix: str) -> ValueError:
    return refusal("The cache that was passed in", got=got, expected=expected, fix=fix)


def _export_layer(layer: TreeLayer, target: DynamicLayer | StaticLayer | TreeLayer) -> None:
    keys, values = layer.keys, layer.values
    if isinstance(target, TreeLayer):
        target.reset()
        target.load(keys, values, layer.length)
        return
    if isinstance(target, StaticLayer):
        _export_static(keys, values, target)
        return
    if isinstance(target, DynamicSlidingWindowLayer):
        target.cumulative_length = layer.length
        if not target.record_past:
            # As its own update() does: a window includes the query, so window - 1 rows are enough.
            keys, values = (states[:, :, -target.sliding_window + 1 :] for states in (keys, values))
    if not target.is_initialized:
        target.lazy_initialization(keys, values)
    target.keys, target.values = keys.clone(), values.clone()


def _export_static(keys: Tensor, values: Tensor, target: StaticLayer) -> None:
    """Written in place: compiled passes hold on to the addresses."""
    if not target.is_initialized:
        with torch.inference_mode(False):
            target.lazy_initialization(keys, values)
    length = keys.shape[2]
    kept = min(length, target.max_cache_len)  # a window's newest rows
    for buffer, states in ((target.keys, keys), (target.values, values)):
        buffer.zero_()
        buffer[:, :, :kept] = states[:, :, length - kept :]
    target.cumulative_length.fill_(kept)
    if isinstance(target, StaticSlidingWindowLayer):
        target.cumulative_length_int = length
