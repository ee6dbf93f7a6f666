"""Draft trees as index tensors: growing one, choosing where to contemplate, laying it out for the verify pass.

Pure index work with a leading batch dimension. It knows no model: the draft is a callable that a lookup table can
replace, the cache is a row of position ids. Nothing here reads a value back to the host, so a GPU is never waited for,
but for `confidence_threshold`, which makes the size of a tree depend on values.

Running the draft and the target is left to others (modeling_confu.py, target.py), and so is walking the tree
(verification.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class DraftTree:
    """A batch of draft trees with T drafted nodes each. Node 0 is the root: the newest decided token.

    Attributes:
        tokens: (B, T+1) long, target-vocabulary ids; column 0 is the root.
        parents: (B, T+1) long, node index of each node's parent; -1 for the root, and `parents[b, i] < i`.
        depths: (B, T+1) long, distance from the root.
        log_probs: (B, T+1) float, joint log-probability of the path from the root under the draft; root 0.0.

    Raises:
        ValueError: if the four shapes differ.
    """

    tokens: Tensor
    parents: Tensor
    depths: Tensor
    log_probs: Tensor

    def __post_init__(self):
        shapes = {name: tuple(getattr(self, name).shape) for name in ("tokens", "parents", "depths", "log_probs")}
        if len(set(shapes.values())) != 1 or self.tokens.dim() != 2 or self.tokens.shape[1] == 0:
            raise ValueError(
                f"got a tree of shapes {shapes}; expected all of them equal, (batch, nodes) with nodes >= 1"
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


class DraftStep(Protocol):
    """One pass of the draft over a layer of the tree."""

    def __call__(self, tokens: Tensor, parents: Tensor | None) -> tuple[Tensor, Tensor]:
        """Score the children of W nodes.

        Args:
            tokens: (B, W) long, target-vocabulary ids.
            parents: (B, W) long, index of each token's parent among the rows of the PREVIOUS call; None on the first
                call, where W = 1 and `tokens` is the root.

        Returns:
            child_tokens (B, W, top_k) long, the most likely children of each row as target-vocabulary ids, and
            child_log_probs (B, W, top_k) float, their CONDITIONAL log-probabilities, sorted descending.
        """


def grow_tree(
    step: DraftStep, root_tokens: Tensor, *, total_tokens: int, depth: int, confidence_threshold: float = 0.0
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
        depth: greatest depth of a drafted node.
        confidence_threshold: nodes of a smaller joint probability are left out, in [0, 1). A batch keeps as many nodes
            as its largest tree needs.

    Raises:
        ValueError: if `total_tokens` or `depth` is negative.
    """
    if total_tokens < 0 or depth < 0:
        raise ValueError(f"got total_tokens={total_tokens} and depth={depth}; expected both to be 0 or more")
    if total_tokens == 0:
        depth = 0
    beam_tokens = root_tokens.unsqueeze(1)  # (B, 1)
    beam_ids = torch.zeros_like(beam_tokens)  # position in the list of candidates; the root is candidate 0
    beam_log_probs = torch.zeros(beam_tokens.shape, device=root_tokens.device)
    beam_parents = None
    # One entry per layer, each (B, candidates of the layer); the entries side by side are the list of candidates.
    tokens, parent_ids, depths, log_probs = [beam_tokens], [beam_ids], [beam_ids], [beam_log_probs]

    floor = math.log(confidence_threshold) if confidence_threshold > 0 else None
    num_candidates = 1
    for layer in range(1, depth + 1):
        child_tokens, child_log_probs = step(beam_tokens, beam_parents)
        top_k = child_tokens.shape[-1]
        # Rounding in the draft may leave a log-probability just above 0, and the child would overtake its parent.
        joint = beam_log_probs.unsqueeze(-1) + child_log_probs.clamp(max=0.0)  # (B, W, top_k)
        tokens.append(child_tokens.flatten(1))  # (B, W * top_k)
        log_probs.append(joint.flatten(1))
        parent_ids.append(beam_ids.unsqueeze(-1).expand_as(child_tokens).flatten(1))
        depths.append(torch.full_like(tokens[-1], layer))
        if layer == depth or (floor is not None and not _can_grow(log_probs, total_tokens, floor)):
            break
        chosen = _best(log_probs[-1], top_k)  # (B, top_k), positions within this layer
        beam_tokens = tokens[-1].gather(1, chosen)
        beam_log_probs = log_probs[-1].gather(1, chosen)
        # Candidates lie row after row. With top_k = 3, candidate 4 is the second child of row 1: 4 // 3 = 1.
        beam_parents = chosen // top_k
        beam_ids = chosen + num_candidates
        num_candidates += tokens[-1].shape[1]

    all_log_probs = torch.cat(log_probs, dim=1)
    count = total_tokens + 1
    if floor is not None:
        count = min(count, int((all_log_probs >= floor).sum(1).max()))
    kept = _best(all_log_probs, count).sort(dim=1).values  # ascending: parents first, the root at 0
    # A parent's new index is its place among the kept. Kept candidates 0 1 2 5, parents 0 0 0 2: new parents 0 0 0 2,
    # and a child of candidate 5 would find it at index 3.
    parents = torch.searchsorted(kept, torch.cat(parent_ids, dim=1).gather(1, kept))
    parents[:, 0] = -1
    return DraftTree(
        tokens=torch.cat(tokens, dim=1).gather(1, kept),
        parents=parents,
        depths=torch.cat(depths, dim=1).gather(1, kept),
        log_probs=all_log_probs.gather(1, kept),
    )


