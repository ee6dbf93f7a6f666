"""The Trainer around it all: an interrupted run ends like an uninterrupted one, and its folder is what users load."""

from __future__ import annotations

import functools
import json
import shutil
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_models import tiny_llama
from tiny_pairs import conversations, tiny_pair
from transformers import TrainingArguments

from confu_hf import ConFuAssistant
from confu_hf.options import TreeOptions
from confu_hf.training.data import IGNORED, ConversationCollator
from confu_hf.training.module import ConFuForTraining, ConFuTrainingObjective
from confu_hf.training.trainer import ConFuTrainer

SEQUENCES = [(3, 12), (4, 14), (3, 9), (5, 16), (4, 10), (3, 15)]
STEPS = 6  # of two sequences: two epochs
OBJECTIVE = ConFuTrainingObjective(ttt_steps=3, num_anchors=4)


def make_trainer(folder, contemplate: bool, trainer_arguments: dict | None = None, **arguments) -> ConFuTrainer:
    target = tiny_llama(dtype=torch.float32)
    draft = tiny_pair(target, contemplate=contemplate)
    fields = {
        "max_steps": STEPS,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "train_sampling_strategy": "group_by_length",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        **arguments,
    }
    rows = conversations(*SEQUENCES)
    return ConFuTrainer(
        ConFuForTraining(target, draft, OBJECTIVE),
        TrainingArguments(str(folder), **fields),
        train_dataset=rows,
        eval_dataset=rows[:3],
        data_collator=ConversationCollator(0),
        **(trainer_arguments or {}),
    )


@pytest.fixture(scope="module", params=[False, True], ids=["eagle3", "confu"])
def finished(request, tmp_path_factory):
    """A run from start to end: (with contemplation?, its folder, its trainer)."""
    folder = tmp_path_factory.mktemp("run")
    trainer = make_trainer(folder, request.param)
    trainer.train()
    trainer.save_model()
    return request.param, folder, trainer


def saved_weights(folder) -> dict[str, torch.Tensor]:
    files = [folder / "model.safetensors", folder / "adapter" / "adapter_model.safetensors"]
    return {f"{file.name} {key}": weight for file in files if file.exists() for key, weight in load_file(file).items()}


