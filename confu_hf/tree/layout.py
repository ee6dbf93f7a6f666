"""Lays a draft tree out for the verify pass: rows, positions, who may attend to whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .draft_tree import DraftTree


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

    mask = _mask(tree, contemplate_nodes, committed_position_ids >= 0, soft_prompt_length)
    return VerifyLayout(
        tokens=tree.tokens,
        contemplate_nodes=contemplate_nodes,
        position_ids=position_ids,
        key_position_ids=torch.cat([no_slots[:, 1:], committed_position_ids, position_ids], dim=1),
        mask=mask,
        soft_prompt_length=soft_prompt_length,
    )


def _mask(tree: DraftTree, contemplate_nodes: Tensor, committed: Tensor, soft_prompt_length: int) -> Tensor:
    """The drawing of [`verify_layout`], `(B, Q, S+C+Q)` bool; `committed` `(B, C)` bool, False for empty slots."""
    num_nodes, num_rows = tree.tokens.shape[1], tree.tokens.shape[1] + contemplate_nodes.shape[1]
    nodes_start = soft_prompt_length + committed.shape[1]
    contemplate_start = nodes_start + num_nodes
    ancestors = tree.ancestor_mask()
    mask = ancestors.new_zeros(len(committed), num_rows, nodes_start + num_rows)
    mask[:, num_nodes:, :soft_prompt_length] = True
    mask[:, :, soft_prompt_length:nodes_start] = committed.unsqueeze(1)
    mask[:, :num_nodes, nodes_start:contemplate_start] = ancestors
    rows = contemplate_nodes.unsqueeze(-1).expand(-1, -1, num_nodes)  # (B, M, T+1)
    mask[:, num_nodes:, nodes_start:contemplate_start] = ancestors.gather(1, rows)
    mask[:, num_nodes:, contemplate_start:].diagonal(dim1=1, dim2=2).fill_(True)
    return mask
