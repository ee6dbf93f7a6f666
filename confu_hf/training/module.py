"""`ConFuForTraining`: target (frozen), draft and adapter in one module whose forward returns the loss. Knows nothing
of decoding.

Row `t` is the draft that starts at position `t`. At test-time step `k` it holds position `t + k`, has read the true
tokens up to `x_{t+1+k}` and predicts
`x_{t+2+k}`; its target is the target's distribution at position `t + 1 + k`.

Example (answer `c d e f` after the prompt `a b`): x_2 = c is drawn by the target itself at prefill, so the first row
is t = 1: it reads the features of b, the token c, and drafts d (step 0), e (step 1), f (step 2).

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
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from .. import compat
from ..compat import cache_keyword
from ..modeling_confu import ConFuDraftModel
from ..target.context import ContemplateContext
from ..target.passes import contemplate_anchors
from ..target.soft_prompts import soft_prompt_key_values
from .losses import chain_accepted_length, linear_kl
from .rows import DraftRows, gather_rows, row_attention, select_rows
from .store import FeatureStore

# Config fields of targets that change logits behind the head.
LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


@dataclass
class ConFuTrainingObjective:
    """What is trained for (the paper's training framework).

    Args:
        ttt_steps: test-time steps `K_ttt` that the draft is unrolled for.
        ttt_decay: weight of step `k` is `ttt_decay ** k`.
        num_anchors: contemplate tokens per sequence (`K_train`).
        replication: an anchor's future is used by this many rows, its own and the following (`l`).
        max_lag: the contemplate token's experts read features 1..max_lag positions before its node.
        deep_row_fraction: share of the rows that are unrolled beyond step 0, drawn anew for every batch. Rows depend
            on each other through their first step alone, so leaving some out costs samples, not exactness.
        future_weight: weight of a loss beyond the paper's: the contemplate token itself, through the target's head,
            should predict what the target says one position on. It tells soft prompts and experts from the first step
            what the draft asks of them only once it has learned to listen.
    """

    ttt_steps: int = 4
    ttt_decay: float = 0.8
    deep_row_fraction: float = 1.0
    num_anchors: int = 24
    replication: int = 4
    max_lag: int = 6
    future_weight: float = 0.0


@dataclass(frozen=True)
class RowFutures:
    """The future token of every row, `(B, R, ...)`; rows without one have `present` False."""

    embeds: torch.Tensor  # (B, R, d)  MoE_f(h_t)
    states: torch.Tensor  # (B, R, d)  W_f f
    present: torch.Tensor  # (B, R) bool
    anchors: torch.Tensor  # (B, A) long, positions that were contemplated after
    chosen: torch.Tensor  # (B, A) bool, False where a sequence has fewer rows than anchors
    last: torch.Tensor  # (B, A, d) the contemplate tokens' own states behind the target's last norm


class ConFuForTraining(nn.Module):
    """Loss of a draft (and its adapter) against a frozen target.

    Args:
        target: causal LM; gradients are switched off here.
        draft: [`ConFuDraftModel`]; with `config.contemplate` the target must carry the adapter (`target.confu`).
        feature_store: keeps what the target says from epoch to epoch.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        draft: ConFuDraftModel,
        objective: ConFuTrainingObjective | None = None,
        feature_store: FeatureStore | None = None,
    ):
        super().__init__()
        config = target.config.get_text_config(decoder=True)
        scaled = [name for name in LOGIT_TRANSFORMS if getattr(config, name, None)]
        if feature_store is not None and scaled:
            raise ValueError(
                f"feature_store: got a target with {scaled}, expected one whose logits are its head's output. "
                "Train without feature_store."
            )
        self.feature_store = feature_store
        self.target, self.draft = target, draft
        self.objective = objective or ConFuTrainingObjective()
        for name, parameter in target.named_parameters():
            parameter.requires_grad_("confu_" in name)

    def train(self, mode: bool = True) -> ConFuForTraining:
        """The target stays in eval mode: it speaks as it does when it decodes, without dropout."""
        super().train(mode)
        self.target.eval()
        return self

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor,
        index: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """All `(B, N)` long, padded on the right; `labels` -100 outside the answers. `index` `(B,)`: which sequences
        these are, for the feature store.

        Returns:
            `loss`; `accepted` `(B, 2)`: sum of chain accepted lengths and number of rows per sequence; `correct` `(B,
            K, 2)`: right guesses and guesses per
            step.
        """
        rows, deep = DraftRows.of(labels, self.objective.ttt_steps), None
        if self.training and self.objective.deep_row_fraction < 1:
            rows, deep = rows.thinned(self.objective.deep_row_fraction)
        features, log_probs, target_choice, context = self._run_target(input_ids, attention_mask, rows, index)
        token_embeds = self.target.get_input_embeddings()(input_ids).to(features.dtype)
        hidden_states = self.draft.fuse(features)
        futures = None
        if self.draft.config.contemplate:
            futures = self._row_futures(features, hidden_states, context, rows)
        outputs = self._unroll(token_embeds, hidden_states, rows, futures, deep)  # (K, B, R, d)
        result = self._loss(outputs, rows, log_probs, target_choice)
        if futures is not None and self.training and self.objective.future_weight:
            result["loss"] = result["loss"] + self._future_loss(futures, rows, log_probs, target_choice)
        return result

    @torch.no_grad()
    def _run_target(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, rows: DraftRows, index):
        """Features `(B, N, 3 d)`; and of the positions from the first row on: log-probabilities over the draft
        vocabulary `(B, P, K)` with the target's choice as a draft id `(B, P)`, -1 where it lies outside; and the
        target's cache."""
        first, store = int(rows.starts.min()) + 1, self.feature_store
        contemplate = self.draft.config.contemplate
        if store is not None and index is None:
            raise ValueError(
                "feature_store: got a batch without `index`, expected the sequences' own numbers, (B,) long. "
                "Make batches with ConversationCollator."
            )
        if store is not None and store.holds(index, cache=contemplate):
            head = self.target.get_output_embeddings().weight[self.draft.draft_token_ids]
            states, choices = (part.to(head.device) for part in store.read(index, input_ids.shape[1]))
            states = states.to(head.dtype)
            features, last = states.split([3 * states.shape[-1] // 4, states.shape[-1] // 4], dim=-1)
            cache = store.read_cache(index, input_ids.shape[1], head.device) if contemplate else None
            return features, *self._draft_view(F.linear(last[:, first:], head), choices[:, first:]), cache
        keep_cache = store is not None and store.cache_shape is not None
        cache = DynamicCache() if contemplate or keep_cache else None
        # Padding is on the right, where causal attention never looks: no mask, so the fastest attention there is.
        features, last, all_logits = self._read_target(input_ids, first, cache)
        logits = all_logits[..., self.draft.draft_token_ids]
        best, choice = logits.max(-1)
        choices = torch.where(best == all_logits.amax(-1), choice, -1)
        if store is not None:
            store.write(index, attention_mask, torch.cat([features, last], dim=-1), F.pad(choices, (first, 0)))
        if keep_cache:
            store.write_cache(index, attention_mask, cache)
        return features, *self._draft_view(logits, choices), cache

    def _read_target(self, input_ids: torch.Tensor, first: int, cache: DynamicCache | None):
        """Features `(B, N, 3 d)`; for the store, the head's inputs `(B, N, d)`, else None; logits from `first` on."""
        ids = self.draft.config.target_layer_ids
        module = self.target if self.feature_store is None else self.target.get_decoder()
        arguments = {
            "use_cache": cache is not None,
            "output_hidden_states": compat.layer_states_request(ids),
            **cache_keyword(module, cache),
        }
        if self.feature_store is None:
            # Whole: soft-capped and scaled logits stay where they are.
            kept = torch.arange(first, input_ids.shape[1], device=input_ids.device)
            output = module(input_ids=input_ids, logits_to_keep=kept, **arguments)
            last, logits = None, output.logits
        else:
            output = module(input_ids=input_ids, **arguments)
            last = output.last_hidden_state
            logits = self.target.get_output_embeddings()(last[:, first:])
        return torch.cat(compat.layer_states(output, ids), dim=-1), last, logits

    @staticmethod
    def _draft_view(logits: torch.Tensor, choices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits.float().log_softmax(-1), choices

    def _row_futures(self, features, hidden_states, context, rows: DraftRows) -> RowFutures:
        """Contemplate at random anchors and hand each future to the next `replication` rows."""
        objective, device = self.objective, features.device
        batch, count = rows.starts.shape
        exists = rows.valid[0]
        # Evaluation contemplates at every row, as decoding does; training at a random few.
        number = min(objective.num_anchors, count) if self.training else count
        replication = objective.replication if self.training else 1
        chance = torch.rand(batch, count, device=device).masked_fill(~exists, -1.0)
        anchor_rows = chance.topk(number, dim=-1).indices.sort(-1).values  # (B, A) indices into rows
        anchors = rows.starts.gather(1, anchor_rows)
        lag = torch.randint(1, objective.max_lag + 1, anchors.shape, device=device) if self.training else 1
        sources = (anchors - lag).clamp_min(0)
        gather = sources[..., None].expand(-1, -1, features.shape[-1])
        layer = self.target.confu
        embeddings = layer.contemplate_embedding(features.gather(1, gather))  # (B, A, d)
        visible = torch.arange(features.shape[1], device=device) <= anchors[..., None]  # (B, A, N)
        futures, last = contemplate_anchors(
            self.target,
            ContemplateContext(context, self._soft_prompts(layer)),
            embeddings,
            anchors + 1,
            visible,
            self.draft.config.target_layer_ids,
        )  # (B, A, 3 d), (B, A, d)
        latest = (
            torch.searchsorted(
                anchor_rows, torch.arange(count, device=device).expand(batch, -1).contiguous(), right=True
            )
            - 1
        )
        distance = rows.starts - anchors.gather(1, latest.clamp_min(0))
        present = (latest >= 0) & (distance < replication) & exists
        h_rows = gather_rows(hidden_states, rows.starts)
        embeds = self.draft.future_mixture(h_rows)
        states = gather_rows(self.draft.future_fc(futures.to(hidden_states.dtype)), latest.clamp_min(0))
        return RowFutures(embeds, states, present, anchors, exists.gather(1, anchor_rows), last)

    def _future_loss(self, futures: RowFutures, rows: DraftRows, log_probs, target_choice) -> torch.Tensor:
        """KL(target at `a + 1` || the contemplate token after `a`), mean over anchors, weighted by `future_weight`."""
        head = self.target.get_output_embeddings().weight[self.draft.draft_token_ids]
        # Position a + 1 is row a + 1 - first of the kept logits, where first = the first row's start + 1.
        position = futures.anchors - int(rows.starts.min())  # (B, A)
        batch = torch.arange(len(position), device=position.device)[:, None]
        target_rows = position + batch * log_probs.shape[1]
        used = (target_choice.gather(1, position) >= 0) & futures.chosen
        weights = torch.full(target_rows[used].shape, self.objective.future_weight / used.sum(), device=used.device)
        loss, _ = linear_kl(
            futures.last[used], head, log_probs.flatten(0, 1), target_choice.flatten(), target_rows[used], weights
        )
        return loss

    def _soft_prompts(self, layer) -> torch.Tensor:
        weight = layer.prompt_weight()
        return weight if layer.soft_prompt_type == "kv" else soft_prompt_key_values(self.target, weight)

    def _unroll(
        self,
        token_embeds,
        hidden_states,
        rows: DraftRows,
        futures: RowFutures | None,
        deep: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the draft for all test-time steps: `(K, B, R, d)` normalised outputs, zeros for rows that are not `deep`
        (`(B, R')`, None = all) beyond step 0."""
        layer, attention = self.draft.midlayer, self.draft.midlayer.self_attn
        batch, length = token_embeds.shape[:2]
        # Row t reads emb(x_{t+1}); the last position has no next token and is no row.
        inputs = layer.attention_inputs(token_embeds[:, 1:], hidden_states[:, :-1])  # (B, N-1, 2d)
        positions = torch.arange(length - 1, device=token_embeds.device).expand(batch, -1)
        keys, values = attention.key_value(inputs, *self.draft.rotary(positions, inputs.dtype))
        causal = positions[:, None, :] <= rows.starts[..., None]  # (B, R, N-1)
        own: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        state = gather_rows(hidden_states, rows.starts)
        residual = state
        if futures is not None:
            future_inputs = layer.attention_inputs(futures.embeds, futures.states)
            rotary = self.draft.rotary(rows.starts + 1, inputs.dtype)
            own.append((*attention.key_value(future_inputs, *rotary), futures.present))
            residual = state + self.draft.future_skip(futures.states) * futures.present[..., None]
        starts, outputs = rows.starts, []
        for step in range(self.objective.ttt_steps):
            if step == 1 and deep is not None:
                starts, state, causal = starts.gather(1, deep), gather_rows(state, deep), gather_rows(causal, deep)
                own = [tuple(select_rows(part, deep) for part in entry) for entry in own]
            tokens = (starts + 1 + step).clamp_max(length - 1)
            row_inputs = layer.attention_inputs(gather_rows(token_embeds, tokens), state)
            rotary = self.draft.rotary(starts + step, inputs.dtype)
            query = attention.query(row_inputs, *rotary)
            if step > 0:
                own.append((*attention.key_value(row_inputs, *rotary), torch.ones_like(starts, dtype=torch.bool)))
            context = row_attention(query, keys, values, causal, own)
            state = layer.finish(residual if step == 0 else state, attention.merge(context))
            output = self.draft.norm(state)
            if step > 0 and deep is not None:
                index = deep[..., None].expand(-1, -1, output.shape[-1])
                output = torch.zeros_like(outputs[0]).scatter(1, index, output)
            outputs.append(output)
        return torch.stack(outputs)

    def _loss(self, outputs, rows: DraftRows, log_probs, target_choice) -> dict[str, torch.Tensor]:
        steps, batch, count, width = outputs.shape
        device = outputs.device
        first = int(rows.starts.min()) + 1
        # Row t at step k is compared with position t + 1 + k, which is row t + 1 + k - first of the kept logits.
        offset = torch.arange(steps, device=device)[:, None, None] + 1 - first
        position = (rows.starts + offset).clamp_max(log_probs.shape[1] - 1)  # (K, B, R)
        choice = target_choice.gather(1, position.transpose(0, 1).reshape(batch, -1))
        choice = choice.view(batch, steps, count).transpose(0, 1)  # (K, B, R)
        used = rows.valid & (choice >= 0)
        target_rows = position + torch.arange(batch, device=device)[:, None] * log_probs.shape[1]
        decay = self.objective.ttt_decay ** torch.arange(steps, device=device)
        weights = (decay / rows.valid.sum((1, 2)).clamp_min(1))[:, None, None].expand_as(used)
        correct = torch.zeros_like(used)
        loss, correct[used] = linear_kl(
            outputs[used],
            self.draft.lm_head.weight,
            log_probs.flatten(0, 1),
            target_choice.flatten(),
            target_rows[used],
            weights[used],
        )
        accepted, whole = chain_accepted_length(correct.flatten(1), rows.valid.flatten(1))
        per_row = torch.stack((accepted * whole, whole.float()), dim=-1)  # (B * R, 2)
        return {
            "loss": loss,
            "accepted": per_row.view(batch, count, 2).sum(1),
            "correct": torch.stack((correct & rows.valid, rows.valid), dim=-1).float().sum(2).transpose(0, 1),
        }