def logged(trainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize("step", [2, 4])  # in the middle of the first epoch and of the second
def test_a_resumed_run_ends_with_the_same_weights(finished, tmp_path, step):
    contemplate, folder, trainer = finished
    resumed = make_trainer(tmp_path, contemplate)
    torch.manual_seed(99)  # nothing may hang on what the process did before
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{step}"))
    expected, got = saved_weights(folder / f"checkpoint-{STEPS}"), saved_weights(tmp_path / f"checkpoint-{STEPS}")
    assert got.keys() == expected.keys()
    for name, weight in got.items():
        assert torch.equal(weight, expected[name]), name
    assert logged(resumed, "loss") == logged(trainer, "loss")
    assert logged(resumed, "answer_tokens_seen") == logged(trainer, "answer_tokens_seen")


@pytest.mark.parametrize("name", ["model.safetensors", "adapter/adapter_model.safetensors"])
def test_a_damaged_checkpoint_is_refused_before_anything_is_loaded(finished, tmp_path, name):
    contemplate, folder, _ = finished
    if not contemplate and name.startswith("adapter"):
        pytest.skip("an EAGLE-3 draft has no adapter")
    checkpoint = shutil.copytree(folder / "checkpoint-2", tmp_path / "checkpoint-2")
    data = bytearray((checkpoint / name).read_bytes())
    data[-3] ^= 1
    (checkpoint / name).write_bytes(data)
    trainer = make_trainer(tmp_path, contemplate)
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    with pytest.raises(ValueError, match=r"The weights in .*: got the checksum .*, expected .*Download both again"):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert all(torch.equal(value, before[key]) for key, value in trainer.model.state_dict().items())
    (checkpoint / name).unlink()
    with pytest.raises(FileNotFoundError, match="got .*, expected both|among them"):
        trainer.train(resume_from_checkpoint=str(checkpoint))


def test_the_best_model_is_loaded_at_the_end(finished, tmp_path):
    contemplate, folder, _ = finished
    trainer = make_trainer(tmp_path, contemplate)
    trainer.state.best_model_checkpoint = str(folder / "checkpoint-4")
    trainer._load_best_model()
    trainer.save_model(str(tmp_path / "best"))
    expected = saved_weights(folder / "checkpoint-4")
    for key, value in saved_weights(tmp_path / "best").items():
        assert torch.equal(value, expected[key])


def test_resuming_with_muon(tmp_path):
    options = {"muon": True, "adapter_learning_rate": 1e-2}
    whole, resumed, adamw = (
        make_trainer(tmp_path / name, True, chosen) for name, chosen in (("a", options), ("b", options), ("c", {}))
    )
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    adamw.train()
    assert logged(resumed, "loss") == logged(whole, "loss") != logged(adamw, "loss")
    expected, got = (saved_weights(tmp_path / name / f"checkpoint-{STEPS}") for name in "ab")
    for name, weight in got.items():
        assert torch.equal(weight, expected[name]), name


def test_every_epoch_has_an_order_of_its_own(tmp_path):
    sampler = make_trainer(tmp_path, False)._get_train_sampler()
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert sorted(orders[0]) == list(range(len(SEQUENCES))) == sorted(orders[1]) and len(sampler) == len(SEQUENCES)


@pytest.mark.parametrize("stored", [True, False])
def test_batches_are_of_one_length(tmp_path, stored):
    """Of one answer length where a store spares the target its pass, which it does from the second epoch on, else of one
    total length."""
    trainer = make_trainer(tmp_path, False, per_device_train_batch_size=2)
    trainer.model.teacher.store = object() if stored else None
    # Long prompts with short answers, short prompts with long ones: each length mixes what the other one keeps apart.
    trainer.train_dataset = conversations(*[(20, 24), (3, 25), (21, 26), (4, 27)] * 4)
    lengths = [length - prompt if stored else length for prompt, length in [(20, 24), (3, 25), (21, 26), (4, 27)] * 4]
    sampler = trainer._get_train_sampler()
    sampler.set_epoch(1)
    assert sampler.sampler.lengths == lengths and sampler.sampler.batch_size == 2
    batches = [[lengths[row] for row in pair] for pair in zip(*[iter(sampler)] * 2, strict=True)]
    # All but the one that the longest answer was swapped into, to come first, and the one that it came from.
    assert sum(abs(first - second) < 3 for first, second in batches) >= 6


@pytest.mark.parametrize("fast", [True, False])
def test_bf16_on_a_processor_without_it_warns(tmp_path, monkeypatch, fast):
    monkeypatch.setattr("confu_hf.training.trainer.multiplies_bfloat16", lambda: fast)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        make_trainer(tmp_path, False, bf16=True)
    assert any("leave --bf16 out" in str(warning.message) for warning in caught) == (not fast)


def test_resuming_with_the_trainers_own_sampler(tmp_path):
    whole, resumed = (make_trainer(tmp_path / name, True, train_sampling_strategy="random") for name in ("a", "b"))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert logged(resumed, "loss") == logged(whole, "loss")


def test_every_trained_weight_moves_and_is_saved(finished):
    contemplate, folder, trainer = finished
    first, last = saved_weights(folder / "checkpoint-2"), saved_weights(folder)
    for name, weight in last.items():
        assert torch.equal(weight, first[name]) == name.endswith(("d2t", "t2d")), name
    assert last.keys() == saved_weights(folder / f"checkpoint-{STEPS}").keys()
    module = trainer.model
    for name, weight in module.draft.state_dict().items():
        assert torch.equal(last[f"model.safetensors {name}"], weight)


def test_the_folder_is_what_users_load(finished):
    contemplate, folder, trainer = finished
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if "checkpoint-" not in str(path)}
    adapter = {"adapter", "adapter/adapter_config.json", "adapter/adapter_model.safetensors"}
    draft = {"config.json", "generation_config.json", "model.safetensors"}
    assert files - {"README.md"} - adapter == draft  # and no pickle
    assert adapter <= files if contemplate else not adapter & files
    target = tiny_llama()
    assistant = ConFuAssistant.from_pretrained(folder, target=target)
    assert assistant.dtype == torch.float64 and assistant.config.contemplate == contemplate
    torch.testing.assert_close(assistant.lm_head.weight, trainer.model.draft.lm_head.weight.double(), rtol=0, atol=0)
    if contemplate:
        trained = trainer.model.target.confu.adapter_weights("contemplate")
        for name, weight in target.confu.adapter_weights("contemplate").items():
            torch.testing.assert_close(weight, trained[name].double(), rtol=0, atol=0)
    prompt = torch.tensor([[5, 17, 40, 8]])
    expected = tiny_llama().generate(prompt, max_new_tokens=12, do_sample=False)
    assert torch.equal(
        target.generate(prompt, assistant_model=assistant, max_new_tokens=12, do_sample=False, policy="fixed"),
        expected,
    )
    assert assistant.stats.rounds > 0
    assert (assistant.stats.contemplate_tokens > 0) == contemplate


