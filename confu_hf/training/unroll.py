"""Training-time test: the draft runs on its own outputs, all rows of a batch at once, one step after the other.

Row `t` is the draft that starts at position `t`. At test-time step `k` it holds position `t + k`, has read the true
tokens up to `x_{t+1+k}` and predicts `x_{t+2+k}`; its target is the target's distribution at position `t + 1 + k`.

Example (answer `c d e f` after the prompt `a b`): x_2 = c is drawn by the target itself at prefill, so the first row is
t = 1: it reads the features of b, the token c, and drafts d (step 0), e (step 1), f (step 2).

Which keys its three rows see (`#`), if the only anchor is row 1 and its future is used by two rows (`l = 2`). A key of
the last three groups belongs to one row alone:

    keys            first-step rows   own, step 1   own, step 2   future
                    0 1 2 3 4         1 2 3         1 2 3         1 2 3
    step 0  row 1   # # . . .         . . .         . . .         # . .
            row 2   # # # . .         . . .         . . .         . # .
            row 3   # # # # .         . . .         . . .         . . .
    step 1  row 1   # # . . .         # . .         . . .         # . .
            row 2   # # # . .         . # .         . . .         . # .
            row 3   # # # # .         . . #         . . .         . . .
    step 2  row 1   # # . . .         # . .         # . .         # . .
            row 2   # # # . .         . # .         . # .         . # .
            row 3   # # # # .         . . #         . . #         . . .

Rows depend on each other through their first step alone, so beyond it any of them can be left out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..modeling_confu import ConFuDraftModel
from .futures import RowFutures
from .rows import DraftRows, gather_rows, row_attention, select_rows


class DraftUnroll:
    """The draft over the rows of a batch, one test-time step per [`step`].

    Args:
        token_embeds: `(B, N, d)` embeddings of all tokens.
        hidden_states: `(B, N, d)`, `h_i` of every position.
        futures: None in EAGLE-3's stage.

    Attributes:
        index: `(B, R')` long, which of the batch's rows are still unrolled: all of them until [`keep`].
    """

    def __init__(
        self,
        draft: ConFuDraftModel,
        token_embeds: Tensor,
        hidden_states: Tensor,
        rows: DraftRows,
        futures: RowFutures | None = None,
    ):
        self.draft, self.token_embeds = draft, token_embeds
        layer, attention = draft.midlayer, draft.midlayer.self_attn
        batch, length = token_embeds.shape[:2]
        # Row t reads emb(x_{t+1}); the last position has no next token and is no row.
        inputs = layer.attention_inputs(token_embeds[:, 1:], hidden_states[:, :-1])  # (B, N-1, 2d)
        positions = torch.arange(length - 1, device=token_embeds.device).expand(batch, -1)
        self.keys, self.values = attention.key_value(inputs, *draft.rotary(positions, inputs.dtype))
        self.starts = rows.starts
        self.index = torch.arange(rows.starts.shape[1], device=rows.starts.device).expand(batch, -1)
        self.causal = positions[:, None, :] <= rows.starts[..., None]  # (B, R, N-1)
        self.state = gather_rows(hidden_states, rows.starts)
        self.own: list[tuple[Tensor, Tensor, Tensor]] = []
        self.skip: Tensor | None = None
        words = None if futures is None else futures.words
        self.words: list[Tensor] = [] if words is None else list(words.unbind(-2))  # of this step and those to come
        self.steps = 0
        if futures is not None:
            future_inputs = layer.attention_inputs(futures.embeds, futures.states)
            rotary = draft.rotary(rows.starts + 1, inputs.dtype)
            self.own.append((*attention.key_value(future_inputs, *rotary), futures.present))
            self.skip = draft.future_skip(futures.states) * futures.present[..., None]

    def step(self) -> Tensor:
        """The next test-time step: `(B, R', d)`, what the LM head reads."""
        layer, attention = self.draft.midlayer, self.draft.midlayer.self_attn
        tokens = (self.starts + 1 + self.steps).clamp_max(self.token_embeds.shape[1] - 1)
        inputs = layer.attention_inputs(gather_rows(self.token_embeds, tokens), self.state)
        rotary = self.draft.rotary(self.starts + self.steps, inputs.dtype)
        query = attention.query(inputs, *rotary)
        if self.steps > 0:
            seen = torch.ones_like(self.starts, dtype=torch.bool)
            self.own.append((*attention.key_value(inputs, *rotary), seen))
        context = row_attention(query, self.keys, self.values, self.causal, self.own)
        residual = layer.residual(inputs, self.state)
        if self.steps == 0 and self.skip is not None:
            residual = residual + self.skip
        self.state = self.draft.fed_back(layer.finish(residual, attention.merge(context)))
        outputs = self.draft.head_inputs(self.state)
        if self.words:
            outputs = outputs + self.words.pop(0)
        self.steps += 1
        return outputs

    def keep(self, chosen: Tensor) -> None:
        """Go on with the rows `chosen` `(B, R'')` alone, indices into those that are still unrolled."""
        self.index, self.starts = self.index.gather(1, chosen), self.starts.gather(1, chosen)
        self.state, self.causal = gather_rows(self.state, chosen), gather_rows(self.causal, chosen)
        self.words = [gather_rows(word, chosen) for word in self.words]
        self.own = [tuple(select_rows(part, chosen) for part in entry) for entry in self.own]
