"""Lays a draft tree out for the verify pass: rows, positions, who may attend to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import refusal
from ..host import send
from .draft_tree import DraftTree


@dataclass(frozen=True)
class VerifyLayout:
    """What the verify pass feeds to the target: Q = (T+1) + n M rows, the nodes and then the contemplate tokens: all that
    come first behind their nodes, then all that come second, ...

    Keys lie in the order [S soft prompts | slots of the cache], where the rows of a batch row of length C lie in the
    slots C .. C+Q-1: K = the greatest C + Q.

    A node sees the committed slots, its ancestors and itself. A contemplate token sees the soft prompts, the committed
    slots, its node, that node's ancestors, the contemplate tokens between, and itself. Nothing else sees a soft prompt or a
    contemplate token.

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
        contemplate 3   4 + 1 = 5     where the token after node 3 will be; a second one stands at 6

    Attributes:
        tokens: (B, T+1) long, tokens of the nodes.
        contemplate_nodes: (B, M) long, the nodes with contemplate tokens; M may be 0.
        position_ids: (B, Q) long, for the rotary embedding.
        places: (B, Q) long, where a row stands among the slots, for sliding windows and chunks; the same numbers as
            position_ids, unless plain decoding counts otherwise (`position_offset`).
        key_places: (B, S+K) long; -1 for soft prompts and for empty slots.
        mask: (B, Q, S+K) bool, True = may attend.
        soft_prompt_length: S.
        contemplate_length: n, contemplate tokens in a row behind each of these nodes.
        sees_all: known to the host: the one row of this pass sees every slot, so that it needs no mask.
    """

    tokens: Tensor
    contemplate_nodes: Tensor
    position_ids: Tensor
    places: Tensor
    key_places: Tensor
    mask: Tensor
    soft_prompt_length: int
    contemplate_length: int = 1
    sees_all: bool = False

    @property
    def contemplate_rows(self) -> int:
        """n M."""
        return self.contemplate_length * self.contemplate_nodes.shape[1]

    @property
    def contemplated(self) -> Tensor:
        """(B, T+1) bool: which nodes carry a contemplate token."""
        return torch.zeros_like(self.tokens, dtype=torch.bool).scatter_(1, self.contemplate_nodes, True)


def verify_layout(
    tree: DraftTree,
    contemplate_nodes: Tensor,
    *,
    slot_position_ids: Tensor,
    soft_prompt_length: int,
    contemplate_length: int = 1,
    lengths: Sequence[int] | None = None,
    root_places: Tensor | None = None,
    position_offset: Tensor | int = 0,
    has_gaps: bool = True,
) -> VerifyLayout:
    """Positions and attention mask of one verify pass; [`VerifyLayout`] draws it.

    Args:
        tree: T drafted nodes.
        contemplate_nodes: (B, M) long, node indices; M may be 0.
        slot_position_ids: (B, C) long, place of each committed cache slot, -1 = empty or padding.
        soft_prompt_length: S, slots in front of the committed ones.
        contemplate_length: n, contemplate tokens behind each of these nodes.
        lengths: committed slots of each batch row; None = C for all.
        root_places: (B, 1) long; None = the place after the greatest committed one (0 if there is none).
        position_offset: (B, 1) long or 0, what position ids differ by from places.
        has_gaps: whether a committed slot may be empty or padding.

    Raises:
        ValueError: if the batch sizes differ or S is negative.
    """
    batch_size, num_nodes = tree.tokens.shape
    _check_arguments(tree, contemplate_nodes, slot_position_ids, soft_prompt_length)
    device, width = tree.tokens.device, num_nodes + contemplate_length * contemplate_nodes.shape[1]
    if root_places is None:
        root_places = torch.nn.functional.pad(slot_position_ids, (1, 0), value=-1).amax(dim=1, keepdim=True) + 1
    lengths = [slot_position_ids.shape[1]] * batch_size if lengths is None else lengths
    if width == 1 and len(set(lengths)) == 1 and not has_gaps and not soft_prompt_length:
        return _plain_step(tree, contemplate_nodes, slot_position_ids[:, : lengths[0]], root_places, position_offset)
    node_places = root_places + tree.depths
    ends = node_places.gather(1, contemplate_nodes)
    places = torch.cat([node_places, *(ends + 1 + number for number in range(contemplate_length))], dim=1)  # (B, Q)
    rows = send(lengths, device)[:, None] + torch.arange(width, device=device)  # (B, Q) slots
    empty = max(lengths) + width - slot_position_ids.shape[1]
    slots = torch.nn.functional.pad(slot_position_ids, (0, empty), value=-1)  # (B, K)
    mask = (slots >= 0)[:, None].repeat(1, width, 1)
    mask.scatter_(2, rows[:, None].expand(-1, width, -1), _row_mask(tree, contemplate_nodes, contemplate_length))
    prompts = mask.new_zeros(batch_size, width, soft_prompt_length)
    prompts[:, num_nodes:] = True
    no_places = slots.new_full((batch_size, soft_prompt_length), -1)
    return VerifyLayout(
        tokens=tree.tokens,
        contemplate_nodes=contemplate_nodes,
        position_ids=places + position_offset,
        places=places,
        key_places=torch.cat([no_places, slots.scatter(1, rows, places)], dim=1),
        mask=torch.cat([prompts, mask], dim=2),
        soft_prompt_length=soft_prompt_length,
        contemplate_length=contemplate_length,
    )


def _check_arguments(tree: DraftTree, contemplate_nodes: Tensor, slots: Tensor, soft_prompt_length: int) -> None:
    if not len(tree.tokens) == len(contemplate_nodes) == len(slots) or soft_prompt_length < 0:
        raise refusal(
            "verify_layout",
            got=f"a tree of shape {tuple(tree.tokens.shape)}, contemplate_nodes {tuple(contemplate_nodes.shape)}, "
            f"slot_position_ids {tuple(slots.shape)}, soft_prompt_length={soft_prompt_length}",
            expected="the same batch size in all of them and a length of 0 or more",
            fix="Take them from one decoding state.",
        )


def _plain_step(
    tree: DraftTree, contemplate_nodes: Tensor, slots: Tensor, root_places: Tensor, position_offset: Tensor | int
) -> VerifyLayout:
    """The layout of roots alone that see all `slots` `(B, C)`, without index work."""
    return VerifyLayout(
        tokens=tree.tokens,
        contemplate_nodes=contemplate_nodes,
        position_ids=root_places + position_offset,
        places=root_places,
        key_places=torch.cat([slots, root_places], dim=1),
        mask=torch.ones(len(slots), 1, slots.shape[1] + 1, dtype=torch.bool, device=slots.device),
        soft_prompt_length=0,
        sees_all=True,
    )


def _row_mask(tree: DraftTree, contemplate_nodes: Tensor, length: int) -> Tensor:
    """Which row of the pass sees which, (B, Q, Q) bool: the right part of the drawing of [`VerifyLayout`]."""
    num_nodes, count = tree.tokens.shape[1], contemplate_nodes.shape[1]
    ancestors, width = tree.ancestor_mask(), num_nodes + length * count
    mask = ancestors.new_zeros(len(ancestors), width, width)
    mask[:, :num_nodes, :num_nodes] = ancestors
    rows = contemplate_nodes.unsqueeze(-1).expand(-1, -1, num_nodes)  # (B, M, T+1)
    mask[:, num_nodes:, :num_nodes] = ancestors.gather(1, rows).repeat(1, length, 1)
    for behind in range(length):  # a node's own tokens lie `count` rows apart
        mask[:, num_nodes:, num_nodes:].diagonal(-behind * count, dim1=1, dim2=2).fill_(True)
    return mask
