"""Draws a draft tree: children are drawn without replacement from the draft's distribution, not chosen.

Which nodes have how many children is settled before anything is drawn ([`tree_shape`]): were a node kept or dropped for the
token it got, its token would no longer be a draw from the distribution that decoding/rejection.py weighs it against.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import refusal
from .draft_tree import DraftTree

# How often the first child drawn is accepted, and the next ones if those before were not: measured about so at
# temperature 1 (EXPERIMENTS.md). The shape of trees depends on it, what they are worth hardly.
FIRST_CHILD = 0.4


@dataclass(frozen=True, kw_only=True)
class DrawnTree(DraftTree):
    """A tree whose nodes were drawn. Children of a node stand in the order in which they were drawn.

    Attributes:
        distributions: (B, E, K) float, log-probabilities that the draft gave at the nodes `expanded`, before any draw.
        expanded: the E nodes that have children, ascending. token_ids: (K,) long, target ids of the K draft tokens.
    """

    distributions: Tensor
    expanded: tuple[int, ...]
    token_ids: Tensor


class DistributionStep(Protocol):
    """One pass of the draft over a layer of the tree, as [`growing.DraftStep`], but all of what it says."""

    def __call__(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """(B, W) tokens -> (B, W, K) logits over the draft's tokens."""


def tree_shape(total_tokens: int, depth: int, most_children: int) -> tuple[list[int], list[int]]:
    """Parents and depths of the drafted nodes, the root not counted: the `total_tokens` that are likeliest to be reached.

    Layer by layer, siblings side by side. The child of rank r is accepted in `FIRST_CHILD / (r + 1)^2` of the times that
    its parent is.

    Example: 5 nodes, depth 3 -> parents 0 0 0 1 4 (three children of the root, one of the first of them, one below).
    """
    heap, nodes = [(-FIRST_CHILD, 0, (0,))] if depth and most_children else [], []
    while heap and len(nodes) < total_tokens:
        value, count, path = heapq.heappop(heap)
        nodes.append(path)
        if path[-1] + 1 < most_children:
            sibling = value * ((path[-1] + 1) / (path[-1] + 2)) ** 2
            heapq.heappush(heap, (sibling, count + 1, (*path[:-1], path[-1] + 1)))
        if len(path) < depth:
            heapq.heappush(heap, (value * FIRST_CHILD, count + 1, (*path, 0)))
    nodes.sort(key=lambda path: (len(path), path))
    index = {(): 0} | {path: number for number, path in enumerate(nodes, start=1)}
    return [index[path[:-1]] for path in nodes], [len(path) for path in nodes]


def draw_tree(
    step: DistributionStep,
    root_tokens: Tensor,
    token_ids: Tensor,
    *,
    total_tokens: int,
    depth: int,
    most_children: int,
    temperature: float,
) -> DrawnTree:
    """Draw a tree, layer by layer.

    Args:
        step: the draft; called once for each layer that has children.
        root_tokens: (B,) long. token_ids: (K,) long, target ids of the draft's tokens.
        total_tokens, depth, most_children: see [`tree_shape`].
        temperature: of the draft.
    """
    if not temperature > 0:
        raise refusal("draw_tree", got=f"temperature={temperature}", expected="above 0", fix="Draft without sampling.")
    shape, depths = tree_shape(total_tokens, depth, min(most_children, len(token_ids)))
    tokens, log_probs = root_tokens[:, None], root_tokens[:, None].float() * 0  # (B, nodes so far)
    distributions, expanded, rows = [], [], [0] if shape else []
    row_parents = None
    while rows:
        logits = step(tokens[:, rows], row_parents).float()
        spread = (logits / temperature).log_softmax(-1)  # (B, W, K)
        counts = [shape.count(row) for row in rows]
        # The greatest of log-probabilities with Gumbel noise, in order: draws without replacement.
        noise = torch.empty_like(spread).exponential_().log()
        drawn = (spread - noise).topk(max(counts), dim=-1).indices  # (B, W, children)
        said = spread.gather(-1, drawn) + log_probs[:, rows, None]
        children = [(row, rank) for row, count in enumerate(counts) for rank in range(count)]
        of_row, of_rank = (list(values) for values in zip(*children, strict=True))
        first = tokens.shape[1]
        tokens = torch.cat([tokens, token_ids[drawn[:, of_row, of_rank]]], dim=1)
        log_probs = torch.cat([log_probs, said[:, of_row, of_rank]], dim=1)
        distributions.append(spread)
        expanded += rows
        grown = [number for number, _ in enumerate(children) if first + number in shape]
        rows = [first + number for number in grown]
        row_parents = torch.tensor([of_row[number] for number in grown], device=tokens.device).expand(len(tokens), -1)
    numbers = torch.tensor([[-1, *shape], [0, *depths]], device=tokens.device)
    parents, depths = (row.expand_as(tokens) for row in numbers)
    wide = torch.cat(distributions, dim=1) if distributions else log_probs[..., None][:, :0]
    drawn = {"distributions": wide, "expanded": tuple(expanded), "token_ids": token_ids}
    return DrawnTree(tokens, parents, depths, log_probs, **drawn)
