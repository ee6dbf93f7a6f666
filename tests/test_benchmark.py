"""The benchmark's figures from questions whose figures are known, its journal, and that a whole run goes through."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny_models import tiny_llama

from confu_hf.decoding.memory import AnswerMemory

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def examples(monkeypatch):
    """The scripts' modules, imported as the scripts import them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import _methods
    import _report
    import benchmark
    import quickstart

    return SimpleNamespace(methods=_methods, report=_report, benchmark=benchmark, quickstart=quickstart)


def result(seconds, ratio=None, accepted=None, verify=0.5):
    """One method on one question of 10 new tokens, as `condensed` leaves it."""
    found = {"new_tokens": 10, "seconds": seconds, "tokens_per_second": 10 / seconds, "peak_bytes": 10**9}
    if ratio is not None:
        found |= {"ratio": ratio, "identical": True}
    if accepted is None:
        return {**found, "stats": None}
    phases = {"policy": 0.0, "draft": 0.25, "verify": verify, "accept": 0.0, "cache": 0.0}
    stats = {"rounds": len(accepted), "mean_accepted_length": sum(accepted) / len(accepted), "accepted": accepted}
    times = {
        "drafted": [4] * len(accepted),
        "rows": [3] * len(accepted),
        "verify_ms": [1000 * verify / len(accepted)] * len(accepted),
    }
    return {**found, "stats": {**stats, **times, "phase_seconds": phases}}


RECORDS = [
    {"task": "qa", "prefill_seconds": 0.25, "methods": {"plain": result(2), "confu": result(1, 2.0, [4, 5])}},
    {"task": "qa", "prefill_seconds": 0.25, "methods": {"plain": result(4), "confu": result(1, 4.0, [4, 5])}},
    {"task": "rag", "prefill_seconds": 0.25, "methods": {"plain": result(2), "confu": result(2, 1.0, [1, 2])}},
]


def test_figures_of_known_questions(examples):
    figures = examples.report.report(RECORDS, ["plain", "confu"])
    assert list(figures["tasks"]) == ["qa", "rag", "all"]
    row = figures["tasks"]["all"]["confu"]
    assert row["median_ratio"] == 2.0 and row["interval"] == (1.0, 4.0) and row["mean_accepted_length"] == 3.5
    assert row["efficiency"] == pytest.approx(2 / 3.5) and row["ratio_to_best_other"] == pytest.approx(8 / 4)
    assert figures["tasks"]["qa"]["confu"]["median_ratio"] == 3.0
    # 21 tokens in 6 rounds: 15 drafted ones of 24 were accepted. 30 tokens in 4 s, plainly in 8 s.
    assert row["acceptance_rate"] == 15 / 24 and row["overall_ratio"] == 2.0
    assert figures["tasks"]["all"]["plain"]["acceptance_rate"] is None
    # 4 seconds in 6 rounds; 0.75 of prefill, 0.75 of drafting, 1.5 of verifying; 1 is left.
    budget = figures["round_ms"]["confu"]
    assert budget["draft"] == pytest.approx(125) and budget["verify"] == pytest.approx(250)
    assert budget["rest"] == pytest.approx(1000 / 6)
    assert figures["acceptance_by_depth"]["confu"] == pytest.approx((5 / 6, 4 / 6, 4 / 6, 2 / 6))
    assert figures["verify_ms_by_rows"]["confu"] == {3: 250.0} and "plain" not in figures["round_ms"]
    table = examples.report.markdown(figures, ["plain", "confu"])
    assert "| confu | 3/3 | 3.50 | 7.5 | 2.00 [1.00, 4.00] (1.00, 4.00) | 2.00 | 0.57 | 1.00 |" in table
    assert "| confu | 3.00 | 1.00 | 2.00 |" in table


def test_an_interval_narrows_with_more_questions(examples):
    few, many = ([1.0 + i % 7 / 7 for i in range(count)] for count in (7, 700))
    narrow, wide = examples.report.bootstrap_interval(many), examples.report.bootstrap_interval(few)
    assert wide[0] <= narrow[0] <= 1 + 3 / 7 <= narrow[1] <= wide[1] and narrow[1] - narrow[0] < wide[1] - wide[0]


