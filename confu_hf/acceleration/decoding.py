"""What makes the models of a call cheaper while they decode: one context manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..compat import multiplies_bfloat16
from .attention import grouped_queries
from .packing import MIN_ELEMENTS, PackedLinears, idle_copy, packed_linears
from .products import Products


@dataclass(frozen=True)
class Execution:
    """Whether the target computes with compiled products, and if not, why; and whether passes of one row go the plain way
    all the same."""

    compiled: bool = False
    not_compiled_because: str | None = None
    single_rows_plain: bool = True


class Acceleration:
    """How the target of a call computes. Where single rows go the plain way, packed weights wait for a pass of more.

    Args:
        describe: `execution` with these packed weights. idle: packed weights that wait; None = there are none.
        enter: packed weights are used from now on.
    """

    def __init__(
        self,
        describe: Callable[[PackedLinears | None], Execution],
        idle: PackedLinears | None,
        enter: Callable[[], PackedLinears | None],
    ):
        self._describe, self._enter, self._waits = describe, enter, idle is not None
        self.execution = describe(idle if self._waits else enter())

    def expect(self, rows: int) -> None:
        """Before a pass of so many rows, contemplate tokens and all rows of a batch included."""
        if self._waits and rows > 1:
            self._waits = False
            self.execution = self._describe(self._enter())


@contextmanager
def accelerated(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    pack_weights: bool | None,
    products: Products | None = None,
) -> Iterator[Acceleration]:
    """Within it, target and draft compute with packed weights where `TreeOptions.pack_weights` and the CPU allow it, and
    the target attends over trees without copies. Passes of the target are to be announced: `Acceleration.expect`.

    What the draft guesses may be rounded to bfloat16, the target's word may not.

    Args:
        products: compiled products, for layers in float32; None = none were built.
    """
    # Half of the bytes to read; compiled products widen them.
    draft_dtype = torch.bfloat16 if products is not None or multiplies_bfloat16() else None
    drafts = nullcontext() if draft is None else packed_linears(draft, pack_weights, draft_dtype, products)

    def describe(packed: PackedLinears | None) -> Execution:
        plain = packed is None or packed.leaves_single_rows_plain
        return Execution(*_compiled(target, packed, products), single_rows_plain=plain)

    with grouped_queries(target), drafts, ExitStack() as stack:
        yield Acceleration(
            describe,
            idle_copy(target, pack_weights, products),
            lambda: stack.enter_context(packed_linears(target, pack_weights, products=products)),
        )


def _compiled(
    target: PreTrainedModel, packed: PackedLinears | None, products: Products | None
) -> tuple[bool, str | None]:
    """Whether the target computes with compiled products, and why not."""
    if products is None:
        return False, "confu.compile() was not called"
    if packed is None:
        return False, "the weights are not packed: see pack_weights"
    if not packed.compiled and packed.too_small:
        return False, f"no linear layer with {MIN_ELEMENTS} weights or more, only {packed.too_small} smaller ones"
    if not packed.compiled:
        return False, f"no plain linear layer with float32 weights on the CPU, but {target.dtype} on {target.device}"
    return True, None
