"""Decoding over again of texts that are known: the rounds of `generate()` without their verify passes.

What the target would say of each node of a tree is known where the node continues the text, and nowhere else does a greedy
walk go. So, with the target's features and its cache of the whole text at hand, only the draft runs, and one contemplate
token a round. Sequences go on side by side. For texts that the target did not write greedily, the counts are those of
a target that insists on them.

Example: text `a b | c d e f`, prompt `a b`; the tree after root c holds d, d e and x. The round brings d, e and the bonus
token f: 3. The next root would be f, the last token: the replay is over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..options import TreeOptions
from ..target.context import ContemplateContext, KnownTexts
from ..tree.draft_tree import DraftTree
from ..tree.ends import nearest_contemplated
from .contemplation import Contemplator
from .drafting import Drafter
from .policy import RoundPlan
from .state import DecodingState, Rows


class TreeReplay:
    """Counts what each round of decoding would bring.

    Args:
        new_drafter: makes the drafter of a call. contemplator: None = EAGLE-3 mode.
        options: the tree, the same in every round. Unlike `generate()`, trees keep their depth at the end of a text.
    """

    def __init__(
        self,
        new_drafter: Callable[[], Drafter],
        contemplator: Contemplator | None,
        options: TreeOptions,
    ):
        self.new_drafter, self.contemplator = new_drafter, contemplator
        self.plan = RoundPlan(options.total_tokens, options.depth, options.top_k, options.confidence_threshold)
        self.contemplate_tokens = options.contemplate_tokens

    @torch.no_grad()
    def counts(self, texts: KnownTexts) -> list[list[int]]:
        """Tokens that each round would emit, bonus included, by sequence; the first token is prefill's."""
        drafter, device = self.new_drafter(), texts.input_ids.device
        context = None if self.contemplator is None else self.contemplator.context(texts.cache)
        counts: list[list[int]] = [[] for _ in texts.input_ids]
        newest = texts.prompt_lengths - 1  # (B,) `v`, the newest position whose features are known
        drafter.observe(_state(texts, newest), _rows(texts, torch.full_like(newest, -1), newest))
        while True:
            state = _state(texts, newest)
            if all(state.finished):
                return counts
            tree = drafter.grow(state, self.plan)
            node, depth = _accepted(tree, texts, newest)
            emitted = torch.minimum(depth + 1, (texts.lengths - 2 - newest).clamp_min(0))  # (B,)
            future, known = self._future(tree, node, texts, newest, context)
            rows = _rows(texts, newest, newest + emitted)
            newest = newest + emitted
            drafter.observe(
                _state(texts, newest), Rows(rows.tokens, rows.features, rows.position_ids.to(device), future, known)
            )
            for row, count in zip(counts, emitted.tolist(), strict=True):
                row += [count] if count else []

    def _future(
        self, tree: DraftTree, node: Tensor, texts: KnownTexts, newest: Tensor, context: ContemplateContext | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """`(B, 3 d)` the future of the last accepted `node` `(B,)`, and `(B,)` bool which rows have one.

        It is of the node's own contemplate token or of its nearest ancestor's: on the accepted path, so in the text.
        """
        if self.contemplator is None:
            return None, None
        nodes = self.contemplator.nodes(tree, self.contemplate_tokens)
        nearest = nearest_contemplated(tree, nodes).gather(1, node[:, None])  # (B, 1)
        carrier = nodes.gather(1, nearest.clamp_min(0))
        # A row that has ended stays within its text.
        last = texts.lengths[:, None] - 1
        positions = torch.minimum(newest[:, None] + 1 + tree.depths.gather(1, carrier), last)  # (B, 1)
        sources = _at(texts.features, newest[:, None])[:, 0]
        futures = self.contemplator.anchors(context, sources, positions)[:, 0]
        return self.contemplator.timely(futures, (carrier == node[:, None])[:, 0]), nearest[:, 0] >= 0


def _accepted(tree: DraftTree, texts: KnownTexts, newest: Tensor) -> tuple[Tensor, Tensor]:
    """`(B,)` each: the deepest node whose whole path continues the text, and its depth."""
    positions = newest[:, None] + 1 + tree.depths  # (B, T+1); the root is at v + 1
    inside = positions < texts.lengths[:, None]
    tokens = texts.input_ids.gather(1, positions.clamp(max=texts.input_ids.shape[1] - 1))
    wrong = (tree.tokens != tokens) | ~inside
    wrong[:, 0] = False
    on_path = ~(tree.ancestor_mask() & wrong[:, None]).any(-1)
    depth, node = torch.where(on_path, tree.depths, -1).max(-1)
    return node, depth


def _state(texts: KnownTexts, newest: Tensor) -> DecodingState:
    """Where decoding stands with the features up to `newest` `(B,)` known, and one token more decided."""
    lengths = newest + 2
    columns = torch.arange(int(lengths.max()), device=newest.device)
    ids = texts.input_ids[:, : len(columns)]
    return DecodingState(
        input_ids=torch.where(columns < lengths[:, None], ids, -1),
        lengths=tuple(lengths.tolist()),
        finished=tuple((lengths >= texts.lengths).tolist()),
        features=_at(texts.features, newest[:, None])[:, 0],
        position_offset=torch.zeros_like(newest[:, None]),
    )


def _rows(texts: KnownTexts, before: Tensor, newest: Tensor) -> Rows:
    """The rows `before + 1 .. newest` of each sequence, both `(B,)`; -1 behind the end of those that have fewer."""
    width = max(int((newest - before).max()), 1)
    positions = before[:, None] + 1 + torch.arange(width, device=before.device)
    real = positions <= newest[:, None]
    inside = positions.clamp(max=texts.input_ids.shape[1] - 2)
    return Rows(
        tokens=texts.input_ids.gather(1, inside + 1),
        features=_at(texts.features, inside),
        position_ids=torch.where(real, positions, -1),
    )


def _at(features: Tensor, positions: Tensor) -> Tensor:
    """`(B, N, 3 d)` at `(B, R)` -> `(B, R, 3 d)`."""
    return features.gather(1, positions[..., None].expand(-1, -1, features.shape[-1]))
