"""Where a walk through a draft tree is likely to end, and whose contemplate token serves which node."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import refusal
from .draft_tree import DraftTree, best_first


def likeliest_ends(tree: DraftTree, count: int) -> Tensor:
    """The nodes most likely to be the last accepted one, if the target agreed with the draft.

    The walk ends at a node if it gets there and leaves to none of its children in the tree:
    `P(end at i) = exp(joint i) - sum over its children c of exp(joint c)`.

    Returns:
        (B, M) long, node indices, ascending, M = min(count, T+1). Among equals the smaller index is taken.

    Raises:
        ValueError: if `count` is negative.
    """
    if count < 0:
        raise refusal(
            "likeliest_ends", got=f"count={count} contemplate tokens", expected="0 or more", fix="Ask for none with 0."
        )
    reached = tree.log_probs.exp()
    ends = reached.scatter_add(1, tree.parents[:, 1:], -reached[:, 1:])
    return best_first(ends, count).sort(dim=1).values


def nearest_contemplated(tree: DraftTree, contemplate_nodes: Tensor) -> Tensor:
    """For each node, whose contemplate token tells where the target is heading.

    Args:
        contemplate_nodes: (B, M) long, the nodes that carry a contemplate token, in any order.

    Returns:
        (B, T+1) long, index into 0..M-1: the node's own contemplate token or that of its nearest ancestor; -1 if none.
    """
    if contemplate_nodes.shape[1] == 0:
        return torch.full_like(tree.tokens, -1)
    nodes = contemplate_nodes.unsqueeze(1).expand(-1, tree.tokens.shape[1], -1)  # (B, T+1, M)
    # Ancestors come before their descendants, so on a path the greatest node index is the nearest.
    nearest, index = nodes.where(tree.ancestor_mask().gather(2, nodes), -1).max(dim=-1)
    return index.where(nearest >= 0, -1)
