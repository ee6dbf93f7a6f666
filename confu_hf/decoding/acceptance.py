"""Acceptance: which path of a verified tree the target would have written itself, and the token that follows it.

The walk asks at every node for ONE token, with the call, the float type and the random stream of plain `generate`,
and follows it if it is a child of the node. So the text, greedy or sampled, is that of plain decoding, whatever was
drafted. Trees whose children were drawn go by another rule for the same distribution: rejection.py.

It gets logits that are already computed; the forward pass is target/passes.py's, the cache's rows target/cache.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from .. import host
from ..errors import refusal
from ..tree.draft_tree import DraftTree
from ..tree.drawing import DrawnTree
from .rejection import RejectionSampler
from .rules import ROW_CRITERIA


@dataclass(frozen=True)
class Acceptance:
    """What one round decided. Row `b` emits `counts[b]` tokens: at least one, or none if it had ended before.

    Attributes:
        path: (B, P) long, accepted nodes from the root (column 0) down, padded with -1. Emitted token i is the target's
            choice at node `path[:, i]`.
        tokens: (B, P) long, emitted tokens, padded with -1: those of nodes `path[:, 1:]`, then one that follows the
            last node.
        counts: tokens emitted by each row.
        finished: whether a stopping criterion fired on the last emitted token; `path` then ends at the node it follows.
        scores: of each row, one (1, V) float32 per emitted token, after the processors; empty unless recorded.
        raw_logits: the same before the processors.
        nodes: `path` on the host, without the padding. emitted: `tokens` likewise.
        marks: of each of the `columns` that were asked for, of each row, its numbers at `nodes`.

    With path 0 1 4, node tokens 7 (root), 8 (node 1), 9 (node 4), and 5 drawn at node 4: tokens = 8 9 5.
    """

    path: Tensor
    tokens: Tensor
    counts: tuple[int, ...]
    finished: tuple[bool, ...]
    scores: tuple[tuple[Tensor, ...], ...] = ()
    raw_logits: tuple[tuple[Tensor, ...], ...] = ()
    nodes: tuple[tuple[int, ...], ...] = ()
    emitted: tuple[tuple[int, ...], ...] = ()
    marks: tuple[tuple[tuple[int, ...], ...], ...] = ()

    @property
    def counts_tensor(self) -> Tensor:
        """`counts` as (B,) long."""
        return host.send(self.counts, self.path.device)


@dataclass(frozen=True)
class _Walk:
    """The walk of one row: nodes passed, tokens emitted, whether it ended."""

    path: list[int]
    tokens: list[int]
    finished: bool = False
    scores: tuple[Tensor, ...] = ()
    raw_logits: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Sampler:
    """Draws the next token exactly as `GenerationMixin._sample` does, random stream included."""

    do_sample: bool

    def at(self, node: int) -> Sampler:
        """The next call is about this node: here all are alike."""
        return self

    def __call__(self, scores: Tensor) -> Tensor:
        """(B,) long, one token for each row of processed scores (B, V) float32."""
        if self.do_sample:
            probs = torch.nn.functional.softmax(scores, dim=-1)
            return torch.multinomial(probs, num_samples=1).squeeze(1)
        return torch.argmax(scores, dim=-1)


def accept(
    tree: DraftTree,
    logits: Tensor,
    input_ids: Tensor,
    *,
    processors: LogitsProcessorList | Sequence[LogitsProcessorList],
    do_sample: bool,
    stopping_criteria: StoppingCriteriaList,
    lengths: Sequence[int] | None = None,
    finished: Sequence[bool] | None = None,
    record: bool = False,
    past_scores: tuple[Tensor, ...] | None = (),
    columns: Sequence[Tensor] = (),
) -> Acceptance:
    """Walk each tree from its root along the target's own choices.

    Args:
        tree: the verified trees.
        logits: (B, T+1, V), the target's logits at every node, any float type.
        input_ids: (B, n) long, all decided tokens. lengths: how many each row has; None = n. The last one is the
            root's.
        processors: called once per emitted token, with the ids up to the node and that node's logits in float32; one
            list for all rows, or one for each.
        do_sample: draw from the processed distribution, or take its argmax.
        stopping_criteria: asked after every emitted token, with the ids including it.
        finished: rows that have ended and emit nothing; None = none.
        record: return scores and raw logits.
        past_scores: scores of earlier rounds (one row only), so that the criteria see all of them as in plain `generate`.
            They see None if it is None, or if nothing is recorded.
        columns: (B, T+1) integers or bool, to be read together with the tree: see `Acceptance.marks`.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    if logits.shape[:2] != tree.tokens.shape or len(input_ids) != len(tree.tokens):
        raise refusal(
            "accept",
            got=f"trees of shape {tuple(tree.tokens.shape)}, logits {tuple(logits.shape)}, ids {tuple(input_ids.shape)}",
            expected="one row of logits per node and one row of ids per tree",
            fix="Pass the trees that were verified.",
        )
    lengths = [input_ids.shape[1]] * len(input_ids) if lengths is None else lengths
    finished = [False] * len(input_ids) if finished is None else finished
    if isinstance(processors, LogitsProcessorList):
        processors = (processors,) * len(input_ids)
    # On a CPU waiting costs nothing, and an argmax over the whole vocabulary pays only at nodes the walk comes to.
    greedy = host.waits(logits.device) and not (do_sample or record or any(processors))
    choices = greedy_choices(logits) if greedy else None
    tokens, parents, choices, marks, input_ids = _read(tree, choices, columns, input_ids, stopping_criteria)
    walks = []
    for row, length in enumerate(lengths):
        children, ids = _children(tokens[row], parents[row]), input_ids[row : row + 1, :length]
        if finished[row]:
            walks.append(_Walk([], [], True))
        elif choices is not None:
            walks.append(walk_greedily(children, choices[row], ids, stopping_criteria))
        else:
            rules = (processors[row], _sampler(tree, row, do_sample), stopping_criteria, record, past_scores)
            walks.append(walk_stepwise(children, logits[row : row + 1], ids, *rules))
    return _gather(walks, marks, tree.tokens.device)


