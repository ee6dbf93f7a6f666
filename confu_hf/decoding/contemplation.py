"""All of contemplation in decoding: which nodes carry a contemplate token, what it is made of, which future goes on.

EAGLE-3 mode has no `Contemplator`. The adapter is held by name: which one is active on the target does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from ..acceleration.attention import grouped_queries
from ..adapter.layer import ConFuLayer
from ..host import send
from ..target.context import ContemplateContext
from ..target.passes import Verified, as_futures, contemplate_anchors
from ..target.soft_prompts import SoftPrompts, soft_prompt_key_values
from ..tree.draft_tree import DraftTree
from ..tree.ends import likeliest_ends, nearest_contemplated
from .acceptance import Acceptance


class Contemplator:
    """What one adapter has the target contemplate.

    Args:
        target: the model. layer: the adapters on it. adapter_name: which of them.
        layer_ids: whose entering hidden states make a future: those of the features, and perhaps the last one.
        length: contemplate tokens in a row behind a node.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        layer: ConFuLayer,
        adapter_name: str,
        layer_ids: Sequence[int],
        length: int = 1,
    ):
        self.target, self.layer, self.adapter_name, self.layer_ids = target, layer, adapter_name, layer_ids
        self.length = length
        config = layer.configs[adapter_name]
        self.num_features = len(config.target_layer_ids) * config.target_hidden_size
        self.low_rank = layer.low_rank(target, adapter_name)

    def acting(self, count: int | None = None) -> AbstractContextManager:
        """Within it, a pass gives its last `count` rows (None = all) what contemplate tokens add to projections."""
        return nullcontext() if self.low_rank is None or count == 0 else self.low_rank.acting(count)

    def soft_prompts(self) -> SoftPrompts:
        """Keys and values that contemplate tokens see in front of everything."""
        weight = self.layer.prompt_weight(self.adapter_name)
        kind = self.layer.configs[self.adapter_name].soft_prompt_type
        return weight if kind == "kv" else soft_prompt_key_values(self.target, weight)

    def nodes(self, tree: DraftTree, count: int | None) -> Tensor:
        """`(B, M)` long: the `count` nodes (None = all) that are likeliest to be the last accepted one."""
        return likeliest_ends(tree, tree.tokens.shape[1] if count is None else count)

    def embedding(self, features: Tensor) -> Tensor:
        """`(B, 3 d)`, features of the newest known position -> `(B, d)`, the input of all contemplate tokens."""
        return self.layer.contemplate_embedding(features, self.adapter_name)

    def context(self, cache: Cache) -> ContemplateContext:
        """Keys and values of a finished text, and the soft prompts, for [`anchors`] of as many positions each time."""
        return ContemplateContext(cache, self.soft_prompts(), is_reused=True)

    def anchors(self, context: ContemplateContext, features: Tensor, positions: Tensor) -> Tensor:
        """Contemplate after positions of a finished text, as after the nodes of one verify pass.

        Args:
            context: of the text. features: `(B, 3 d)`, of the newest position that is known.
            positions: `(B, A)` long.

        Returns:
            Futures `(B, A, 3 d)`, or `(B, A, 3 d + n d)` with the last hidden states.
        """
        embeddings = self.embedding(features)[:, None].expand(-1, positions.shape[1], -1)
        visible = torch.arange(context.get_seq_length(), device=positions.device) <= positions[..., None]
        with self.acting(), grouped_queries(self.target):
            states = contemplate_anchors(
                self.target, context, embeddings, positions + 1, visible, self.layer_ids, self.length
            )[0]
        return as_futures(states, self.length, self.num_features)

    def future(
        self, tree: DraftTree, nodes: Tensor, verified: Verified, acceptance: Acceptance, known: Sequence[bool]
    ) -> tuple[Tensor | None, Tensor | None]:
        """The future of the last accepted node, or of its nearest ancestor that carried a contemplate token.

        Args:
            known: of each batch row, whether a node of its path carried one.

        Returns:
            `(B, 3 d)`, or `(B, 3 d + n d)`, and `(B,)` bool, which rows have one, None = all; None and None if no row has.
        """
        if not any(known):
            return None, None
        last = acceptance.path.gather(1, (acceptance.counts_tensor.clamp(min=1) - 1)[:, None]).clamp(min=0)
        nearest = nearest_contemplated(tree, nodes).gather(1, last)  # (B, 1)
        carrier = nodes.gather(1, nearest.clamp(min=0))
        rows = torch.arange(len(nearest), device=nearest.device)
        future = self.timely(verified.futures[rows, nearest[:, 0].clamp(min=0)], (carrier == last)[:, 0])
        return future, None if all(known) else send(known, nearest.device)

    def timely(self, futures: Tensor, fresh: Tensor) -> Tensor:
        """`futures` `(B, ...)` without the words of those that are not `fresh` `(B,)` bool: an ancestor's contemplate tokens
        begin with one that is decided by now. Its features stay."""
        if futures.shape[-1] == self.num_features:
            return futures
        features, words = futures.split([self.num_features, futures.shape[-1] - self.num_features], dim=-1)
        return torch.cat([features, words * fresh[:, None].to(words)], dim=-1)
