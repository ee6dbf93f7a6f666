"""Linear layers whose weights are laid out once, for the few rows of a verify pass on the CPU: for oneDNN, or for the
products that `compile()` builds (products.py).

`F.linear` lays a weight out anew in every call, which for a few rows costs as much as the product itself. The packed
copies take as much memory as the weights. Off the CPU, or without oneDNN, nothing is packed and nothing changes.
When to pack is the caller's business: once before decoding, again when `is_stale()`.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..compat import has_bfloat16_kernels
from .fused import FusedParts
from .products import Products
from .shared import SWITCHING, holding, is_held

# Below this size the call costs more than packing saves.
MIN_ELEMENTS = 2**16
# With more rows (prefill) the product itself dominates, and its plain form is bit-identical to plain decoding.
MAX_ROWS = 64
# For so few rows the cheapest way is measured: over so many layers of a shape, so many times. oneDNN's kernels for one
# or two rows can cost more than the one for four.
MEASURED_ROWS, FILLED_ROWS = (1, 2), 4
MEASURED_LAYERS, MEASURED_TIMES = 8, 3
# Another way than the plain one must take less than this share of its time: plain products are those of plain decoding
# to the bit.
WORTH_LEAVING_PLAIN = 0.95


@dataclass(frozen=True)
class _Packed:
    """A module, the packed copy of its weight, what the weight was like when it was packed, and, if compiled products
    multiply with that copy, these; else oneDNN does."""

    module: nn.Linear
    weight: Tensor
    state: tuple[int, int | None, int | None]
    checksum: Tensor
    products: Products | None = None


class PackedLinears:
    """Packed copies of the linear layers in `modules`, used while `active()`.

    Taken are plain `nn.Linear`s with float32 or bfloat16 weights on the CPU. Subclasses (quantized layers), modules
    with a `forward` of their own (accelerate hooks) and small weights are left alone. A weight that two modules
    share is packed once. Results are those of `F.linear` up to rounding. `len()` is the number of layers packed,
    `too_small` the number of those left out for their size alone. One or two rows go the way that a short measurement
    finds cheapest on this processor, the plain one where others gain little: `few_rows`.

    Args:
        modules: searched for linear layers, themselves included.
        max_rows: calls with more rows than this use `F.linear`.
        min_elements: weights with fewer elements are not packed.
        dtype: round weights to this one, and multiply in it; inputs and outputs are converted. None = that of each weight.
        products: multiply with these where weights are float32, in float32 whatever `dtype` the weights are rounded to;
            None = with oneDNN.

    Example:
        packed = PackedLinears(target)
        with packed.active():
            target(...)
    """

    def __init__(
        self,
        *modules: nn.Module,
        max_rows: int = MAX_ROWS,
        min_elements: int = MIN_ELEMENTS,
        dtype: torch.dtype | None = None,
        products: Products | None = None,
    ) -> None:
        self.max_rows, self.products, self.too_small = max_rows, products, 0
        self._packed: list[_Packed] = []
        self._switched: list[nn.Module] = []  # those that compute with packed weights now
        by_address: dict[int, Tensor] = {}
        linears = {id(child): child for module in modules for child in module.modules() if _packable(child)}
        for linear in linears.values():
            weight = linear.weight.detach()
            if weight.numel() < min_elements:
                self.too_small += 1
                continue
            used = products if weight.dtype == torch.float32 else None
            packed = by_address.get(weight.data_ptr())
            if packed is None:
                wanted = weight.to(dtype or weight.dtype)
                packed = torch.ops.mkldnn._reorder_linear_weight(wanted) if used is None else used.pack(weight)
                by_address[weight.data_ptr()] = packed
            self._packed.append(_Packed(linear, packed, _state(linear), _checksum(weight, products), used))
        shapes = {tuple(packed.module.weight.shape) for packed in self._packed}
        self.few_rows = {shape: {rows: self._cheapest_way(shape, rows) for rows in MEASURED_ROWS} for shape in shapes}
        self.fused = self._fuse(modules)

    def _fuse(self, modules: Sequence[nn.Module]) -> dict[nn.Module, Callable]:
        """Whole parts of layers that compiled products compute; rows that are cheaper plain stay plain there."""
        linears = {packed.module: packed.weight for packed in self._packed if packed.products is not None}
        plain_rows = {shape: {rows for rows, way in ways.items() if way == 0} for shape, ways in self.few_rows.items()}
        fused: dict[nn.Module, Callable] = {}
        for module in modules if linears else ():
            fused |= FusedParts(module, linears, self.products, self.max_rows, plain_rows).forwards
        return fused

    @torch.no_grad()
    def _cheapest_way(self, shape: tuple[int, int], rows: int) -> int:
        """To how many rows `rows` are filled up before the packed product; 0 = the plain product.

        Measured: processors differ in it. Several layers in turn, so that no weight stays in their caches.
        """
        layers = [packed for packed in self._packed if tuple(packed.module.weight.shape) == shape][:MEASURED_LAYERS]
        # Compiled products take any number of rows as it is.
        ways = (0, rows) if layers[0].products is not None else (0, rows, FILLED_ROWS)
        forwards = {way: [_forward(packed, self.max_rows, {rows: way}) for packed in layers] for way in ways}
        input = torch.zeros(rows, shape[1], dtype=layers[0].module.weight.dtype)
        seconds = dict.fromkeys(ways, float("inf"))
        for _ in range(MEASURED_TIMES):
            for way in ways:
                start = time.perf_counter()
                for forward in forwards[way]:
                    forward(input)
                seconds[way] = min(seconds[way], time.perf_counter() - start)
        best = min(ways, key=seconds.get)
        return best if seconds[best] < WORTH_LEAVING_PLAIN * seconds[0] else 0

    @property
    def compiled(self) -> bool:
        """Whether compiled products compute any of the layers."""
        return any(packed.products is not None for packed in self._packed)

    @property
    def leaves_single_rows_plain(self) -> bool:
        """Whether a pass of one row goes the plain way in every layer."""
        return not any(ways[1] for ways in self.few_rows.values())

    def __len__(self) -> int:
        return len(self._packed)

    def is_stale(self) -> bool:
        """Whether a weight has been replaced or changed since it was packed: pack again.

        Writes through `weight.data` or through a numpy view leave address and version as they were, so every element
        is looked at. That reads the weights once: 540 MB in some 10 to 40 ms on two cores, less than one token.
        """
        weights = ((packed, packed.module.weight.detach()) for packed in self._packed)
        return self.is_marked() or any(
            not torch.equal(_checksum(weight, self.products), packed.checksum) for packed, weight in weights
        )

    def is_marked(self) -> bool:
        """Whether a weight says itself that it has been replaced or changed since it was packed."""
        return any(_state(packed.module) != packed.state for packed in self._packed)

    @contextmanager
    def active(self) -> Iterator[PackedLinears]:
        """Within it the layers compute with their packed weights; in all threads that use them."""
        forwards = self.fused | {
            packed.module: _forward(packed, self.max_rows, self.few_rows.get(tuple(packed.module.weight.shape), {}))
            for packed in self._packed
        }
        used = [module for module in forwards if "forward" not in module.__dict__]

        def switch_on() -> None:
            self._switched = used
            for module in used:
                module.__dict__["forward"] = forwards[module]

        def switch_off() -> None:
            for module in self._switched:
                module.__dict__.pop("forward", None)

        with holding(self, switch_on, switch_off):
            yield self


def _packable(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in module.__dict__ or not torch.backends.mkldnn.is_available():
        return False
    weight = module.weight
    if weight.dtype == torch.bfloat16:
        supported = has_bfloat16_kernels()
    else:
        supported = weight.dtype == torch.float32
    # Exactly these two: tensor subclasses (quantized by torchao, sharded) have their own linear.
    return supported and weight.device.type == "cpu" and type(weight) in (nn.Parameter, Tensor)


def _state(linear: nn.Linear) -> tuple[int, int | None, int | None]:
    """Where weight and bias lie, and the version of the weight; a bias that changes where it lies is read as it is."""
    weight, bias = linear.weight.detach(), linear.bias
    version = None if weight.is_inference() else weight._version
    return weight.data_ptr(), version, None if bias is None else bias.data_ptr()


def _checksum(weight: Tensor, products: Products | None) -> Tensor:
    """What one changed element changes, or exchanging rows or columns: that of compiled products, if there are any; else
    the sums of a weight's bit patterns over its rows and over its columns. Row by row in parts that stay in the
    processor's cache."""
    weight = weight.contiguous()
    if products is not None and weight.numel() * weight.element_size() % 4 == 0:
        return products.checksum(weight)
    size, offset = weight.element_size(), weight.storage_offset()
    wide = weight.shape[1] * size % 8 == 0 and offset * size % 8 == 0  # eight bytes at a time, where they fit
    patterns = weight.view(torch.int64 if wide else {2: torch.int16, 4: torch.int32}[size])
    by_row, by_column = [], torch.zeros(patterns.shape[1], dtype=torch.int64)
    for part in patterns.split(512):
        by_row.append(part.sum(1))
        by_column += part.sum(0)
    return torch.cat([*by_row, by_column])


