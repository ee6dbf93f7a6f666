"""`ConFuForTraining`: target (frozen), draft and adapter in one module whose forward returns the loss.

Puts together what the target says (teacher.py), what contemplate tokens add (futures.py), the draft's test-time steps
(unroll.py, where rows and steps are drawn) and the loss (losses.py). Knows nothing of decoding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..errors import refusal
from ..modeling_confu import ConFuDraftModel
from .futures import Anchors, RowFutures, future_numerator, row_futures
from .losses import LossTerms, chain_accepted_length, linear_kl
from .rows import DraftRows, predicted_positions, random_rows, rows_in_front
from .sharding import leave_shards_to_fsdp
from .store import FeatureStore
from .teacher import Teacher, TeacherView
from .unroll import DraftUnroll

DEEP_ROWS = ("all", "random", "survivors")


@dataclass
class ConFuTrainingObjective:
    """What is trained for (the paper's training framework).

    Args:
        ttt_steps: test-time steps `K_ttt` that the draft is unrolled for.
        ttt_decay: weight of step `k` is `ttt_decay ** k`.
        deep_rows: which rows are unrolled beyond step 0. `all`; `random`, a share `deep_row_fraction` drawn anew for
            every batch; `survivors`, those whose guesses so far were the target's, as in decoding, where a wrong guess
            ends the round. Rows depend on each other through their first step alone, so leaving some out costs samples,
            not exactness; those that stay stand for all of their step.
        deep_row_fraction: that share.
        num_anchors: contemplate tokens per sequence (`K_train`).
        replication: an anchor's future is used by this many rows, its own and the following (`l`).
        max_lag: the contemplate token's experts read features 1..max_lag positions before its node.
        future_weight: weight of a loss beyond the paper's: the contemplate token itself, through the target's head,
            should predict what the target says one position on (a second one two positions on, ...). It tells soft prompts and experts from the first step
            what the draft asks of them only once it has learned to listen.
        adapter_alone: that loss alone; the draft is neither run nor changed. The "accepted length" is then 1 and the share
            of contemplate tokens that name the target's choice.
        freeze_adapter: the draft alone is changed: an adapter that is taught serves it, at the cost of a forward pass.
    """

    ttt_steps: int = 4
    ttt_decay: float = 0.8
    deep_rows: str = field(default="random", metadata={"choices": list(DEEP_ROWS)})
    deep_row_fraction: float = 1.0
    num_anchors: int = 24
    replication: int = 4
    max_lag: int = 6
    future_weight: float = 0.0
    adapter_alone: bool = False
    freeze_adapter: bool = False

    def __post_init__(self):
        if self.deep_rows not in DEEP_ROWS:
            raise refusal(
                "deep_rows", got=repr(self.deep_rows), expected=f"one of {', '.join(DEEP_ROWS)}", fix="Correct it."
            )
        if self.deep_rows != "random" and self.deep_row_fraction < 1:
            raise refusal(
                "deep_row_fraction",
                got=f"{self.deep_row_fraction} with deep_rows={self.deep_rows!r}",
                expected="deep_rows='random'",
                fix="Leave one of the two out.",
            )
        if self.freeze_adapter and (self.adapter_alone or self.future_weight):
            raise refusal(
                "freeze_adapter",
                got=f"adapter_alone={self.adapter_alone} and future_weight={self.future_weight}",
                expected="False and 0: losses for the adapter",
                fix="Leave freeze_adapter out, or the others.",
            )


class ConFuForTraining(nn.Module):
    """Loss of a draft (and its adapter) against a frozen target.

    Args:
        target: causal LM; gradients are switched off here.
        draft: [`ConFuDraftModel`]; with `config.contemplate` the target must carry the adapter (`target.confu`).
        feature_store: keeps what the target says from epoch to epoch.
    """

    accepts_loss_kwargs = (
        True  # the Trainer is told so: the loss is divided by the whole batch's counts, in the trainer
    )

    def __init__(
        self,
        target: PreTrainedModel,
        draft: ConFuDraftModel,
        objective: ConFuTrainingObjective | None = None,
        feature_store: FeatureStore | None = None,
    ):
        super().__init__()
        self.target, self.draft = target, draft
        self.teacher = Teacher(target, draft.config.target_layer_ids, feature_store)
        self.objective = objective or ConFuTrainingObjective()
        for name, parameter in target.named_parameters():
            parameter.requires_grad_("confu_" in name and not self.objective.freeze_adapter)
        if self.objective.adapter_alone:
            draft.requires_grad_(False)
        leave_shards_to_fsdp(self)

    def train(self, mode: bool = True) -> ConFuForTraining:
        """The target stays in eval mode: it speaks as it does when it decodes, without dropout."""
        super().train(mode)
        self.target.eval()
        return self

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        index: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """All `(B, N)` long, padded on the right; `labels` -100 outside the answers. `index` `(B,)`: which sequences
        these are, for the feature store.

        Returns:
            `numerators` and `denominators` `(K + 1,)`, see [`LossTerms`], and `loss`, their ratios' sum; `accepted`
            `(B, 2)`: sum of chain accepted lengths and number of rows per sequence; `correct` `(B, K, 2)`: right guesses
            and guesses per step. In training with contemplation also `routers`, see health.py.
        """
        rows, contemplate = DraftRows.of(labels, self.objective.ttt_steps), self.draft.config.contemplate
        view = self.teacher.view(
            input_ids,
            attention_mask,
            self.draft.draft_token_ids,
            needed=predicted_positions(labels),
            index=index,
            with_cache=contemplate,
        )
        features = view.features
        if not torch.is_autocast_enabled(features.device.type):
            features = features.to(self.draft.fc.weight.dtype)
        embed = self.draft.input_embeddings(self.target.get_input_embeddings())
        token_embeds, hidden_states = embed(input_ids).to(features.dtype), self.draft.fuse(features)
        futures = self._row_futures(view, hidden_states, rows) if contemplate else None
        if self.objective.adapter_alone:
            return self._adapter_alone(futures, rows, view)
        unroll = DraftUnroll(self.draft, token_embeds, hidden_states, rows, futures)
        numerators, correct, attempted = self._steps(unroll, rows, view)
        extra = numerators[0].new_zeros(())
        if futures is not None and self.training and self.objective.future_weight:
            extra = self.objective.future_weight * future_numerator(self.target, self.draft, futures, view)[0]
        terms = LossTerms(torch.stack([*numerators, extra]), self._denominators(rows))
        # A row that was left out at random says nothing of its chain; one that went wrong says all.
        known = attempted if self.objective.deep_rows == "random" else rows.valid
        routers = {} if futures is None or not self.training else {"routers": futures.routers}
        return {**terms.outputs(), **_guesses(correct, attempted, known), **routers}

    def _adapter_alone(self, futures: RowFutures, rows: DraftRows, view: TeacherView) -> dict[str, Tensor]:
        """As [`forward`]'s; the contemplate tokens are the only guesses there are."""
        numerator, right, exist = future_numerator(self.target, self.draft, futures, view)
        terms = LossTerms(F.pad(numerator[None], (self.objective.ttt_steps, 0)), self._denominators(rows))
        routers = {"routers": futures.routers} if self.training else {}
        return {**terms.outputs(), **_guesses(right, exist, exist), **routers}

    def denominators(self, labels: Tensor) -> Tensor:
        """`(K + 1,)`: what the numerators of this batch are to be divided by, known before it has run."""
        return self._denominators(DraftRows.of(labels, self.objective.ttt_steps))

    def _denominators(self, rows: DraftRows) -> Tensor:
        anchors = rows.valid[0].sum(-1).clamp_max(self.objective.num_anchors).sum()
        return torch.cat([rows.valid.sum((1, 2)), anchors[None]])

    def _row_futures(self, view: TeacherView, hidden_states: Tensor, rows: DraftRows) -> RowFutures:
        objective = self.objective
        # Evaluation contemplates at every row, as decoding does; training at a random few.
        number, max_lag, replication = rows.starts.shape[1], 1, 1
        if self.training:
            number, max_lag, replication = objective.num_anchors, objective.max_lag, objective.replication
        anchors = Anchors.of(rows, number, max_lag)
        return row_futures(self.target, self.draft, view, hidden_states, rows, anchors, replication)

    def _steps(self, unroll: DraftUnroll, rows: DraftRows, view: TeacherView) -> tuple[list[Tensor], Tensor, Tensor]:
        """Numerators of all test-time steps; and per step and row, `(K, B, R)` bool, whether its guess was right and
        whether it made one."""
        numerators, right = [], rows.valid[0]
        correct, attempted = torch.zeros_like(rows.valid), torch.zeros_like(rows.valid)
        live = rows.valid[0]  # (B, R') of the rows still unrolled: those that are none but fill up the rectangle
        for step in range(self.objective.ttt_steps):
            valid = rows.valid[step].gather(1, unroll.index) & live
            chosen = self._deep_rows(step, valid, right & valid)
            if chosen is not None:
                unroll.keep(chosen[0])
                live, valid = chosen[1], valid.gather(1, chosen[0]) & chosen[1]
            numerator, right = self._compare(unroll.step(), step, unroll.starts, valid, view)
            count, kept = rows.valid[step].sum(), valid.sum().clamp_min(1)
            numerators.append(numerator * self.objective.ttt_decay**step * (count / kept))
            correct[step] = correct[step].scatter(1, unroll.index, right)
            attempted[step] = attempted[step].scatter(1, unroll.index, valid)
        return numerators, correct, attempted

    def _deep_rows(self, step: int, valid: Tensor, survivors: Tensor) -> tuple[Tensor, Tensor] | None:
        """The rows to go on with, `(B, R'')` indices into those still unrolled, and which of them are no filling."""
        if not self.training or step == 0:
            return None
        if self.objective.deep_rows == "survivors":
            return rows_in_front(survivors)
        if self.objective.deep_rows == "random" and step == 1 and self.objective.deep_row_fraction < 1:
            return random_rows(valid, self.objective.deep_row_fraction)
        return None

    def _compare(
        self, outputs: Tensor, step: int, starts: Tensor, valid: Tensor, view: TeacherView
    ) -> tuple[Tensor, Tensor]:
        """Sum of KL(target || draft) over the valid rows of one step, and `(B, R')` which guesses were right."""
        # Row t at step k is compared with position t + 1 + k.
        target_rows, choices = view.locate(starts + 1 + step)
        used = valid & (choices >= 0)
        weights = torch.ones(target_rows[used].shape, device=used.device)
        right = torch.zeros_like(used)
        numerator, right[used] = linear_kl(
            outputs[used],
            self.draft.lm_head.weight,
            view.log_probs,
            view.choices,
            target_rows[used],
            weights,
        )
        return numerator, right


def _guesses(correct: Tensor, attempted: Tensor, known: Tensor) -> dict[str, Tensor]:
    """`accepted` and `correct` of the module's outputs, from `(K, B, R)` bool; `known`: steps whose outcome is known."""
    batch, count = known.shape[1:]
    accepted, whole = chain_accepted_length(correct.flatten(1), known.flatten(1))
    per_row = torch.stack((accepted * whole, whole.float()), dim=-1)  # (B * R, 2)
    return {
        "accepted": per_row.view(batch, count, 2).sum(1),
        "correct": torch.stack((correct, attempted), dim=-1).float().sum(2).transpose(0, 1),
    }
