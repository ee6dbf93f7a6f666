"""Which rows train, what they see, where gradients go. test_training_equals_decoding.py compares with decoding."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tiny_models import tiny_llama
from tiny_pairs import conversations, tiny_pair
from torch.nn import functional as F
from training_batches import batch_of, choose_anchors, spy, steps_of

from confu_hf.training import module as training
from confu_hf.training import unroll
from confu_hf.training.data import IGNORED, ConversationCollator
from confu_hf.training.losses import LossTerms
from confu_hf.training.module import ConFuForTraining, ConFuTrainingObjective
from confu_hf.training.rows import DraftRows, row_attention
from confu_hf.training.teacher import Teacher

A_TO_F = [[IGNORED, IGNORED, 12, 13, 14, 15]]  # prompt `a b`, answer `c d e f`


def learn(module, batch, steps: int = 12) -> None:
    """Let the draft guess some of the batch right."""
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        module.train()(**batch)["loss"].backward()
        optimizer.step()


def test_rows_worked_example_of_the_docstring():
    rows = DraftRows.of(torch.tensor(A_TO_F), steps=3)
    assert rows.starts.tolist() == [[1, 2, 3]]
    # Row 1 drafts d, e, f; row 2 e, f; row 3 f.
    assert rows.valid[:, 0].T.tolist() == [[True, True, True], [True, True, False], [True, False, False]]


def test_rows_of_a_batch_and_of_an_answer_in_two_parts():
    labels = torch.full((3, 9), IGNORED)
    labels[0, 2:6] = 7
    labels[1, 1:4], labels[1, 5:9] = 7, 7
    labels[2, 4] = 7  # one token is drawn at prefill: nothing to draft
    rows = DraftRows.of(labels, steps=2)
    assert rows.valid[0].tolist() == [[True] * 3 + [False] * 2, [True] * 5, [False] * 5]
    assert rows.starts[0, :3].tolist() == [1, 2, 3]
    assert rows.starts[1].tolist() == [0, 1, 4, 5, 6]
    assert rows.valid[1, 1].tolist() == [True, False, True, True, False]  # no step reaches over the gap


def test_an_answer_behind_a_gap_does_not_make_a_step_valid():
    labels = torch.full((1, 8), IGNORED)
    labels[0, 1:3], labels[0, 4:6] = 7, 7
    rows = DraftRows.of(labels, steps=4)
    # Row 0 drafts position 2; position 3 is a prompt's, so positions 4 and 5 are out of reach.
    assert rows.starts[0].tolist() == [0, 3] and rows.valid[:, 0, 0].tolist() == [True, False, False, False]


def test_a_batch_without_answers_is_refused():
    with pytest.raises(ValueError, match="got no answer of two tokens or more in 2 sequences"):
        DraftRows.of(torch.full((2, 5), IGNORED), steps=2)


def render(step: int, row: int, groups: list[torch.Tensor]) -> str:
    head = f"    step {step}  " if row == 1 else " " * 12
    cells = [" ".join("#" if seen else "." for seen in group.tolist()) for group in groups]
    return f"{head}row {row}   {cells[0]:18}{cells[1]:14}{cells[2]:14}{cells[3]}"


def test_the_drawing_in_the_docstring_is_the_mask(monkeypatch):
    calls, attend = [], unroll.row_attention

    def record(query, keys, values, mask, own):
        calls.append((mask[0], [present[0] for _, _, present in own]))
        return attend(query, keys, values, mask, own)

    monkeypatch.setattr(unroll, "row_attention", record)
    choose_anchors(monkeypatch, 0)  # row t = 1
    target = tiny_llama()
    module = ConFuForTraining(
        target, tiny_pair(target), ConFuTrainingObjective(ttt_steps=3, num_anchors=1, replication=2)
    )
    ids = torch.arange(10, 16)[None]
    module.train()(ids, torch.ones_like(ids), torch.tensor(A_TO_F))
    drawn = []
    for step, (mask, (future, *own)) in enumerate(calls):
        own = own + [torch.zeros(3, dtype=torch.bool)] * (2 - len(own))
        for row in range(3):
            only_mine = torch.arange(3) == row
            drawn.append(render(step, row + 1, [mask[row], *(only_mine & seen[row] for seen in (*own, future))]))
    assert drawn == [line for line in unroll.__doc__.splitlines() if " row " in line and " # " in line]


@pytest.mark.parametrize("deep_rows", ["random", "survivors"])
def test_rows_that_go_on_are_the_same_rows(monkeypatch, deep_rows):
    """Rows left out beyond step 0 change no other row."""
    target = tiny_llama()
    fields = {"ttt_steps": 3, "num_anchors": 100, "replication": 1, "max_lag": 1}
    module = ConFuForTraining(target, tiny_pair(target), ConFuTrainingObjective(**fields, deep_rows="all")).train()
    batch = batch_of((3, 24), (3, 14))  # twenty rows and ten
    learn(module, batch)
    whole, module_of = steps_of(monkeypatch), spy(module, monkeypatch, "_steps")
    module(**batch)
    expected = [step["outputs"] for step in whole]
    _, correct, valid = module_of["result"]
    assert torch.equal(valid, DraftRows.of(batch["labels"], 3).valid)
    whole.clear()
    module.objective = ConFuTrainingObjective(
        **fields, deep_rows=deep_rows, deep_row_fraction=0.4 if deep_rows == "random" else 1.0
    )
    torch.manual_seed(0)
    module(**batch)
    _, _, attempted = module_of["result"]
    assert torch.equal(attempted[0], valid[0])
    if deep_rows == "survivors":
        assert torch.equal(attempted[1:], (correct.cumprod(0).bool()[:-1] & valid[1:]))
    else:
        assert torch.equal(attempted[1].sum(-1), torch.tensor([8, 8]).minimum(valid[1].sum(-1)))
        assert torch.equal(attempted[2], attempted[1] & valid[2])
    assert attempted[1].any() and (attempted[1] < valid[1]).any()
    for step, seen in enumerate(whole):
        got = torch.zeros_like(expected[0]).scatter(
            1, seen["index"][..., None].expand_as(seen["outputs"]), seen["outputs"]
        )
        torch.testing.assert_close(got[attempted[step]], expected[step][attempted[step]], rtol=1e-10, atol=1e-10)
    module.eval()(**batch)
    assert torch.equal(module_of["result"][2], valid)


def test_survivors_loss_is_the_mean_over_them(monkeypatch):
    """Each step's mean runs over the rows that were right so far; chains are counted as with all rows."""
    target = tiny_llama()
    draft = tiny_pair(target, contemplate=False)
    module = ConFuForTraining(target, draft, ConFuTrainingObjective(ttt_steps=3, deep_rows="survivors"))
    batch = batch_of((3, 24), (3, 14))
    learn(module, batch)
    seen = spy(module, monkeypatch, "_steps")
    outputs, steps = module(**batch), steps_of(monkeypatch)
    _, correct, attempted = seen["result"]
    module.objective.deep_rows = "all"
    every = module(**batch)
    view = spy(module.teacher, monkeypatch, "view")
    module(**batch)
    view, rows = view["result"], DraftRows.of(batch["labels"], 3)
    expected = 0.0
    for step in range(3):
        log_q = draft.lm_head(steps[step]["outputs"]).log_softmax(-1)
        index, choices = view.locate(rows.starts + 1 + step)
        log_p = view.log_probs[index]
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1) * (choices >= 0)
        expected += 0.8**step * divergence[attempted[step]].sum() / attempted[step].sum()
    torch.testing.assert_close(outputs["loss"].detach(), expected.detach(), rtol=1e-6, atol=1e-6)
    assert torch.equal(outputs["accepted"], every["accepted"])
    assert torch.equal(outputs["denominators"], every["denominators"])
    assert outputs["correct"][:, 1:].sum() < every["correct"][:, 1:].sum() and correct.any()


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"deep_rows": "some"}, "deep_rows: got 'some', expected one of all, random, survivors"),
        ({"deep_rows": "survivors", "deep_row_fraction": 0.5}, "got 0.5 with deep_rows='survivors', expected"),
    ],
)
def test_an_objective_that_cannot_be_is_refused(fields, text):
    with pytest.raises(ValueError, match=text):
        ConFuTrainingObjective(**fields)


