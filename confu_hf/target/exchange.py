"""Caches that a user holds, copied into a `TreeCache` and brought up to date from one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from transformers import Cache

from ..compat import DynamicLayer, DynamicSlidingWindowLayer
from ..errors import refusal
from .cache import TreeCache, TreeLayer


def import_cache(
    cache: Cache,
    num_layers: int,
    soft_prompts: Tensor | Sequence[Sequence[Tensor]] | None = None,
    capacity: int = 256,
) -> TreeCache:
    """Copy a DynamicCache or TreeCache. Rows dropped by sliding layers become zeros, out of every later window."""
    new = TreeCache(num_layers, soft_prompts, capacity)
    if len(cache.layers) > num_layers:
        raise _misfit(
            f"{len(cache.layers)} layers", f"at most {num_layers}, the model's", "Pass a cache of this model."
        )
    for source, layer in zip(cache.layers, new.layers, strict=False):
        _check_layer(source)
        if source.is_initialized:
            layer.load(source.keys, source.values, source.get_seq_length())
    return new


def export_cache(source: TreeCache, cache: Cache) -> None:
    """Overwrite a DynamicCache or TreeCache with the committed tokens, as a plain forward pass would fill it."""
    while len(cache.layers) < len(source.layers) and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    if len(cache.layers) != len(source.layers):
        raise _misfit(f"{len(cache.layers)} layers", f"{len(source.layers)}, the model's", "Use DynamicCache().")
    for layer, target in zip(source.layers, cache.layers, strict=True):
        _check_layer(target)
        if layer.is_initialized:
            _export_layer(layer, target)


def batch_of(cache: Cache | None) -> int:
    """Rows of a batch that a cache holds; 0 if it holds nothing."""
    layers = () if cache is None else cache.layers
    return next((layer.keys.shape[0] for layer in layers if layer.is_initialized), 0)


def _check_layer(layer: object) -> None:
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, TreeLayer):
        raise _misfit(f"a {type(layer).__name__}", "the plain layers of a DynamicCache", "Pass a DynamicCache().")


def _misfit(got: str, expected: str, fix: str) -> ValueError:
    return refusal("The cache that was passed in", got=got, expected=expected, fix=fix)


def _export_layer(layer: TreeLayer, target: DynamicLayer | TreeLayer) -> None:
    keys, values = layer.keys, layer.values
    if isinstance(target, TreeLayer):
        target.reset()
        target.load(keys, values, layer.length)
        return
    if isinstance(target, DynamicSlidingWindowLayer):
        target.cumulative_length = layer.length
        if not target.record_past:
            # As its own update() does: a window includes the query, so window - 1 rows are enough.
            keys, values = (states[:, :, -target.sliding_window + 1 :] for states in (keys, values))
    if not target.is_initialized:
        target.lazy_initialization(keys, values)
    target.keys, target.values = keys.clone(), values.clone()
