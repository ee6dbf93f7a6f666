"""The draft network: files, vocabulary, initial weights, and EAGLE-3 as the same network without a future."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VOCAB_SIZE, tiny_llama
from tiny_pairs import DRAFT_VOCAB_SIZE, tiny_pair
from transformers import AutoModel

from confu_hf import ConFuAssistant, ConFuConfig
from confu_hf.decoding.drafting import NetworkDrafter
from confu_hf.decoding.state import Rows
from confu_hf.modeling_confu import ConFuDraftModel
from confu_hf.training.warm_start import warm_start_from_eagle3

EAGLE3_KEYS = {
    "fc.weight",
    *(f"midlayer.self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"midlayer.mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
    *(f"midlayer.{name}.weight" for name in ("input_layernorm", "hidden_norm", "post_attention_layernorm")),
    "norm.weight",
    "lm_head.weight",
    "d2t",
    "t2d",
}
FUTURE_KEYS = {"future_fc.weight", "future_mixture.router.weight", "future_mixture.experts", "future_skip.weight"}


def draft_config(**fields) -> ConFuConfig:
    return ConFuConfig.from_target_config(tiny_llama().config, draft_vocab_size=DRAFT_VOCAB_SIZE, **fields)


def draft_chain(draft, target, *, future=None, steps=3, rows=5):
    """Hidden states `(steps, B, d)` of a chain behind `rows` verified rows of random features."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB_SIZE, (1, rows + 1 + steps), generator=generator)
    features = torch.randn(1, rows, 3 * draft.config.hidden_size, generator=generator, dtype=draft.dtype)
    with torch.no_grad():
        drafting = NetworkDrafter(draft, target.get_input_embeddings())
        drafting.observe(None, Rows(tokens[:, 1 : rows + 1], features, torch.arange(rows)[None], future))
        states = []
        for step in range(steps):
            parents = None if step == 0 else torch.zeros(1, 1, dtype=torch.long)
            drafting.step(tokens[:, rows + step, None], parents, 1)
            states.append(drafting.hidden_states[:, 0])
    return torch.stack(states)


def test_weights_are_named_as_in_eagle3_checkpoints():
    assert set(ConFuDraftModel(draft_config(contemplate=False)).state_dict()) == EAGLE3_KEYS
    assert set(ConFuDraftModel(draft_config()).state_dict()) == EAGLE3_KEYS | FUTURE_KEYS