def test_a_journal_goes_on_only_with_its_own_settings(examples, tmp_path):
    journal, read = tmp_path / "questions.jsonl", examples.benchmark.read_journal
    assert read(journal, {"depth": 3}) == []
    examples.benchmark.append(journal, {"id": "a", "settings": {"depth": 3}})
    examples.benchmark.append(journal, {"id": "b"})
    with journal.open("a") as file:
        file.write('{"id": "c", "met')  # stopped while it wrote
    assert [record["id"] for record in read(journal, {"depth": 3})] == ["a", "b"]
    assert journal.read_text().endswith("\n")
    with pytest.raises(ValueError, match=r"got depth=4 \(begun with 3\), expected the settings .* another folder"):
        read(journal, {"depth": 4})


def test_a_run_measures_all_and_goes_on_where_it_stopped(examples, tmp_path, monkeypatch, tokenizer, capsys):
    target = tiny_llama(dtype=torch.float32)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'][:20] }}{% endfor %}"
    monkeypatch.setattr(examples.benchmark, "load_target", lambda *args: (target, tokenizer))
    methods = ["plain", "prompt-lookup", "lookup-tree"]
    command = [
        "benchmark.py",
        "--methods",
        *methods,
        "--limit",
        "2",
        "--max-new-tokens",
        "6",
        "--output",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--no-plots"])
    examples.benchmark.main()
    first = (tmp_path / "questions.jsonl").read_text()
    lines = [json.loads(line) for line in first.splitlines()]
    assert len(lines) == 2 and list(lines[0]["methods"]) == methods
    assert all(line["methods"]["lookup-tree"]["identical"] for line in lines)
    assert "records" not in lines[0]["methods"]["lookup-tree"]["stats"]
    examples.benchmark.main()
    assert (tmp_path / "questions.jsonl").read_text() == first, "nothing is measured twice"
    (tmp_path / "questions.jsonl").write_text(first.splitlines(keepends=True)[0])
    examples.benchmark.main()
    again = (tmp_path / "questions.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in again] == [line["id"] for line in lines]
    figures = json.loads((tmp_path / "results.json").read_text())
    assert figures["settings"]["max_new_tokens"] == 6 and figures["environment"]["torch"]
    assert "| lookup-tree | 2/2 |" in (tmp_path / "table.md").read_text()
    assert "| lookup-tree | 2/2 |" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["benchmark", "quickstart", "quickstart --no-stream"])
def test_no_assistant_remembers_the_answer_that_is_measured(
    examples, script, tokenizer, tmp_path, monkeypatch, capsys
):
    """Warming up and showing an answer come before it is timed: what they wrote is known to nobody then."""
    target, asked = tiny_llama(), []
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'][:20] }}{% endfor %}"
    begin = AnswerMemory.begin

    def noted(memory, prompt):
        asked.append((tuple(prompt), [answer[start:] for start, answer in memory._answers]))
        return begin(memory, prompt)

    monkeypatch.setattr(AnswerMemory, "begin", noted)
    module = getattr(examples, script.split()[0])
    monkeypatch.setattr(module, "load_target", lambda *args: (target, tokenizer))
    where = (
        ["--output", str(tmp_path), "--no-plots"] if script == "benchmark" else ["--json", str(tmp_path / "out.json")]
    )
    words = ["--methods", "plain", "lookup-tree", "--limit", "3", "--max-new-tokens", "6"]
    monkeypatch.setattr(sys, "argv", [*script.split(), *words, *where])
    module.main()
    prompts = [prompt for prompt, _ in asked]
    assert len(set(prompts)) == len(prompts), "no question is asked twice of an assistant that remembers"
    assert len(asked) == (0 if script == "quickstart" else 3)


def test_plots_are_drawn(examples, tmp_path):
    pytest.importorskip("matplotlib")
    import _plots

    figures = examples.report.report(RECORDS, ["plain", "confu"])
    figures["reliability"] = {"confu": [{"count": 3, "expected": 0.4, "observed": 0.5}]}
    files = _plots.draw(figures, tmp_path)
    assert {file.name for file in files} == {
        "speed_up.png",
        "round.png",
        "acceptance.png",
        "cost.png",
        "calibration.png",
    }
    assert all(file.stat().st_size > 1000 for file in files)
