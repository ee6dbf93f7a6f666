"""The contemplate token's own word: how it starts, when it counts, and that it changes no text."""

from __future__ import annotations

import pytest
import torch
from oracles import make_assistant
from tiny_models import keep_softmax_in_float64, tiny_llama
from tiny_pairs import conversations, tiny_pair

from confu_hf import ConFuAssistant
from confu_hf.decoding.contemplation import Contemplator
from confu_hf.target.weights import head_rows
from confu_hf.training.data import ConversationCollator
from confu_hf.training.module import ConFuForTraining, ConFuTrainingObjective
from confu_hf.training.pair import DraftShape, starting_pair

LENGTHS = {"max_new_tokens": 24, "eos_token_id": None}
TREE = {"total_tokens": 9, "depth": 3, "draft_top_k": 3, "lookup": False, "policy": "fixed"}


@pytest.fixture(autouse=True)
def _exact_softmax(monkeypatch):
    keep_softmax_in_float64(monkeypatch)


def test_it_starts_as_a_share_of_what_the_targets_head_says(tmp_path):
    target = tiny_llama(dtype=torch.float32)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        eagle3 = tiny_pair(target, contemplate=False, initializer_range=1.0)
        target.get_output_embeddings().weight.data.normal_()
    # A head that has learned: another basis than the target's.
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(1))).Q
    eagle3.lm_head.weight.data = head_rows(target, eagle3.draft_token_ids) @ turn
    eagle3.save_pretrained(tmp_path)
    draft = starting_pair(
        ConFuAssistant,
        target,
        None,
        contemplate=True,
        init_from=tmp_path,
        draft_shape=DraftShape(future_word=True),
    )
    futures = torch.randn(2, 5, 4 * 32, generator=torch.Generator().manual_seed(2))
    hidden_states = torch.zeros(2, 5, 32)
    expected = 0.5 * futures[..., 3 * 32 :] @ head_rows(target, draft.draft_token_ids).T
    torch.testing.assert_close(draft.logits(hidden_states, draft.word(futures)), expected, rtol=1e-4, atol=1e-4)
    assert draft.config.future_layer_ids == [*draft.config.target_layer_ids, target.config.num_hidden_layers]


def test_an_eagle3_draft_knows_none():
    shape = DraftShape(draft_vocab_size=40, future_word=True)
    assert shape.config(tiny_llama(), contemplate=True).future_word
    assert not shape.config(tiny_llama(), contemplate=False).future_word


def test_a_fresh_one_is_silent():
    draft = tiny_pair(tiny_llama(), future_word=False)
    assert draft.word(torch.randn(1, 4 * 32, dtype=torch.float64)) is None
    with torch.random.fork_rng():
        draft = ConFuAssistant.from_target(tiny_llama(), draft_vocab_size=40, future_word=True)
    assert not draft.word(torch.randn(1, 4 * 32, dtype=torch.float64)).any()


def test_an_ancestors_word_is_not_heard():
    target = tiny_llama()
    confu = tiny_pair(target, future_word=True)
    futures = torch.arange(1, 1 + 2 * 4 * 32.0).view(2, 4 * 32)
    timely = confu.contemplator(target).timely(futures, torch.tensor([True, False]))
    assert torch.equal(timely[0], futures[0])
    assert torch.equal(timely[1, : 3 * 32], futures[1, : 3 * 32]) and not timely[1, 3 * 32 :].any()
    plain = Contemplator(target, target.confu, target.confu.current, confu.config.target_layer_ids)
    features = futures[:, : 3 * 32]
    assert plain.timely(features, torch.tensor([True, False])) is features


@pytest.mark.parametrize("contemplate_tokens", [None, 2])
@pytest.mark.parametrize("sampled", [False, True])
def test_the_text_is_that_of_plain_decoding(contemplate_tokens, sampled):
    target = tiny_llama()
    confu = make_assistant(target, future_word=True)
    prompts = torch.tensor([[0, 0, 5, 17, 40], [9, 3, 30, 30, 61], [0, 44, 45, 12, 7]])
    if sampled:
        prompts = prompts[1:2]
    arguments = {"attention_mask": (prompts > 0).long(), "pad_token_id": 0, "do_sample": sampled, **LENGTHS}
    torch.manual_seed(7)
    plain = target.generate(prompts, **arguments)
    heard = []
    confu.lm_head.register_forward_pre_hook(lambda *_: heard.append(1))
    torch.manual_seed(7)
    ours = target.generate(prompts, assistant_model=confu, contemplate_tokens=contemplate_tokens, **TREE, **arguments)
    assert torch.equal(plain, ours) and heard and confu.stats.contemplate_tokens > 0


def test_it_changes_what_is_drafted_after_a_fresh_future_alone():
    """The first tree, which has no future yet, is the same with another word; a later one is not."""
    target = tiny_llama()
    confu, prompt, trees = make_assistant(target, future_word=True), torch.tensor([[5, 17, 40, 8]]), []
    new_drafter = confu.new_drafter

    def recorded(*arguments):
        drafter = new_drafter(*arguments)
        grow = drafter.grow
        drafter.grow = lambda state, plan: trees[-1].append(grow(state, plan)) or trees[-1][-1]
        return drafter

    confu.new_drafter = recorded
    for sign in (1, -1):
        trees.append([])
        confu.future_word.weight.data.mul_(sign)
        target.generate(prompt, assistant_model=confu, do_sample=False, **TREE, **LENGTHS)
    (first, *later), (other_first, *other_later) = trees
    assert torch.equal(first.log_probs, other_first.log_probs)
    assert not torch.equal(later[0].log_probs, other_later[0].log_probs)


def test_a_frozen_adapter_serves_and_stays():
    target = tiny_llama(dtype=torch.float32)
    draft = tiny_pair(target, future_word=True)
    batch = ConversationCollator(0)(conversations((4, 20), (4, 16)))
    whole = ConFuForTraining(target, draft, ConFuTrainingObjective(max_lag=1))
    torch.manual_seed(3)
    expected = whole(**batch)["loss"]
    assert any(parameter.requires_grad for parameter in target.confu.parameters())
    module = ConFuForTraining(target, draft, ConFuTrainingObjective(max_lag=1, freeze_adapter=True))
    torch.manual_seed(3)
    loss = module(**batch)["loss"]
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert not any(parameter.requires_grad for parameter in target.parameters())
    assert draft.future_word.weight.grad.abs().sum() > 0 and draft.future_skip.weight.grad.abs().sum() > 0


def test_a_frozen_adapter_with_a_loss_of_its_own_is_refused():
    with pytest.raises(
        ValueError, match=r"freeze_adapter.*got adapter_alone=False and future_weight=0.3.*Leave freeze"
    ):
        ConFuTrainingObjective(freeze_adapter=True, future_weight=0.3)
