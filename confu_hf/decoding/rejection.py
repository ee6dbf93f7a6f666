"""The choice of a token at the nodes of a drawn tree.

Where children were drawn, recursive rejection accepts more than waiting for the target's own draw to be among them, and
what is emitted has the target's distribution all the same. Proof for one node, with p the target's distribution and q the
one that the first child x was drawn from: x is taken with probability min(1, p(x) / q(x)), so token t comes out of this
step with min(p(t), q(t)); what is missing is max(p - q, 0), and that is the distribution that goes on, to the second child,
drawn from q without x, and at last to a draw of the target's own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tree.drawing import DrawnTree


class RejectionSampler:
    """Chooses tokens at the nodes of one row of a drawn tree.

    Args:
        tree: the trees of a batch. row: which of them.
    """

    def __init__(self, tree: DrawnTree, row: int):
        self.tree, self.row = tree, row
        tokens, parents = tree.tokens[row].tolist(), tree.parents[row].tolist()
        self.drawn = {node: [t for t, p in zip(tokens, parents, strict=True) if p == node] for node in tree.expanded}
        self.node = 0

    def at(self, node: int) -> RejectionSampler:
        """The next call is about this node."""
        self.node = node
        return self

    def __call__(self, scores: Tensor) -> Tensor:
        """(1,) long, a token for the processed scores (1, V) float32 at the node."""
        left = scores[0].double().softmax(-1)  # what the target still has to give
        if self.node in self.drawn:
            place = self.tree.expanded.index(self.node)
            spread = torch.zeros_like(left)
            said = self.tree.distributions[self.row, place].to(left.device)
            spread[self.tree.token_ids.to(left.device)] = said.double().exp()
            for token in self.drawn[self.node]:
                chance = torch.rand((), dtype=left.dtype, device=left.device)
                missing = (left - spread).clamp_(min=0)
                if chance * spread[token] < left[token] or not missing.any():
                    return torch.tensor([token], device=scores.device)
                left, spread = missing / missing.sum(), without(spread, token)
        return torch.multinomial(left, num_samples=1)


def without(spread: Tensor, token: int) -> Tensor:
    """(V,) the distribution of the next draw without replacement."""
    spread = spread.clone()
    spread[token] = 0
    return spread / spread.sum().clamp(min=torch.finfo(spread.dtype).tiny)
