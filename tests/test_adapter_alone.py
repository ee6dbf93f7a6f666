"""Training of the adapter without the draft."""

from __future__ import annotations

import torch
from tiny_models import tiny_llama
from tiny_pairs import conversations, tiny_pair

from confu_hf.training.data import ConversationCollator
from confu_hf.training.futures import Anchors, future_numerator, row_futures
from confu_hf.training.module import ConFuForTraining, ConFuTrainingObjective
from confu_hf.training.rows import DraftRows, predicted_positions


def test_the_adapter_without_the_draft():
    """`adapter_alone`: the loss is the contemplate tokens' own, it goes down, and nothing of the draft changes."""
    target = tiny_llama(dtype=torch.float32)
    torch.manual_seed(0)
    draft = tiny_pair(target)
    module = ConFuForTraining(target, draft, ConFuTrainingObjective(max_lag=1, adapter_alone=True, num_anchors=6))
    batch, kept = (
        ConversationCollator(0)(conversations((4, 20), (4, 16))),
        {name: weight.clone() for name, weight in draft.state_dict().items()},
    )
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert {id(one) for one in learning} == {id(one) for one in target.confu.parameters() if one.requires_grad}
    module.eval()
    before, optimizer = module(**batch), torch.optim.AdamW(learning, lr=2e-2)
    view = module.teacher.view(
        batch["input_ids"],
        batch["attention_mask"],
        draft.draft_token_ids,
        needed=predicted_positions(batch["labels"]),
        index=None,
        with_cache=True,
    )
    rows = DraftRows.of(batch["labels"], 4)
    anchors = Anchors.of(rows, rows.starts.shape[1], 1)
    hidden_states = draft.fuse(view.features)
    futures = row_futures(target, draft, view, hidden_states, rows, anchors, 1)
    expected, (right,), _ = future_numerator(target, draft, futures, view)
    torch.testing.assert_close(before["numerators"].sum(), expected)
    assert before["accepted"].sum(0).tolist() == [
        len(right[anchors.exist]) + right.sum().item(),
        len(right[anchors.exist]),
    ]
    for _ in range(10):
        optimizer.zero_grad()
        module(**batch)["loss"].backward()
        optimizer.step()
    assert module(**batch)["loss"].item() < 0.95 * before["loss"].item()
    assert all(torch.equal(weight, kept[name]) for name, weight in draft.state_dict().items())
