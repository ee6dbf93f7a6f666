"""Pairs as training starts them: fresh from the target, from EAGLE-3, with an adapter, with a store."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama, tiny_target
from tiny_pairs import conversations, tiny_pair

from confu_hf import ConFuAssistant
from confu_hf.adapter.tuner import remove_adapter
from confu_hf.target.soft_prompts import soft_prompt_key_values
from confu_hf.training.data import ConversationCollator
from confu_hf.training.module import ConFuForTraining
from confu_hf.training.pair import (
    AdapterShape,
    DraftShape,
    add_adapter,
    confu_from_eagle3,
    fresh_draft,
    open_store,
    starting_pair,
)
from confu_hf.training.store import store_bytes

ROWS = conversations((4, 20), (3, 16), (5, 24))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"feedback_after_norm": True, "fc_norm": True},
        {"norm_before_residual": True, "qk_norm": True, "own_embeddings": True},
        {"draft_hidden_size": 16},
        {"target_layer_ids": [3, 6]},
    ],
)
def test_each_shape_starts_and_trains(fields):
    target = tiny_llama(dtype=torch.float32)
    shape = DraftShape(draft_vocab_size=40, **fields)
    fresh = fresh_draft(ConFuAssistant, shape, target, ROWS, contemplate=False, always=[2])
    draft = fresh.draft
    assert draft.t2d.sum() == 40 and draft.t2d[2] and 0 < fresh.coverage <= 1
    assert "midlayer.mlp.up_proj.weight" in fresh.from_target or fields.get("draft_hidden_size")
    loss = ConFuForTraining(target, draft).train()(**ConversationCollator(0)(ROWS))["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None and p.grad.isfinite().all() for p in draft.parameters())


def test_norms_before_the_fusion_keep_the_size_of_the_top_feature():
    target = tiny_llama(dtype=torch.float32)
    shape = DraftShape(draft_vocab_size=40, fc_norm=True)
    draft = fresh_draft(ConFuAssistant, shape, target, ROWS, contemplate=False).draft
    states = target(torch.tensor([ROWS[2]["input_ids"]]), output_hidden_states=True).hidden_states
    features = torch.cat([states[i] for i in draft.config.target_layer_ids], dim=-1)
    fused, top = draft.fuse(features).detach(), states[draft.config.target_layer_ids[-1]]
    assert torch.nn.functional.cosine_similarity(fused, top, dim=-1).min() > 0.999
    size = (fused.square().mean() / top.square().mean()).sqrt()
    assert 0.8 < size < 1.25
    weights = torch.stack([norm.weight for norm in draft.fc_norm])
    assert (weights == weights[0, 0]).all() and weights[0, 0] != 1


def test_a_target_of_one_layer_has_something_to_start_from():
    target = tiny_target("llama", num_hidden_layers=1, dtype=torch.float32)
    draft = fresh_draft(ConFuAssistant, DraftShape(draft_vocab_size=40), target, ROWS, contemplate=False).draft
    assert draft.config.target_layer_ids == [0]
    assert torch.equal(draft.midlayer.mlp.up_proj.weight, target.model.layers[0].mlp.up_proj.weight)


def test_confu_from_eagle3_keeps_the_variant():
    target = tiny_llama(dtype=torch.float32)
    eagle3 = tiny_pair(target, contemplate=False, fc_norm=True, feedback_after_norm=True)
    confu = confu_from_eagle3(ConFuAssistant, eagle3)
    assert confu.config.contemplate and confu.config.fc_norm and confu.config.feedback_after_norm
    assert torch.equal(confu.future_fc.weight, eagle3.fc.weight)


def test_a_new_adapter_starts_among_the_targets_embeddings():
    target = tiny_llama(dtype=torch.float32)
    draft = fresh_draft(ConFuAssistant, DraftShape(draft_vocab_size=40), target, ROWS, contemplate=True).draft
    torch.manual_seed(3)
    add_adapter(target, draft, AdapterShape(num_virtual_tokens=5, num_experts=3))
    table, ids = target.get_input_embeddings().weight, draft.draft_token_ids
    torch.manual_seed(3)
    weights = target.confu.adapter_weights("default")
    assert weights["confu_prompts"].shape[2] == 5 and len(weights["confu_experts"]) == 3
    prompts = weights["confu_prompts"]
    first = {tuple(soft_prompt_key_values(target, table[i][None])[0, 1, 0].flatten().tolist()) for i in ids}
    values = [tuple(prompts[0, 1, slot].flatten().tolist()) for slot in range(5)]  # of layer 0: no context in them
    near = [min(sum((a - b) ** 2 for a, b in zip(value, other, strict=True)) for other in first) for value in values]
    assert max(near) < 1e-8
    assert (weights["confu_experts"] - table[ids].mean(0)).abs().max() < 0.15


def test_the_store_is_for_these_layers_and_this_data(tmp_path):
    target = tiny_llama(dtype=torch.float32)
    draft = fresh_draft(
        ConFuAssistant, DraftShape(draft_vocab_size=40, target_layer_ids=[1, 5]), target, ROWS, contemplate=False
    ).draft
    store = open_store(str(tmp_path), target, draft, ROWS[:2], ROWS[2:], name="tiny", store_caches=False)
    module = ConFuForTraining(target, draft, feature_store=store).eval()
    batch = ConversationCollator(0)(ROWS)
    first = module(**batch)["loss"]
    assert store.holds(torch.arange(3)) and store.states.shape[1] == 3 * 32
    torch.testing.assert_close(module(**batch)["loss"], first, rtol=1e-2, atol=0)
    with pytest.raises(ValueError, match="The target features in"):
        open_store(str(tmp_path), target, draft, ROWS[:2], name="tiny", store_caches=False)


def test_a_store_says_what_it_takes_and_has_a_limit(tmp_path):
    target = tiny_llama(dtype=torch.float32)
    draft = fresh_draft(ConFuAssistant, DraftShape(draft_vocab_size=40), target, ROWS, contemplate=False).draft
    store = open_store(str(tmp_path / "a"), target, draft, ROWS, name="tiny", store_caches=True)
    positions = sum(len(row["input_ids"]) for row in ROWS)
    files = [tmp_path / "a" / f"{name}.bin" for name in ("states", "choices", "caches")]
    size = sum(file.stat().st_size for file in files)
    assert size == store_bytes(positions, 32, 3, (8, 2, 8)) and store.cache_shape == (8, 2, 8)
    with pytest.raises(
        ValueError, match=r"feature_store: got 0.00 GB for 60 positions, expected at most 0.00 GB. Train"
    ):
        open_store(str(tmp_path / "b"), target, draft, ROWS, name="tiny", store_caches=True, limit=size / 1e9 / 2)
    assert not (tmp_path / "b").exists()


def test_a_draft_from_no_sequences_is_refused():
    with pytest.raises(
        ValueError, match="rows: got none, expected sequences to start a draft with. Make answers with"
    ):
        fresh_draft(ConFuAssistant, DraftShape(), tiny_llama(), [], contemplate=False)


def test_a_stage_goes_on_from_what_it_is_given(tmp_path):
    """Fresh; ConFu from EAGLE-3; a pair as it is; a pair that gets a gated LoRA; EAGLE-3 with a pair's adapter."""
    target = tiny_llama(dtype=torch.bfloat16)

    def start(contemplate, init_from=None, adapter_from=None, **shape):
        return starting_pair(
            ConFuAssistant,
            target,
            ROWS,
            contemplate=contemplate,
            init_from=init_from,
            adapter_from=adapter_from,
            draft_shape=DraftShape(draft_vocab_size=40),
            adapter_shape=AdapterShape(num_virtual_tokens=3, num_experts=4, **shape),
        )

    eagle3 = start(False)
    eagle3.save_pretrained(tmp_path / "eagle3")
    eagle3.detach()
    confu = start(True, str(tmp_path / "eagle3"))
    assert torch.equal(confu.fc.weight, eagle3.fc.weight) and target.confu.prompt_weight().dtype == torch.float32
    kept = {name: weight.clone() for name, weight in target.confu.adapter_weights(target.confu.current).items()}
    confu.save_pretrained(tmp_path / "confu")
    confu.detach()
    remove_adapter(target, "default")
    again = start(True, str(tmp_path / "confu"))
    assert torch.equal(again.future_fc.weight, confu.future_fc.weight)
    assert target.confu.config.lora_rank == 0 and target.confu.config.num_virtual_tokens == 3
    again.detach()
    more = start(True, str(tmp_path / "confu"), lora_rank=2)
    weights = target.confu.adapter_weights(target.confu.current)
    assert target.confu.config.lora_rank == 2 and not weights["confu_lora_up"].any()
    assert all(torch.equal(weights[name], weight) for name, weight in kept.items())
    assert all(torch.equal(weight, confu.state_dict()[name]) for name, weight in more.state_dict().items())
    more.save_pretrained(tmp_path / "more")
    kept = {name: weight.clone() for name, weight in weights.items()}
    more.detach()
    other = start(True, str(tmp_path / "eagle3"), adapter_from=str(tmp_path / "more"), lora_rank=1)
    assert torch.equal(other.fc.weight, eagle3.fc.weight) and target.confu.config.lora_rank == 2
    weights = target.confu.adapter_weights(target.confu.current)
    assert all(torch.equal(weights[name], weight) for name, weight in kept.items())
