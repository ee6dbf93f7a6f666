"""The contemplate tokens' own words: how they start, when they count, and that they change no text."""

from __future__ import annotations

import pytest
import torch
from oracles import make_assistant
from tiny_models import keep_softmax_in_float64, tiny_llama
from tiny_pairs import conversations, tiny_pair

from confu_hf import ConFuAssistant, ConFuConfig
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


@pytest.mark.parametrize("count", [1, 2])
def test_they_start_as_a_share_of_what_the_targets_head_says(tmp_path, count):
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
        draft_shape=DraftShape(future_words=count),
    )
    futures = torch.randn(2, 5, (3 + count) * 32, generator=torch.Generator().manual_seed(2))
    hidden_states = torch.zeros(2, 5, 32)
    for state, word in zip(futures[..., 3 * 32 :].split(32, -1), draft.words(futures).unbind(-2), strict=True):
        expected = 0.5 * state @ head_rows(target, draft.draft_token_ids).T
        torch.testing.assert_close(draft.logits(hidden_states, word), expected, rtol=1e-4, atol=1e-4)
    assert draft.config.future_layer_ids == [*draft.config.target_layer_ids, target.config.num_hidden_layers]


def test_an_eagle3_draft_knows_none():
    shape = DraftShape(draft_vocab_size=40, future_words=2)
    assert shape.config(tiny_llama(), contemplate=True).future_words == 2
    assert shape.config(tiny_llama(), contemplate=False).future_words == 0


def test_older_files_have_one(tmp_path):
    assert ConFuConfig(future_word=True).future_words == 1 and ConFuConfig(future_word=False).future_words == 0
    ConFuConfig(future_word=True).save_pretrained(tmp_path)
    assert 'future_word"' not in (tmp_path / "config.json").read_text()
    with pytest.raises(ValueError, match=r"got future_words=-1, expected 0 or more"):
        ConFuConfig(future_words=-1)


def test_a_fresh_one_is_silent():
    draft = tiny_pair(tiny_llama(), future_words=0)
    assert draft.words(torch.randn(1, 4 * 32, dtype=torch.float64)) is None
    with torch.random.fork_rng():
        draft = ConFuAssistant.from_target(tiny_llama(), draft_vocab_size=40, future_words=1)
    assert not draft.words(torch.randn(1, 4 * 32, dtype=torch.float64)).any()


@pytest.mark.parametrize("count", [1, 2])
def test_an_ancestors_words_are_not_heard(count):
    target = tiny_llama()
    confu = tiny_pair(target, future_words=count)
    width = (3 + count) * 32
    futures = torch.arange(1, 1 + 2.0 * width).view(2, width)
    timely = confu.contemplator(target).timely(futures, torch.tensor([True, False]))
    assert torch.equal(timely[0], futures[0])
    assert torch.equal(timely[1, : 3 * 32], futures[1, : 3 * 32]) and not timely[1, 3 * 32 :].any()
    plain = Contemplator(target, target.confu, target.confu.current, confu.config.target_layer_ids)
    features = futures[:, : 3 * 32]
    assert plain.timely(features, torch.tensor([True, False])) is features


@pytest.mark.parametrize("contemplate_tokens", [None, 2])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_text_is_that_of_plain_decoding(contemplate_tokens, sampled, count):
    target = tiny_llama()
    confu = make_assistant(target, future_words=count, lora_rank=2)
    for weight in target.confu.confu_lora_up.parameters():
        torch.nn.init.normal_(weight, std=0.1, generator=torch.Generator().manual_seed(1))
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
    assert all(record.rows == record.nodes + count * record.contemplate_tokens for record in confu.stats.records)


def test_it_changes_what_is_drafted_after_a_fresh_future_alone():
    """The first tree, which has no future yet, is the same with another word; a later one is not."""
    target = tiny_llama()
    confu, prompt, trees = make_assistant(target, future_words=1), torch.tensor([[5, 17, 40, 8]]), []
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


def test_a_second_word_matters_to_the_second_layer():
    """Its map changes nothing of the first drafted layer, and something of the second."""
    target = tiny_llama()
    draft = make_assistant(target, future_words=2)
    futures = torch.randn(1, 1, 5 * 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = draft.words(futures)
    draft.future_word.weight.data[32:].neg_()
    after = draft.words(futures)
    assert torch.equal(before[..., 0, :], after[..., 0, :]) and torch.equal(before[..., 1, :], -after[..., 1, :])


def test_a_pair_gets_more_words_and_keeps_what_it_has(tmp_path):
    target = tiny_llama(dtype=torch.float32)
    small = tiny_pair(target, future_words=1, lora_rank=2)
    small.save_pretrained(tmp_path)
    weights, adapter = small.state_dict(), small.target.confu.adapter_weights(target.confu.current)
    adapter = {name: weight.clone() for name, weight in adapter.items()}
    fresh = tiny_llama(dtype=torch.float32)
    arguments = {"contemplate": True, "init_from": tmp_path}
    grown = starting_pair(ConFuAssistant, fresh, None, draft_shape=DraftShape(future_words=2), **arguments)
    assert grown.config.future_words == 2 and grown.contemplate_length == 2
    found = grown.state_dict()
    for name, weight in weights.items():
        assert torch.equal(found[name][: len(weight)], weight), name
    assert found["future_word.weight"].shape == (2 * 32, 32) and found["future_word.weight"][32:].abs().sum() > 0
    for name, weight in fresh.confu.adapter_weights(fresh.confu.current).items():
        assert torch.equal(weight, adapter[name]), name
    same = starting_pair(ConFuAssistant, tiny_llama(dtype=torch.float32), None, **arguments)
    assert same.config.future_words == 1
    grown.save_pretrained(tmp_path)
    for fewer in (0, 1):
        shape, target = DraftShape(future_words=fewer), tiny_llama(dtype=torch.float32)
        text = rf"future_words: got {fewer} for a pair that has 2, expected 2 or more. Leave it out"
        with pytest.raises(ValueError, match=text):
            starting_pair(ConFuAssistant, target, None, draft_shape=shape, **arguments)


def test_each_contemplate_token_is_asked_for_a_word_of_its_own():
    """Alone, the adapter's loss is the sum over tokens of what each is asked for; those behind the end ask nothing."""
    target = tiny_llama(dtype=torch.float32)
    draft = tiny_pair(target, future_words=2, lora_rank=2)
    batch = ConversationCollator(0)(conversations((4, 20), (4, 16)))
    module = ConFuForTraining(target, draft, ConFuTrainingObjective(adapter_alone=True, max_lag=1)).eval()
    with torch.no_grad():
        outputs = module(**batch)
    # Rows start at 3 .. 17 and 3 .. 13: 15 and 11 of them; of the last row of each the second token has nothing to say.
    assert outputs["correct"][..., 1].tolist() == [[15.0, 14.0], [11.0, 10.0]]
    assert outputs["denominators"][-1] == 26


def test_a_frozen_adapter_serves_and_stays():
    target = tiny_llama(dtype=torch.float32)
    draft = tiny_pair(target, future_words=1)
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