def _forward(packed: _Packed, max_rows: int, few_rows: Mapping[int, int]) -> Callable[[Tensor], Tensor]:
    """The layer's computation. More than `max_rows` rows use `F.linear`; by `few_rows`, a number of rows is filled up to
    another with zeros, or uses `F.linear` if that is 0."""
    linear = packed.module
    dtype, features = linear.weight.dtype, linear.in_features
    product = _onednn_product(packed) if packed.products is None else _compiled_product(packed)

    def forward(input: Tensor) -> Tensor:
        rows = input.numel() // features
        filled = few_rows.get(rows, rows)
        if (
            rows > max_rows
            or (filled == 0 and rows)
            or input.dtype != dtype
            or (torch.is_grad_enabled() and (input.requires_grad or linear.weight.requires_grad))
            or torch.is_autocast_enabled("cpu")
            or torch.compiler.is_compiling()
        ):
            return F.linear(input, linear.weight, linear.bias)
        if filled == rows:
            return product(input)
        padded = F.pad(input.reshape(rows, features), (0, 0, 0, filled - rows))
        return product(padded)[:rows].view(*input.shape[:-1], -1)

    return forward


def _onednn_product(packed: _Packed) -> Callable[[Tensor], Tensor]:
    linear, weight = packed.module, packed.weight
    bias = None if linear.bias is None else linear.bias.detach().to(weight.dtype)
    product = torch.ops.mkldnn._linear_pointwise

    def forward(input: Tensor) -> Tensor:
        return product(input.to(weight.dtype), weight, bias, "none", [], "").to(input.dtype)

    return forward


