"""Contemplation in training: anchors, their futures, and which row uses which. Knows the adapter by its layer alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..modeling_confu import ConFuDraftModel
from ..target.context import ContemplateContext
from ..target.passes import contemplate_anchors
from ..target.soft_prompts import SoftPrompts, soft_prompt_key_values
from ..target.weights import head_rows
from .health import router_use
from .losses import linear_kl
from .rows import DraftRows, gather_rows
from .teacher import TeacherView


@dataclass(frozen=True)
class Anchors:
    """The positions that are contemplated after, `A` per sequence, in order."""

    rows: Tensor  # (B, A) long, which rows they are
    positions: Tensor  # (B, A) long
    lag: Tensor | int  # how many positions before them the contemplate token's experts read
    exist: Tensor  # (B, A) bool, False where a sequence has fewer rows than anchors

    @classmethod
    def of(cls, rows: DraftRows, number: int, max_lag: int) -> Anchors:
        """`number` rows of each sequence, drawn at random, with lags from 1 to `max_lag`."""
        exists = rows.valid[0]
        chance = torch.rand(rows.starts.shape, device=exists.device).masked_fill(~exists, -1.0)
        chosen = chance.topk(min(number, exists.shape[1]), dim=-1).indices.sort(-1).values
        lag = torch.randint(1, max_lag + 1, chosen.shape, device=exists.device) if max_lag > 1 else 1
        return cls(chosen, rows.starts.gather(1, chosen), lag, exists.gather(1, chosen))


@dataclass(frozen=True)
class RowFutures:
    """The future token of every row, `(B, R, ...)`; rows without one have `present` False."""

    embeds: Tensor  # (B, R, d)  MoE_f(h_t)
    states: Tensor  # (B, R, d)  W_f f
    words: Tensor | None  # (B, R, n, d)  what the row's own contemplate tokens say next; zeros where it has none
    present: Tensor  # (B, R) bool
    anchors: Anchors
    last: Tensor  # (B, A, n, d) the contemplate tokens' own states behind the target's last norm
    routers: dict[str, Tensor]  # how the two mixtures' routers are used, see health.py


def row_futures(
    target: PreTrainedModel,
    draft: ConFuDraftModel,
    view: TeacherView,
    hidden_states: Tensor,
    rows: DraftRows,
    anchors: Anchors,
    replication: int,
) -> RowFutures:
    """Contemplate after `anchors` and hand each future to the next `replication` rows.

    Args:
        hidden_states: `(B, N, d)`, `h_i` of every position.
    """
    features, device = view.features, view.features.device
    batch, count = rows.starts.shape
    sources = (anchors.positions - anchors.lag).clamp_min(0)
    layer, length = target.confu, draft.config.contemplate_length
    read = gather_rows(features, sources)
    embeddings = layer.contemplate_embedding(read)  # (B, A, d)
    visible = torch.arange(features.shape[1], device=device) <= anchors.positions[..., None]  # (B, A, N)
    low_rank = layer.low_rank(target)
    with nullcontext() if low_rank is None else low_rank.acting():
        futures, last = contemplate_anchors(
            target,
            ContemplateContext(view.cache, soft_prompts(target)),
            embeddings,
            anchors.positions + 1,
            visible,
            draft.config.target_layer_ids,
            length,
        )  # (B, n A, 3 d), (B, n A, d)
    futures = futures[:, : anchors.rows.shape[1]]
    last = last.unflatten(1, (length, -1)).transpose(1, 2)  # (B, A, n, d)
    every_row = torch.arange(count, device=device).expand(batch, -1).contiguous()
    latest = torch.searchsorted(anchors.rows, every_row, right=True) - 1  # (B, R), -1 before the first anchor
    distance = rows.starts - anchors.positions.gather(1, latest.clamp_min(0))
    present = (latest >= 0) & (distance < replication) & rows.valid[0]
    own = gather_rows(hidden_states, rows.starts)
    embeds, mixture = draft.future_mixture(own), draft.future_mixture
    states = gather_rows(draft.fuse_future(futures.to(hidden_states.dtype)), latest.clamp_min(0))
    words = draft.words(torch.cat([futures, last.flatten(-2)], dim=-1).to(hidden_states.dtype))
    if words is not None:
        words = gather_rows(words.flatten(-2), latest.clamp_min(0)) * (present & (distance == 0))[..., None]
        words = words.unflatten(-1, (length, -1))
    routers = {
        "contemplate": router_use(read, layer.router_weight(), layer.config.num_experts_per_token, anchors.exist),
        "future": router_use(own, mixture.router.weight, mixture.top_k, present),
    }
    return RowFutures(embeds, states, words, present, anchors, last, routers)


def soft_prompts(target: PreTrainedModel) -> SoftPrompts:
    """Those of the adapter in use, differentiable."""
    weight = target.confu.prompt_weight()
    return weight if target.confu.soft_prompt_type == "kv" else soft_prompt_key_values(target, weight)


def future_numerator(
    target: PreTrainedModel, draft: ConFuDraftModel, futures: RowFutures, view: TeacherView
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over anchors `a` and their contemplate tokens `j` of KL(target at `a + 1 + j` || token `j` after `a`, through the
    target's head); `(n, B, A)` bool, which tokens named the target's choice; and which had one to name.

    As for rows of the draft, an anchor whose target says a token that the draft does not have adds nothing.
    """
    length = futures.last.shape[2]
    head = head_rows(target, draft.draft_token_ids)
    positions = torch.stack([futures.anchors.positions + 1 + number for number in range(length)])  # (n, B, A)
    located = [view.locate(part) for part in positions]
    target_rows, choices = (torch.stack(parts) for parts in zip(*located, strict=True))
    exist = futures.anchors.exist & torch.stack([view.asked(part) for part in positions])
    used = (choices >= 0) & exist
    weights = torch.ones(target_rows[used].shape, device=used.device)
    right, last = torch.zeros_like(used), futures.last.movedim(2, 0)
    loss, right[used] = linear_kl(last[used], head, view.log_probs, view.choices, target_rows[used], weights)
    return loss, right, exist
