"""One context manager that makes the models of a call cheaper while they decode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from ..compat import multiplies_bfloat16
from .attention import grouped_queries
from .packing import packed_linears


@contextmanager
def accelerated(target: PreTrainedModel, draft: PreTrainedModel | None, pack_weights: bool | None) -> Iterator[None]:
    """Within it, target and draft compute with packed weights where `TreeOptions.pack_weights` and the CPU allow it, and
    the target attends over trees without copies.

    What the draft guesses may be rounded to bfloat16, the target's word may not.
    """
    draft_dtype = torch.bfloat16 if multiplies_bfloat16() else None
    with grouped_queries(target), packed_linears(target, pack_weights):
        if draft is None:
            yield
            return
        with packed_linears(draft, pack_weights, draft_dtype):
            yield
