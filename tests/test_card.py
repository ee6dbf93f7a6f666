"""A pair's card: metadata that the Hub's client understands, and every figure out of a file."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import torch
import yaml
from doc_blocks import blocks
from huggingface_hub import ModelCard
from tiny_models import tiny_llama
from tiny_pairs import tiny_pair
from tiny_tokenizer import characters_tokenizer

from confu_hf import ConFuConfig
from confu_hf.hub.card import CardContent, pair_card

ROOT = Path(__file__).parent.parent
SHIPPED = ["confu-smollm2-135m-instruct", "eagle3-smollm2-135m-instruct"]
ORIGIN = {
    "command": "examples/benchmark.py --output runs/benchmark",
    "commit": "0123456789ab",
    "date": "2026-01-02",
    "python": "3.11.7",
    "torch": "2.13.0",
    "transformers": "5.24.0",
    "peft": "0.21.2",
    "device": "A Processor",
    "cpus": 2,
    "threads": 2,
    "dtype": "float32",
}
SETTINGS = {"prompts": ["data/questions.jsonl"], "temperature": 0.0, "max_new_tokens": 128, "compile": True}
FACTS = {
    "base_model": "org/target",
    "licence": "apache-2.0",
    "licence_text": "Apache-2.0.",
    "language": ["en"],
    "datasets": ["org/questions"],
    "data": "Answers of the target.",
    "sources": {"MIT": "org/questions"},
    "stages": [{"text": "Stage 1: warm up.", "commands": ["python examples/train.py --stage eagle3"]}],
    "limits": ["Short answers only."],
    "benchmark": {"type": "org/bench", "name": "A bench"},
}


@pytest.fixture
def script(monkeypatch):
    """The scripts' modules, imported as the scripts import them."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    return SimpleNamespace(**{name: importlib.import_module(name) for name in ("make_card", "_report", "train")})


def measured(seconds, ratio=None, accepted=None):
    """One method on one question of 10 new tokens, as `benchmark.py` keeps it."""
    run = {"new_tokens": 10, "seconds": seconds, "tokens_per_second": 10 / seconds, "peak_bytes": 10**9}
    run |= {} if ratio is None else {"ratio": ratio, "identical": True}
    if accepted is None:
        return {**run, "stats": None}
    stats = {"rounds": len(accepted), "mean_accepted_length": sum(accepted) / len(accepted), "accepted": accepted}
    phases = {"policy": 0.0, "draft": 0.25, "verify": 0.5, "accept": 0.0, "cache": 0.0}
    rows = {"rows": [3] * len(accepted), "verify_ms": [250.0] * len(accepted), "phase_seconds": phases}
    return {**run, "stats": {**stats, **rows}}


RECORDS = [
    {
        "task": task,
        "prefill_seconds": 0.25,
        "methods": {
            "plain": measured(4),
            "eagle3": measured(2, 2.0, [3, 4, 3]),
            "confu": measured(4 / ratio, ratio, [4, 6]),
        },
    }
    for task, ratio in (("qa", 2.5), ("qa", 3.5), ("rag", 1.5))
]


@pytest.fixture
def files(tmp_path, script):
    """A pair and files of figures, small, in the form that the scripts write."""
    pair = tiny_pair(tiny_llama())
    pair.save_pretrained(tmp_path / "pair")
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(FACTS))
    speed = {"settings": SETTINGS, "environment": ORIGIN}
    speed |= script._report.report(RECORDS, ["plain", "eagle3", "confu"])
    row = {"questions": 3, "eagle3": 3.111, "confu": 4.222, "confu, % more": [35.7, 30.0, 41.0]}
    tree = {"total_tokens": 30, "depth": 7, "top_k": 10, "temperature": 0.7}
    accepted = {"settings": SETTINGS | tree, "environment": ORIGIN, "figures": {"all": row, "qa": row}}
    for name, document in (("speed", speed), ("accepted", accepted)):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    (tmp_path / "speed_up.png").write_bytes(b"png")
    return tmp_path


