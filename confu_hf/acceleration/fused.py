"""Parts of a layer in one call of the compiled products each: norms, gated MLPs, attention's projections with their
rotation, and whole layers made of these in two calls, with attention between. A few rows cost a CPU more in the calls
between products than in the arithmetic there.

Which modules are such parts is not guessed by their names: their children are looked at, and then each must compute what
its own `forward` computes (likeness.py). Nothing of the model is replaced; packing.py puts the forwards on and takes them
off. A gated LoRA's hooks on linear layers are understood, and computed in the same calls; other hooks are left to run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import compat
from ..gated import GatedProduct
from .attention import GROUPED, grouped_attention
from .likeness import agree, attention_of, close, epsilon, example, fit, is_norm
from .products import AttentionProjections, Gated, GatedWeights, LowRankPart, Norm, Products

Linears = Mapping[nn.Module, Tensor]  # linear layers that compute with compiled products, and their packed weights
Child = tuple[nn.Module, str, nn.Module]  # a module, its name for one of its children, and that
LAYER = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


@dataclass(frozen=True)
class _Part:
    """A gated MLP, or an attention: its packed weights and its linear layers; of an attention the norms of heads, too, and
    where their weights lie."""

    weights: GatedWeights | AttentionProjections
    linears: Sequence[Child]
    norms: Sequence[Child] = ()
    addresses: Sequence[int] = ()

    def has_its_norms(self) -> bool:
        """Whether they are those that were packed with the weights."""
        return all(
            child.weight.data_ptr() == known for (*_, child), known in zip(self.norms, self.addresses, strict=True)
        )


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
        self._parts: dict[nn.Module, _Part] = {}
        self._low_ranks: dict[nn.Module, tuple[tuple, LowRankPart]] = {}
        for module in reversed(list(model.modules())):  # children before those that they are parts of
            for make in (self._norm, self._gated_mlp, self._attention, self._layer):
                forward = None if "forward" in module.__dict__ or module.training else make(module)
                if forward is not None:
                    self.forwards[module] = forward

    # 1. Whether a call is one for compiled products

    def _mostly_plain(self, children: Sequence[Child]) -> set[int]:
        """Numbers of rows that are cheaper in the plain way for most of these layers' weights."""
        sizes = [
            (child.weight.numel(), self.plain_rows.get(tuple(child.weight.shape), set())) for *_, child in children
        ]
        half = sum(size for size, _ in sizes) / 2
        every = set().union(*(plain for _, plain in sizes))
        return {rows for rows in every if sum(size for size, plain in sizes if rows in plain) > half}

    def _serves(self, input: Tensor, plain_rows: Set[int]) -> bool:
        rows = input.numel() // input.shape[-1]
        return (
            0 < rows <= self.max_rows
            and rows not in plain_rows
            and input.dtype == torch.float32
            and input.device.type == "cpu"
            and input.is_contiguous()
            and not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling())
        )

    def _gated(self, linears: Sequence[Child], input: Tensor) -> tuple[bool, Gated | None]:
        """Whether nobody but a gated LoRA has a word in these linear layers: other hooks, another layer or forward in the
        place of one; and what it says, None = nothing."""
        found, gated = [], None
        for parent, name, child in linears:
            if not _in_place(parent, name, child):
                return False, None
            part = None
            if child._forward_hooks:
                hook, *others = child._forward_hooks.values()
                if others or not isinstance(hook, GatedProduct) or hook.down.dtype != torch.float32:
                    return False, None
                gated = hook.call if gated is None and hook.call.is_meant() else gated
                part = self._low_rank(child, hook) if hook.call is gated else None
            found.append(part)
        if gated is None:
            return True, None
        length = input.shape[1] if input.ndim == 3 else len(input)
        return True, Gated(found, length, gated.first_row(length))

    def _low_rank(self, linear: nn.Module, hook: GatedProduct) -> LowRankPart:
        """Laid out once, for all passes of all calls with these weights."""
        if hook.part is None:
            versions = [None if weight.is_inference() else weight._version for weight in (hook.down, hook.up)]
            key = (hook.down.data_ptr(), hook.up.data_ptr(), *versions, hook.scale)
            if self._low_ranks.get(linear, (None,))[0] != key:
                part = LowRankPart(hook.down.detach(), self.products.pack(hook.up.detach()), hook.scale)
                self._low_ranks[linear] = (key, part)
            hook.part = self._low_ranks[linear][1]
        return hook.part

    # 2. The parts

    def _children(self, module: nn.Module, *names: str) -> list[Child]:
        """Those of a module, each with it and its name; none if one is no linear layer with compiled products."""
        found = [(module, name, module._modules.get(name)) for name in names]
        return found if all(child in self.linears for _, _, child in found) else []

    def _norm(self, module: nn.Module) -> Callable | None:
        if not is_norm(module):
            return None
        plain, small = type(module).forward, epsilon(module)

        def fused(hidden_states: Tensor) -> Tensor:
            return self.products.rms_norm(hidden_states, module.weight, small)

        def forward(hidden_states: Tensor) -> Tensor:
            fits = hidden_states.shape[-1] == module.weight.numel() and self._serves(hidden_states, self.always_plain)
            return fused(hidden_states) if fits else plain(module, hidden_states)

        return forward if agree(module, fused, example(module.weight.numel())) else None

    def _gated_mlp(self, module: nn.Module) -> Callable | None:
        children = self._children(module, "gate_proj", "up_proj", "down_proj")
        if not children or any(child.bias is not None for *_, child in children):
            return None
        gate, up, down = (child for *_, child in children)
        if gate.in_features != down.out_features or len({gate.out_features, up.out_features, down.in_features}) > 1:
            return None
        plain, packed = type(module).forward, [self.linears[child] for *_, child in children]
        weights, plain_rows = GatedWeights(*packed, gate.out_features), self._mostly_plain(children)

        def fused(hidden_states: Tensor, gated: Gated | None = None) -> Tensor:
            return self.products.gated_mlp(hidden_states, weights, gated)

        def forward(hidden_states: Tensor) -> Tensor:
            alone, gated = self._gated(children, hidden_states)
            if alone and self._serves(hidden_states, plain_rows):
                return fused(hidden_states, gated)
            return plain(module, hidden_states)

        if not agree(module, fused, example(gate.in_features), packed[0].dtype):
            return None
        self._parts[module] = _Part(weights, children)
        return forward

    def _attention(self, module: nn.Module) -> Callable | None:
        children = self._children(module, "q_proj", "k_proj", "v_proj", "o_proj")
        needed = ("config", "head_dim", "scaling", "layer_idx")
        if not children or not all(hasattr(module, name) for name in needed):
            return None
        norms = [(module, name, child) for name, child in module._modules.items() if child not in self.linears]
        projections = self._projections(module, [child for *_, child in children[:3]], [child for *_, child in norms])
        if projections is None or [name for _, name, _ in norms] not in ([], ["q_norm", "k_norm"]):
            return None
        plain, plain_rows = type(module).forward, self._mostly_plain(children)
        part = _Part(projections, children, norms, [norm[-1].weight.data_ptr() for norm in norms])

        def fused(hidden_states, gated=None, **given):
            return module.o_proj(self._attend(module, part, hidden_states, gated, **given))

        def forward(hidden_states, position_embeddings=None, **more):
            given = {"position_embeddings": position_embeddings, **more}
            alone, gated = self._gated(children[:3], hidden_states)
            if alone and self._attends(module, part, hidden_states, plain_rows, position_embeddings):
                return fused(hidden_states, gated, **given), None
            return plain(module, hidden_states, **given)

        angles, input = example(module.head_dim // 2).repeat(1, 1, 2), example(module.o_proj.out_features)
        given = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
        asks = attention_of(module, input, **given)
        if not asks or not agree(
            module, lambda *args, **kw: (fused(*args, **kw), None), input, projections.dtype, **given
        ):
            return None
        got = self.products.attention_inputs(input, projections, *given["position_embeddings"])
        if not all(close(a, b, projections.dtype) for a, b in zip(got, asks, strict=True)):
            return None
        self._parts[module] = part
        return forward

    def _attends(self, module, part: _Part, hidden_states, plain_rows, position_embeddings) -> bool:
        """Whether an attention's call is one for compiled products, as far as it alone is concerned."""
        return (
            module.config._attn_implementation == GROUPED
            and not module.training
            and self._serves(hidden_states, plain_rows)
            and _untouched(part.norms)
            and part.has_its_norms()
            and fit(hidden_states, position_embeddings, module.head_dim)
        )

    def _attend(
        self, module, part: _Part, hidden_states, gated, position_embeddings, attention_mask=None, norm=None, **more
    ) -> Tensor:
        """`(B, Q, heads * head_dim)`, what the heads say."""
        query, key, value = self.products.attention_inputs(
            hidden_states, part.weights, *position_embeddings, norm, gated
        )
        cache, more = compat.split_cache(more)
        if cache is not None:
            key, value = cache.update(key, value, module.layer_idx)
        if self.products.attends(query, key, value, attention_mask):
            say = self.products.attention(query, key, value, attention_mask, module.scaling)
        else:
            arguments = {"dropout": 0.0, "scaling": module.scaling, **more}
            say, _ = grouped_attention(module, query, key, value, attention_mask, **arguments)
        return say.reshape(*hidden_states.shape[:-1], -1)

    def _layer(self, module: nn.Module) -> Callable | None:
        """A layer of these parts: `h = x + attention(norm(x))`, then `h + mlp(norm(h))`."""
        if sorted(module._modules) != sorted(LAYER):
            return None
        parts = [(module, name, module._modules[name]) for name in LAYER]
        first, attention, second, mlp = (part for *_, part in parts)
        inner, gates = self._parts.get(attention), self._parts.get(mlp)
        if inner is None or gates is None or not {first, second} <= self.forwards.keys():
            return None
        linears, width = [*inner.linears, *gates.linears], attention.o_proj.out_features
        if attention.o_proj.bias is not None or {norm.weight.numel() for norm in (first, second)} != {width}:
            return None
        if (
            gates.linears[0][-1].in_features != width
            or inner.weights.dtype != self.linears[gates.linears[0][-1]].dtype
        ):
            return None
        plain, plain_rows = type(module).forward, self._mostly_plain(linears)
        output, epsilons = self.linears[attention.o_proj], (epsilon(first), epsilon(second))

        def fused(hidden_states, gated=None, **given):
            norms = [Norm(norm.weight, small) for norm, small in zip((first, second), epsilons, strict=True)]
            into, out_of = (None, None) if gated is None else _split(gated, 3)
            say = self._attend(attention, inner, hidden_states, into, norm=norms[0], **given)
            return self.products.layer_end(say, hidden_states, output, norms[1], gates.weights, out_of)

        def forward(hidden_states, position_embeddings=None, **more):
            given = {"position_embeddings": position_embeddings, **more}
            alone, gated = self._gated(linears, hidden_states)
            fits = alone and _untouched(parts) and not mlp.training
            if fits and self._attends(attention, inner, hidden_states, plain_rows, position_embeddings):
                return fused(hidden_states, gated, **given)
            return plain(module, hidden_states, **given)

        angles = example(attention.head_dim // 2).repeat(1, 1, 2)
        given = {"position_embeddings": (angles.cos(), angles.sin()), "attention_mask": None}
        return forward if agree(module, fused, example(width), inner.weights.dtype, **given) else None

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
        epsilons = {epsilon(norm) for norm in norms} or {0.0}
        if len(epsilons) > 1 or not all(is_norm(norm, d) for norm in norms):
            return None
        return AttentionProjections(
            [self.linears[child] for child in inputs],
            [None if child.bias is None else child.bias.detach() for child in inputs],
            heads,
            d,
            [norm.weight.detach() for norm in norms] or (None, None),
            *epsilons,
        )


def _in_place(parent: nn.Module, name: str, child: nn.Module) -> bool:
    """Whether it is still this child, which computes as its class does, or as packing.py has it compute."""
    own = child.__dict__.get("forward")
    ours = own is None or getattr(own, "__module__", "").startswith(__package__)
    return ours and parent._modules.get(name) is child and not child._forward_pre_hooks


def _untouched(children: Sequence[Child]) -> bool:
    """Whether these are still in their places, and nobody else has a word in what they compute."""
    return all(
        _in_place(parent, name, child) and all(map(compat.captures_outputs, child._forward_hooks.values()))
        for parent, name, child in children
    )


def _split(gated: Gated, count: int) -> tuple[Gated, Gated]:
    """That of the first `count` products, and of the others."""
    return gated._replace(parts=gated.parts[:count]), gated._replace(parts=gated.parts[count:])
