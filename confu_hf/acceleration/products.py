"""Products of a few rows with a large matrix, and what stands between them in a layer, in C++ made for this processor
(`products.cpp`, `attention.cpp`): what `compile()` builds.

Built once by the C++ compiler at hand, in about a second, and kept in the user's cache folder under a name that source,
flags and compiler decide. Which layers compute with it is the business of packing.py and fused.py.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import refusal

SOURCES = [Path(__file__).with_name(name) for name in ("products.cpp", "attention.cpp", "vectors.h")]
# By what torch finds the processor capable of. Contracted sums, but nothing that would change the treatment of NaN or of
# very small numbers.
FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
COMMON_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")


class _LowRank(ctypes.Structure):
    _fields_ = [
        ("down", ctypes.c_void_p),
        ("up", ctypes.c_void_p),
        ("down_stride", ctypes.c_int64),
        ("rank", ctypes.c_int64),
        ("scale", ctypes.c_float),
    ]


class _Gate(ctypes.Structure):
    _fields_ = [("length", ctypes.c_int64), ("first", ctypes.c_int64)]


class _Attention(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "out")]
    _fields_ += [(name, ctypes.c_int64) for name in ("batch", "rows", "heads", "key_heads", "d", "keys")]
    _fields_ += [(name, ctypes.c_int64) for name in ("key_batch", "key_head", "mask_batch", "mask_row")]
    _fields_ += [("scale", ctypes.c_float)]


class LowRankPart:
    """What a gated LoRA adds to the product of one weight: `scale up (down x)`.

    Args:
        down: `(r, k)` float32, values of a line side by side. up: `(n, r)` as [`Products.pack`] makes panels of it.
    """

    def __init__(self, down: Tensor, up: Tensor, scale: float):
        self._kept = (down, up)  # they must outlive the pointers
        self._struct = _LowRank(down.data_ptr(), up.data_ptr(), down.stride(0), len(down), scale)
        self.address = ctypes.addressof(self._struct)


class Gated(NamedTuple):
    """The parts of a call's products in their order, None where there is none; and the rows that get them: of every
    `length` rows those from `first` on."""

    parts: Sequence[LowRankPart | None]
    length: int
    first: int


def _low(count: int, gated: Gated | None) -> tuple[ctypes.Array, _Gate]:
    """As arguments of `count` products."""
    if gated is None:
        return _NOTHING[count], _EVERY_ROW
    addresses = (None if part is None else part.address for part in gated.parts)
    return (ctypes.c_void_p * count)(*addresses), _Gate(gated.length, gated.first)


_NOTHING, _EVERY_ROW = {count: (ctypes.c_void_p * count)() for count in (3, 4)}, _Gate(1, 0)


@dataclass(frozen=True)
class Products:
    """The loaded library. `path` is where it lies, `seconds` what building it took: 0 if it was there already.

    `gated`, where it is an argument: what a gated LoRA adds; None = nothing.
    """

    path: Path
    seconds: float = field(compare=False)

    @cached_property
    def _library(self) -> ctypes.CDLL:
        library = ctypes.CDLL(str(self.path))
        pointer, number, flag, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool, ctypes.c_float
        low = [pointer, _Gate]
        arguments = {
            "panel_columns": [],
            "checksum_block": [],
            "lanes": [],
            "product": [pointer] * 3 + [number] * 3 + [flag, number],
            "rms_norm": [pointer] * 3 + [number] * 2 + [real],
            "gated_mlp": [pointer] * 4 + [number] * 3 + [flag, *low, number],
            "layer_end": [pointer] * 7 + [number] * 4 + [real, flag, *low, number],
            "attention_inputs": [pointer] * 10 + [number] * 4 + [real, real, flag, *low, number],
            "attention": [pointer, number],
            "checksum": [pointer] * 2 + [number] * 2,
        }
        for name, types in arguments.items():
            function = getattr(library, name)
            function.argtypes, function.restype = types, None if types else number
        return library

    def pack(self, weight: Tensor) -> Tensor:
        """`(n, k)` of a linear layer, float32 or bfloat16 -> panels `(ceil(n / columns), k, columns)` of that dtype."""
        columns = self._library.panel_columns()
        filled = F.pad(weight, (0, 0, 0, -weight.shape[0] % columns))
        return filled.unflatten(0, (-1, columns)).transpose(1, 2).contiguous()

    def __call__(self, input: Tensor, panels: Tensor, features: int) -> Tensor:
        """`(..., k)` float32 times a packed weight -> `(..., features)`."""
        input = input.contiguous()
        width = input.shape[-1]
        output = input.new_empty(*input.shape[:-1], features)
        rows = input.numel() // width
        pointers = (input.data_ptr(), panels.data_ptr(), output.data_ptr())
        wide = panels.dtype == torch.float32
        self._library.product(*pointers, rows, width, features, wide, torch.get_num_threads())
        return output

    def rms_norm(self, input: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """`(..., k)` float32, divided by the root of its mean square and multiplied by `weight` `(k,)`."""
        output, width = torch.empty_like(input), input.shape[-1]
        pointers = (input.data_ptr(), weight.data_ptr(), output.data_ptr())
        self._library.rms_norm(*pointers, input.numel() // width, width, epsilon)
        return output

    def gated_mlp(self, input: Tensor, weights: GatedWeights, gated: Gated | None = None) -> Tensor:
        """`(silu(input gate) * (input up)) down`: `(..., k)` float32 -> the same shape."""
        width = input.shape[-1]
        rows = input.numel() // width
        output, hidden = torch.empty_like(input), input.new_empty(2, rows, weights.inner)
        pointers = (input.data_ptr(), weights.pointers, hidden.data_ptr(), output.data_ptr())
        how = (weights.wide, *_low(3, gated), torch.get_num_threads())
        self._library.gated_mlp(*pointers, rows, width, weights.inner, *how)
        return output

    def layer_end(
        self,
        attended: Tensor,
        residual: Tensor,
        output_panels: Tensor,
        norm: Norm,
        weights: GatedWeights,
        gated: Gated | None = None,
    ) -> Tensor:
        """What follows attention in a layer: `h = residual + attended output`, then `h + mlp(norm(h))`.

        Args:
            attended: `(..., a)` float32. residual: `(..., k)`, the layer's input. output_panels: packed `(k, a)`.
            norm: of the MLP's inputs. weights: of the MLP.
            gated: of `output` and of the MLP's three.
        """
        width = residual.shape[-1]
        rows = residual.numel() // width
        output, room = torch.empty_like(residual), residual.new_empty(2 * rows * (width + weights.inner))
        inputs = (attended.data_ptr(), residual.data_ptr(), output_panels.data_ptr(), norm.weight.data_ptr())
        pointers = (*inputs, weights.pointers, room.data_ptr(), output.data_ptr())
        sizes = (rows, attended.shape[-1], width, weights.inner)
        how = (norm.epsilon, weights.wide, *_low(4, gated), torch.get_num_threads())
        self._library.layer_end(*pointers, *sizes, *how)
        return output

    def attention_inputs(
        self,
        input: Tensor,
        projections: AttentionProjections,
        cos: Tensor,
        sin: Tensor,
        norm: Norm | None = None,
        gated: Gated | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of `(B, Q, k)` float32, each `(B, its heads, Q, d)`; heads of queries and keys normed, if
        they are, and rotated, the first half of a head with the second, by `cos` and `sin` `(1 or B, Q, d)`.

        Args:
            norm: of the inputs; None = they are normed already.
        """
        (batch, length, width), heads, d = input.shape, projections.heads, projections.head_dim
        rows = batch * length
        output = input.new_empty(rows * sum(heads) * d)
        normed = None if norm is None else torch.empty_like(input)
        inputs = (input.data_ptr(), *((None, None) if norm is None else (norm.weight.data_ptr(), normed.data_ptr())))
        pointers = (*inputs, *projections.pointers, cos.data_ptr(), sin.data_ptr(), output.data_ptr())
        sizes = (rows, width, d, cos.shape[0] * length)
        epsilons = (0.0 if norm is None else norm.epsilon, projections.epsilon)
        how = (*epsilons, projections.dtype == torch.float32, *_low(3, gated), torch.get_num_threads())
        self._library.attention_inputs(*pointers, *sizes, *how)
        parts = output.split([rows * count * d for count in heads])
        return tuple(
            part.view(batch, length, count, d).transpose(1, 2) for part, count in zip(parts, heads, strict=True)
        )

    def attends(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
        """Whether [`attention`] takes these: float32, heads side by side in rows, keys and values in slots that follow each
        other, a mask to add if there is more than one row."""
        d, rows, keys = query.shape[-1], query.shape[2], key.shape[2]
        fits = d % self._library.lanes() == 0 and query.transpose(1, 2).is_contiguous()
        fits = fits and len(key) == len(query) and key.shape[3] == d and query.shape[1] % key.shape[1] == 0
        fits = fits and query.dtype == key.dtype == value.dtype == torch.float32 and key.shape == value.shape
        fits = fits and key.stride() == value.stride() and key.stride()[2:] == (d, 1)
        if mask is None:
            return fits and rows == 1
        fits = fits and mask.dtype == torch.float32 and mask.ndim == 4 and mask.stride(3) == 1
        return fits and mask.shape[0] in (1, query.shape[0]) and mask.shape[1:] == (1, rows, keys)

    def attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """`softmax(scale query key + mask) value` of grouped queries.

        Args:
            query: `(B, heads, Q, d)`. key, value: `(B, key heads, K, d)`. mask: `(B or 1, 1, Q, K)`; None = nothing is
                hidden.

        Returns:
            `(B, Q, heads, d)`.
        """
        batch, heads, rows, d = query.shape
        output = query.new_empty(batch, rows, heads, d)
        tensors = (query, key, value, mask, output)
        sizes = (batch, rows, heads, key.shape[1], d, key.shape[2], key.stride(0), key.stride(1))
        strides = (0, 0) if mask is None else (mask.stride(0) if len(mask) > 1 else 0, mask.stride(2))
        asked = _Attention(*(None if part is None else part.data_ptr() for part in tensors), *sizes, *strides, scale)
        self._library.attention(ctypes.addressof(asked), torch.get_num_threads())
        return output

    def checksum(self, weight: Tensor) -> Tensor:
        """Of a contiguous weight whose bytes are whole words of four: one number for each part of it."""
        words = weight.numel() * weight.element_size() // 4
        sums = torch.empty(-(-words // self._library.checksum_block()), dtype=torch.int32)
        self._library.checksum(weight.data_ptr(), sums.data_ptr(), words, torch.get_num_threads())
        return sums


class Norm(NamedTuple):
    """A root mean square norm: `weight` `(k,)` float32."""

    weight: Tensor
    epsilon: float


class GatedWeights:
    """Packed weights of a gated MLP, of one dtype; `inner` values wide inside."""

    def __init__(self, gate: Tensor, up: Tensor, down: Tensor, inner: int):
        self._kept = (gate, up, down)  # they must outlive the pointers
        self._array = (ctypes.c_void_p * 3)(*(weight.data_ptr() for weight in self._kept))
        self.pointers, self.wide, self.inner = ctypes.addressof(self._array), gate.dtype == torch.float32, inner


class AttentionProjections:
    """Packed weights of queries, keys and values, of one dtype, with their biases, and how many heads of width `head_dim`
    each makes; `norms` `(head_dim,)` of the heads of queries and of keys, with their `epsilon`, if there are any."""

    def __init__(
        self,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        heads: Sequence[int],
        head_dim: int,
        norms: Sequence[Tensor | None] = (None, None),
        epsilon: float = 0.0,
    ):
        self.heads, self.head_dim, self.dtype, self.epsilon = tuple(heads), head_dim, weights[0].dtype, epsilon
        self._kept = (weights, biases, [*norms, None])  # they must outlive the pointers
        addresses = [[None if tensor is None else tensor.data_ptr() for tensor in part] for part in self._kept]
        self._arrays = (*((ctypes.c_void_p * 3)(*part) for part in addresses), (ctypes.c_int64 * 3)(*heads))
        self.pointers = tuple(ctypes.addressof(array) for array in self._arrays)


def build_products(capability: str | None = None, folder: Path | None = None) -> Products:
    """The library for this processor, built if it was not yet.

    Args:
        capability: a key of `FLAGS`; None = this processor's.
        folder: where it is kept; None = `confu_hf/compiled` in the user's cache folder.

    Raises:
        ValueError: if the processor is of another kind, or there is no compiler, or it fails.
    """
    capability = torch.backends.cpu.get_cpu_capability() if capability is None else capability
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    on_linux = sys.platform == "linux" and platform.machine() == "x86_64"
    if capability not in FLAGS or compiler is None or not on_linux:
        raise refusal(
            "compile()",
            got=f"{platform.system()} on {platform.machine()} ({capability}), C++ compiler: {compiler}",
            expected="Linux on a processor with AVX2 or AVX-512, and g++ or clang++",
            fix="Install a compiler (apt install g++), or go on without compile(): everything works, only slower.",
        )
    flags = (*COMMON_FLAGS, *FLAGS[capability])
    key = hashlib.sha256(repr(([source.read_text() for source in SOURCES], compiler, flags)).encode()).hexdigest()[:16]
    path = (folder or cache_folder()) / f"products-{capability.lower()}-{key}.so"
    start = time.perf_counter()
    if path.exists():
        return Products(path, 0.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place and then renamed: an interrupted build leaves nothing half-written behind.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        command = [compiler, *flags, *(str(source) for source in SOURCES if source.suffix == ".cpp"), "-o", str(built)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise refusal(
                "compile()",
                got=f"from {' '.join(command)}: {result.stderr.strip()[-400:]}",
                expected="a compiler that builds it",
                fix="Name another one in the environment variable CXX, or go on without compile().",
            )
        built.replace(path)
    return Products(path, time.perf_counter() - start)


def cache_folder() -> Path:
    """Where built libraries are kept; delete it to have them built again."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "confu_hf" / "compiled"
