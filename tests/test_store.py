"""From the second epoch on the store stands in for the target, for the target and the data it was filled from only."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_gemma2, tiny_llama
from tiny_pairs import conversations, tiny_pair

from confu_hf.compat import OUTPUT_CACHE
from confu_hf.options import TreeOptions
from confu_hf.target.geometry import attention_geometry
from confu_hf.training.data import ConversationCollator
from confu_hf.training.evaluation import HeldOut, replayed
from confu_hf.training.module import ConFuForTraining
from confu_hf.training.store import FeatureStore
from confu_hf.training.teacher import Teacher

LENGTHS = [(4, 16), (3, 12), (6, 14)]
WIDTH = 32


def open_store(folder, **changes) -> FeatureStore:
    fields = {"lengths": [length for _, length in LENGTHS], "width": WIDTH, "fingerprint": "tiny bf16", **changes}
    return FeatureStore(folder, **fields)


def setup(folder, dtype=torch.bfloat16):
    target = tiny_llama(dtype=dtype)
    draft = tiny_pair(target, contemplate=False).float()
    return ConFuForTraining(target, draft, feature_store=open_store(folder)).eval()


def run(module, rows) -> dict[str, torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16, enabled=module.target.dtype == torch.bfloat16), torch.no_grad():
        return module(**ConversationCollator(0)(rows))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_second_epoch_needs_no_target_and_says_the_same(tmp_path, dtype, monkeypatch):
    module = setup(tmp_path, dtype)
    rows = conversations(*LENGTHS)
    online = ConFuForTraining(module.target, module.draft).eval()
    expected, first = run(online, rows), run(module, rows)
    for name, value in first.items():
        assert torch.equal(value, expected[name]), name  # filling changes nothing

    def gone(*args, **kwargs):
        raise AssertionError("the target ran")

    monkeypatch.setattr(module.target.get_decoder(), "forward", gone)
    second = run(module, rows)
    # A bfloat16 target's features come back as they were; of a float32 target's, rounded.
    torch.testing.assert_close(second["loss"], first["loss"], rtol=1e-3 if dtype == torch.bfloat16 else 1e-2, atol=0)
    assert torch.equal(second["correct"][..., 1], first["correct"][..., 1])
    assert torch.equal(second["accepted"][:, 1], first["accepted"][:, 1])
    with pytest.raises(AssertionError, match="the target ran"):
        run(online, rows)


def test_sequences_come_back_in_other_batches_and_from_disk(tmp_path):
    module = setup(tmp_path)
    rows = conversations(*LENGTHS)
    run(module, rows[:2])
    run(module, rows[2:])
    online = ConFuForTraining(module.target, module.draft).eval()
    module.teacher.store = open_store(tmp_path)  # as after a restart
    module.target.forward = None
    stored = run(module, [rows[2], rows[0]])
    del module.target.forward
    # The target itself rounds differently in another batch.
    torch.testing.assert_close(stored["loss"], run(online, [rows[2], rows[0]])["loss"], rtol=5e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_contemplation_reads_stored_keys_and_values(tmp_path, dtype, monkeypatch):
    target = tiny_llama(dtype=dtype)
    store = open_store(tmp_path, cache_shape=attention_geometry(target.config))
    module = ConFuForTraining(target, tiny_pair(target).float(), feature_store=store).eval()
    rows = conversations(*LENGTHS)
    first = run(module, rows)
    assert torch.equal(first["loss"], run(ConFuForTraining(target, module.draft).eval(), rows)["loss"])
    monkeypatch.setattr(Teacher, "_from_target", None)  # what is left: contemplate tokens, through the decoder
    torch.testing.assert_close(run(module, rows)["loss"], first["loss"], rtol=5e-3, atol=0)


def test_contemplation_runs_the_target_where_no_keys_and_values_are_stored(tmp_path):
    """A store that EAGLE-3's stage filled has none."""
    module = setup(tmp_path)
    rows = conversations(*LENGTHS)
    run(module, rows)
    confu = ConFuForTraining(module.target, tiny_pair(module.target).float()).eval()
    expected = run(confu, rows)["loss"]
    confu.teacher.store = open_store(tmp_path)
    assert torch.equal(run(confu, rows)["loss"], expected)
    confu.teacher.store = open_store(tmp_path, cache_shape=attention_geometry(module.target.config))
    index = torch.arange(3)
    assert confu.teacher.store.holds(index) and not confu.teacher.store.holds(index, cache=True)
    assert torch.equal(run(confu, rows)["loss"], expected)
    assert confu.teacher.store.holds(index, cache=True)
    keys = confu.teacher.store.read_cache(index, 20).layers[3].keys
    expected_keys = module.target(torch.tensor(rows[1]["input_ids"])[None])[OUTPUT_CACHE].layers[3].keys
    torch.testing.assert_close(keys[1, :, :12], expected_keys[0], rtol=0.05, atol=0.05)
    assert not keys[1, :, 12:].any()