def test_peft_loads_the_adapter_of_the_folder(finished):
    contemplate, folder, trainer = finished
    if not contemplate:
        pytest.skip("an EAGLE-3 draft has no adapter")
    model = PeftModel.from_pretrained(tiny_llama(dtype=torch.float32), folder, subfolder="adapter")
    trained = trainer.model.target.confu.adapter_weights("contemplate")
    for name, weight in model.get_base_model().confu.adapter_weights("default").items():
        assert torch.equal(weight, trained[name])


def test_checkpoints_hold_what_resuming_needs(finished):
    _, folder, _ = finished
    names = {path.name for path in (folder / "checkpoint-2").iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names


def test_what_is_logged(finished):
    _, folder, trainer = finished
    seen = logged(trainer, "answer_tokens_seen")
    drafted = sum(length - prompt - 1 for prompt, length in SEQUENCES)  # the first token is drawn at prefill
    assert seen == sorted(seen) and seen[2] == drafted and seen[-1] == 2 * drafted  # after each epoch
    accepted = logged(trainer, "train_accepted_length")
    assert len(accepted) == STEPS and all(1.0 <= length <= 4.0 for length in accepted)
    history = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
    assert history[-1]["answer_tokens_seen"] == seen[-1]


def test_evaluation(finished):
    _, _, trainer = finished
    metrics = trainer.evaluate()
    module = trainer.model.eval()
    with torch.no_grad():
        outputs = module(**ConversationCollator(0)(conversations(*SEQUENCES)[:3]))
    total, rows = outputs["accepted"].sum(0).tolist()
    assert metrics["eval_accepted_length"] == pytest.approx(total / rows)
    for depth, (right, guesses) in enumerate(outputs["correct"].sum(0).tolist(), start=1):
        assert metrics[f"eval_accuracy_depth_{depth}"] == pytest.approx(right / guesses)
    assert metrics["eval_loss"] == pytest.approx(outputs["loss"].item(), rel=1e-5)


def test_trees_are_evaluated_by_task(tmp_path):
    trainer = make_trainer(tmp_path, True, per_device_eval_batch_size=2)
    rows = conversations((3, 12), (4, 9), (2, 10), (5, 11), (3, 8))
    for row, task, greedy in zip(rows, "xyxxy", (True, True, False, True, True), strict=True):
        row |= {"task": task, "greedy": greedy}
    target, layer_ids, seen = trainer.model.target, trainer.model.draft.config.target_layer_ids, []

    class Told:
        """Two rounds for each sequence of 12 tokens, four for all others; looks at what it is given."""

        def counts(self, texts):
            for row, length in enumerate(texts.lengths.tolist()):
                ids, prompt = texts.input_ids[row, :length].tolist(), int(texts.prompt_lengths[row])
                seen.append((ids, prompt))
                states = target(texts.input_ids[row : row + 1, :length], output_hidden_states=True).hidden_states
                features = torch.cat([states[layer] for layer in layer_ids], dim=-1)[0]
                torch.testing.assert_close(texts.features[row, :length], features)
            assert texts.cache.get_seq_length() == texts.input_ids.shape[1]
            assert len(texts.cache.layers[0].keys) == len(texts.lengths)
            return [[4, 4] if length == 12 else [2, 2, 1, 1] for length in texts.lengths.tolist()]

    trainer.replay = Told()
    metrics = trainer.evaluate(rows)
    assert sorted(seen) == sorted((row["input_ids"], row["labels"].count(IGNORED)) for row in rows if row["greedy"])
    assert metrics["eval_tree_accepted_length_x"] == pytest.approx((8 + 6) / 6)
    assert metrics["eval_tree_accepted_length_y"] == pytest.approx(1.5)
    assert metrics["eval_tree_accepted_length"] == pytest.approx((8 + 6 + 6 + 6) / 14)
    assert 1 <= metrics["eval_accepted_length"] <= 4


def test_the_replay_of_a_pair_runs_in_the_trainer(finished):
    contemplate, _, trainer = finished
    trainer.replay = trainer.model.draft.replay(TreeOptions(total_tokens=8, depth=3, top_k=3))
    metrics = trainer.evaluate()
    trainer.replay = None
    assert 1 <= metrics["eval_tree_accepted_length"] == metrics["eval_tree_accepted_length_all"] <= 4


def test_the_best_checkpoint_is_kept_by_accepted_length_in_trees(tmp_path):
    trainer = make_trainer(
        tmp_path,
        False,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="tree_accepted_length",
    )

    class Rising:
        """Says that the checkpoint of step 4 is the best one."""

        def counts(self, texts):
            return [[2 if trainer.state.global_step == 4 else 1]] * len(texts.lengths)

    trainer.replay = Rising()
    trainer.train()
    assert logged(trainer, "eval_tree_accepted_length") == [1.0, 2.0, 1.0]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    trainer.save_model(str(tmp_path / "best"))
    expected = saved_weights(tmp_path / "checkpoint-4")
    assert all(torch.equal(value, expected[key]) for key, value in saved_weights(tmp_path / "best").items())


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_that_are_no_numbers_stop_the_run(tmp_path, monkeypatch, accumulation):
    trainer = make_trainer(tmp_path, False, gradient_accumulation_steps=accumulation)
    forward, seen = ConFuForTraining.forward, {0: [], 1: [], 2: []}

    @functools.wraps(forward)  # the Trainer reads its signature
    def spoilt(module, **batch):
        outputs = forward(module, **batch)
        step = trainer.state.global_step
        seen[step] += batch["index"].tolist()
        if step == 2:
            outputs["numerators"] = outputs["numerators"] * float("nan")
        return outputs

    monkeypatch.setattr(ConFuForTraining, "forward", spoilt)
    with pytest.raises(FloatingPointError, match="Step 3: got gradients that are NaN .*smaller --learning_rate") as e:
        trainer.train()
    assert str(seen[2]) in str(e.value) and len(seen[2]) == 2 * accumulation
    assert all(parameter.isfinite().all() for parameter in trainer.model.draft.parameters())
    assert trainer.state.global_step == 2


def test_routers_are_logged(finished):
    contemplate, _, trainer = finished
    for name, experts in (("contemplate", 4), ("future", 8)):
        entropies = logged(trainer, f"router_{name}_entropy")
        loads = [logged(trainer, f"router_{name}_load_{expert}") for expert in range(experts)]
        assert len(entropies) == (STEPS if contemplate else 0)
        assert all(0 < entropy < torch.tensor(experts).log() for entropy in entropies)
        assert all(sum(shares) == pytest.approx(1, abs=1e-3) for shares in zip(*loads, strict=True))


def test_tensorboard_gets_what_is_logged(tmp_path, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    trainer = make_trainer(tmp_path, True, max_steps=2, report_to="tensorboard")
    trainer.train()
    events = accumulator.EventAccumulator(str(tmp_path / "events")).Reload()
    for name in ("loss", "train_accepted_length", "answer_tokens_seen", "router_future_entropy"):
        values = [event.value for event in events.Scalars(f"train/{name}")]
        assert values == pytest.approx(logged(trainer, name), rel=1e-6)


def test_batches_are_of_like_length_by_what_a_step_costs(tmp_path):
    """While the target reads along, prompts count; from a filled store, answers alone do."""
    trainer = make_trainer(tmp_path, contemplate=False)
    totals, answers = [length for _, length in SEQUENCES], [length - prompt for prompt, length in SEQUENCES]
    order = trainer._get_train_sampler()
    assert order.first.lengths == order.sampler.lengths == totals
    trainer.model.teacher.store = "a store"
    order = trainer._get_train_sampler()
    assert order.first.lengths == totals and order.sampler.lengths == answers
    for epoch, expected in ((0, order.first), (1, order.sampler)):
        order.set_epoch(epoch)
        seen = list(order)
        assert sorted(seen) == list(range(len(SEQUENCES)))
        expected.generator.manual_seed(trainer.args.seed + epoch)
        assert seen == list(expected)
