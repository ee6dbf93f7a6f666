"""Acceptance: which path of a verified tree the target would have written itself, and the token that follows it.

The walk asks at every node for ONE token, with the call, the float type and the random stream of plain `generate`,
and follows it if it is a child of the node. So the text, greedy or sampled, is that of plain decoding, whatever was
drafted.

It gets logits that are already computed; the forward pass is left to target.py, the cache rows to cache.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from ..tree.draft_tree import DraftTree


@dataclass(frozen=True)
class Acceptance:
    """What one round decided. P tokens are emitted, at least one.

    Attributes:
        path: (B, P) long, accepted nodes from the root (column 0) down. Emitted token i is the target's choice at node
            `path[:, i]`.
        tokens: (B, P) long, emitted tokens: those of nodes `path[:, 1:]`, then one that follows the last node.
        finished: a stopping criterion fired on the last emitted token; `path` then ends at the node it follows.
        scores: one (B, V) float32 per emitted token, after the processors; empty unless recorded.
        raw_logits: the same before the processors.

    With path 0 1 4, node tokens 7 (root), 8 (node 1), 9 (node 4), and 5 drawn at node 4: tokens = 8 9 5.
    """

    path: Tensor
    tokens: Tensor
    finished: bool
    scores: tuple[Tensor, ...] = ()
    raw_logits: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Sampler:
    """Draws the next token exactly as `GenerationMixin._sample` does, random stream included."""

    do_sample: bool

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
    processors: LogitsProcessorList,
    do_sample: bool,
    stopping_criteria: StoppingCriteriaList,
    record: bool = False,
    past_scores: tuple[Tensor, ...] | None = (),
) -> Acceptance:
    """Walk the tree from its root along the target's own choices.

    Args:
        tree: the verified tree; B must be 1.
        logits: (B, T+1, V), the target's logits at every node, any float type.
        input_ids: (B, n) long, all decided tokens; the last one is the root's.
        processors: called once per emitted token, with the ids up to the node and that node's logits in float32.
        do_sample: draw from the processed distribution, or take its argmax.
        stopping_criteria: asked after every emitted token, with the ids including it.
        record: return scores and raw logits.
        past_scores: scores of earlier rounds, so that the criteria see all of them as in plain `generate`. They see
            None if it is None, or if nothing is recorded.

    Raises:
        ValueError: if B is not 1 or the shapes do not fit each other.
    """
    if input_ids.shape[0] != 1 or tree.tokens.shape[0] != 1 or logits.shape[:2] != tree.tokens.shape:
        raise ValueError(
            f"got a tree of shape {tuple(tree.tokens.shape)}, logits {tuple(logits.shape)}, input_ids "
            f"{tuple(input_ids.shape)}; expected batch size 1 and one row of logits per node"
        )
    # On a CPU waiting costs nothing, and an argmax over the whole vocabulary pays only at nodes the walk comes to.
    if logits.device.type != "cpu" and not (do_sample or record or processors):
        return accept_greedy(tree, logits, input_ids, stopping_criteria)
    return accept_stepwise(
        tree, logits, input_ids, processors, Sampler(do_sample), stopping_criteria, record, past_scores
    )


def accept_stepwise(
    tree: DraftTree,
    logits: Tensor,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    sampler: Sampler,
    stopping_criteria: StoppingCriteriaList,
    record: bool = False,
    past_scores: tuple[Tensor, ...] | None = (),
) -> Acceptance:
    """The walk for any processors and any way to draw: plain decoding's loop body, once per node. See `accept`."""
    children = _children(*torch.stack([tree.tokens[0], tree.parents[0]]).tolist())
    num_past = input_ids.shape[1]
    # A path emits at most one token per node. Views of one buffer spare a copy of all ids per token.
    ids = torch.cat([input_ids, input_ids.new_empty(tree.tokens.shape)], dim=1)
    path, scores, raw_logits, finished = [], (), (), False
    node: int | None = 0
    while node is not None and not finished:
        path.append(node)
        end = num_past + len(path)  # ids[:, :end] will include the token drawn now
        node_logits = logits[:, node].to(copy=True, dtype=torch.float32, device=input_ids.device)
        node_scores = processors(ids[:, : end - 1], node_logits)
        if record:
            scores += (node_scores,)
            raw_logits += (node_logits,)
        ids[:, end - 1] = sampler(node_scores)
        seen_scores = past_scores + scores if record and past_scores is not None else None
        finished = bool(stopping_criteria(ids[:, :end], seen_scores).all())
        node = children.get((node, ids[0, end - 1].item()))
    return Acceptance(
        path=torch.tensor([path], device=tree.tokens.device),
        tokens=ids[:, num_past:end],
        finished=finished,
        scores=scores,
        raw_logits=raw_logits,
    )


def accept_greedy(
    tree: DraftTree, logits: Tensor, input_ids: Tensor, stopping_criteria: StoppingCriteriaList
) -> Acceptance:
    """The walk where each choice depends on that node's logits alone: all nodes at once, the host waits once.

    See `accept` for the arguments.
    """
    if logits.dtype == torch.float64:
        logits = logits.float()  # plain decoding rounds before its argmax, which can make a tie
    choices = logits.argmax(dim=-1).to(tree.tokens.device)
    choices, tokens, parents = torch.stack([choices[0], tree.tokens[0], tree.parents[0]]).tolist()
    children = _children(tokens, parents)
    path = [0]
    while (child := children.get((path[-1], choices[path[-1]]))) is not None:
        path.append(child)
    emitted = torch.tensor([[choices[node] for node in path]], device=input_ids.device)

    finished = False
    if stopping_criteria:
        ids = torch.cat([input_ids, emitted], dim=1)
        for num_emitted in range(1, len(path) + 1):
            finished = bool(stopping_criteria(ids[:, : input_ids.shape[1] + num_emitted], None).all())
            if finished:
                path, emitted = path[:num_emitted], emitted[:, :num_emitted]
                break
    return Acceptance(path=torch.tensor([path], device=tree.tokens.device), tokens=emitted, finished=finished)


def _children(tokens: list[int], parents: list[int]) -> dict[tuple[int, int], int]:
    """Node by (parent, token). Should a token be drafted twice under one parent, the earlier node is taken."""
    children: dict[tuple[int, int], int] = {}
    for node, key in enumerate(zip(parents, tokens, strict=True)):
        children.setdefault(key, node)
    return children
