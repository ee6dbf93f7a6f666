"""The fused loss is the plain one, in value and gradient; accepted lengths are counted as decoding counts them."""

from __future__ import annotations

import pytest
import torch

from confu_hf.training.losses import chain_accepted_length, kl_reference, linear_kl

ROWS, POSITIONS, WIDTH, VOCABULARY = 11, 5, 6, 9


@pytest.fixture
def problem():
    torch.manual_seed(0)
    hidden_states = torch.randn(ROWS, WIDTH, dtype=torch.float64, requires_grad=True)
    head = torch.randn(VOCABULARY, WIDTH, dtype=torch.float64, requires_grad=True)
    log_probs = (2 * torch.randn(POSITIONS, VOCABULARY, dtype=torch.float64)).log_softmax(-1)
    target_rows = torch.randint(POSITIONS, (ROWS,))
    weights = torch.rand(ROWS, dtype=torch.float64)
    return hidden_states, head, log_probs, target_rows, weights


def fused(problem, **kwargs):
    hidden_states, head, log_probs, target_rows, weights = problem
    return linear_kl(hidden_states, head, log_probs, log_probs.argmax(-1), target_rows, weights, **kwargs)


def reference(problem):
    hidden_states, head, log_probs, target_rows, weights = problem
    return kl_reference(hidden_states, head, log_probs[target_rows], weights)


def value_and_gradients(loss, problem):
    # A factor other than 1 shows that the incoming gradient is used.
    return loss.detach(), *torch.autograd.grad(3.0 * loss, problem[:2])


@pytest.mark.parametrize("chunk", [1, 4, ROWS, 512])
def test_value_and_gradients_are_those_of_the_reference_for_any_chunk(problem, chunk):
    loss, _ = fused(problem, chunk=chunk)
    assert loss.dtype == torch.float64
    for got, expected in zip(
        value_and_gradients(loss, problem), value_and_gradients(reference(problem), problem), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_the_gradient_is_the_slope_of_the_loss(problem):
    hidden_states, head, log_probs, target_rows, weights = problem

    def loss(hidden_states, head):
        return linear_kl(hidden_states, head, log_probs, log_probs.argmax(-1), target_rows, weights, 4)[0]

    assert torch.autograd.gradcheck(loss, (hidden_states, head))


def test_inputs_are_left_as_they_were(problem):
    before = problem[2].clone()
    fused(problem)
    assert torch.equal(problem[2], before)


def test_a_zero_weight_leaves_a_row_out(problem):
    hidden_states, head, log_probs, target_rows, weights = problem
    keep = torch.arange(ROWS) % 3 > 0
    masked = (hidden_states, head, log_probs, target_rows, weights * keep)
    loss, grad_hidden, grad_head = value_and_gradients(fused(masked)[0], masked)
    shorter = (hidden_states[keep], head, log_probs, target_rows[keep], weights[keep])
    torch.testing.assert_close(loss, fused(shorter)[0].detach())
    torch.testing.assert_close(grad_head, torch.autograd.grad(3.0 * fused(shorter)[0], head)[0])
    assert not grad_hidden[~keep].any() and grad_hidden[keep].any(-1).all()


def test_the_loss_is_zero_where_the_draft_agrees(problem):
    hidden_states, head, _, _, weights = problem
    log_probs = (hidden_states @ head.T).log_softmax(-1).detach()
    loss, correct = linear_kl(hidden_states, head, log_probs, log_probs.argmax(-1), torch.arange(ROWS), weights)
    assert abs(loss.item()) < 1e-12 and correct.all()


@pytest.mark.parametrize("chunk", [3, 512])
def test_correct_says_where_the_likeliest_tokens_are_the_same(problem, chunk):
    hidden_states, head, log_probs, target_rows, _ = problem
    _, correct = fused(problem, chunk=chunk)
    expected = (hidden_states @ head.T).argmax(-1) == log_probs.argmax(-1)[target_rows]
    assert torch.equal(correct, expected) and 0 < expected.sum() < ROWS  # both cases occur


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_close_and_keeps_the_dtypes(problem, autocast):
    hidden_states, head, log_probs, target_rows, weights = (
        part.detach().float() if part.is_floating_point() else part for part in problem
    )
    dtype = torch.float32 if autocast else torch.bfloat16
    hidden_states, head = hidden_states.to(dtype).requires_grad_(), head.to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss, _ = fused((hidden_states, head, log_probs, target_rows, weights))
    loss.backward()
    assert loss.dtype == torch.float32 and hidden_states.grad.dtype == head.grad.dtype == dtype
    torch.testing.assert_close(loss.double(), reference(problem).detach(), rtol=0.02, atol=0.02)
    assert loss != loss.bfloat16()  # summed in float32
    expected = torch.autograd.grad(reference(problem), problem[:2])
    for got, gradient in zip((hidden_states.grad, head.grad), expected, strict=True):
        torch.testing.assert_close(got.double(), gradient, rtol=0.05, atol=0.05)


def test_chain_accepted_length_worked_example():
    right, wrong = True, False
    correct = torch.tensor([[right, right, wrong, right], [wrong, right, right, right], [right] * 4]).T  # (K, R)
    accepted, whole = chain_accepted_length(correct, torch.ones_like(correct))
    assert accepted.tolist() == [3.0, 1.0, 5.0]  # 1 + the right ones before the first wrong one
    assert whole.all()


def test_chain_accepted_length_ends_with_the_answer():
    correct = torch.ones(3, 2, dtype=torch.bool)
    valid = torch.tensor([[True, True], [True, True], [True, False]])
    accepted, whole = chain_accepted_length(correct, valid)
    assert accepted.tolist() == [4.0, 3.0] and whole.tolist() == [True, False]
