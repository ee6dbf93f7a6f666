"""Cuts a draft tree down to some of its nodes. Which ones is decided in decoding/cost_policy.py."""

from __future__ import annotations

import torch
from torch import Tensor

from .draft_tree import DraftTree


def prune(tree: DraftTree, kept: Tensor) -> DraftTree:
    """The tree of the kept nodes.

    Args:
        kept: `(B, n+1)` long, node indices, ascending, the root's 0 first; with a node its parent is kept, too.

    Example: nodes 0 1 2 3 with parents -1 0 0 2, kept 0 2 3: parents -1 0 1.
    """
    parents = torch.searchsorted(kept, tree.parents.gather(1, kept))
    parents[:, 0] = -1
    return DraftTree(
        tokens=tree.tokens.gather(1, kept),
        parents=parents,
        depths=tree.depths.gather(1, kept),
        log_probs=tree.log_probs.gather(1, kept),
        looked_up=tree.looked_up.gather(1, kept),
    )
