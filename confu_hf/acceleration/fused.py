"""Parts of a layer in one call of the compiled products each: norms, gated MLPs, and attention's projections with their
rotation. A few rows cost a CPU more in the calls between products than in the arithmetic there.

Which modules are such parts is not guessed by their names: their children are looked at, and then each must compute what
its own `forward` computes. Nothing of the model is replaced; packing.py puts the forwards on and takes them off.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence, Set

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from .. import compat
from .attention import GROUPED, grouped_attention
from .products import AttentionProjections, Products

# How far a part may be from its own forward, as a share of its greatest value: rounding, in sums of thousands of float32,
# or of weights that were rounded. Another formula is farther away.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
EXAMPLE_ROWS = 3
Linears = Mapping[nn.Module, Tensor]  # linear layers that compute with compiled products, and their packed weights
Child = tuple[nn.Module, str, nn.Module]  # a module, its name for one of its children, and that
SPY = f"{compat.OWN_ATTENTION}spy"  # an attention that only notes what it is asked


class FusedParts:
    """The parts of `model` that compute in one call.

    Args:
        linears: see `Linears`. products: what computes. max_rows: calls of more rows take a part's own forward.
        plain_rows: by the shape of a weight, numbers of rows that are cheaper in the plain way. A part leaves them to its own
            forward if that holds for most of its weights; a norm, if it holds for all there are.

    Attributes:
        forwards: of each part.
    """

    def __init__(
        self,
        model: nn.Module,
        linears: Linears,
        products: Products,
        max_rows: int,
        plain_rows: Mapping[tuple[int, int], Set[int]],
    ):
        self.linears, self.products, self.max_rows, self.plain_rows = linears, products, max_rows, plain_rows
        self.always_plain = set.intersection(*map(set, plain_rows.values())) if plain_rows else set()
        self.forwards: dict[nn.Module, Callable] = {}
        for module in model.modules():
            for make in (self._norm, self._gated_mlp, self._attention):
                forward = None if "forward" in module.__dict__ or module.training else make(module)
                if forward is not None:
                    self.forwards[module] = forward

    def _mostly_plain(self, children: Sequence[Child]) -> set[int]:
        """Numbers of rows that are cheaper in the plain way for most of these layers' weights."""
        sizes = [
            (child.weight.numel(), self.plain_rows.get(tuple(child.weight.shape), set())) for *_, child in children
        ]
        half = sum(size for size, _ in sizes) / 2
        every = set().union(*(plain for _, plain in sizes))
        return {rows for rows in every if sum(size for size, plain in sizes if rows in plain) > half}

    def _serves(self, input: Tensor, plain_rows: Set[int], children: Sequence[Child] = ()) -> bool:
        """Whether a call is one for compiled products, and nobody else has a word in the children's: hooks, such as a gated
        LoRA's, or another layer in the place of one."""
        rows = input.numel() // input.shape[-1]
        return (
            0 < rows <= self.max_rows
            and rows not in plain_rows
            and input.dtype == torch.float32
            and input.device.type == "cpu"
            and input.is_contiguous()
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
            and all(
                parent._modules.get(name) is child and not child._forward_hooks and not child._forward_pre_hooks
                for parent, name, child in children
            )
        )

    def _children(self, module: nn.Module, *names: str) -> list[Child]:
        """Those of a module, each with it and its name; none if one is no linear layer with compiled products."""
        found = [(module, name, module._modules.get(name)) for name in names]
        return found if all(child in self.linears for _, _, child in found) else []

    def _norm(self, module: nn.Module) -> Callable | None:
        if not _is_norm(module):
            return None
        plain, epsilon = type(module).forward, _epsilon(module)

        def fused(hidden_states: Tensor) -> Tensor:
            return self.products.rms_norm(hidden_states, module.weight, epsilon)

        def forward(hidden_states: Tensor) -> Tensor:
            fits = hidden_states.shape[-1] == module.weight.numel() and self._serves(hidden_states, self.always_plain)
            return fused(hidden_states) if fits else plain(module, hidden_states)

        return forward if _agree(module, fused, _example(module.weight.numel())) else None

    def _gated_mlp(self, module: nn.Module) -> Callable | None:
        children = self._children(module, "gate_proj", "up_proj", "down_proj")
        if not children or any(child.bias is not None for *_, child in children):
            return None
        gate, up, down = (child for *_, child in children)
        if gate.in_features != down.out_features or len({gate.out_features, up.out_features, down.in_features}) > 1:
            return None
        plain, packed = type(module).forward, [self.linears[child] for *_, child in children]
        plain_rows = self._mostly_plain(children)

        def fused(hidden_states: Tensor) -> Tensor:
            return self.products.gated_mlp(hidden_states, *packed, gate.out_features)

        def forward(hidden_states: Tensor) -> Tensor:
            fits = self._serves(hidden_states, plain_rows, children)
            return fused(hidden_states) if fits else plain(module, hidden_states)

        return forward if _agree(module, fused, _example(gate.in_features), packed[0].dtype) else None

    def _attention(self, module: nn.Module) -> Callable | None:
        children = self._children(module, "q_proj", "k_proj", "v_proj", "o_proj")
        needed = ("config", "head_dim", "scaling", "layer_idx")
        if not children or not all(hasattr(module, name) for name in needed):
            return None
        o_proj, d = module.o_proj, module.head_dim
        norms = [(module, name, child) for name, child in module._modules.items() if child not in self.linears]
        projections = self._projections(module, [child for *_, child in children[:3]], [child for *_, child in norms])
        if projections is None or [name for _, name, _ in norms] not in ([], ["q_norm", "k_norm"]):
            return None
        plain, plain_rows = type(module).forward, self._mostly_plain(children)
        inside, addresses = [*children, *norms], [(norm, norm[-1].weight.data_ptr()) for norm in norms]

        def fused(hidden_states, position_embeddings, attention_mask=None, **more):
            query, key, value = self.products.attention_inputs(hidden_states, projections, *position_embeddings)
            cache, more = compat.split_cache(more)
            if cache is not None:
                key, value = cache.update(key, value, module.layer_idx)
            heads_say = grouped_attention(
                module, query, key, value, attention_mask, dropout=0.0, scaling=module.scaling, **more
            )
            return o_proj(heads_say[0].reshape(*hidden_states.shape[:-1], -1)), heads_say[1]

        def forward(hidden_states, position_embeddings=None, attention_mask=None, **more):
            fits = module.config._attn_implementation == GROUPED and not module.training
            fits = fits and self._serves(hidden_states, plain_rows, inside)
            fits = fits and all(child.weight.data_ptr() == known for (*_, child), known in addresses)
            fits = fits and _fit(hidden_states, position_embeddings, d)
            compute = fused if fits else functools.partial(plain, module)
            return compute(
                hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask, **more
            )

        angles, input = _example(d // 2).repeat(1, 1, 2), _example(o_proj.out_features)
        more = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
        asks = _attention_of(module, input, **more)
        if not asks or not _agree(module, fused, input, projections.dtype, **more):
            return None
        got = self.products.attention_inputs(input, projections, *more["position_embeddings"])
        return forward if all(_close(a, b, projections.dtype) for a, b in zip(got, asks, strict=True)) else None

    def _projections(
        self, module: nn.Module, inputs: Sequence[nn.Linear], norms: Sequence[nn.Module]
    ) -> AttentionProjections | None:
        """Those of an attention module, if they fit each other."""
        width, d = module.o_proj.out_features, module.head_dim
        heads, rest = zip(*(divmod(child.out_features, d) for child in inputs), strict=True)
        if (
            any(rest)
            or any(child.in_features != width for child in inputs)
            or module.o_proj.in_features != heads[0] * d
        ):
            return None
        epsilons = {_epsilon(norm) for norm in norms} or {0.0}
        if len(epsilons) > 1 or not all(_is_norm(norm, d) for norm in norms):
            return None
        return AttentionProjections(
            [self.linears[child] for child in inputs],
            [None if child.bias is None else child.bias.detach() for child in inputs],
            heads,
            d,
            [norm.weight.detach() for norm in norms] or (None, None),
            *epsilons,
        )


def _is_norm(module: nn.Module, width: int | None = None) -> bool:
    """Whether a module looks like an RMS norm with a weight in float32, over `width` values if that is given."""
    weight, name = getattr(module, "weight", None), type(module).__name__
    looks_like_one = name.endswith("RMSNorm") and not module._modules and isinstance(_epsilon(module), float)
    looks_like_one &= isinstance(weight, Tensor) and weight.dtype == torch.float32 and weight.ndim == 1
    return looks_like_one and width in (None, weight.numel())


def _epsilon(module: nn.Module) -> float | None:
    return getattr(module, "variance_epsilon", getattr(module, "eps", None))


def _fit(hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor] | None, head_dim: int) -> bool:
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


def _example(width: int) -> Tensor:
    """Rows of noise; the global random stream belongs to the user."""
    return torch.randn(1, EXAMPLE_ROWS, width, generator=torch.Generator().manual_seed(width))


def _close(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """Within the tolerance of weights in `dtype`."""
    if got.shape != expected.shape:
        return False
    return bool((got - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max())


@torch.no_grad()
def _agree(module: nn.Module, forward: Callable, input: Tensor, dtype: torch.dtype = torch.float32, **more) -> bool:
    """Whether `forward` with weights in `dtype` computes what the module itself does. One that cannot be called like this is
    another part."""
    try:
        expected, got = type(module).forward(module, input, **more), forward(input, **more)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    if isinstance(expected, tuple):
        expected, got = expected[0], got[0]
    return _close(got, expected, dtype)


@torch.no_grad()
def _attention_of(module: nn.Module, input: Tensor, **more) -> tuple[Tensor, ...]:
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
