"""Key/value caches: TreeCache for decoding, ContemplateContext for training.

They store keys and values and move rows. Which row may attend to which is decided by the caller's mask (tree.py,
target.py).
Slot order: [S soft prompts | C committed tokens | rows of the running verify pass].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Cache

from ..compat import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer in a buffer that grows by blocks, `(B, kv_heads, capacity, head_dim)`.

    `soft_prompt` is `(2, S, kv_heads, head_dim)`, shared by the batch, or `(2, B, S, kv_heads, head_dim)`; index 0 is
    the key.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, soft_prompt: Tensor | None = None, block_size: int = 256) -> None:
        # Not super().__init__(): it sets `keys` and `values`, which are views of the buffers here.
        self.is_initialized = False
        self.block_size = block_size
        self.soft_prompt = soft_prompt
        self.committed = 0
        self.pending = 0
        self._buffers: list[Tensor] = []  # key buffer, value buffer

    @property
    def soft_prompt_length(self) -> int:
        return 0 if self.soft_prompt is None else self.soft_prompt.shape[-3]

    @property
    def keys(self) -> Tensor | None:
        """Committed keys without the soft prompts, `(B, kv_heads, C, head_dim)`, a view."""
        return self._view(self.soft_prompt_length, self._end)[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """Committed values without the soft prompts, `(B, kv_heads, C, head_dim)`, a view."""
        return self._view(self.soft_prompt_length, self._end)[1] if self.is_initialized else None

    @property
    def _end(self) -> int:
        return self.soft_prompt_length + self.committed

    def _view(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        keys, values = (buffer[:, :, start:stop] for buffer in self._buffers)
        return keys, values

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Buffers made under inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            self._buffers = [
                states.new_zeros(*states.shape[:2], 0, states.shape[-1]) for states in (key_states, value_states)
            ]
        self.is_initialized = True
        self._reserve(self.soft_prompt_length)
        self._write_soft_prompt()

    def _reserve(self, length: int) -> None:
        """Make room for `length` slots, by whole blocks: the cache is copied once in `block_size` tokens."""
        if self._buffers[0].shape[2] >= length:
            return
        capacity = -(-length // self.block_size) * self.block_size
        used = min(self._end + self.pending, self._buffers[0].shape[2])
        with torch.inference_mode(False):
            for i, old in enumerate(self._buffers):
                new = old.new_empty(*old.shape[:2], capacity, old.shape[-1])
                new[:, :, :used] = old[:, :, :used]
                self._buffers[i] = new

    def _write_soft_prompt(self) -> None:
        if self.soft_prompt is None:
            return
        for buffer, prompt in zip(self._buffers, self.soft_prompt, strict=True):
            prompt = prompt.to(buffer).transpose(-3, -2)  # ([B,] kv_heads, S, head_dim)
            front = buffer[:, :, : self.soft_prompt_length]
            batch_fits = prompt.ndim == 3 or prompt.shape[0] == front.shape[0]
            if prompt.shape[-3:] != front.shape[1:] or not batch_fits:
                raise ValueError(
                    f"Soft prompts of shape (.., kv_heads, S, head_dim) = {tuple(prompt.shape)} do not fit the cache "
                    f"{tuple(front.shape)}. Use an adapter made for this target (num_key_value_heads, head_dim)."
                )
            front.copy_(prompt)

    def set_soft_prompt(self, soft_prompt: Tensor | None) -> None:
        length = 0 if soft_prompt is None else soft_prompt.shape[-3]
        if self.is_initialized and length != self.soft_prompt_length:
            raise ValueError(
                f"Got {length} soft prompt slots, but the cache was filled with {self.soft_prompt_length}. "
                "Start a new TreeCache to change the length."
            )
        self.soft_prompt = soft_prompt
        if self.is_initialized:
            self._write_soft_prompt()

    def _append(self, key_states: Tensor, value_states: Tensor) -> int:
        """Write new rows behind the committed ones without committing them; returns the slot behind the last one."""
        if key_states.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "TreeCache stores keys and values without gradient, but got states that require one. "
                "Run the forward pass under torch.no_grad(), or use ContemplateContext in training."
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.pending = 0  # rows of an earlier verify pass are overwritten, so growing need not copy them
        start, stop = self._end, self._end + key_states.shape[2]
        self._reserve(stop)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        return stop

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Commit new tokens; returns committed and new keys and values, without the soft prompts."""
        stop = self._append(key_states, value_states)
        self.committed += key_states.shape[2]
        return self._view(self.soft_prompt_length, stop)

    def update_pending(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Write rows of a verify pass; returns `[S | C | new]` and commits nothing."""
        stop = self._append(key_states, value_states)
        self.pending = key_states.shape[2]
        return self._view(0, stop)

    def keep_rows(self, path: Tensor, start: int) -> None:
        """Move pending rows `path[:, start:]` to slots `C + start ..`, commit `P` tokens. `path` is `(B, P)`; the rows
        before `start` already are where they belong."""
        first, length = self._end, path.shape[1]
        if start < length:
            moved = path[:, start:].to(self.device)  # (B, P - start)
            for buffer in self._buffers:
                rows = buffer[:, :, first : first + self.pending]  # (B, kv_heads, pending, head_dim)
                if moved.shape[0] == 1:
                    kept = rows.index_select(2, moved[0])
                else:
                    kept = rows.gather(2, moved[:, None, :, None].expand(-1, rows.shape[1], -1, rows.shape[3]))
                buffer[:, :, first + start : first + length] = kept
        self.committed += length
        self.pending = 0

    def load(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Commit `(B, kv_heads, n, head_dim)` of the newest `n` of `length` tokens, zeros for the others."""
        self.lazy_initialization(keys, values)
        pad = (0, 0, length - keys.shape[2], 0)
        self.update(torch.nn.functional.pad(keys, pad), torch.nn.functional.pad(values, pad))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.committed + query_length, 0

    def get_seq_length(self) -> int:
        return self.committed

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0 or -tokens_to_remove > self.committed:
            raise ValueError(
                f"crop() got {tokens_to_remove}, expected a number from {-self.committed} to 0: "
                "minus the count of newest tokens to remove."
            )
        self.committed += tokens_to_remove
        self.pending = 0

    def reset(self) -> None:
        self._buffers, self.is_initialized = [], False
        self.committed = self.pending = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._buffers = [buffer.repeat_interleave(repeats, dim=0) for buffer in self._buffers]
        if self.soft_prompt is not None and self.soft_prompt.ndim == 5:
            self.soft_prompt = self.soft_prompt.repeat_interleave(repeats, dim=1)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._buffers = [buffer[indices.to(buffer.device)] for buffer in self._buffers]
        if self.soft_prompt is not None and self.soft_prompt.ndim == 5:
            self.soft_prompt = self.soft_prompt[:, indices.to(self.soft_prompt.device)]

    def offload(self) -> None:
        raise NotImplementedError("TreeCache does not offload its layers; use it without offloading.")

    prefetch = offload


class TreeCache(Cache):
    """Cache of the committed tokens of every layer, with soft prompts in front that ordinary forward passes never see.

    Outside `verifying()` it is an ordinary cache: `update()` appends and returns the tokens so far. Inside, `update()`
    returns `[S | C | new]` and commits nothing until `keep_path()` says which of the new rows stay. Every layer keeps
    all tokens (`is_sliding` is False); sliding windows are a matter of the mask. For inference: no gradients.

    Args:
        num_layers: layers of the model.
        soft_prompts: `(L, 2, S, kv_heads, head_dim)`, or `(L, 2, B, S, kv_heads, head_dim)` for one per batch row, or
            a sequence of `L` such tensors without the first dimension. Index 0 of the second dimension is the key.
        block_size: slots added whenever the buffers are full.
    """

    def __init__(
        self, num_layers: int, soft_prompts: Tensor | Sequence[Tensor] | None = None, block_size: int = 256
    ) -> None:
        if block_size < 1:
            raise ValueError(f"block_size must be positive, got {block_size}. Use 256 if unsure.")
        super().__init__(layers=[TreeLayer(block_size=block_size) for _ in range(num_layers)])
        self._verifying = False
        self.set_soft_prompts(soft_prompts)

    @property
    def soft_prompt_length(self) -> int:
        return self.layers[0].soft_prompt_length if self.layers else 0

    def set_soft_prompts(self, soft_prompts: Tensor | Sequence[Tensor] | None) -> None:
        """Replace the soft prompts (shapes as in the constructor); a filled cache keeps its number of slots."""
        per_layer = [None] * len(self.layers) if soft_prompts is None else list(soft_prompts)
        if len(per_layer) != len(self.layers):
            raise ValueError(
                f"Got soft prompts for {len(per_layer)} layers, expected {len(self.layers)}. "
                "Use an adapter made for this target (config.num_hidden_layers)."
            )
        for prompt in per_layer:
            if prompt is not None and (prompt.ndim not in (4, 5) or prompt.shape[0] != 2):
                raise ValueError(
                    f"Got a layer's soft prompt of shape {tuple(prompt.shape)}, "
                    "expected (2, S, kv_heads, head_dim) or (2, B, S, kv_heads, head_dim)."
                )
        for layer, prompt in zip(self.layers, per_layer, strict=True):
            layer.set_soft_prompt(None if prompt is None else prompt.detach())

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        if self._verifying:
            return layer.update_pending(key_states, value_states)
        return layer.update(key_states, value_states)

    @contextmanager
    def verifying(self) -> Iterator[TreeCache]:
        """Within it, new rows are stored but not committed, and soft prompts are among the keys."""
        self._verifying = True
        try:
            yield self
        finally:
            self._verifying = False

    def keep_path(self, path: Tensor) -> None:
        """Commit some rows of the last verify pass and drop the others.

        Args:
            path: `(B, P)` long, rows of that pass, ascending, column 0 the root. Every batch row keeps `P`.

        Example: committed `[a b]`, pass `[r x y z]`, path `[[0, 2]]` -> committed `[a b r y]`; only `y` was moved.
        """
        pending = min((layer.pending for layer in self.layers if layer.is_initialized), default=0)
        if path.ndim != 2 or not 0 < path.shape[1] <= pending:
            raise ValueError(
                f"Got a path of shape {tuple(path.shape)} after a verify pass of {pending} rows, expected (B, P) with "
                "1 <= P <= rows. Call keep_path() once after each forward pass inside verifying()."
            )
        in_place = (path == torch.arange(path.shape[1], device=path.device)).all(dim=0)
        start = int(in_place.long().cumprod(0).sum())
        for layer in self.layers:
            if layer.is_initialized:
                layer.keep_rows(path, start)

    @classmethod
    def from_cache(
        cls,
        cache: Cache,
        num_layers: int,
        soft_prompts: Tensor | Sequence[Tensor] | None = None,
        block_size: int = 256,
    ) -> TreeCache:
        """Copy a DynamicCache or TreeCache. Rows dropped by sliding layers become zeros, out of every later window."""
        new = cls(num_layers, soft_prompts, block_size)
        if len(cache.layers) > num_layers:
            raise ValueError(f"Got a cache of {len(cache.layers)} layers, expected at most {num_layers}, the model's.")
        for source, layer in zip(cache.layers, new.layers, strict=False):
            if type(source) not in (DynamicLayer, DynamicSlidingWindowLayer, TreeLayer):
                raise ValueError(_unsupported_layer(source))
            if source.is_initialized:
                layer.load(source.keys, source.values, source.get_seq_length())
        return new

    def export_to(self, cache: Cache) -> None:
        """Overwrite a DynamicCache or TreeCache with the committed tokens, as a plain forward pass would fill it."""
        while len(cache.layers) < len(self.layers) and cache.layer_class_to_replicate is not None:
            cache.layers.append(cache.layer_class_to_replicate())
        if len(cache.layers) != len(self.layers):
            raise ValueError(
                f"Got a cache of {len(cache.layers)} layers, expected {len(self.layers)}. Use DynamicCache()."
            )
        for layer, target in zip(self.layers, cache.layers, strict=True):
            if type(target) not in (DynamicLayer, DynamicSlidingWindowLayer, TreeLayer):
                raise ValueError(_unsupported_layer(target))
            if layer.is_initialized:
                _export_layer(layer, target)


def _unsupported_layer(layer: object) -> str:
    return (
        f"Got a cache with a {type(layer).__name__}, expected the plain layers of a DynamicCache. "
        "Pass a DynamicCache()."
    )


def _export_layer(layer: TreeLayer, target: DynamicLayer | TreeLayer) -> None:
    keys, values = layer.keys, layer.values
    if isinstance(target, TreeLayer):
        target.reset()
        target.load(keys, values, layer.committed)
        return
    if isinstance(target, DynamicSlidingWindowLayer):
        target.cumulative_length = layer.committed
        if not target.record_past:
            # As its own update() does: a window includes the query, so window - 1 rows are enough.
            keys, values = (states[:, :, -target.sliding_window + 1 :] for states in (keys, values))
    if not target.is_initialized:
        target.lazy_initialization(keys, values)
    target.keys, target.values = keys.clone(), values.clone()
