"""Grafts chains of tokens onto a draft tree: what several drafters propose becomes one tree, verified at once.

Pure index work on the host; where chains come from is decoding/lookup.py's, how a network grows a tree growing.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..errors import refusal
from .draft_tree import TENSORS, DraftTree


@dataclass(frozen=True)
class Chain:
    """Tokens proposed in a row behind the root.

    Attributes:
        tokens: target-vocabulary ids, the child of the root first.
        log_probs: for each token the joint log-probability from the root down to it; never rising.

    Raises:
        ValueError: if there is not one log-probability per token, or if they rise along the chain.
    """

    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]

    def __post_init__(self):
        above = (0.0, *self.log_probs)
        if len(self.tokens) != len(self.log_probs) or any(a < b for a, b in zip(above, self.log_probs, strict=False)):
            raise refusal(
                "Chain",
                got=f"{len(self.tokens)} tokens with joint log-probabilities {self.log_probs}",
                expected="one per token, 0 or less, never rising",
                fix="Add up the conditional log-probabilities from the root down.",
            )


@dataclass
class _Nodes:
    """One tree as lists, in the order of its nodes; 0 is the root."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    log_probs: list[float]
    looked_up: list[bool]


def graft(
    tree: DraftTree, chains: Sequence[Sequence[Chain]], *, total_tokens: int, confidence_threshold: float = 0.0
) -> DraftTree:
    """The best `total_tokens` nodes of a tree and of chains that start at its root.

    A chain shares the nodes that the tree has already; a node that both propose keeps the greater joint probability.
    New nodes are marked as looked up; they stand behind the tree's, and parents before their children, so a parent is never left out for its child.

        root - a - b          and the chain a - c      gives      root - a - b
                                                                          \\ - c

    Args:
        tree: B trees. chains: for each of them any number of chains.
        total_tokens: drafted nodes kept. A batch row with fewer nodes than the fullest is filled up with children of the
            root of probability 0.
        confidence_threshold: nodes of a smaller joint probability are left out.

    Raises:
        ValueError: if there is not one list of chains per tree, or if `total_tokens` is negative.
    """
    if len(chains) != len(tree.tokens) or total_tokens < 0:
        raise refusal(
            "graft",
            got=f"{len(chains)} lists of chains for {len(tree.tokens)} trees, total_tokens={total_tokens}",
            expected="one list per tree, and 0 nodes or more",
            fix="Give a tree without chains an empty list.",
        )
    if not any(chains) and tree.tokens.shape[1] <= total_tokens + 1:
        return tree
    floor = math.log(confidence_threshold) if confidence_threshold > 0 else -math.inf
    rows = zip(*(getattr(tree, name).tolist() for name in TENSORS), strict=True)
    kept = []
    for row, row_chains in zip(rows, chains, strict=True):
        nodes = _Nodes(*row)
        _add_chains(nodes, row_chains)
        kept.append(_best(nodes, total_tokens, floor))
    return _as_tree(kept, tree)


def _add_chains(nodes: _Nodes, chains: Sequence[Chain]) -> None:
    children = {
        (parent, token): node for node, (parent, token) in enumerate(zip(nodes.parents, nodes.tokens, strict=True))
    }
    for chain in chains:
        node = 0
        for token, log_prob in zip(chain.tokens, chain.log_probs, strict=True):
            parent, node = node, children.setdefault((node, token), len(nodes.tokens))
            if node == len(nodes.tokens):
                nodes.tokens.append(token)
                nodes.parents.append(parent)
                nodes.depths.append(nodes.depths[parent] + 1)
                nodes.log_probs.append(log_prob)
                nodes.looked_up.append(True)
            else:
                nodes.log_probs[node] = max(nodes.log_probs[node], log_prob)


def _best(nodes: _Nodes, total_tokens: int, floor: float) -> _Nodes:
    """The root and the likeliest `total_tokens`; among equals the earlier, so a parent comes before its child."""
    drafted = [node for node in range(1, len(nodes.tokens)) if nodes.log_probs[node] >= floor]
    likeliest = sorted(drafted, key=lambda node: -nodes.log_probs[node])[:total_tokens]
    kept = [0, *sorted(likeliest)]
    new_index = {node: index for index, node in enumerate(kept)}
    return _Nodes(
        tokens=[nodes.tokens[node] for node in kept],
        parents=[-1, *(new_index[nodes.parents[node]] for node in kept[1:])],
        depths=[nodes.depths[node] for node in kept],
        log_probs=[nodes.log_probs[node] for node in kept],
        looked_up=[nodes.looked_up[node] for node in kept],
    )


def _as_tree(rows: list[_Nodes], like: DraftTree) -> DraftTree:
    """Rows of one width: what is missing repeats the root's token below the root, with probability 0."""
    width = max(len(row.tokens) for row in rows)
    for row in rows:
        missing = width - len(row.tokens)
        row.tokens += row.tokens[:1] * missing
        row.parents += [0] * missing
        row.depths += [1] * missing
        row.log_probs += [-math.inf] * missing
        row.looked_up += [False] * missing
    return DraftTree(
        **{name: torch.tensor([getattr(row, name) for row in rows]).to(getattr(like, name)) for name in TENSORS}
    )
