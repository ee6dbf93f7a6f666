"""Grows a draft tree, layer by layer, as EAGLE-2 does.

Pure index work with a leading batch dimension. It knows no model: the draft is a callable that a lookup table can
replace. Nothing here reads a value back to the host, so a GPU is never waited for, but for `confidence_threshold` and
`another_step`, which make the size of a tree depend on values. Laying a tree out for the verify pass is layout.py's, where a walk ends
ends.py's, walking decoding/acceptance.py's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ..errors import refusal
from .draft_tree import DraftTree, best_first
from .pruning import prune

# Asked between two layers: whether to draft one more. Gets, of the candidates of the newest layer, each (B, candidates):
# the parents, numbered through all candidates so far (the root is 0), and the joint log-probabilities.
AnotherStep = Callable[[Tensor, Tensor], bool]


class DraftStep(Protocol):
    """One pass of the draft over a layer of the tree."""

    def __call__(self, tokens: Tensor, parents: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
        """Score the children of W nodes.

        Args:
            tokens: (B, W) long, target-vocabulary ids.
            parents: (B, W) long, index of each token's parent among the rows of the PREVIOUS call; None on the first
                call, where W = 1 and `tokens` is the root.
            top_k: children wanted for each row; fewer may come back.

        Returns:
            child_tokens (B, W, top_k) long, the most likely children of each row as target-vocabulary ids, and
            child_log_probs (B, W, top_k) float, their CONDITIONAL log-probabilities, sorted descending.
        """


def grow_tree(
    step: DraftStep,
    root_tokens: Tensor,
    *,
    total_tokens: int,
    depth: int,
    top_k: int,
    confidence_threshold: float = 0.0,
    another_step: AnotherStep | None = None,
) -> DraftTree:
    """Grow the dynamic draft tree of EAGLE-2.

    Layer 1 is the root's `top_k` children. Then, layer by layer, the `top_k` candidates of the newest layer with the
    best joint log-probability are expanded. At last the best `total_tokens` candidates of all layers stay.

    Sorts are stable and candidates are listed layer by layer, so among equals the earlier one wins. As a child is
    never likelier than its parent, a candidate's parent always ranks before it: every cut of the ranking is a tree.

    Args:
        step: the draft; called `depth` times, with widths 1, top_k, top_k, ... (never if `total_tokens` is 0). With a
            threshold, not again once no further node could stay in the tree.
        root_tokens: (B,) long.
        total_tokens: T, drafted nodes to keep, root not counted. With fewer candidates than that the tree is smaller.
        depth: greatest depth of a drafted node. A `ValueError` is raised if it or `total_tokens` is negative.
        top_k: nodes expanded per layer, and children considered for each.
        confidence_threshold: nodes of a smaller joint probability are left out, in [0, 1); a batch keeps the most.
        another_step: asked after each layer but the last whether to go on.
    """
    _check_size(total_tokens, depth)
    depth = depth if total_tokens else 0
    beam_tokens = root_tokens.unsqueeze(1)  # (B, 1)
    beam_ids = torch.zeros_like(beam_tokens)  # position in the list of candidates; the root is candidate 0
    beam_log_probs = torch.zeros(beam_tokens.shape, device=root_tokens.device)
    beam_parents = None
    # One entry per layer, each (B, candidates of it); side by side they are the list of candidates.
    tokens, parent_ids, depths, log_probs = [beam_tokens], [beam_ids], [beam_ids], [beam_log_probs]
    floor = math.log(confidence_threshold) if confidence_threshold > 0 else None
    num_candidates = 1
    for layer in range(1, depth + 1):
        child_tokens, child_log_probs = step(beam_tokens, beam_parents, top_k)
        children = child_tokens.shape[-1]
        # Rounding in the draft may leave a log-probability just above 0, and the child would overtake its parent.
        joint = beam_log_probs.unsqueeze(-1) + child_log_probs.clamp(max=0.0)  # (B, W, top_k)
        tokens.append(child_tokens.flatten(1))  # (B, W * top_k)
        log_probs.append(joint.flatten(1))
        parent_ids.append(beam_ids.unsqueeze(-1).expand_as(child_tokens).flatten(1))
        depths.append(torch.full_like(tokens[-1], layer))
        last = layer == depth or (floor is not None and not _can_grow(log_probs, total_tokens, floor))
        if last or (another_step and not another_step(parent_ids[-1], log_probs[-1])):
            break
        chosen = best_first(log_probs[-1], top_k)  # (B, top_k), positions within this layer
        beam_tokens = tokens[-1].gather(1, chosen)
        beam_log_probs = log_probs[-1].gather(1, chosen)
        # Candidates lie row after row. With three each, candidate 4 is the second child of row 1: 4 // 3 = 1.
        beam_parents = chosen // children
        beam_ids = chosen + num_candidates
        num_candidates += tokens[-1].shape[1]
    candidates = DraftTree(*(torch.cat(layers, dim=1) for layers in (tokens, parent_ids, depths, log_probs)))
    return _best_tree(candidates, total_tokens, floor)


def _check_size(total_tokens: int, depth: int) -> None:
    if total_tokens < 0 or depth < 0:
        got = f"total_tokens={total_tokens} and depth={depth}"
        raise refusal("grow_tree", got=got, expected="both 0 or more", fix="0 = no draft.")


def _best_tree(candidates: DraftTree, total_tokens: int, floor: float | None) -> DraftTree:
    """The tree of the best candidates; ascending, so that parents come first and the root is node 0."""
    count = total_tokens + 1
    if floor is not None:
        count = min(count, int((candidates.log_probs >= floor).sum(1).max()))
    return prune(candidates, best_first(candidates.log_probs, count).sort(dim=1).values)


def _can_grow(log_probs: list[Tensor], total_tokens: int, floor: float) -> bool:
    """Whether a child of the newest layer could be among the best `total_tokens` and above the floor: it is never
    likelier than its parent, and among equals the earlier wins."""
    best = log_probs[-1].amax(1)
    listed = torch.cat(log_probs, dim=1)
    grows = best >= floor
    if listed.shape[1] > total_tokens:
        grows &= best > listed.topk(total_tokens + 1, dim=1).values[:, -1]
    return bool(grows.any())
