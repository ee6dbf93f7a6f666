"""A pair within a given time: the stages in miniature, their clock, and sizes from memory."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainingArguments

from confu_hf import ConFuAssistant
from confu_hf.options import TreeOptions
from confu_hf.training.answers import Question, write_answers
from confu_hf.training.budget import Budget
from confu_hf.training.data import split_held_out
from confu_hf.training.module import ConFuTrainingObjective
from confu_hf.training.pair import AdapterShape, DraftShape
from confu_hf.training.recipe import SHARES, UNLIMITED_STEPS, Recipe, RecipeOptions, summary
from confu_hf.training.sizes import bytes_per_token, plan_sizes

WORDS = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 97)}}
TEMPLATE = "{% for message in messages %}<s> {{ message['content'] }} {% endfor %}"


@pytest.fixture
def tokenizer():
    words = Tokenizer(models.WordLevel(WORDS, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class Clock:
    """Seconds that pass when somebody looks."""

    def __init__(self, step: float = 0.0):
        self.now, self.step = 0.0, step

    def __call__(self) -> float:
        self.now += self.step
        return self.now


def questions(number: int) -> list[Question]:
    return [
        Question(f"q{n}", "xy"[n % 2], [{"role": "user", "content": f"w{3 + n} w{5 + n} w7"}], {"source": "tests"})
        for n in range(number)
    ]


def options(name: str, **fields) -> RecipeOptions:
    small = {
        "max_minutes": 0.25,
        "max_new_tokens": 12,
        "max_length": 40,
        "held_out": 3,
        "logging_steps": 1,
        "draft": DraftShape(draft_vocab_size=40, feedback_after_norm=True, fc_norm=True),
        "adapter": AdapterShape(num_virtual_tokens=3, num_experts=4, lora_rank=2),
        "objective": ConFuTrainingObjective(ttt_steps=3, deep_rows="survivors", num_anchors=4, max_lag=3),
        "tree": TreeOptions(total_tokens=6, depth=3, top_k=3),
    }
    return RecipeOptions(recipe=name, **{**small, **fields})


def make_recipe(folder, tokenizer, name="confu", **fields) -> Recipe:
    return Recipe(
        folder, tiny_llama(dtype=torch.float32), tokenizer, questions(40), ConFuAssistant, options(name, **fields)
    )


@pytest.fixture(autouse=True)
def _no_bf16(monkeypatch):
    monkeypatch.setattr("confu_hf.training.recipe.product_dtype", lambda device: torch.float32)


def test_all_stages_give_a_pair_and_its_baseline(tmp_path, tokenizer):
    recipe = make_recipe(tmp_path, tokenizer)
    before = {name: weight.clone() for name, weight in recipe.target.state_dict().items()}
    found = recipe.run()
    stages = json.loads((tmp_path / "recipe.json").read_text())["stages"]
    assert list(stages) == list(SHARES["confu"]) and all(stage["done"] for stage in stages.values())
    assert stages["confu"]["steps"] == stages["twin"]["steps"] >= 1 and stages["adapter"]["steps"] >= 1
    alone, start = (
        load_file(tmp_path / "adapter" / "model.safetensors"),
        load_file(tmp_path / "eagle3" / "model.safetensors"),
    )
    assert all(torch.equal(alone[name], weight) for name, weight in start.items()), "the draft learned in its stage"
    assert stages["regenerate"]["answers"] >= 10 and stages["eagle3"]["answer_tokens_seen"] > 0
    assert found["accepted"].keys() == {"eagle3", "confu", "confu, f masked"} and found["sequences"] == 3
    assert all(1 <= value <= 4 for metrics in found["accepted"].values() for value in metrics.values())
    assert "confu: tree_accepted_length" in summary(tmp_path)
    # The target is what it was, and the pair is what users load.
    after = recipe.target.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    target = tiny_llama(dtype=torch.float32)
    confu = ConFuAssistant.from_pretrained(tmp_path / "confu", target=target)
    assert confu.config.feedback_after_norm and target.confu.config.lora_rank == 2
    target.generate(torch.tensor([[5, 17, 40]]), assistant_model=confu, max_new_tokens=6, policy="fixed")
    assert confu.stats.contemplate_tokens > 0


def test_an_interrupted_stage_goes_on(tmp_path, tokenizer, monkeypatch):
    """Killed in the middle of EAGLE-3's stage: what was done stays, and the stage goes on from its checkpoint."""
    whole = make_recipe(tmp_path, tokenizer, "eagle3")
    monkeypatch.setattr("confu_hf.training.recipe.CHECKPOINTS_PER_STAGE", 10**6)  # one after every step
    ticks = []
    tick = type(whole.budget.start("eagle3")).tick

    def dies(clock):
        ticks.append(clock.name)
        if ticks.count("eagle3") == 4:
            raise KeyboardInterrupt
        tick(clock)

    monkeypatch.setattr("confu_hf.training.budget.StageClock.tick", dies)
    with pytest.raises(KeyboardInterrupt):
        whole.run()
    answers = (tmp_path / "answers.jsonl").read_text()
    assert (tmp_path / "eagle3" / "checkpoint-3").is_dir() and not whole.budget.done("eagle3")
    monkeypatch.setattr("confu_hf.training.budget.StageClock.tick", tick)
    again = make_recipe(tmp_path, tokenizer, "eagle3")
    found = again.run()
    assert (tmp_path / "answers.jsonl").read_text() == answers
    assert again.budget.results("eagle3")["steps"] > 3 and found["accepted"].keys() == {"eagle3"}
    assert again.run() == found  # nothing is left to do