def make(script, files, *arguments):
    script.make_card.main([str(files / "pair"), "--repository", "org/pair", *map(str, arguments)])
    return (files / "pair" / "README.md").read_text()


def test_metadata_for_the_hub(script, files):
    """Read back by the Hub's own client, which refuses a `model-index` that it does not understand."""
    text = make(script, files, "--speed", files / "speed.json", "--accepted", files / "accepted.json")
    data = ModelCard(text).data
    assert data.base_model == "org/target" and data.to_dict()["base_model_relation"] == "adapter"
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", "apache-2.0")
    assert data.datasets == ["org/questions"] and data.language == ["en"] and data.model_name == "pair"
    assert {"confu_hf", "confu", "eagle-3"} <= set(data.tags)
    results = {
        (one.metric_type, one.dataset_config, one.metric_args["temperature"]): one.metric_value
        for one in data.eval_results
    }
    assert results == {
        ("mean_accepted_length", "qa", 0.7): 4.222,
        ("mean_accepted_length", "all", 0.7): 4.222,
        ("speedup_ratio", "qa", 0.0): 3.0,
        ("speedup_ratio", "rag", 0.0): 1.5,
        ("speedup_ratio", "all", 0.0): 2.5,
    }
    assert {one.dataset_type for one in data.eval_results} == {"org/bench"}
    assert ModelCard((files / "pair" / "adapter" / "README.md").read_text()).data.library_name == "peft"


def test_every_section_is_filled(script, files):
    arguments = ["--speed", files / "speed.json", "--accepted", files / "accepted.json", files / "speed.json"]
    text = make(script, files, *arguments, "--plot", files / "speed_up.png")
    assert "{{" not in text.replace("{{ConFu}", "").replace("{{EAGLE-3}", "") and "{%" not in text
    for expected in (
        'ConFuAssistant.from_pretrained("org/pair", target=model)',
        "Speed, after `confu.compile()`, the tree of `generation_config.json`: 3 questions (questions.jsonl), greedy, at",
        "| ConFu + lookup | 3/3 | 5.00 |",
        "| median ratio | qa | rag | all |",
        "| ConFu + lookup | 3.00 | 1.50 | 2.50 |",
        "drafted nodes 30, depth 7, top_k 10: 3 questions (questions.jsonl), temperature 0.7,",
        "| ConFu | 4.22 | 4.22 |",
        "ConFu accepts +35.7 % (95 %: +30.0 to +41.0 %).",
        "| ConFu | 5.00 | 5.00 | 5.00 |",
        "![Speed-up by task](speed_up.png)",
        "| MIT | org/questions |",
        "Stage 1: warm up.",
        "- Short answers only.",
        "2603.08899",
    ):
        assert expected in text
    for told in ("A Processor, 2 cores, 2 threads", "torch 2.13.0", "commit 0123456789ab", "`python examples/bench"):
        assert text.count(told) == 3, "no figure without its origin"
    assert (files / "pair" / "speed_up.png").read_bytes() == b"png"


def test_without_figures_there_is_no_table(script, files):
    text = make(script, files)
    assert "## Figures" not in text and "model-index" not in text and "## Training data" in text


@pytest.mark.parametrize("contemplate", [True, False])
def test_a_card_from_a_config_alone(contemplate, tmp_path):
    """As `push_to_hub` makes it."""
    config = tiny_pair(tiny_llama(), contemplate=contemplate).config
    text = pair_card(config, "org/pair", CardContent(tags=("mine",)))
    data = ModelCard(text).data.to_dict()
    assert data["tags"][-1] == "mine" and ("confu" in data["tags"]) == contemplate
    assert "base_model" not in data and "model-index" not in data
    assert ("adapter/" in text) == contemplate and ("2603.08899" in text) == contemplate and "2503.01840" in text
    config.base_model_name_or_path = str(tmp_path)
    assert str(tmp_path) not in pair_card(config, "org/pair"), "a folder of this machine means nothing to others"


