"""`TreeCache`: keys and values of every layer of a target (or of a draft) in numbered slots.

Each row of a batch has its own length: its committed tokens lie in the slots `0 .. length - 1`, left padding included.
A verify pass writes its rows behind them and commits nothing; accepting a path moves the kept rows together and commits
them. Capacity is fixed until it grows, by doubling at first, then in steps, so shapes stay.

    slots of one batch row      S soft prompts | committed ... | rows of a pass ... | empty ... | spare

Soft prompts lie in front and have no number: ordinary forward passes never see them. What is written to the spare slot
nobody reads. Which row may attend to which is the caller's mask (tree/layout.py); caches of the user are exchange.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import Cache

from ..compat import CacheLayerMixin
from ..errors import refusal
from ..host import send
from .slots import Slots

# Buffers double up to this many slots, then grow by as many, or by a share of what they are if that is more: a long context
# shall not take twice its memory for the sake of a few tokens.
GROWTH_SLOTS, GROWTH_SHARE = 1024, 1 / 16


class TreeLayer(CacheLayerMixin):
    """Keys and values of one layer, `(B, kv_heads, S + capacity + 1, head_dim)` each; the last slot is the spare one.

    Where a target caches latents, `head_dim` of keys and of values differ. `soft_prompt` is a key and a value,
    `(S, kv_heads, head_dim)`, shared by the batch, or `(B, S, kv_heads, head_dim)`. `lengths` holds the number of committed slots of every batch row.
    """

    is_sliding = False
    is_croppable = True

    def __init__(self, soft_prompt: Sequence[Tensor] | None = None, capacity: int = 256) -> None:
        # Not super().__init__(): it sets `keys` and `values`, which are views of the buffers here.
        self.is_initialized = False
        self.initial_capacity = capacity
        self.soft_prompt = soft_prompt
        self.lengths: list[int] = []
        self._buffers: list[Tensor] = []  # key buffer, value buffer

    @property
    def soft_prompt_length(self) -> int:
        return 0 if self.soft_prompt is None else self.soft_prompt[0].shape[-3]

    @property
    def capacity(self) -> int:
        """Slots without soft prompts and spare."""
        return self._buffers[0].shape[2] - self.soft_prompt_length - 1 if self._buffers else self.initial_capacity

    @property
    def length(self) -> int:
        """Committed slots of the longest batch row."""
        return max(self.lengths, default=0)

    @property
    def keys(self) -> Tensor | None:
        """Committed keys without the soft prompts, `(B, kv_heads, length, head_dim)`, a view."""
        return self._view(0, self.length)[0] if self.is_initialized else None

    @property
    def values(self) -> Tensor | None:
        """Committed values without the soft prompts, `(B, kv_heads, length, head_dim)`, a view."""
        return self._view(0, self.length)[1] if self.is_initialized else None

    def _view(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        keys, values = self._buffers
        slots = slice(self.soft_prompt_length + start, self.soft_prompt_length + stop)
        return keys[:, :, slots], values[:, :, slots]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        size = self.soft_prompt_length + self.initial_capacity + 1
        # Zeros: a masked slot still takes part in products, where garbage could be NaN. Buffers made under
        # inference_mode could not be written outside of it.
        with torch.inference_mode(False):
            self._buffers = [
                states.new_zeros(*states.shape[:2], size, states.shape[-1]) for states in (key_states, value_states)
            ]
        self.lengths = self.lengths or [0] * key_states.shape[0]
        self.is_initialized = True
        self._write_soft_prompt()

    def reserve(self, slots: int) -> None:
        """Make room for `slots` slots."""
        if not self.is_initialized or slots <= self.capacity:
            self.initial_capacity = max(slots, self.initial_capacity)
            return
        used = self.soft_prompt_length + self.capacity
        step = min(self.capacity, max(GROWTH_SLOTS, int(GROWTH_SHARE * self.capacity)))
        more = max(slots - self.capacity, step)
        with torch.inference_mode(False):
            for i, old in enumerate(self._buffers):
                new = old.new_zeros(*old.shape[:2], old.shape[2] + more, old.shape[-1])
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
                raise refusal(
                    "Soft prompts",
                    got=f"shape (.., kv_heads, S, head_dim) = {tuple(prompt.shape)}",
                    expected=f"{tuple(front.shape)}, as the cache",
                    fix="Use an adapter made for this target (num_key_value_heads, head_dim).",
                )
            front.copy_(prompt)

    def set_soft_prompt(self, soft_prompt: Sequence[Tensor] | None) -> None:
        length = 0 if soft_prompt is None else soft_prompt[0].shape[-3]
        if self.is_initialized and length != self.soft_prompt_length:
            raise refusal(
                "TreeCache",
                got=f"{length} soft prompt slots",
                expected=f"{self.soft_prompt_length}, those that it was filled with",
                fix="Start a new TreeCache to change the length.",
            )
        self.soft_prompt = soft_prompt
        if self.is_initialized:
            self._write_soft_prompt()

    def write(self, key_states: Tensor, value_states: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
        """Write rows without committing them; returns what `slots` shows of keys and values, views."""
        if key_states.requires_grad and torch.is_grad_enabled():
            raise refusal(
                "TreeCache, which stores keys and values without gradient,",
                got="states that require one",
                expected="states without",
                fix="Run the forward pass under torch.no_grad(), or use ContemplateContext in training.",
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.reserve(slots.visible)
        front = self.soft_prompt_length
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            if slots.start is not None:
                buffer[:, :, front + slots.start : front + slots.start + states.shape[2]] = states
            else:
                rows = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
                index = slots.index.to(buffer.device)
                index = torch.where(index < 0, buffer.shape[2] - 1 - front, index)  # the spare slot
                buffer[rows, :, front + index] = states.transpose(1, 2)  # (B, W, kv_heads, head_dim)
        return self._view(-front if slots.soft_prompts else 0, slots.visible)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Commit new tokens, as many for every batch row; returns committed and new ones, without the soft prompts."""
        if len(set(self.lengths)) > 1:
            raise refusal(
                "An ordinary forward pass on a TreeCache",
                got=f"batch rows of lengths {self.lengths}",
                expected="one length",
                fix="Go on with the assistant, or run the rows one by one.",
            )
        start, stop = self.length, self.length + key_states.shape[2]
        self.write(key_states, value_states, Slots(torch.empty(0), start, stop))
        self.lengths = [stop] * key_states.shape[0]
        return self._view(0, stop)

    def move(self, source: Tensor, target: Tensor, seen: dict) -> None:
        """Copy slots `source` `(B, P)` to slots `target` `(B, P)`; -1 there is the spare slot. `seen`: from layer to layer."""
        kind = front, spare, device = self.soft_prompt_length, self._buffers[0].shape[2] - 1, self.device
        if kind not in seen:  # as a rule all layers are alike
            seen[kind] = source.to(device) + front, (torch.where(target < 0, spare - front, target) + front).to(device)
        source, target = seen[kind]
        for buffer in self._buffers:
            if buffer.shape[0] == 1:
                buffer.index_copy_(2, target[0], buffer.index_select(2, source[0]))
            else:
                rows = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
                buffer[rows, :, target] = buffer[rows, :, source]

    def load(self, keys: Tensor, values: Tensor, length: int) -> None:
        """Commit `(B, kv_heads, n, head_dim)` of the newest `n` of `length` tokens, zeros for the others."""
        pad = (0, 0, length - keys.shape[2], 0)
        self.update(torch.nn.functional.pad(keys, pad), torch.nn.functional.pad(values, pad))

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0 or -tokens_to_remove > min(self.lengths, default=0):
            raise refusal(
                "crop()",
                got=tokens_to_remove,
                expected=f"a number from {-min(self.lengths, default=0)} to 0: minus the count of newest tokens",
                fix="Pass minus the number of tokens to remove.",
            )
        self.lengths = [length + tokens_to_remove for length in self.lengths]

    def reset(self) -> None:
        self._buffers, self.is_initialized, self.lengths = [], False, []

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._buffers = [buffer.repeat_interleave(repeats, dim=0) for buffer in self._buffers]
        self.lengths = [length for length in self.lengths for _ in range(repeats)]
        if self.soft_prompt is not None and self.soft_prompt[0].ndim == 4:
            self.soft_prompt = [part.repeat_interleave(repeats, dim=0) for part in self.soft_prompt]

    def batch_select_indices(self, indices: Tensor) -> None:
        self._buffers = [buffer[indices.to(buffer.device)] for buffer in self._buffers]
        self.lengths = [self.lengths[index] for index in indices.tolist()] if self.lengths else []
        if self.soft_prompt is not None and self.soft_prompt[0].ndim == 4:
            self.soft_prompt = [part[indices.to(part.device)] for part in self.soft_prompt]

    def offload(self) -> None:
        raise NotImplementedError("TreeCache does not offload its layers; use it without offloading.")

    prefetch = offload


