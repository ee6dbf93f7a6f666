"""The training loss: KL(target || draft) over the draft vocabulary, computed with the draft's LM head, chunk by chunk.

A step of training has `rows x test-time steps` predictions over thousands of tokens; keeping their logits for the
backward pass would take more memory and time than the rest of the draft. So the gradient with respect to the hidden
states and the head's weight is formed in the forward pass, while a chunk's logits are at hand: for p = target,
q = softmax(z), d KL / d z = q - p.

Knows tensors only: no model, no data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

# Rows whose logits exist at one time: a CPU wants them in its caches, a GPU few and large products.
CHUNK_ROWS = {"cpu": 512, "cuda": 8192}


@dataclass(frozen=True)
class LossTerms:
    """A loss as sums and what they are sums over, so that parts of a batch can be added up wherever they ran.

    One entry per test-time step and a last one for the contemplate tokens; weights of the objective are in the
    numerators. Example, two steps: 10 rows with a summed divergence of 20, of which 8 have a second step with (weighted)
    12, no contemplate tokens: numerators (20, 12, 0), denominators (10, 8, 0), loss 2 + 1.5. Half of that batch has
    other numerators and other counts; the sums over both halves are these.
    """

    numerators: torch.Tensor  # (K + 1,) with gradient
    denominators: torch.Tensor  # (K + 1,) long

    def mean(self, denominators: torch.Tensor | None = None) -> torch.Tensor:
        """The loss; with the `denominators` of a larger batch, this part's share in its loss."""
        counts = self.denominators if denominators is None else denominators
        return (self.numerators / counts.clamp_min(1)).sum()

    def outputs(self) -> dict[str, torch.Tensor]:
        return {"loss": self.mean(), "numerators": self.numerators, "denominators": self.denominators}


def kl_reference(
    hidden_states: torch.Tensor, head_weight: torch.Tensor, target_log_probs: torch.Tensor, row_weights: torch.Tensor
) -> torch.Tensor:
    """The plain form of [`linear_kl`], for tests and for reading: `sum_r w_r KL(target_r || softmax(h_r W^T))`."""
    log_q = F.linear(hidden_states, head_weight).log_softmax(-1)
    return (row_weights * (target_log_probs.exp() * (target_log_probs - log_q)).sum(-1)).sum()


class _LinearKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_states, head_weight, target_log_probs, target_choice, target_rows, row_weights, chunk):
        rows, device_type = hidden_states.shape[0], hidden_states.device.type
        autocast = torch.is_autocast_enabled(device_type)
        compute = torch.get_autocast_dtype(device_type) if autocast else hidden_states.dtype
        weight = head_weight.to(compute)
        hidden = hidden_states.to(compute)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(head_weight, dtype=torch.promote_types(compute, torch.float32))
        loss = hidden_states.new_zeros((), dtype=torch.promote_types(compute, torch.float32))
        correct = torch.empty(rows, dtype=torch.bool, device=hidden_states.device)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            logits = F.linear(hidden[part], weight).to(loss.dtype)  # (chunk, K)
            # A comparison with the maximum, not an argmax: several times faster on CPU.
            correct[part] = logits.gather(1, target_choice[target_rows[part], None])[:, 0] >= logits.amax(-1)
            log_q = logits.log_softmax(-1)
            log_p = target_log_probs[target_rows[part]].to(loss.dtype)
            p = log_p.exp()
            # Not `weights @ divergences`: under autocast a product of vectors is rounded to bfloat16.
            loss += log_p.sub_(log_q).mul_(p).sum(-1).mul_(row_weights[part]).sum()
            grad_logits = log_q.exp_().sub_(p).mul_(row_weights[part, None]).to(compute)
            grad_hidden[part] = grad_logits @ weight
            grad_weight += grad_logits.t() @ hidden[part]
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes = hidden_states.dtype, head_weight.dtype
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx, grad_loss, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden_dtype, weight_dtype = ctx.dtypes
        return (grad_hidden * grad_loss).to(hidden_dtype), (grad_weight * grad_loss).to(weight_dtype), *[None] * 5


def linear_kl(
    hidden_states: torch.Tensor,
    head_weight: torch.Tensor,
    target_log_probs: torch.Tensor,
    target_choice: torch.Tensor,
    target_rows: torch.Tensor,
    row_weights: torch.Tensor,
    chunk: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum over rows of KL(target || draft), with the draft's LM head inside.

    Args:
        hidden_states: `(R, d)` the draft's normalised outputs.
        head_weight: `(K, d)` of the draft's LM head.
        target_log_probs: `(P, K)` finite log-softmax of the target's logits over the draft vocabulary, one row per
            *position* (several draft rows predict the same position).
        target_choice: `(P,)` long, the target's likeliest token as a draft id.
        target_rows: `(R,)` long, which of the `P` positions each draft row is compared with.
        row_weights: `(R,)` weights; 0 leaves a row out.
        chunk: rows whose logits exist at one time; None = as suits the device.

    Returns:
        The loss, a scalar in at least float32, and `(R,)` bool: the draft would propose the target's choice.
    """
    if chunk is None:
        chunk = CHUNK_ROWS.get(hidden_states.device.type, CHUNK_ROWS["cuda"])
    return _LinearKL.apply(
        hidden_states, head_weight, target_log_probs, target_choice, target_rows, row_weights, chunk
    )


def chain_accepted_length(correct: torch.Tensor, valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens a round would emit with a chain of `K` drafted tokens, bonus included.

    That is 1 + the number of correct guesses before the first wrong one: right, right, wrong, right give 1 + 2 = 3.
    Exact for text that the target wrote greedily; for sampled text it is the chance of the text.

    Args:
        correct: `(K, R)` bool, step `k` of row `r` proposed the right token.
        valid: `(K, R)` bool, that step lies inside the response.

    Returns:
        `(R,)` float accepted lengths, and `(R,)` bool: rows whose chain lies wholly inside the response.
    """
    accepted = (correct & valid).long().cumprod(dim=0).sum(dim=0)
    return 1.0 + accepted.float(), valid.all(dim=0)
