"""The package `speculators` loads what we write and computes the same logits. It allows other versions of Transformers and
datasets than ours, so it has an environment of its own: `make speculators-check`, and a step of CI."""

from __future__ import annotations

import pytest
import torch
from test_conversion import WRITTEN
from tiny_models import VOCAB_SIZE, tiny_llama
from tiny_pairs import tiny_pair

from confu_hf.hub.conversion.formats import write_eagle3
from confu_hf.hub.conversion.layer import ExportTarget
from confu_hf.hub.pair import read_pair

eagle3 = pytest.importorskip("speculators.models.eagle3")
speculators = pytest.importorskip("speculators")

ROWS = 6


@pytest.fixture
def target(tmp_path):
    model = tiny_llama(dtype=torch.float32)
    model.save_pretrained(tmp_path / "target")
    return model


def load_theirs(folder):
    config = eagle3.Eagle3SpeculatorConfig.from_pretrained(folder)
    config.transformer_layer_config._attn_implementation = "eager"
    return speculators.SpeculatorModel.from_pretrained(folder, config=config).eval()


@pytest.mark.parametrize("variant", range(len(WRITTEN["speculators"])))
def test_speculators_gives_the_same_logits(variant, target, tmp_path):
    draft = tiny_pair(target, contemplate=False, **WRITTEN["speculators"][variant])
    write_eagle3(tmp_path / "draft", draft, "speculators", ExportTarget.of(target, str(tmp_path / "target")))
    theirs, seen = load_theirs(tmp_path / "draft"), []
    theirs.lm_head.register_forward_hook(lambda module, inputs, logits: seen.append(logits))

    torch.manual_seed(0)
    features = torch.randn(1, ROWS, draft.config.num_features * draft.config.target_hidden_size)
    tokens = torch.randint(VOCAB_SIZE, (1, ROWS))
    with torch.no_grad():
        theirs(features, tokens, torch.zeros(1, ROWS, dtype=torch.long), ttt_steps=2)
        embeds = draft.input_embeddings(target.get_input_embeddings())
        mask = torch.ones(ROWS, ROWS).tril().bool()[None, None]
        positions = torch.arange(1, 1 + ROWS)[None]
        first = draft(embeds(tokens), draft.fuse(features), positions, attention_mask=mask)
    torch.testing.assert_close(draft.logits(first), seen[0], rtol=1e-4, atol=1e-5)

    # The second step feeds the first one's states back, and sees the rows of both: row i those of step 1 up to i, and itself.
    shifted = torch.cat([tokens[:, 1:], torch.zeros(1, 1, dtype=torch.long)], dim=-1)
    with torch.no_grad():
        attention = draft.midlayer.self_attn
        inputs = [draft.midlayer.attention_inputs(embeds(tokens), draft.fuse(features))]
        inputs.append(draft.midlayer.attention_inputs(embeds(shifted), first))
        rotary = [draft.rotary(positions + step, torch.float32) for step in (0, 1)]
        pairs = [attention.key_value(states, *turn) for states, turn in zip(inputs, rotary, strict=True)]
        keys, values = (torch.cat(parts, dim=2) for parts in zip(*pairs, strict=True))
        both = torch.cat([mask, torch.eye(ROWS).bool()[None, None]], dim=-1)
        context = attention.attend(attention.query(inputs[1], *rotary[1]), keys, values, both)
        second = draft.fed_back(draft.midlayer.finish(draft.midlayer.residual(inputs[1], first), context))
    torch.testing.assert_close(draft.logits(second), seen[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", range(len(WRITTEN["speculators"])))
def test_we_read_what_speculators_saves(variant, target, tmp_path):
    draft = tiny_pair(target, contemplate=False, **WRITTEN["speculators"][variant])
    write_eagle3(tmp_path / "draft", draft, "speculators", ExportTarget.of(target, str(tmp_path / "target")))
    load_theirs(tmp_path / "draft").save_pretrained(tmp_path / "saved")
    pair = read_pair(tmp_path / "saved", target=target)
    state = draft.state_dict()
    assert pair.weights.keys() == state.keys(), "embeddings equal to the target's are not kept"
    assert all(torch.equal(pair.weights[name], state[name]) for name in state)
    assert pair.config.target_layer_ids == draft.config.target_layer_ids
