"""Products of a few rows with a large matrix, and what stands between them in a layer, in C++ made for this processor
(`products.cpp`): what `compile()` builds.

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

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import refusal

SOURCE = Path(__file__).with_name("products.cpp")
# By what torch finds the processor capable of. Contracted sums, but nothing that would change the treatment of NaN or of
# very small numbers.
FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
COMMON_FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC")


@dataclass(frozen=True)
class Products:
    """The loaded library. `path` is where it lies, `seconds` what building it took: 0 if it was there already."""

    path: Path
    seconds: float = field(compare=False)

    @cached_property
    def _library(self) -> ctypes.CDLL:
        library = ctypes.CDLL(str(self.path))
        library.panel_columns.restype = ctypes.c_int64
        pointer, number, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_bool
        arguments = {
            "product": [pointer] * 3 + [number] * 3 + [flag, number],
            "rms_norm": [pointer] * 3 + [number] * 2 + [ctypes.c_float],
            "gated_mlp": [pointer] * 6 + [number] * 4 + [flag, number],
            "attention_inputs": [pointer] * 8 + [number] * 4 + [ctypes.c_float, flag, number],
        }
        for name, types in arguments.items():
            getattr(library, name).argtypes, getattr(library, name).restype = types, None
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

    def gated_mlp(self, input: Tensor, gate: Tensor, up: Tensor, down: Tensor, inner: int) -> Tensor:
        """`(silu(input gate) * (input up)) down`: `(..., k)` float32 -> the same shape; packed weights of one dtype."""
        width = input.shape[-1]
        rows = input.numel() // width
        output, hidden = torch.empty_like(input), input.new_empty(2, rows, inner)
        weights = (gate.data_ptr(), up.data_ptr(), down.data_ptr())
        pointers = (input.data_ptr(), *weights, hidden.data_ptr(), output.data_ptr())
        wide = gate.dtype == torch.float32
        self._library.gated_mlp(*pointers, rows, width, inner, width, wide, torch.get_num_threads())
        return output

    def attention_inputs(
        self, input: Tensor, projections: AttentionProjections, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of `(B, Q, k)` float32, each `(B, its heads, Q, d)`; heads of queries and keys normed, if
        they are, and rotated, the first half of a head with the second, by `cos` and `sin` `(1 or B, Q, d)`."""
        (batch, length, width), heads, d = input.shape, projections.heads, projections.head_dim
        rows = batch * length
        output = input.new_empty(rows * sum(heads) * d)
        pointers = (*projections.pointers, cos.data_ptr(), sin.data_ptr(), output.data_ptr())
        sizes = (rows, width, d, cos.shape[0] * length)
        how = (projections.epsilon, projections.dtype == torch.float32, torch.get_num_threads())
        self._library.attention_inputs(input.data_ptr(), *pointers, *sizes, *how)
        parts = output.split([rows * count * d for count in heads])
        return tuple(
            part.view(batch, length, count, d).transpose(1, 2) for part, count in zip(parts, heads, strict=True)
        )


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
    key = hashlib.sha256(repr((SOURCE.read_text(), compiler, flags)).encode()).hexdigest()[:16]
    path = (folder or cache_folder()) / f"products-{capability.lower()}-{key}.so"
    start = time.perf_counter()
    if path.exists():
        return Products(path, 0.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place and then renamed: an interrupted build leaves nothing half-written behind.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        built = Path(scratch) / path.name
        command = [compiler, *flags, str(SOURCE), "-o", str(built)]
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
