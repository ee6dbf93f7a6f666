"""Times bare verify passes of a target on a cache of their own: nothing of a generation is touched."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from transformers import PreTrainedModel

from .. import compat
from ..acceleration.cost_files import CostKey
from ..target.cache import TreeCache
from ..target.passes import verify
from ..tree.draft_tree import root_only
from ..tree.growing import grow_tree
from ..tree.layout import verify_layout
from .stats import Stopwatch

PRODUCT_ROWS, PRODUCT_PASSES = 4, 3  # of the passes that a gated LoRA is timed in


class Bench:
    """The models of a call, and passes of them to time.

    Args:
        target: the model. layer_ids: whose entering hidden states are asked for, as when decoding.
        draft: the network that drafts, if one does. execution: how the passes run: packed, compiled, ...
        expect: told of the rows of every pass beforehand; None = no one wants to know.
        acting: within it a pass gives its last rows a gated LoRA's products; None = there is none.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        layer_ids: list[int],
        draft: PreTrainedModel | None,
        execution: str,
        expect: Callable[[int], None] | None = None,
        acting: Callable[[int], AbstractContextManager] | None = None,
    ):
        self.target, self.layer_ids = target, layer_ids
        self.draft, self.execution, self.expect, self.acting = draft, execution, expect, acting

    def key(self) -> CostKey:
        """What the costs of these models are kept under."""
        return CostKey.of(self.target, self.draft, self.execution)

    def draft_share(self) -> float:
        """Parameters of the draft, as a share of the target's."""
        draft = 0 if self.draft is None else sum(parameter.numel() for parameter in self.draft.parameters())
        return draft / sum(parameter.numel() for parameter in self.target.parameters())

    def contemplation(self) -> float | None:
        """Seconds that a gated LoRA's products add to a pass: of the least of a few passes each, with and without. None
        without one, as in a call that does not contemplate: the next one may."""
        if self.acting is None:
            return None
        self.run(PRODUCT_ROWS, PRODUCT_ROWS)  # the first one pays for what later ones find ready
        times = [(self.run(PRODUCT_ROWS, PRODUCT_ROWS), self.run(PRODUCT_ROWS)) for _ in range(PRODUCT_PASSES)]
        with_products, without = (min(part) for part in zip(*times, strict=True))
        return max(0.0, with_products - without)

    def run(self, rows: int, products: int = 0) -> float:
        """Seconds of a verify pass over a root and `rows - 1` children of it, behind no context; the last `products` rows
        with those of a gated LoRA.

        On a CPU those that this process was given, shared among its threads: other processes do not bend the curve.
        """
        device = compat.working_device(self.target)
        layers = self.target.config.get_text_config(decoder=True).num_hidden_layers
        cache, stopwatch = TreeCache(layers, capacity=rows), Stopwatch(device)
        root = torch.zeros(1, dtype=torch.long, device=device)
        tree = root_only(root)
        if rows > 1:
            children = torch.zeros(1, 1, rows - 1, dtype=torch.long, device=device)
            drafted = (children, torch.zeros(children.shape, device=device))
            tree = grow_tree(lambda *_: drafted, root, total_tokens=rows - 1, depth=1, top_k=rows - 1)
        layout = verify_layout(
            tree, tree.tokens[:, :0], slot_position_ids=tree.tokens[:, :0], soft_prompt_length=0, lengths=[0]
        )
        if self.expect is not None:
            self.expect(rows)
        start = time.process_time()
        with stopwatch.phase("verify"), self.acting(products) if products else nullcontext():
            verify(self.target, layout, None, cache, self.layer_ids)
        if device.type == "cpu":
            return (time.process_time() - start) / torch.get_num_threads()
        return stopwatch.read()["verify"]