@pytest.mark.parametrize("contemplate", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_round_trip_through_a_folder(tmp_path, contemplate, dtype):
    draft = tiny_pair(tiny_llama(dtype=dtype), contemplate=contemplate)
    assert draft.d2t.any() and not torch.equal(draft.t2d, torch.arange(VOCAB_SIZE) < DRAFT_VOCAB_SIZE)
    draft.save_pretrained(tmp_path)
    loaded = ConFuAssistant.from_pretrained(tmp_path, dtype="auto")
    assert loaded.dtype == dtype
    weights, expected = loaded.state_dict(), draft.state_dict()
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name
    assert loaded.d2t.dtype == torch.long and loaded.t2d.dtype == torch.bool
    assert torch.equal(AutoModel.from_pretrained(tmp_path).draft_token_ids, draft.draft_token_ids)


def test_weights_that_the_file_lacks_are_refused_and_spoil_no_other(tmp_path):
    draft = tiny_pair(tiny_llama(dtype=torch.float32))
    draft.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["future_skip.weight"], weights["d2t"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing keys: \['d2t', 'future_skip.weight'\].*exactly the weights"):
        ConFuAssistant.from_pretrained(tmp_path)
    # The plain network fills these, and only these.
    loaded = ConFuDraftModel.from_pretrained(tmp_path)
    assert not loaded.future_skip.weight.any() and not loaded.d2t.any()
    for name, weight in weights.items():
        assert torch.equal(loaded.state_dict()[name], weight), name


def test_nan_in_a_file_is_refused(tmp_path):
    draft = tiny_pair(tiny_llama(dtype=torch.float32), contemplate=False)
    draft.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["fc.weight"][0, 0] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="`fc.weight`.*got NaN or infinite weights, expected finite numbers"):
        ConFuAssistant.from_pretrained(tmp_path)


def test_loading_fills_weights_that_start_as_nan(tmp_path, monkeypatch):
    draft = tiny_pair(tiny_llama(dtype=torch.float32))
    draft.save_pretrained(tmp_path)

    def forgotten(self, module):
        for parameter in module.parameters(recurse=False):
            torch.nn.init.constant_(parameter, float("nan"))

    monkeypatch.setattr(ConFuDraftModel, "_init_weights", forgotten)
    assert ConFuDraftModel(draft.config).fc.weight.isnan().all()  # a fresh one would be caught
    loaded = ConFuDraftModel.from_pretrained(tmp_path)
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


def test_initial_weights():
    torch.manual_seed(0)
    draft = ConFuDraftModel(draft_config(initializer_range=0.1))
    for name, parameter in draft.named_parameters():
        if name == "future_skip.weight":
            assert not parameter.any()
        elif "norm" in name:
            assert (parameter == 1).all()
        else:
            assert 0.08 < parameter.std() < 0.12 and abs(parameter.mean()) < 0.02, name
    assert torch.equal(draft.draft_token_ids, torch.arange(DRAFT_VOCAB_SIZE))
    assert torch.equal(draft.t2d, torch.arange(VOCAB_SIZE) < DRAFT_VOCAB_SIZE)


def test_draft_vocabulary_as_eagle_stores_it():
    draft = ConFuDraftModel(draft_config().from_target_config(tiny_llama().config, draft_vocab_size=4))
    draft.set_draft_vocabulary(torch.tensor([50, 3, 7, 96]))
    assert draft.draft_token_ids.tolist() == [3, 7, 50, 96]
    assert draft.d2t.tolist() == [3, 6, 48, 93]  # token id minus draft id
    assert draft.t2d.nonzero().flatten().tolist() == [3, 7, 50, 96]


@pytest.mark.parametrize(
    ("token_ids", "text"),
    [
        (range(5), "got 5 distinct token ids, expected draft_vocab_size=4"),
        ([1, 2, 3, 3], "got 3 distinct token ids"),
        ([1, 2, 3, VOCAB_SIZE], r"got token ids from 1 to 97, expected ids in \[0, vocab_size=97\)"),
        ([-1, 2, 3, 4], "got token ids from -1 to 4"),
    ],
)
def test_a_wrong_draft_vocabulary_is_refused_and_changes_nothing(token_ids, text):
    draft = ConFuDraftModel(ConFuConfig.from_target_config(tiny_llama().config, draft_vocab_size=4))
    draft.set_draft_vocabulary([5, 6, 7, 8])
    with pytest.raises(ValueError, match=text):
        draft.set_draft_vocabulary(list(token_ids))
    assert draft.draft_token_ids.tolist() == draft.t2d.nonzero().flatten().tolist() == [5, 6, 7, 8]


def test_without_a_future_the_draft_is_eagle3():
    target = tiny_llama()
    confu = tiny_pair(target)
    eagle3 = ConFuDraftModel(ConFuConfig.from_dict({**confu.config.to_dict(), "contemplate": False})).double()
    eagle3.load_state_dict({key: weight for key, weight in confu.state_dict().items() if key in EAGLE3_KEYS})
    expected = draft_chain(eagle3, target)
    assert torch.equal(draft_chain(confu, target), expected)
    future = torch.randn(1, 96, dtype=torch.float64)
    with_future = draft_chain(confu, target, future=future)
    assert ((with_future - expected).abs().amax(-1) > 1e-3).all()  # at every step, and for this draft only
    confu.future_skip.weight.data.zero_()
    assert ((draft_chain(confu, target, future=future) - expected).abs().amax(-1) > 1e-4).all()  # by attention too


def test_an_untouched_draft_from_eagle3_is_that_eagle3():
    target = tiny_llama()
    eagle3 = tiny_pair(target, contemplate=False)
    confu = ConFuAssistant(ConFuConfig.from_dict({**eagle3.config.to_dict(), "contemplate": True})).double()
    warm_start_from_eagle3(confu, eagle3)
    assert torch.equal(draft_chain(confu, target), draft_chain(eagle3, target))
    # The future token starts as what features are read with, and adds nothing to the residual stream.
    assert torch.equal(confu.future_fc.weight, eagle3.fc.weight) and not confu.future_skip.weight.any()


def test_a_row_does_not_see_its_siblings():
    """The mask is the caller's: two rows under a mask are what each is alone."""
    torch.manual_seed(0)
    draft = tiny_pair(tiny_llama(), contemplate=False)
    embeds, states = torch.randn(2, 1, 2, 32, dtype=torch.float64)
    positions = torch.tensor([[3, 3]])
    both = draft(embeds, states, positions, attention_mask=torch.eye(2, dtype=torch.bool)[None, None])
    for row in range(2):
        alone = draft(embeds[:, row, None], states[:, row, None], positions[:, :1])
        torch.testing.assert_close(both[:, row, None], alone, rtol=1e-12, atol=1e-12)


def test_rotary_embeddings_see_distances_only():
    torch.manual_seed(0)
    draft = tiny_pair(tiny_llama(), contemplate=False)
    embeds, states = torch.randn(2, 1, 3, 32, dtype=torch.float64)
    mask = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    positions = torch.tensor([[0, 1, 2]])
    near = draft(embeds, states, positions, attention_mask=mask)
    torch.testing.assert_close(
        draft(embeds, states, positions + 1000, attention_mask=mask), near, rtol=1e-9, atol=1e-9
    )
    assert (draft(embeds, states, 2 * positions, attention_mask=mask)[:, 1:] - near[:, 1:]).abs().max() > 1e-4