@pytest.mark.parametrize("contemplate", [True, False])
def test_parts_of_a_batch_add_up_to_it(contemplate):
    """Numerators and counts of two unequal parts sum to those of the whole, and so do the gradients."""
    target = tiny_llama()
    draft = tiny_pair(target, contemplate=contemplate)
    objective = ConFuTrainingObjective(
        ttt_steps=3, deep_rows="all", num_anchors=100, replication=1, max_lag=1, future_weight=0.3
    )
    module = ConFuForTraining(target, draft, objective).train()
    lengths = [(4, 12), (7, 10), (2, 16)]
    rows = conversations(*lengths)
    whole = module(**ConversationCollator(0)(rows))
    whole["loss"].backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    batches = [ConversationCollator(0)(part) for part in (rows[:2], rows[2:])]
    counts = sum(module.denominators(batch["labels"]) for batch in batches)
    assert torch.equal(counts, whole["denominators"]) and (counts[-1] > 0 or not contemplate)
    total = 0.0
    for batch in batches:
        outputs = module(**batch)
        loss = LossTerms(outputs["numerators"], outputs["denominators"]).mean(counts)
        loss.backward()
        total += loss.detach()
    torch.testing.assert_close(total, whole["loss"].detach(), rtol=1e-12, atol=1e-12)
    for name, gradient in expected.items():
        torch.testing.assert_close(module.get_parameter(name).grad, gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_row_attention_is_dense_attention_under_the_explicit_mask(groups):
    torch.manual_seed(0)
    batch, kv_heads, rows, keys, width, steps = 2, 2, 5, 7, 8, 3
    query = torch.randn(batch, kv_heads * groups, rows, width, dtype=torch.float64, requires_grad=True)
    shared = [torch.randn(batch, kv_heads, keys, width, dtype=torch.float64) for _ in range(2)]
    mask = torch.rand(batch, rows, keys) > 0.4
    mask[..., 0] = True
    own = []
    for _ in range(steps):
        key, value = torch.randn(2, batch, kv_heads, rows, width, dtype=torch.float64)
        own.append((key, value, torch.rand(batch, rows) > 0.3))
    got = row_attention(query, *shared, mask, own)
    dense_keys = torch.cat([shared[0], *(key for key, _, _ in own)], dim=2)
    dense_values = torch.cat([shared[1], *(value for _, value, _ in own)], dim=2)
    dense_mask = torch.cat([mask, *(torch.diag_embed(present) for *_, present in own)], dim=-1)[:, None]
    expected = F.scaled_dot_product_attention(query, dense_keys, dense_values, dense_mask, enable_gqa=True)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(output.square().sum(), query)[0] for output in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("contemplate", [True, False])
def test_padding_on_the_right_changes_nothing(contemplate):
    target = tiny_llama()
    module = ConFuForTraining(target, tiny_pair(target, contemplate=contemplate)).eval()
    batch = batch_of((4, 12))
    expected = module(**batch)
    padded = {
        "input_ids": F.pad(batch["input_ids"], (0, 5), value=55),
        "attention_mask": F.pad(batch["attention_mask"], (0, 5)),
        "labels": F.pad(batch["labels"], (0, 5), value=IGNORED),
    }
    for name, value in module(**padded).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("contemplate", [True, False])
def test_the_loss_of_a_batch_is_the_mean_over_its_rows(contemplate):
    target = tiny_llama()
    draft = tiny_pair(target, contemplate=contemplate)
    module = ConFuForTraining(target, draft, ConFuTrainingObjective(ttt_steps=1)).eval()
    lengths = [(4, 12), (7, 10), (2, 16)]
    together = module(**batch_of(*lengths))
    rows = conversations(*lengths)
    alone = [module(**ConversationCollator(0)([row])) for row in rows]
    counts = torch.tensor([length - prompt - 1 for prompt, length in lengths])
    mean = sum(count * output["loss"] for count, output in zip(counts, alone, strict=True)) / counts.sum()
    torch.testing.assert_close(together["loss"], mean, rtol=1e-12, atol=0)
    for name in ("accepted", "correct"):
        assert torch.equal(together[name], torch.cat([output[name] for output in alone]))
    assert together["correct"][:, 0, 1].tolist() == counts.tolist()


@pytest.mark.parametrize("kind", ["kv", "embedding", None])
def test_gradients_reach_draft_and_adapter_and_nothing_else(kind):
    target = tiny_llama().requires_grad_(True)  # the module freezes it
    fields = {"contemplate": False} if kind is None else {"soft_prompt_type": kind}
    draft = tiny_pair(target, **fields)
    torch.manual_seed(0)
    module = ConFuForTraining(target, draft).train()
    module(**batch_of((4, 16), (3, 12)))["loss"].backward()
    trained = {name for name, parameter in module.named_parameters() if parameter.grad is not None}
    adapter = {f"target.confu.confu_{name}.contemplate.weight" for name in ("prompts", "experts", "router")}
    assert trained == {f"draft.{name}" for name, _ in draft.named_parameters()} | (adapter if kind else set())
    for name in trained:
        gradient = module.get_parameter(name).grad
        assert gradient.isfinite().all() and gradient.any(), name


def test_metrics_count_right_guesses(monkeypatch):
    """A draft that says what the target says is right at every step, and accepts whole chains."""
    target = tiny_llama()
    module = ConFuForTraining(
        target, tiny_pair(target, contemplate=False), ConFuTrainingObjective(ttt_steps=3, ttt_decay=0.5)
    ).eval()
    batch = batch_of((3, 11))

    def exact(states, head, log_probs, choice, target_rows, weights, chunk=512):
        return weights.sum(), torch.ones(len(states), dtype=torch.bool)

    monkeypatch.setattr(training, "linear_kl", exact)
    # Every token is in the draft's vocabulary.
    view = Teacher.view

    def known(*args, **kwargs):
        said = view(*args, **kwargs)
        return replace(said, choices=said.choices.clamp_min(0))

    monkeypatch.setattr(Teacher, "view", known)
    outputs = module(**batch)
    assert outputs["accepted"].tolist() == [[4.0 * 5, 5.0]]  # 7 rows, 5 of them with 3 steps before the end
    assert outputs["correct"].tolist() == [[[7, 7], [6, 6], [5, 5]]]
    torch.testing.assert_close(outputs["loss"], torch.tensor(1 + 0.5 + 0.25))  # the mean at each step, then the decay


def test_what_the_target_would_say_outside_the_draft_vocabulary_is_left_out(monkeypatch):
    target = tiny_llama()
    module = ConFuForTraining(target, tiny_pair(target, contemplate=False), ConFuTrainingObjective(ttt_steps=1)).eval()
    batch = batch_of((3, 30))
    seen = spy(module.teacher, monkeypatch, "view")
    outputs = module(**batch)
    log_probs, choice = seen["result"].log_probs, seen["result"].choices
    # Nothing is compared with what comes after the last token, nor with the answer's first, which prefill draws.
    logits = target(**{name: batch[name] for name in ("input_ids", "attention_mask")}).logits[0, 3:29]
    inside = module.draft.t2d[logits.argmax(-1)]
    assert 0 < inside.sum() < len(inside)
    assert torch.equal(choice >= 0, inside)
    ids = module.draft.draft_token_ids
    assert torch.equal(ids[choice[inside]], logits.argmax(-1)[inside])
    torch.testing.assert_close(log_probs, logits[:, ids].log_softmax(-1))
    # No prediction of such a row counts as right, and its loss is zero.
    module.draft.lm_head.weight.data.zero_()
    expected = -(log_probs.exp() * -log_probs).sum(-1) + torch.log(torch.tensor(64.0))  # KL to uniform
    count = outputs["correct"][0, 0, 1]
    torch.testing.assert_close(
        module(**batch)["loss"], (expected * inside)[: int(count)].sum() / count, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", ["kv", "embedding", None])
def test_a_few_steps_lower_the_loss(kind):
    target = tiny_llama(dtype=torch.float32)
    fields = {"contemplate": False} if kind is None else {"soft_prompt_type": kind}
    torch.manual_seed(0)
    module = ConFuForTraining(target, tiny_pair(target, **fields)).train()
    batch = batch_of((4, 20), (4, 16))
    before = module.eval()(**batch)["loss"].item()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=5e-3)
    module.train()
    for _ in range(15):
        optimizer.zero_grad()
        module(**batch)["loss"].backward()
        optimizer.step()
    assert module.eval()(**batch)["loss"].item() < 0.7 * before
