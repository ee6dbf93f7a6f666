"""What drafts: the `Drafter` that the loop asks for a tree, and the one that is a network.

A drafter is told what every round decided (`observe`), and drafts when it is asked (`grow`; by default layer by layer, by
`step`). Rows that it was told of wait until it drafts. Which nodes are expanded is decided in tree/growing.py; the network is modeling_confu.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..host import send
from ..modeling_confu import ConFuDraftModel
from ..target.cache import TreeCache
from ..target.slots import Slots
from ..tree.draft_tree import DraftTree, root_only
from ..tree.growing import grow_tree
from .policy import RoundPlan
from .state import DecodingState, Rows

MEMORY = "confu_draft_memory"  # the attribute of a cache


class Drafter:
    """Proposes tokens, by `step` or by a `grow` of its own. A lookup table is one, so is an oracle in a test."""

    network: PreTrainedModel | None = None  # the module that drafts, if one does
    steps: int = 0  # how often `step` was asked for the last tree

    def recall(self, cache: Cache | None, input_ids: Tensor) -> None:
        """Told before prefill: the cache that the call goes on from, and its ids. Nothing, unless overridden."""

    def remember(self, cache: Cache, input_ids: Tensor) -> None:
        """Told at the end: the cache that is returned, and all ids. Nothing, unless overridden."""

    def read(self, embeds: Tensor, features: Tensor, position_ids: Tensor, is_whole: bool) -> None:
        """Told before the first [`observe`], if the prompt is embeddings: its rows but for the newest, as [`Rows`] has
        them, with the target's embeddings `(B, R, d)` in place of tokens. Nothing, unless overridden."""

    def observe(self, state: DecodingState, rows: Rows) -> None:
        """Told after prefill and after every round: the state now, and the rows that are new."""
        raise NotImplementedError

    def select(self, rows: Sequence[int]) -> None:
        """Told when batch rows have ended: the others, which are the new rows. Nothing, unless overridden."""

    def step(self, tokens: Tensor, parents: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
        """[`tree.growing.DraftStep`]; `parents` None starts a new tree."""
        raise NotImplementedError

    def grow(self, state: DecodingState, plan: RoundPlan) -> DraftTree:
        """The tree of a round: grown step by step, unless overridden. The root alone if nothing may be drafted."""
        self.steps = 0
        if plan.total_tokens == 0:
            return root_only(state.roots)
        return grow_tree(
            self._counted_step,
            state.roots,
            total_tokens=plan.total_tokens,
            depth=plan.depth,
            top_k=plan.top_k,
            confidence_threshold=plan.confidence_threshold,
            another_step=plan.another_step,
        )

    def _counted_step(self, tokens: Tensor, parents: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
        self.steps += 1
        return self.step(tokens, parents, top_k)


@dataclass(frozen=True)
class DraftMemory:
    """What a draft knows of the tokens in a cache, kept with that cache so that a next turn can go on from it.

    Attributes:
        draft_key: of which draft. input_ids: `(1, n)` long, all ids; the last one is not in the cache yet.
        cache: the draft's own. waiting: rows that it has not read, by round.
    """

    draft_key: str
    input_ids: Tensor
    cache: TreeCache
    waiting: list[Rows]


class NetworkDrafter(Drafter):
    """Writes the waiting rows into the draft's cache, then drafts one layer of the tree per [`step`].

    Slots of the draft's cache in a round, for every batch row, if `v` is the newest row:

        rows 0 .. v-1, committed | future token, if there is one | start row v | drafted rows, layer by layer

    What is not committed is overwritten in the next round. The start row waits again, as the oldest of the next rows.

    Args:
        draft: the network.
        target_embeddings: the target's token embeddings.
        capacity: slots of the cache to begin with.
    """

    def __init__(self, draft: ConFuDraftModel, target_embeddings: nn.Module, capacity: int = 256):
        self.draft = self.network = draft
        self.embed_tokens = target_embeddings
        self.cache = TreeCache(1, capacity=capacity)
        self.token_ids = draft.draft_token_ids
        # By round: joined when the draft reads them, not in every round in which it is not asked.
        self.waiting: list[Rows] = []
        self.hidden_states: Tensor | None = None  # (B, W, d) of the newest layer
        self.ancestors: Tensor | None = None  # (B, W, rows so far) bool, of the newest layer; the start row is row 0
        self.position_ids: Tensor | None = None  # (B, 1), of the start row
        self.words: list[Tensor] = []  # (B, 1, d) each, for this layer's head and those of the layers to come
        self.future_known: Tensor | None = None  # (B, 1) bool; None = no row has a future token
        self.futures_whole = True  # known to the host: all rows have one, or none has

    def recall(self, cache: Cache | None, input_ids: Tensor) -> None:
        """Go on from what this draft left with a cache, if that is all the cache holds and the ids are the same."""
        memory = getattr(cache, MEMORY, None)
        if memory is None or memory.draft_key != self.draft.instance_key:
            return
        known = memory.input_ids.shape[1]
        same = known <= input_ids.shape[1] and torch.equal(memory.input_ids, input_ids[:, :known])
        if same and cache.get_seq_length() == known - 1:
            self.cache, self.waiting = memory.cache, list(memory.waiting)
            delattr(cache, MEMORY)  # this call writes into it, and may not come to its end

    def remember(self, cache: Cache, input_ids: Tensor) -> None:
        """Leave what this draft knows with the cache. The next call takes it over, so it is good for one call."""
        if len(input_ids) == 1:
            setattr(cache, MEMORY, DraftMemory(self.draft.instance_key, input_ids, self.cache, self.waiting))

    def read(self, embeds: Tensor, features: Tensor, position_ids: Tensor, is_whole: bool) -> None:
        """Written at once. A draft with embeddings of its own knows nothing of the target's: it starts without."""
        if not self.draft.config.own_embeddings and embeds.shape[1]:
            embeds, features = (
                states.to(device=self.draft.device, dtype=self.draft.dtype) for states in (embeds, features)
            )
            self._write_verified(embeds, self.draft.fuse(features), position_ids, is_whole)

    def observe(self, state: DecodingState, rows: Rows) -> None:
        """New rows wait behind older ones."""
        self.waiting.append(rows)

    def select(self, rows: Sequence[int]) -> None:
        """Its cache, and the rows that wait."""
        self.cache.batch_select_indices(torch.tensor(rows))
        self.waiting = [part.select(rows) for part in self.waiting]

    @torch.no_grad()
    def step(self, tokens: Tensor, parents: Tensor | None, top_k: int) -> tuple[Tensor, Tensor]:
        """[`tree.growing.DraftStep`]: children of `tokens` `(B, W)`, the rows of the next layer."""
        top_k = min(top_k, self.draft.config.draft_vocab_size)
        logits = self.distribution(tokens, parents).float()
        best, children = logits.topk(top_k, dim=-1)
        return self.token_ids[children], best - logits.logsumexp(-1, keepdim=True)

    @torch.no_grad()
    def distribution(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        """[`tree.drawing.DistributionStep`]: `(B, W, draft_vocab_size)` logits behind `tokens` `(B, W)`."""
        skip = None
        if parents is None:
            skip, self.words = self._start()
        else:
            width = tokens.shape[1]
            itself = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(tokens.shape[0], -1, -1)
            index = parents[..., None]
            above = self.ancestors.gather(1, index.expand(-1, -1, self.ancestors.shape[-1]))
            self.ancestors = torch.cat([above, itself], dim=-1)
            self.hidden_states = self.hidden_states.gather(1, index.expand(-1, -1, self.hidden_states.shape[-1]))
            self.position_ids = self.position_ids + 1
        self._run_layer(tokens, skip)
        return self.draft.logits(self.hidden_states, self.words.pop(0) if self.words else None)

    def _start(self) -> tuple[Tensor | None, list[Tensor]]:
        """Read the waiting rows, get the start row ready; returns what the future token adds to its residual stream, and
        to what the heads of this layer and the following ones read."""
        rows = Rows.joined(self.waiting).newest_last()
        # Copied: a view would hold on to the features of a whole prompt.
        newest = (states[:, -1:].clone() for states in (rows.tokens, rows.features, rows.position_ids))
        self.waiting = [Rows(*newest, is_whole=rows.is_whole)]
        hidden_states = self.draft.fuse(rows.features.to(device=self.draft.device, dtype=self.draft.dtype))
        if rows.tokens.shape[1] > 1:
            older = (self._embed(rows.tokens[:, :-1]), hidden_states[:, :-1], rows.position_ids[:, :-1])
            self._write_verified(*older, is_whole=rows.is_whole)
        self.hidden_states, self.position_ids = hidden_states[:, -1:], rows.position_ids[:, -1:]
        self.ancestors = torch.ones(len(rows.tokens), 1, 1, dtype=torch.bool, device=rows.tokens.device)
        self.future_known, self.futures_whole = None, rows.future is None or rows.future_known is None
        return (None, []) if rows.future is None else self._write_future(rows)

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.embed_tokens(tokens).to(device=self.draft.device, dtype=self.draft.dtype)

    def _write_verified(self, embeds: Tensor, hidden_states: Tensor, position_ids: Tensor, is_whole: bool) -> None:
        """Commit rows, `(B, R)` of them, those without a position left out."""
        slots = self.cache.slots_behind(embeds.shape[1], batch_size=len(embeds))
        counts = [embeds.shape[1]] * len(embeds)
        if not is_whole:
            real = position_ids >= 0
            counts = real.sum(1).tolist()
            places = slots.index[:, :1].to(real.device) + real.long().cumsum(1) - 1
            slots = Slots(torch.where(real, places, -1), None, slots.visible)
        with self.cache.writing(slots):
            self.draft.write_rows(embeds, hidden_states, position_ids.clamp(min=0), self.cache)
        self.cache.commit(counts)

    def _write_future(self, rows: Rows) -> tuple[Tensor, list[Tensor]]:
        """Write the future token behind the committed rows; returns `(B, 1, d)` for the start row's residual stream, and for
        the heads of the first layers."""
        layer = self.draft.midlayer
        known = rows.future_known
        self.future_known = torch.ones_like(rows.tokens[:, -1:]).bool() if known is None else known[:, None]
        futures = rows.future[:, None].to(self.hidden_states)
        embeds, states = self.draft.future_inputs(self.hidden_states, futures)
        inputs = layer.attention_inputs(embeds, states)
        rotary = self.draft.rotary(self.position_ids + 1, inputs.dtype)
        with self.cache.writing(self.cache.slots_behind(1, batch_size=len(rows.tokens))):
            self.cache.update(*layer.self_attn.key_value(inputs, *rotary), 0)
        here, words = self.future_known[..., None].to(states), self.draft.words(futures)
        words = [] if words is None else list((words * here[..., None]).unbind(-2))
        return self.draft.future_skip(states) * here, words

    def _run_layer(self, tokens: Tensor, skip: Tensor | None) -> None:
        width, drafted = self.ancestors.shape[1:]
        gap = 0 if self.future_known is None else 1
        slots = self.cache.slots_behind(width, gap + drafted - width, batch_size=len(tokens))
        mask = self._mask(gap) if drafted > 1 or not self._sees_all() else None
        with self.cache.writing(slots):
            self.hidden_states = self.draft(
                self._embed(tokens),
                self.hidden_states,
                self.position_ids.expand_as(tokens),
                attention_mask=mask,
                cache=self.cache,
                skip=skip,
            )

    def _sees_all(self) -> bool:
        """Known to the host: the start row of every batch row sees all slots."""
        return len(set(self.cache.lengths)) < 2 and self.futures_whole

    def _mask(self, gap: int) -> Tensor:
        """`(B, 1, W, slots)` bool: committed rows, the future token where there is one, ancestors and itself."""
        batch_size, width, drafted = self.ancestors.shape
        device = self.ancestors.device
        lengths = send(self.cache.lengths or [0] * batch_size, device)[:, None]  # (B, 1)
        slots = torch.arange(max(self.cache.lengths, default=0) + gap + drafted, device=device)
        mask = (slots < lengths)[:, None].repeat(1, width, 1)
        if gap:
            mask |= ((slots == lengths) & self.future_known)[:, None]
        own = (lengths + gap + torch.arange(drafted, device=device))[:, None].expand(-1, width, -1)
        return mask.scatter_(2, own, self.ancestors)[:, None]
