"""The draft's side of a round: what it reads from the last one, and the `step` that grows the tree.

Which nodes are expanded is decided in tree.py; the network is modeling_confu.py's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..modeling_confu import ConFuDraftModel
from ..target.cache import TreeCache


class DraftRound:
    """Writes the waiting rows into the draft's cache, then drafts one layer of the tree per [`step`].

    Slots of the draft's cache during a round: [rows 0..v-1 | future token, if there is one | start row v | drafted
    rows]. All behind the rows `0..v-1` is dropped by [`close`]; row `v` comes again, first among the waiting rows of
    the next round.

    Args:
        embed_tokens: the target's token embeddings.
        cache: the draft's own, of one layer; holds the verified rows before the waiting ones.
        tokens: `(B, R)` long, `x_{i+1}` of the waiting rows; the last row starts the draft.
        features: `(B, R, 3 d)`, `F_i`. position_ids: `(B, R)` long.
        future: `(B, 3 d)`, `f_v`, or None.
        top_k: children considered for each row.
    """

    def __init__(
        self,
        draft: ConFuDraftModel,
        embed_tokens: nn.Module,
        cache: TreeCache,
        *,
        tokens: Tensor,
        features: Tensor,
        position_ids: Tensor,
        future: Tensor | None,
        top_k: int,
    ):
        self.draft, self.embed_tokens, self.cache = draft, embed_tokens, cache
        self.top_k = min(top_k, draft.config.draft_vocab_size)
        self.token_ids = draft.draft_token_ids
        self.position_ids = position_ids[:, -1:]  # (B, 1), of the start row
        hidden_states = draft.fuse(features.to(device=draft.device, dtype=draft.dtype))  # (B, R, d)
        if tokens.shape[1] > 1:
            draft.write_rows(self._embed(tokens[:, :-1]), hidden_states[:, :-1], position_ids[:, :-1], cache)
        self.verified_rows = cache.get_seq_length()
        self.hidden_states = hidden_states[:, -1:]  # (B, 1, d): of the start row, later of the newest layer
        self.skip = None if future is None else self._write_future(future[:, None])
        self.steps = 0
        self.ancestors: Tensor | None = None  # (B, W, drafted rows so far) bool, of the newest layer

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.embed_tokens(tokens).to(device=self.draft.device, dtype=self.draft.dtype)

    def _write_future(self, future: Tensor) -> Tensor:
        """Put the future token into the cache; returns what it adds to the start row's residual stream."""
        layer = self.draft.midlayer
        embeds, states = self.draft.future_inputs(self.hidden_states, future.to(self.hidden_states))
        inputs = layer.attention_inputs(embeds, states)
        rotary = self.draft.rotary(self.position_ids + 1, inputs.dtype)
        self.cache.update(*layer.self_attn.key_value(inputs, *rotary), 0)
        return self.draft.future_skip(states)

    def step(self, tokens: Tensor, parents: Tensor | None) -> tuple[Tensor, Tensor]:
        """[`tree.DraftStep`]: children of `tokens` `(B, W)`, the rows of the next layer."""
        mask = None
        if parents is not None:
            width = tokens.shape[1]
            itself = torch.eye(width, dtype=torch.bool, device=tokens.device).expand(tokens.shape[0], -1, -1)
            if self.ancestors is not None:
                index = parents[..., None].expand(-1, -1, self.ancestors.shape[-1])
                itself = torch.cat([self.ancestors.gather(1, index), itself], dim=-1)
            self.ancestors = itself
            drafted = self.ancestors.shape[-1]
            shared = self.cache.get_seq_length() - (drafted - width)  # verified rows, future token, start row
            mask = torch.nn.functional.pad(self.ancestors, (shared, 0), value=True)[:, None]  # (B, 1, W, slots)
            self.hidden_states = self.hidden_states.gather(
                1, parents[..., None].expand(-1, -1, self.hidden_states.shape[-1])
            )
        self.hidden_states = self.draft(
            self._embed(tokens),
            self.hidden_states,
            (self.position_ids + self.steps).expand_as(tokens),
            attention_mask=mask,
            cache=self.cache,
            skip=self.skip if self.steps == 0 else None,
        )
        self.steps += 1
        log_probs, children = self.draft.logits(self.hidden_states).float().log_softmax(-1).topk(self.top_k, dim=-1)
        return self.token_ids[children], log_probs

    def close(self) -> None:
        """Drop the future token, the start row and all drafted rows from the cache."""
        self.cache.crop(self.verified_rows - self.cache.get_seq_length())
