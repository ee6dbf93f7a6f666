"""Whether a module of the target computes what a compiled part of a layer computes: by what it does, not by its name."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .. import compat

# How far a part may be from its own forward, as a share of its greatest value: rounding, in sums of thousands of float32,
# or of weights that were rounded. Another formula is farther away.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
EXAMPLE_ROWS = 3
SPY = f"{compat.OWN_ATTENTION}spy"  # an attention that only notes what it is asked


def is_norm(module: nn.Module, width: int | None = None) -> bool:
    """Whether a module looks like an RMS norm with a weight in float32, over `width` values if that is given."""
    weight, name = getattr(module, "weight", None), type(module).__name__
    looks_like_one = name.endswith("RMSNorm") and not module._modules and isinstance(epsilon(module), float)
    looks_like_one &= isinstance(weight, Tensor) and weight.dtype == torch.float32 and weight.ndim == 1
    return looks_like_one and width in (None, weight.numel())


def epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def fit(hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, head_dim: int) -> bool:
    """Whether rotations are those of whole heads, of these rows."""
    if position_embeddings is None:
        return False
    (batch, length), (cos, sin) = hidden_states.shape[:2], position_embeddings
    return (
        cos.shape == sin.shape
        and tuple(cos.shape) in ((1, length, head_dim), (batch, length, head_dim))
        and cos.dtype == sin.dtype == torch.float32
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


def example(width: int) -> Tensor:
    """Rows of noise; the global random stream belongs to the user."""
    return torch.randn(1, EXAMPLE_ROWS, width, generator=torch.Generator().manual_seed(width))


def close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Within the tolerance of weights in `dtype`."""
    if got.shape != expected.shape:
        return False
    return bool((got - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max())


@torch.no_grad()
def agree(module: nn.Module, forward: Callable, input: Tensor, dtype: torch.dtype = torch.float32, **more) -> bool:
    """Whether `forward` with weights in `dtype` computes what the module itself does. One that cannot be called like this is
    another part."""
    try:
        expected, got = type(module).forward(module, input, **more), forward(input, **more)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    if isinstance(expected, tuple) != isinstance(got, tuple):
        return False
    if isinstance(expected, tuple):
        expected, got = expected[0], got[0]
    return close(got, expected, dtype)


@torch.no_grad()
def attention_of(module: nn.Module, input: Tensor, **more) -> tuple[Tensor, ...]:
    """Queries, keys and values that an attention module makes of `input`; nothing, if it asks for more than a mask and a
    scale do: soft-capping or sinks may change too little in an example to be seen in its output."""
    twin, seen = copy.copy(module), []
    twin.config = copy.copy(module.config)
    compat.set_attention_implementation(twin.config, SPY)
    try:
        type(module).forward(twin, input, **more, noted=seen)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return ()
    if len(seen) != 1:
        return ()
    *states, arguments = seen[0]
    usual = arguments.pop("scaling", None) == module.scaling and not arguments.pop("dropout", 0.0)
    arguments.pop("sliding_window", None)  # the mask's business
    return tuple(states) if usual and all(value is None for value in arguments.values()) else ()


def _spy(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    noted: list,
    **arguments,
) -> tuple[Tensor, None]:
    noted.append((query, key, value, arguments))
    return query.transpose(1, 2).contiguous(), None


AttentionInterface.register(SPY, _spy)