def test_gradients_are_those_of_the_target(tmp_path):
    module = setup(tmp_path, torch.float32)
    batch = ConversationCollator(0)(conversations(*LENGTHS))
    gradients = []
    for _ in range(2):
        module.zero_grad()
        module(**batch)["loss"].backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in module.draft.parameters()]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999


def test_bits_survive(tmp_path):
    torch.manual_seed(0)
    store = open_store(tmp_path)
    states, choices = torch.randn(2, 16, 4 * WIDTH, dtype=torch.bfloat16), torch.randint(-1, 64, (2, 16))
    mask = torch.arange(16) < torch.tensor([[16], [14]])
    assert not store.holds(torch.tensor([0, 2]))
    store.write(torch.tensor([0, 2]), mask.long(), states, choices)
    assert store.holds(torch.tensor([2, 0])) and not store.holds(torch.tensor([0, 1]))
    read, read_choices = open_store(tmp_path).read(torch.tensor([0, 2]), 17)
    assert torch.equal(read[:, :16], states * mask[..., None]) and not read[:, 16].any()
    assert torch.equal(read_choices[:, :16], choices * mask)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (
            {"fingerprint": "other"},
            r"The target features in .*: got .*tiny bf16.*, expected .*other.*another folder, or delete",
        ),
        ({"width": 64}, "'width': 32.*expected.*'width': 64"),
        ({"lengths": [16, 12, 15]}, "'lengths_sum': 42.*expected.*'lengths_sum': 43"),
        ({"lengths": [16, 26]}, "'sequences': 3.*expected.*'sequences': 2"),
    ],
)
def test_features_of_something_else_are_refused(tmp_path, changes, text):
    open_store(tmp_path)
    with pytest.raises(ValueError, match=text):
        open_store(tmp_path, **changes)
    open_store(tmp_path)  # and the refusal left them alone


def test_only_where_the_store_can_say_what_the_target_says(tmp_path):
    target = tiny_gemma2()
    with pytest.raises(ValueError, match=r"a target with \['final_logit_softcapping'\]"):
        ConFuForTraining(target, tiny_pair(target, contemplate=False), feature_store=open_store(tmp_path))


def test_a_batch_without_its_numbers_is_refused(tmp_path):
    module = setup(tmp_path)
    batch = ConversationCollator(0)(conversations(*LENGTHS))
    del batch["index"]
    with pytest.raises(ValueError, match="got a batch without `index`.*Make batches with ConversationCollator"):
        module(**batch)


def test_a_replay_leaves_no_holes_in_the_store(tmp_path):
    """It asks for no predictions: what it reads of the target must not pass for all that the target says."""
    target = tiny_llama(dtype=torch.bfloat16)
    draft = tiny_pair(target, contemplate=False).float()
    module = ConFuForTraining(target, draft, feature_store=open_store(tmp_path)).eval()
    rows = conversations(*LENGTHS)
    batch = ConversationCollator(0)(rows)
    replayed(module, draft.replay(TreeOptions(total_tokens=4, depth=2, top_k=2)), HeldOut(rows), batch)
    assert not module.teacher.store.holds(batch["index"])
    expected = run(ConFuForTraining(target, draft).eval(), rows)
    for _ in range(2):  # filled, then read
        assert torch.equal(run(module, rows)["correct"], expected["correct"])
