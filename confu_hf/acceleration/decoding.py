"""One context manager that makes the models of a call cheaper while they decode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..compat import multiplies_bfloat16
from .attention import grouped_queries
from .packing import PackedLinears, packed_linears
from .products import Products


@dataclass(frozen=True)
class Acceleration:
    """Whether the target computes with compiled products, and if not, why."""

    compiled: bool
    not_compiled_because: str | None


@contextmanager
def accelerated(
    target: PreTrainedModel,
    draft: PreTrainedModel | None,
    pack_weights: bool | None,
    products: Products | None = None,
) -> Iterator[Acceleration]:
    """Within it, target and draft compute with packed weights where `TreeOptions.pack_weights` and the CPU allow it, and
    the target attends over trees without copies.

    What the draft guesses may be rounded to bfloat16, the target's word may not.

    Args:
        products: compiled products, for layers in float32; None = none were built.
    """
    draft_dtype = torch.bfloat16 if multiplies_bfloat16() else None
    drafts = nullcontext() if draft is None else packed_linears(draft, pack_weights, draft_dtype, products)
    with grouped_queries(target), packed_linears(target, pack_weights, products=products) as packed, drafts:
        yield Acceleration(*_compiled(target, packed, products))


def _compiled(
    target: PreTrainedModel, packed: PackedLinears | None, products: Products | None
) -> tuple[bool, str | None]:
    """Whether the target computes with compiled products, and why not."""
    if products is None:
        return False, "confu.compile() was not called"
    if packed is None:
        return False, "the weights are not packed: see pack_weights"
    if not packed.compiled:
        return False, f"no plain linear layer with float32 weights on the CPU, but {target.dtype} on {target.device}"
    return True, None
