"""Accepted lengths without verify passes: figures of known counts, and that a whole run goes through."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_llama
from tiny_pairs import tiny_pair

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS = [{"id": "a", "task": "qa"}, {"id": "b", "task": "qa"}, {"id": "c", "task": "rag"}]
COUNTS = {
    "eagle3": {"a": (10, 5), "b": (10, 5), "c": (9, 3)},
    "confu": {"a": (10, 4), "b": (10, 4), "c": (9, 3)},
}


@pytest.fixture
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import accepted_length
    import join_prompts
    from _prompts import read_prompts

    return SimpleNamespace(script=accepted_length, join_prompts=join_prompts, read_prompts=read_prompts)


def test_figures_of_known_counts(examples):
    figures = examples.script.report(ROWS, COUNTS)
    assert figures["qa"]["eagle3"] == 2.0 and figures["qa"]["confu"] == 2.5 and figures["qa"]["questions"] == 2
    assert figures["all"]["eagle3"] == pytest.approx(29 / 13) and figures["all"]["confu"] == pytest.approx(29 / 11)
    # Both questions of `qa` say the same, so nothing is uncertain there; `rag` gains nothing.
    assert figures["qa"]["confu, % more"] == pytest.approx([25, 25, 25])
    assert figures["rag"]["confu, % more"] == pytest.approx([0, 0, 0])
    more, low, high = figures["all"]["confu, % more"]
    assert low < more < high and more == pytest.approx(100 * (13 / 11 - 1))
    table = examples.script.markdown(figures).splitlines()
    assert table[0] == "|  | qa | rag | all |" and table[2] == "| eagle3 | 2.000 | 3.000 | 2.231 |"
    assert table[4].startswith("| confu, % more | +25.0 [+25.0, +25.0] | +0.0 [+0.0, +0.0] | +18.2 [")


@pytest.mark.parametrize("temperature", ["0", "0.7"])
def test_a_run_and_its_answers_again(examples, tmp_path, monkeypatch, tokenizer, capsys, temperature):
    target = tiny_llama(dtype=torch.float32)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'][:20] }}{% endfor %}"
    monkeypatch.setattr(examples.script, "load_target", lambda *args: (target, tokenizer))
    for name, contemplate in (("eagle3", False), ("confu", True)):
        pair = tiny_pair(target, contemplate=contemplate)
        pair.save_pretrained(tmp_path / name)
        pair.detach()
    prompts = tmp_path / "prompts.jsonl"
    questions = [{"id": f"q{n}", "task": f"t{n % 2}", "prompt": "tell me a story " * (n + 1)} for n in range(4)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in questions))
    command = ["--prompts", str(prompts), "--output", str(tmp_path / "out"), "--temperature", temperature]
    command += ["--eagle3", str(tmp_path / "eagle3"), "--confu", str(tmp_path / "confu"), "--batch-size", "3"]
    command += [
        "--max-new-tokens",
        "9",
        "--methods",
        "eagle3",
        "confu",
        "confu-masked",
        "--depth",
        "3",
        "--top-k",
        "4",
    ]
    examples.script.main(command)
    found = json.loads((tmp_path / "out" / "accepted.json").read_text())
    (answers,) = (tmp_path / "out").glob("answers-*.jsonl")
    written = answers.read_text()
    lengths = {row["id"]: len(row["answer"]) for row in map(json.loads, written.splitlines())}
    for method in ("eagle3", "confu", "confu-masked"):
        # Every token but prefill's first one is some round's.
        assert {one: tokens + 1 for one, (tokens, _) in found["counts"][method].items()} == lengths
    assert found["environment"]["torch"] and found["settings"]["total_tokens"] == 30
    assert "| confu-masked, % more |" in capsys.readouterr().out
    examples.script.main(command)
    assert answers.read_text() == written, "answers are made once"


def test_prompts_are_joined_within_their_source(examples, tmp_path):
    rows = [
        {
            "id": f"s{n}",
            "source": f"book {n % 2}",
            "licence": "MIT",
            "task": "summarization",
            "prompt": f"Summarize: {n} " + "text " * 30,
        }
        for n in range(8)
    ]
    rows += [
        {
            "id": f"r{n}",
            "source": "news",
            "licence": "MIT",
            "task": "rag",
            "prompt": "fact " * 30 + f"{n}.\nWho did {n}?",
        }
        for n in range(6)
    ]
    rows += [{"id": "c", "source": "news", "licence": "MIT", "task": "chat", "prompt": "Hello you\nhow are you?"}]
    path, output = tmp_path / "short.jsonl", tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--prompts", str(path), "--output", str(output), "--count", "10", "--characters", "350", "500"]
    examples.join_prompts.main(command)
    joined, by_id = [json.loads(line) for line in output.read_text().splitlines()], {row["id"]: row for row in rows}
    assert {row["task"] for row in joined} == {"summarization", "rag"} and len(joined) == 10
    for row in joined:
        parts = [by_id[one] for one in row["joined"]]
        assert len(parts) > 1 and {part["source"] for part in parts} == {row["source"]}
        assert len(row["prompt"]) < 520
        if row["task"] == "summarization":
            assert row["prompt"].startswith("Summarize: ") and row["prompt"].count("Summarize") == 1
        else:
            assert row["prompt"].endswith(parts[-1]["prompt"].splitlines()[-1]) and row["prompt"].count("?") == 1
    assert examples.read_prompts([output])[0].source in {"book 0", "book 1", "news"}