def _can_grow(log_probs: list[Tensor], total_tokens: int, floor: float) -> bool:
    """Whether a child of the newest layer could be among the best `total_tokens` and above the floor: it is never
    likelier than its parent, and among equals the earlier wins."""
    best = log_probs[-1].amax(1)
    listed = torch.cat(log_probs, dim=1)
    grows = best >= floor
    if listed.shape[1] > total_tokens:
        grows &= best > listed.topk(total_tokens + 1, dim=1).values[:, -1]
    return bool(grows.any())


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
        raise ValueError(f"got count={count} contemplate tokens; expected 0 or more")
    reached = tree.log_probs.exp()
    ends = reached.scatter_add(1, tree.parents[:, 1:], -reached[:, 1:])
    return _best(ends, count).sort(dim=1).values


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


@dataclass(frozen=True)
class VerifyLayout:
    """What the verify pass feeds to the target: Q = (T+1) + M rows, the nodes and then the contemplate tokens.

    Keys lie in the order [S soft prompts | C committed | T+1 nodes | M contemplate tokens].

    Attributes:
        tokens: (B, T+1) long, tokens of the nodes.
        contemplate_nodes: (B, M) long, the node each contemplate token belongs to; M may be 0.
        position_ids: (B, Q) long.
        key_position_ids: (B, S+C+Q) long; -1 for soft prompts and for empty slots.
        mask: (B, Q, S+C+Q) bool, True = may attend.
        soft_prompt_length: S.
    """

    tokens: Tensor
    contemplate_nodes: Tensor
    position_ids: Tensor
    key_position_ids: Tensor
    mask: Tensor
    soft_prompt_length: int


def verify_layout(
    tree: DraftTree, contemplate_nodes: Tensor, *, committed_position_ids: Tensor, soft_prompt_length: int
) -> VerifyLayout:
    """Positions and attention mask of one verify pass.

    A node sees the committed slots, its ancestors and itself. A contemplate token sees the soft prompts, the committed
    slots, its node, that node's ancestors, and itself. Nothing else sees a soft prompt or a contemplate token.

    A tree of four nodes: 1 and 2 are children of the root, 3 is a child of 1; nodes 1 and 3 carry contemplate tokens.
    S = 2 soft prompts, C = 3 committed slots of which the first is empty (`-`); `#` = may attend:

        keys            s s   - c c   0 1 2 3   c1 c3
        node 0          . .   . # #   # . . .   .  .
        node 1          . .   . # #   # # . .   .  .
        node 2          . .   . # #   # . # .   .  .
        node 3          . .   . # #   # # . #   .  .
        contemplate 1   # #   . # #   # # . .   #  .
        contemplate 3   # #   . # #   # # . #   .  #

    Positions, if the committed slots hold positions -1 (empty), 0, 1:
        root            1 + 1 = 2     the first position not committed yet
        nodes 1 and 3   2 + depth     = 3 and 4
        contemplate 3   4 + 1 = 5     where the token after node 3 will be

    Args:
        tree: T drafted nodes.
        contemplate_nodes: (B, M) long, node indices; M may be 0.
        committed_position_ids: (B, C) long, position of each committed cache slot, -1 = empty or padding. The root
            takes the position after the greatest one (0 if there is none).
        soft_prompt_length: S, slots in front of the committed ones.

    Raises:
        ValueError: if the batch sizes differ or S is negative.
    """
    batch_size, num_nodes = tree.tokens.shape
    if not batch_size == contemplate_nodes.shape[0] == committed_position_ids.shape[0] or soft_prompt_length < 0:
        raise ValueError(
            f"got a tree of shape {tuple(tree.tokens.shape)}, contemplate_nodes {tuple(contemplate_nodes.shape)}, "
            f"committed_position_ids {tuple(committed_position_ids.shape)}, soft_prompt_length={soft_prompt_length}; "
            "expected the same batch size in all of them and a length of 0 or more"
        )
    no_slots = committed_position_ids.new_full((batch_size, 1 + soft_prompt_length), -1)
    root_positions = torch.cat([no_slots, committed_position_ids], dim=1).amax(dim=1, keepdim=True) + 1  # (B, 1)
    node_positions = root_positions + tree.depths
    position_ids = torch.cat([node_positions, node_positions.gather(1, contemplate_nodes) + 1], dim=1)  # (B, Q)

    ancestors = tree.ancestor_mask()
    committed_start = soft_prompt_length
    nodes_start = committed_start + committed_position_ids.shape[1]
    contemplate_start = nodes_start + num_nodes
    num_rows = position_ids.shape[1]
    mask = ancestors.new_zeros(batch_size, num_rows, nodes_start + num_rows)
    mask[:, num_nodes:, :committed_start] = True
    mask[:, :, committed_start:nodes_start] = (committed_position_ids >= 0).unsqueeze(1)
    mask[:, :num_nodes, nodes_start:contemplate_start] = ancestors
    rows = contemplate_nodes.unsqueeze(-1).expand(-1, -1, num_nodes)  # (B, M, T+1)
    mask[:, num_nodes:, nodes_start:contemplate_start] = ancestors.gather(1, rows)
    mask[:, num_nodes:, contemplate_start:].diagonal(dim1=1, dim2=2).fill_(True)
    return VerifyLayout(
        tokens=tree.tokens,
        contemplate_nodes=contemplate_nodes,
        position_ids=position_ids,
        key_position_ids=torch.cat([no_slots[:, 1:], committed_position_ids, position_ids], dim=1),
        mask=mask,
        soft_prompt_length=soft_prompt_length,
    )


def _best(scores: Tensor, count: int) -> Tensor:
    """(B, min(count, n)) indices of the greatest of (B, n) scores, best first; among equals the earlier one."""
    # Not torch.topk: it may put a later one first among equals, and a certain child ties with its parent.
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :count]
