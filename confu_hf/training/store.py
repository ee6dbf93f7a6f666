"""What the frozen target says about each training sequence, on disk: from the second epoch on, no pass of the target.

Per position `4 d + 2` numbers of two bytes (with three features): the features, the last hidden state, from which the
draft-vocabulary logits follow, and the target's likeliest token; for ConFu's stage also its keys and values, which
contemplate tokens read. For SmolLM2-135M that is 4.6 kB a token, and 23 kB more with keys and values: worth it where the target is the
slow part and the disk is large.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from ..errors import refusal


def store_bytes(
    positions: int, width: int, num_features: int = 3, cache_shape: tuple[int, int, int] | None = None
) -> int:
    """How large a store of so many positions becomes; the arguments are those of [`FeatureStore`]."""
    layers, heads, head_dim = cache_shape or (0, 0, 0)
    return positions * (2 * (num_features + 1) * width + 4 + 4 * layers * heads * head_dim)


class FeatureStore:
    """Memory-mapped rows per sequence, filled as training goes.

    Args:
        folder: where the files are, or will be.
        lengths: tokens of every sequence, by index.
        width: `d` of the target.
        cache_shape: `(L, kv_heads, head_dim)` to keep keys and values as well.
        num_features: hidden states of the target that make one feature vector.
        fingerprint: what else the content depends on (target, dtype, draft vocabulary, layers); another one is
            refused.

    Raises:
        ValueError: the folder holds features of other data or of another target.
    """

    def __init__(
        self,
        folder: str | Path,
        lengths: list[int],
        width: int,
        fingerprint: str,
        cache_shape: tuple[int, int, int] | None = None,
        num_features: int = 3,
    ):
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        identity = {"lengths_sum": sum(lengths), "sequences": len(lengths), "width": width, "fingerprint": fingerprint}
        self._check_identity(folder / "identity.json", identity)
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        total = int(self.starts[-1])
        self.states = self._open(
            folder / "states.bin", np.int16, (total, (num_features + 1) * width)
        )  # bit patterns of bfloat16
        self.choices = self._open(folder / "choices.bin", np.int32, (total,))
        self.known = self._open(folder / "known.bin", np.uint8, (len(lengths),))
        self.cache_shape = cache_shape
        if cache_shape is not None:
            layers, heads, head_dim = cache_shape
            self.caches = self._open(folder / "caches.bin", np.int16, (total, layers, 2, heads, head_dim))
            self.cached = self._open(folder / "cached.bin", np.uint8, (len(lengths),))

    @staticmethod
    def _check_identity(path: Path, identity: dict[str, int | str]) -> None:
        if path.exists():
            found = json.loads(path.read_text())
            if found != identity:
                raise refusal(
                    f"The target features in {path.parent}",
                    got=found,
                    expected=identity,
                    fix="Give --feature_store another folder, or delete this one.",
                )
        path.write_text(json.dumps(identity))

    @staticmethod
    def _open(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
        with path.open("ab") as file:  # extended, never emptied: several processes may open it at once
            file.truncate(math.prod(shape) * np.dtype(dtype).itemsize)
        return np.memmap(path, dtype=dtype, mode="r+", shape=shape)

    def holds(self, index: Tensor, cache: bool = False) -> bool:
        """Whether all sequences `index` `(B,)` are known; with `cache`, their keys and values too."""
        rows = index.cpu().numpy()
        cached = not cache or (self.cache_shape is not None and bool(self.cached[rows].all()))
        return cached and bool(self.known[rows].all())

    def write(self, index: Tensor, attention_mask: Tensor, states: Tensor, choices: Tensor) -> None:
        """Keep `states` `(B, N, 4 d)`, rounded to bfloat16, and `choices` `(B, N)` long of right-padded sequences
        `index` `(B,)`."""
        for row, (sequence, length) in enumerate(zip(index.tolist(), attention_mask.sum(-1).tolist(), strict=True)):
            part = slice(self.starts[sequence], self.starts[sequence] + length)
            self.states[part] = states[row, :length].to("cpu", torch.bfloat16).view(torch.int16).numpy()
            self.choices[part] = choices[row, :length].cpu().numpy()
            self.known[sequence] = 1

    def read(self, index: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """`states` `(B, length, 4 d)` bfloat16 and `choices` `(B, length)` long, on the CPU, zeros behind the end of
        a sequence."""
        states = torch.zeros(len(index), length, self.states.shape[1], dtype=torch.bfloat16)
        choices = torch.zeros(len(index), length, dtype=torch.long)
        for row, sequence in enumerate(index.tolist()):
            part = slice(self.starts[sequence], self.starts[sequence + 1])
            count = part.stop - part.start
            states[row, :count] = torch.from_numpy(np.array(self.states[part])).view(torch.bfloat16)
            choices[row, :count] = torch.from_numpy(self.choices[part].astype(np.int64))
        return states, choices

    def write_cache(self, index: Tensor, attention_mask: Tensor, cache: Cache) -> None:
        """Keep the keys and values of right-padded sequences `index` `(B,)`, rounded to bfloat16."""
        layers = [torch.stack([layer.keys, layer.values], dim=1) for layer in cache.layers]  # (B, 2, heads, N, width)
        rows = torch.stack(layers, dim=1).permute(0, 4, 1, 2, 3, 5).to("cpu", torch.bfloat16)
        for row, (sequence, length) in enumerate(zip(index.tolist(), attention_mask.sum(-1).tolist(), strict=True)):
            part = slice(self.starts[sequence], self.starts[sequence] + length)
            self.caches[part] = rows[row, :length].contiguous().view(torch.int16).numpy()
            self.cached[sequence] = 1

    def read_cache(self, index: Tensor, length: int, device: torch.device | str = "cpu") -> DynamicCache:
        """Keys and values of sequences `index` `(B,)` in bfloat16, zeros behind the end of a sequence."""
        layers, heads, head_dim = self.cache_shape
        states = torch.zeros(layers, 2, len(index), heads, length, head_dim, dtype=torch.bfloat16)
        for row, sequence in enumerate(index.tolist()):
            part = slice(self.starts[sequence], self.starts[sequence + 1])
            found = torch.from_numpy(np.array(self.caches[part])).view(torch.bfloat16)  # (n, L, 2, heads, head_dim)
            states[:, :, row, :, : len(found)] = found.permute(1, 2, 3, 0, 4)
        cache = DynamicCache()
        for number, (keys, values) in enumerate(states.to(device)):
            cache.update(keys, values, number)
        return cache