def _sampler(tree: DraftTree, row: int, do_sample: bool) -> Sampler | RejectionSampler:
    return RejectionSampler(tree, row) if do_sample and isinstance(tree, DrawnTree) else Sampler(do_sample)


def _read(
    tree: DraftTree,
    choices: Tensor | None,
    columns: Sequence[Tensor],
    input_ids: Tensor,
    stopping_criteria: StoppingCriteriaList,
) -> tuple:
    """Tokens, parents, choices and columns as lists, read at once; and the ids, where criteria are to be asked of them."""
    to_read = [tree.tokens, tree.parents, *columns]
    if choices is None:
        tokens, parents, *marks = (column.tolist() for column in host.read(*to_read))
        return tokens, parents, None, marks, input_ids
    to_read.append(choices.to(tree.tokens.device))
    # Criteria of these kinds answer on whatever device they are asked: on the host nobody waits for them.
    if all(type(criterion) in ROW_CRITERIA for criterion in stopping_criteria):
        *to_read, input_ids = host.read(*to_read, input_ids)
    tokens, parents, *marks, choices = (column.tolist() for column in host.read(*to_read))
    return tokens, parents, choices, marks, input_ids


def _gather(walks: list[_Walk], marks: Sequence[Sequence[Sequence[int]]], device: torch.device) -> Acceptance:
    width = max(len(walk.path) for walk in walks)
    path, tokens = (
        host.send([values + [-1] * (width - len(values)) for values in lists], device, torch.long)
        for lists in ([walk.path for walk in walks], [walk.tokens for walk in walks])
    )
    return Acceptance(
        path=path,
        tokens=tokens,
        counts=tuple(len(walk.path) for walk in walks),
        finished=tuple(walk.finished for walk in walks),
        scores=tuple(walk.scores for walk in walks),
        raw_logits=tuple(walk.raw_logits for walk in walks),
        nodes=tuple(tuple(walk.path) for walk in walks),
        emitted=tuple(tuple(walk.tokens) for walk in walks),
        marks=tuple(
            tuple(tuple(row[node] for node in walk.path) for row, walk in zip(column, walks, strict=True))
            for column in marks
        ),
    )


def walk_stepwise(
    children: dict[tuple[int, int], int],
    logits: Tensor,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    sampler: Sampler | RejectionSampler,
    stopping_criteria: StoppingCriteriaList,
    record: bool = False,
    past_scores: tuple[Tensor, ...] | None = (),
) -> _Walk:
    """The walk for any processors and any way to draw: plain decoding's loop body, once per node.

    Args:
        children: node by (parent, token). logits: (1, T+1, V). input_ids: (1, n). The others: see [`accept`].
    """
    num_past = input_ids.shape[1]
    # A path emits at most one token per node. Views of one buffer spare a copy of all ids per token.
    ids = torch.cat([input_ids, input_ids.new_empty(1, logits.shape[1])], dim=1)
    path, tokens, scores, raw_logits, finished = [], [], (), (), False
    node: int | None = 0
    while node is not None and not finished:
        path.append(node)
        end = num_past + len(path)  # ids[:, :end] will include the token drawn now
        node_logits = logits[:, node].to(copy=True, dtype=torch.float32, device=input_ids.device)
        node_scores = processors(ids[:, : end - 1], node_logits)
        if record:
            scores += (node_scores,)
            raw_logits += (node_logits,)
        ids[:, end - 1] = sampler.at(node)(node_scores)
        seen_scores = past_scores + scores if record and past_scores is not None else None
        finished = bool(stopping_criteria(ids[:, :end], seen_scores).all())
        tokens.append(ids[0, end - 1].item())
        node = children.get((node, tokens[-1]))
    return _Walk(path, tokens, finished, scores, raw_logits)


def greedy_choices(logits: Tensor) -> Tensor:
    """(B, T+1) long, the target's choice at every node, where it depends on that node's logits alone."""
    if logits.dtype == torch.float64:
        logits = logits.float()  # plain decoding rounds before its argmax, which can make a tie
    return logits.argmax(dim=-1)


def walk_greedily(
    children: dict[tuple[int, int], int],
    choices: list[int],
    input_ids: Tensor,
    stopping_criteria: StoppingCriteriaList,
) -> _Walk:
    """The walk along `choices`, one per node. See [`walk_stepwise`] for the other arguments."""
    path = [0]
    while (child := children.get((path[-1], choices[path[-1]]))) is not None:
        path.append(child)
    tokens, finished = [choices[node] for node in path], False
    if stopping_criteria:
        ids = torch.cat([input_ids, host.send([tokens], input_ids.device)], dim=1)
        for num_emitted in range(1, len(path) + 1):
            finished = bool(stopping_criteria(ids[:, : input_ids.shape[1] + num_emitted], None).all())
            if finished:
                path, tokens = path[:num_emitted], tokens[:num_emitted]
                break
    return _Walk(path, tokens, finished)


def _children(tokens: list[int], parents: list[int]) -> dict[tuple[int, int], int]:
    """Node by (parent, token). Should a token be drafted twice under one parent, the earlier node is taken."""
    children: dict[tuple[int, int], int] = {}
    for node, key in enumerate(zip(parents, tokens, strict=True)):
        children.setdefault(key, node)
    return children