def test_what_is_wrong_is_refused(script, files):
    (files / "pair.yaml").write_text(yaml.safe_dump(FACTS | {"figures": "| 9.99 |"}))
    with pytest.raises(ValueError, match=r"The facts in .*: got \['figures'\], expected .* Correct or remove them"):
        make(script, files)
    for name in ("notes", "limits"):
        (files / "pair.yaml").write_text(f"{name}:\n  - Slow: at first.\n")
        with pytest.raises(ValueError, match=r"A line of .*: got {'Slow': 'at first.'}, expected text. Put it into"):
            make(script, files)
    (files / "pair.yaml").unlink()
    with pytest.raises(ValueError, match=r"got no .*pair.yaml, expected a YAML file. Write it, or name --facts"):
        make(script, files)
    (files / "pair.yaml").write_text(yaml.safe_dump(FACTS))
    (files / "speed.json").write_text("{}")
    with pytest.raises(
        ValueError, match="got figures that do not say where they come from, expected .* Measure again"
    ):
        make(script, files, "--speed", files / "speed.json")


@pytest.mark.parametrize("name", SHIPPED)
def test_the_shipped_cards_can_be_written_anew(script, files, name):
    """With what their authors say; figures as above."""
    shutil.copy(ROOT / "hub_cards" / "smollm2-135m-instruct.yaml", files)
    shutil.copy(ROOT / "hub_cards" / f"{name}.yaml", files / "pair.yaml")
    shutil.copy(ROOT / "hub_cards" / name / "config.json", files / "pair")
    text = make(script, files, "--speed", files / "speed.json", "--accepted", files / "accepted.json")
    card = ModelCard(text)
    assert card.data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct" and "CC-BY-4.0 (attribution)" in text
    assert len(card.data.eval_results) == 5 and "apply_chat_template" in text
    commands = [block.code for block in blocks(text) if block.language == "bash"][-1]
    stages = yaml.safe_load((files / "pair.yaml").read_text(encoding="utf-8"))["stages"]
    told = sum(len(stage.get("commands", ())) for stage in stages)
    assert commands.count("python examples/train.py") == told > 0
    assert ConFuConfig.from_json_file(files / "pair" / "config.json").contemplate == name.startswith("confu")


def test_train_leaves_what_a_card_says_of_a_stage(script, files, monkeypatch):
    tokenizer = characters_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    rows = [
        {"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cdefgh" + chr(97 + n)}]}
        for n in range(8)
    ]
    data, output = files / "answers.jsonl", files / "stage"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", files / "cache")
    monkeypatch.setattr(script.train, "load_target", lambda *_: (tiny_llama(dtype=torch.float32), tokenizer))
    command = ["examples/train.py", "--stage", "eagle3", "--data", str(data), "--output_dir", str(output)]
    command += ["--max_steps", "2", "--per_device_train_batch_size", "2", "--held_out", "2", "--use_cpu", "true"]
    command += ["--learning_rate", "1e-3", "--trees", "false", "--report_to", "none", "--draft_vocab_size", "40"]
    monkeypatch.setattr(sys, "argv", command)
    script.train.main()
    record = json.loads((output / "training.json").read_text())
    assert (record["stage"], record["steps"], record["sequences_per_step"]) == ("eagle3", 2, 2)
    # Answers of seven tokens and the one that ends them; the first one is not drafted.
    assert 0 < record["answer_tokens"] <= 2 * 2 * 8
    text = make(script, files, "--training", output / "training.json")
    assert f"| eagle3 | 2 | 2 | {record['answer_tokens']} | 0.001 | float32 |" in text
    assert f"python examples/train.py --stage eagle3 --data {data}" in text and "Stage 1: warm up." in text