def _compiled_product(packed: _Packed) -> Callable[[Tensor], Tensor]:
    linear, panels, products = packed.module, packed.weight, packed.products
    bias = None if linear.bias is None else linear.bias.detach()

    def forward(input: Tensor) -> Tensor:
        output = products(input, panels, linear.out_features)
        return output if bias is None else output.add_(bias)

    return forward


PACK_LIMIT_BYTES = 2 * 2**30


# Packed copies by model: they hold its layers, not the model itself, and go when it goes.
_packed: weakref.WeakKeyDictionary[PreTrainedModel, PackedLinears] = weakref.WeakKeyDictionary()


def packed_linears(
    model: PreTrainedModel,
    wanted: bool | None,
    dtype: torch.dtype | None = None,
    products: Products | None = None,
) -> AbstractContextManager[PackedLinears | None]:
    """Within it, `model` computes with packed weights, in `dtype`; see `TreeOptions.pack_weights`. `products`: see
    [`PackedLinears`]."""
    if not _is_wanted(model, wanted):
        return nullcontext()
    with SWITCHING:
        packed = _packed.get(model)
        in_use = packed is not None and is_held(packed)  # by a call in another thread, whose layers these are
        if not in_use and (packed is None or packed.products != products or packed.is_stale()):
            _packed.pop(model, None)  # before the new one: one copy at a time
            packed = _packed[model] = PackedLinears(model, dtype=dtype, products=products)
    return packed.active()


def idle_copy(model: PreTrainedModel, wanted: bool | None, products: Products | None) -> PackedLinears | None:
    """The packed copy of an earlier call, if it leaves single rows plain: until a pass has more, [`packed_linears`] would
    change nothing, nor need it look at the weights. None if there is none."""
    packed = _packed.get(model) if _is_wanted(model, wanted) else None
    if packed is None or packed.products != products or not packed.leaves_single_rows_plain or packed.is_marked():
        return None
    return packed


def _is_wanted(model: PreTrainedModel, wanted: bool | None) -> bool:
    if wanted is not None:
        return wanted
    # Its size is asked once: that goes through all weights, and every call comes by here.
    return model.device.type == "cpu" and (model in _packed or model.get_memory_footprint() <= PACK_LIMIT_BYTES)