class TreeCache(Cache):
    """The layers of a target, addressed by slots. For inference: no gradients.

    Outside [`writing`] it is an ordinary cache: `update()` appends to rows of one length and returns the tokens so far.
    Inside, `update()` writes where it is told, returns what it is told, and commits nothing. Every layer keeps all
    tokens (`is_sliding` is False); sliding windows are a matter of the mask.

    Attributes:
        slot_position_ids: `(B, slots)` long, the place of each committed slot in its row, counted from the first token
            that is not padding; -1 = empty, or masked. None until [`set_mask`] says what the first ones are;
            [`keep_path`] goes on from there.
        has_gaps: whether one of the first slots is empty or masked.

    Args:
        num_layers: layers of the model.
        soft_prompts: `(L, 2, S, kv_heads, head_dim)`, or `(L, 2, B, S, kv_heads, head_dim)` for one per batch row, or
            a sequence of `L` such tensors without the first dimension, or pairs. Index 0 of the second dimension is the
            key.
        capacity: slots to begin with.
    """

    def __init__(
        self, num_layers: int, soft_prompts: Tensor | Sequence[Sequence[Tensor]] | None = None, capacity: int = 256
    ) -> None:
        if capacity < 1:
            raise refusal("TreeCache", got=f"capacity={capacity}", expected="1 or more", fix="Use 256 if unsure.")
        super().__init__(layers=[TreeLayer(capacity=capacity) for _ in range(num_layers)])
        self._slots: Slots | None = None
        self._written = 0  # rows of the pass that keep_path() would choose from
        self.slot_position_ids: Tensor | None = None
        self.has_gaps = True
        self._padding: Tensor | None = None
        self.set_soft_prompts(soft_prompts)

    @property
    def soft_prompt_length(self) -> int:
        return self.layers[0].soft_prompt_length if self.layers else 0

    @property
    def lengths(self) -> list[int]:
        """Committed slots of every batch row; empty before the first pass."""
        return next((layer.lengths for layer in self.layers if layer.is_initialized), [])

    def set_soft_prompts(self, soft_prompts: Tensor | Sequence[Sequence[Tensor]] | None) -> None:
        """Replace the soft prompts (shapes as in the constructor); a filled cache keeps its number of slots."""
        per_layer = [None] * len(self.layers) if soft_prompts is None else list(soft_prompts)
        fix = "Use an adapter made for this target (config.num_hidden_layers)."
        if len(per_layer) != len(self.layers):
            raise refusal("Soft prompts", got=f"{len(per_layer)} layers", expected=len(self.layers), fix=fix)
        for prompt in per_layer:
            if prompt is not None and (len(prompt) != 2 or any(part.ndim not in (3, 4) for part in prompt)):
                got = f"{len(prompt)} of shape {tuple(prompt[0].shape)}"
                expected = "(2, S, kv_heads, head_dim) or (2, B, S, kv_heads, head_dim)"
                raise refusal("A layer's soft prompt", got=got, expected=expected, fix=fix)
        for layer, prompt in zip(self.layers, per_layer, strict=True):
            layer.set_soft_prompt(None if prompt is None else [part.detach() for part in prompt])

    def reserve(self, slots: int) -> None:
        """Make room for `slots` slots in every layer, at once."""
        for layer in self.layers:
            layer.reserve(slots)

    def slots_behind(self, width: int, offset: int = 0, batch_size: int = 1, soft_prompts: bool = True) -> Slots:
        """The `width` slots behind the committed ones of each batch row, `offset` further on.

        `batch_size` matters before the first pass only.
        """
        lengths = self.lengths or [0] * batch_size
        steps = torch.arange(offset, offset + width)
        start = lengths[0] + offset if len(set(lengths)) == 1 else None
        return Slots(torch.tensor(lengths)[:, None] + steps, start, max(lengths) + offset + width, soft_prompts)

    @contextmanager
    def writing(self, slots: Slots) -> Iterator[TreeCache]:
        """Within it, `update()` writes rows to `slots` and shows what they show; nothing is committed."""
        self._slots, self._written = slots, slots.index.shape[1]
        try:
            yield self
        finally:
            self._slots = None

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs
    ) -> tuple[Tensor, Tensor]:
        layer = self.layers[layer_idx]
        if self._slots is not None:
            return layer.write(key_states, value_states, self._slots)
        return layer.update(key_states, value_states)

    def commit(self, counts: Sequence[int]) -> None:
        """Commit the first `counts[b]` of the rows that lie behind the committed ones of each batch row `b`."""
        for layer in self.layers:
            if layer.is_initialized:
                layer.lengths = [length + count for length, count in zip(layer.lengths, counts, strict=True)]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with some of the batch rows: one copy of their slots."""
        super().batch_select_indices(indices)
        if self.slot_position_ids is not None:
            self.slot_position_ids, self._padding = self.slot_position_ids[indices], self._padding[indices]

    def cut(self, lengths: Sequence[int]) -> None:
        """Take back what is committed behind the first `lengths[b]` slots of each batch row `b`."""
        self.commit([min(0, new - old) for old, new in zip(self.lengths, lengths, strict=True)])
        slots = torch.arange(max(self.lengths), device=self.slot_position_ids.device)
        inside = slots < torch.tensor(self.lengths, device=slots.device)[:, None]
        self.slot_position_ids = torch.where(inside, self.slot_position_ids[:, : len(slots)], -1)

    def __iter__(self) -> Iterator[tuple[Tensor | None, Tensor | None, None]]:
        """Keys, values and (none here) window of every layer, as of a DynamicCache."""
        return ((layer.keys, layer.values, None) for layer in self.layers)

    def set_mask(self, attention_mask: Tensor) -> None:
        """Say which committed slots are real tokens, `(B, length)`, 0 = padding or masked."""
        real = attention_mask.bool()
        self.has_gaps = not bool(real.all())
        slots = torch.arange(real.shape[1], device=real.device)
        self._padding = (real.long().cumsum(1) == 0).sum(1, keepdim=True)  # (B, 1), on the left
        self.slot_position_ids = torch.where(real, slots - self._padding, -1)

    def keep_path(self, path: Tensor, counts: Sequence[int], nodes: Sequence[Sequence[int]] | None = None) -> None:
        """Commit some rows of the pass that was just written behind the committed ones, and drop the others.

        Args:
            path: `(B, P)` long, rows of that pass, ascending, padded with -1 on the right. counts: how many each has.
            nodes: the same rows without the padding, where the host has them: then nothing is read back from a GPU.

        Example: committed `[a b]`, pass `[r x y z]`, path `[[0, 2]]` -> committed `[a b r y]`; only `y` was moved.
        """
        if path.ndim != 2 or not 0 < path.shape[1] <= self._written:
            raise refusal(
                "keep_path",
                got=f"a path of shape {tuple(path.shape)} after a verify pass of {self._written} rows",
                expected="(B, P) with 1 <= P <= rows",
                fix="Call keep_path() once after each forward pass inside writing().",
            )
        self._written = 0
        nodes = [[row for row in rows if row >= 0] for rows in path.tolist()] if nodes is None else nodes
        first = min((step for rows in nodes for step, row in enumerate(rows) if row != step), default=path.shape[1])
        if first < path.shape[1]:  # the rows before already are where they belong
            kept = path[:, first:]
            lengths, steps = send(self.lengths, path.device)[:, None], torch.arange(path.shape[1], device=path.device)
            target = torch.where(kept >= 0, lengths + steps[first:], -1)
            source, seen = lengths + kept.clamp(min=0), {}
            for layer in filter(lambda layer: layer.is_initialized, self.layers):
                layer.move(source, target, seen)
        if self.slot_position_ids is not None:
            self._extend_positions(counts)
        self.commit(counts)

    def next_positions(self) -> Tensor:
        """`(B, 1)` long, the place that the next committed slot of each batch row will have."""
        lengths = send(self.lengths, self.slot_position_ids.device)[:, None]
        return lengths - self._padding

    def _extend_positions(self, counts: Sequence[int]) -> None:
        known = self.slot_position_ids
        width = known.shape[1]
        if set(counts) == {1} and set(self.lengths) == {width}:  # a plain step
            self.slot_position_ids = torch.cat([known, self.next_positions()], dim=1)
            return
        start = send(self.lengths, known.device)[:, None]
        stop = start + send(list(counts), known.device)[:, None]
        size = max(length + count for length, count in zip(self.lengths, counts, strict=True))
        slots = torch.arange(size, device=known.device)
        new = torch.nn.functional.pad(known, (0, size - width), value=-1)
        self.slot_position_ids = torch.where((slots >= start) & (slots < stop), slots - self._padding, new)
