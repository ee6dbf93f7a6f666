"""Gated LoRA: `y = W x + [row is a contemplate token] (alpha / r) B A x` on the projections of a target's layers.

Nothing of the target is replaced: while a pass runs ([`LowRank.acting`]), hooks add to the outputs of the last rows alone,
whatever computes them (packed weights, offloaded ones, another method's LoRA). Ordinary rows are what they were, bit for
bit, and after the pass no hook is left. Which modules they are is settled once, when the adapter is put on its target.

All projections of a layer lie side by side in two weights: `down` `(L, r, sum of inputs)` and `up` `(L, sum of outputs, r)`.

Example: q_proj 32 -> 32 and v_proj 32 -> 16, rank 2, 8 layers: down (8, 2, 64), up (8, 48, 2); of layer 3, v_proj has
`down[3, :, 32:64]` and `up[3, 32:48]`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from ..errors import refusal
from ..gated import GatedPass, GatedProduct

# Llama's seven, and the fused ones of Phi-3.
PROJECTIONS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "qkv_proj",
    "gate_up_proj",
)


def projections(model: nn.Module, names: Sequence[str] | None) -> list[dict[str, nn.Module]]:
    """By layer, the projections called `names` (None = those of `PROJECTIONS` that there are), by name below the layer.

    Raises:
        ValueError: none, or not the same ones in all layers.
    """
    layers = getattr(model.get_decoder(), "layers", [])
    wanted = PROJECTIONS if names is None else names
    found = [
        {
            path: module
            for path, module in layer.named_modules()
            if path.split(".")[-1] in wanted and hasattr(module, "in_features") and hasattr(module, "out_features")
        }
        for layer in layers
    ]
    ends = {path.split(".")[-1] for modules in found for path in modules}
    missing = [] if names is None else sorted(set(names) - ends)
    if not found or not found[0] or missing or len({str(_widths(modules)) for modules in found}) > 1:
        raise refusal(
            "lora_target_modules",
            got=f"{list(wanted)}, of which this {type(model).__name__} has {sorted(ends)}, and not alike in all layers"
            if not missing
            else f"{missing}, which this {type(model).__name__} does not have",
            expected="linear layers of equal shapes in all decoder layers",
            fix="Name projections that all layers have, such as the attention's.",
        )
    return found


def _widths(modules: dict[str, nn.Module]) -> dict[str, list[int]]:
    return {path: [module.in_features, module.out_features] for path, module in modules.items()}


def projection_widths(model: nn.Module, names: Sequence[str] | None) -> dict[str, list[int]]:
    """`{name below the layer: [inputs, outputs]}` of [`projections`], the same in all layers."""
    return _widths(projections(model, names)[0])


class LowRank:
    """The products of one adapter on one target.

    Args:
        model: the target. widths: as [`projection_widths`] gave them.
        down, up: see above, in any floating dtype. scale: alpha / r.
    """

    def __init__(self, model: nn.Module, widths: dict[str, list[int]], down: Tensor, up: Tensor, scale: float):
        self.call = GatedPass()
        # As a whole, before they are split: hundreds of small conversions would take longer than the products.
        dtype = model.get_input_embeddings().weight.dtype
        down, up = down.to(dtype), up.to(dtype)
        inputs, outputs = ([width[side] for width in widths.values()] for side in (0, 1))
        layers = model.get_decoder().layers
        self.parts: list[tuple[nn.Module, GatedProduct]] = []
        for layer, a, b in zip(layers, down, up, strict=True):
            rows = zip(widths, a.split(inputs, dim=1), b.split(outputs, dim=0), strict=True)
            self.parts += [
                (layer.get_submodule(path), GatedProduct(self.call, low, high, scale)) for path, low, high in rows
            ]

    @contextmanager
    def acting(self, rows: int | None = None) -> Iterator[None]:
        """Within it, the last `rows` rows (None = all) of every projection get their product."""
        self.call.rows, self.call.thread, key = rows, threading.get_ident(), f"confu gated LoRA {id(self)}"
        # As register_forward_hook, which takes ten times as long; there are hundreds, in every pass.
        for module, product in self.parts:
            module._forward_hooks[key] = product
        try:
            yield
        finally:
            self.call.thread = None
            for module, _ in self.parts:
                module._forward_hooks.pop(key, None)