def test_a_time_without_answers_is_refused_and_can_be_prolonged(tmp_path, tokenizer):
    recipe = make_recipe(tmp_path, tokenizer, "eagle3", max_minutes=1e-9)
    with pytest.raises(ValueError, match="got no answers, expected .* of at least 4 tokens. Give --max_minutes more"):
        recipe.run()
    longer = make_recipe(tmp_path, tokenizer, "eagle3")
    assert not longer.budget.done("regenerate") and longer.run()["accepted"].keys() == {"eagle3"}


def test_a_folder_of_another_run_is_refused(tmp_path, tokenizer):
    make_recipe(tmp_path, tokenizer).budget.note("regenerate", done=True)
    with pytest.raises(ValueError, match="got a run of .*confu.*, expected .*eagle3.*Give --output_dir another"):
        make_recipe(tmp_path, tokenizer, "eagle3")


def test_stages_share_what_is_left(tmp_path):
    clock = Clock()
    budget = Budget(tmp_path / "state.json", {}, {"a": 1, "b": 2, "c": 1}, 400, clock)
    first = budget.start("a")
    assert first.limit == 100 and first.progress() == 0
    clock.now += 60
    assert first.progress() == pytest.approx(0.6) and not first.over()
    first.finish(tokens=7)
    second = budget.start("b")
    assert second.limit == pytest.approx(340 * 2 / 3)  # what `a` left over goes to both
    clock.now += 100
    second.tick()
    clock.now += 1000  # the machine is off
    again = Budget(tmp_path / "state.json", {}, {"a": 1, "b": 2, "c": 1}, 400, clock)
    assert again.done("a") and again.results("a") == {"seconds": 60, "done": True, "tokens": 7}
    assert again.left == pytest.approx(240)
    resumed = again.start("b")
    assert resumed.seconds == pytest.approx(100) and resumed.limit == pytest.approx(second.limit)
    clock.now += 500
    assert resumed.over() and again.left == 0
    resumed.finish()
    assert again.start("c").over()


def test_answers_until_the_time_is_over(tmp_path, tokenizer):
    target, output = tiny_llama(dtype=torch.float32), tmp_path / "answers.jsonl"
    arguments = {
        "temperatures": (0.0, 0.7),
        "max_new_tokens": 12,
        "max_prompt_tokens": 20,
        "batch_size": 4,
        "seed": 0,
    }
    calls = []

    def stop() -> bool:
        calls.append(0)
        return len(calls) > 20

    first = write_answers(output, target, tokenizer, questions(30), **arguments, stop=stop)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert 4 <= first["answers"] == len(rows) < 30
    assert not rows[-1]["finished"], "open answers are handed out as they are"
    assert {row["temperature"] for row in rows} == {0.0, 0.7} and {row["source"] for row in rows} == {"tests"}
    with output.open("a") as file:
        file.write('{"id": "q29", "mess')  # cut short by an interruption
    second = write_answers(output, target, tokenizer, questions(30), **arguments, stop=lambda: False)
    ids = [json.loads(line)["id"] for line in output.read_text().splitlines()]
    assert second["answers"] == len(ids) == len(set(ids)) == 30 and ids[: len(rows)] == [row["id"] for row in rows]


def test_held_out_rows_are_greedy_and_stay(tmp_path):
    from datasets import Dataset

    rows = [{"input_ids": [n, n + 1], "greedy": n % 3 > 0, "index": n} for n in range(30)]
    train, held_out = split_held_out(Dataset.from_list(rows), 4)
    assert len(held_out) == 4 and all(held_out["greedy"]) and len(train) == 26
    assert not set(train["index"]) & set(held_out["index"])
    longer = split_held_out(Dataset.from_list(rows + [{"input_ids": [99], "greedy": False, "index": 30}]), 4)[1]
    assert longer["index"] == held_out["index"]
    assert len(split_held_out(Dataset.from_list(rows[:10]), 4)[1]) == 2


def test_sizes_follow_the_memory():
    target = tiny_llama()
    need = bytes_per_token(target, 40, 3) * 100
    given = [
        plan_sizes(target, draft_vocab_size=40, steps=3, max_length=100, memory=2 * need * share)
        for share in (0.5, 2, 1000)
    ]
    assert [sizes.sequences for sizes in given] == [1, 2, 2] and given[0].answers <= given[1].answers <= 64
    assert plan_sizes(target, draft_vocab_size=40, steps=3, max_length=100).sequences == 2


def test_a_single_stage_can_end_by_the_clock(tmp_path, monkeypatch):
    """`train.py --max_minutes`: the clock of a stage in place of a number of steps, and a cosine that goes down with it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    train = importlib.import_module("train")
    arguments = train.ScriptArguments(data=["answers.jsonl"])
    training = TrainingArguments(str(tmp_path / "out"), use_cpu=True)
    assert train.stage_clock(arguments, training) is None and training.max_steps == -1
    arguments.max_minutes = 2.0
    clock = train.stage_clock(arguments, training)
    assert clock.limit == pytest.approx(120, abs=1) and training.max_steps == UNLIMITED_STEPS
    clock.finish()
    assert json.loads((tmp_path / "out" / "budget.json").read_text())["stages"]["eagle3"]["done"]
    monkeypatch.setattr(type(clock), "seconds", 30.0)
    assert train.falling(training, clock)(7) == pytest.approx(0.25, abs=0.01)
    constant = TrainingArguments(str(tmp_path / "out"), use_cpu=True, lr_scheduler_type="constant_with_warmup")
    assert train.falling(constant, clock)(7) == 0.0
