"""`DraftTree`: a batch of draft trees as index tensors, and the order in which candidates are preferred."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import refusal

TENSORS = ("tokens", "parents", "depths", "log_probs", "looked_up")


@dataclass(frozen=True)
class DraftTree:
    """A batch of draft trees with T drafted nodes each. Node 0 is the root: the newest decided token.

    Attributes:
        tokens: (B, T+1) long, target-vocabulary ids; column 0 is the root.
        parents: (B, T+1) long, node index of each node's parent; -1 for the root, and `parents[b, i] < i`.
        depths: (B, T+1) long, distance from the root.
        log_probs: (B, T+1) float, joint log-probability of the path from the root under the draft; root 0.0.
        looked_up: (B, T+1) bool, nodes that prompt lookup alone proposed; None = none of them.

    Raises:
        ValueError: if the shapes differ.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    log_probs: Tensor
    looked_up: Tensor | None = None

    def __post_init__(self):
        if self.looked_up is None:
            object.__setattr__(self, "looked_up", torch.zeros_like(self.tokens, dtype=torch.bool))
        shapes = {name: tuple(getattr(self, name).shape) for name in TENSORS}
        if len(set(shapes.values())) != 1 or self.tokens.dim() != 2 or self.tokens.shape[1] == 0:
            raise refusal(
                "DraftTree",
                got=f"shapes {shapes}",
                expected="all of them equal, (batch, nodes) with nodes >= 1",
                fix="Give one number per node.",
            )

    def ancestor_mask(self) -> Tensor:
        """(B, T+1, T+1) bool: `[b, i, j]` is True if node j is node i or one of its ancestors."""
        batch_size, num_nodes = self.tokens.shape
        mask = torch.eye(num_nodes, dtype=torch.bool, device=self.tokens.device).expand(batch_size, -1, -1)
        # The root becomes its own parent: jumping past it adds nothing but the root, an ancestor of every node.
        jump = self.parents.clamp(min=0)
        # Doubling: before round r, `mask` holds the 2^r nearest of (node, parent, ...), `jump` is the 2^r-th ancestor.
        for _ in range((num_nodes - 1).bit_length()):
            mask = mask | mask.gather(1, jump.unsqueeze(-1).expand(-1, -1, num_nodes))
            jump = jump.gather(1, jump)
        return mask


def best_first(scores: Tensor, count: int) -> Tensor:
    """(B, min(count, n)) indices of the greatest of (B, n) scores, best first; among equals the earlier one."""
    # Not torch.topk: it may put a later one first among equals, and a certain child ties with its parent.
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]


def root_only(tokens: Tensor) -> DraftTree:
    """The tree without drafted nodes over `tokens` (B,): verifying it is a plain decoding step."""
    root = tokens[:, None]
    return DraftTree(
        root, torch.full_like(root, -1), torch.zeros_like(root), torch.zeros_like(root, dtype=torch.float)
    )
