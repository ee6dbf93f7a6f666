"""Contemplation in training: which rows use which future, what contemplate tokens read and are asked for."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama
from tiny_pairs import tiny_pair
from training_batches import batch_of, choose_anchors, spy, steps_of

from confu_hf.training.data import IGNORED
from confu_hf.training.module import ConFuForTraining, ConFuTrainingObjective


def test_the_loss_of_the_futures_is_a_prediction_of_the_contemplate_tokens(monkeypatch):
    target = tiny_llama()
    objective = ConFuTrainingObjective(num_anchors=3, max_lag=1)
    module = ConFuForTraining(target, tiny_pair(target), objective).train()
    choose_anchors(monkeypatch, 0, 4, 8)
    batch = batch_of((3, 14))  # rows 2..11, so anchors 2, 6 and 10
    plain = module(**batch)["loss"]
    objective.future_weight = 0.5
    seen = spy(module, monkeypatch, "_row_futures")
    loss = module(**batch)["loss"]
    futures, ids = seen["result"], module.draft.draft_token_ids
    assert futures.anchors.positions.tolist() == [[2, 6, 10]]
    logits = target(batch["input_ids"]).logits[0, futures.anchors.positions[0] + 1]
    inside = module.draft.t2d[logits.argmax(-1)]
    log_p = logits[:, ids].float().log_softmax(-1)
    log_q = (futures.last[0, :, 0] @ target.lm_head.weight[ids].T).log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1)[inside].sum() / 3
    torch.testing.assert_close(loss - plain, 0.5 * divergence.detach(), rtol=1e-5, atol=1e-6, check_dtype=False)
    # It reaches the adapter past a draft that does not listen.
    module.zero_grad()
    (loss - plain).backward()
    assert all(parameter.grad.any() for parameter in target.confu.parameters())


@pytest.mark.parametrize("replication", [1, 3, 100])
def test_a_future_is_handed_to_the_rows_behind_its_anchor(replication, monkeypatch):
    target = tiny_llama()
    objective = ConFuTrainingObjective(num_anchors=2, replication=replication, max_lag=1)
    module = ConFuForTraining(target, tiny_pair(target), objective)
    choose_anchors(monkeypatch, 1, 6)
    seen = spy(module, monkeypatch, "_row_futures")
    batch = batch_of((3, 14))  # ten rows
    module.train()(**batch)
    futures = seen["result"]
    anchor = [None, 1, 1, 1, 1, 1, 6, 6, 6, 6]
    expected = [from_ is not None and row - from_ < replication for row, from_ in enumerate(anchor)]
    assert futures.present[0].tolist() == expected
    module.eval()(**batch)
    own = seen["result"]  # a future of its own for every row
    assert own.present.all()
    for row, present in enumerate(expected):
        torch.testing.assert_close(futures.embeds[0, row], own.embeds[0, row])
        if present:
            torch.testing.assert_close(futures.states[0, row], own.states[0, anchor[row]], rtol=1e-9, atol=1e-9)


def test_a_future_is_not_handed_over_a_gap_in_the_answer(monkeypatch):
    target = tiny_llama()
    module = ConFuForTraining(target, tiny_pair(target), ConFuTrainingObjective(num_anchors=1, replication=3))
    choose_anchors(monkeypatch, 1)
    seen = spy(module, monkeypatch, "_row_futures")
    batch = batch_of((3, 14))
    batch["labels"][:, 6:9] = IGNORED  # answers 3..5 and 9..13: rows 2, 3 and 8..11
    module.train()(**batch)
    assert seen["args"][-1].starts.tolist() == [[2, 3, 8, 9, 10, 11]]
    assert seen["result"].present.tolist() == [[False, True, False, False, False, False]]


def test_rows_without_a_future_are_eagle3_rows(monkeypatch):
    target = tiny_llama()
    draft = tiny_pair(target)
    module = ConFuForTraining(target, draft, ConFuTrainingObjective(num_anchors=1, replication=2)).train()
    choose_anchors(monkeypatch, 4)
    seen = steps_of(monkeypatch)
    batch = batch_of((3, 14))
    module(**batch)
    confu = torch.stack([step["outputs"] for step in seen])
    seen.clear()
    draft.config.contemplate = False
    module(**batch)
    differs = (confu - torch.stack([step["outputs"] for step in seen])).abs().amax((0, -1))[0] > 1e-9
    assert differs.nonzero().flatten().tolist() == [4, 5]


def test_anchors_lags_and_their_sources(monkeypatch):
    """Each anchor reads features 1 to max_lag positions before it, never its own."""
    target = tiny_llama()
    objective = ConFuTrainingObjective(num_anchors=100, max_lag=3)
    module = ConFuForTraining(target, tiny_pair(target), objective)
    batch = batch_of((4, 30))
    embed, read = target.confu.contemplate_embedding, []
    monkeypatch.setattr(target.confu, "contemplate_embedding", lambda states: read.append(states) or embed(states))
    seen = spy(module.teacher, monkeypatch, "view")
    torch.manual_seed(0)
    for _ in range(4):
        module.train()(**batch)
    features = seen["result"].features[0]
    lags = set()
    for states in read:
        for anchor, state in zip(range(3, 28), states[0], strict=True):
            (source,) = (features - state).abs().amax(-1).lt(1e-12).nonzero().flatten().tolist()
            lags.add(anchor - source)
    assert lags == {1, 2, 3}


def test_the_adapter_alone_lowers_the_loss():
    """With the draft frozen, only what the target contemplates can help."""
    target = tiny_llama(dtype=torch.float32)
    torch.manual_seed(0)
    module = ConFuForTraining(target, tiny_pair(target), ConFuTrainingObjective(max_lag=1)).eval()
    batch = batch_of((4, 20), (4, 16))
    before = module(**batch)["loss"].item()
    optimizer = torch.optim.AdamW(target.confu.parameters(), lr=2e-2)
    for _ in range(10):
        optimizer.zero_grad()
        module(**batch)["loss"].backward()
        optimizer.step()
    assert module(**batch)["loss"].item() < 0.98 * before
