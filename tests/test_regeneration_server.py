"""Regeneration by an engine: the same output as with a model at hand, many requests in flight, goes on after a stop."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from chat_server import running_chat
from test_regeneration import ROWS, write_rows


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    for name in ("regenerate", "_prompts", "_server"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("regenerate")
    monkeypatch.setattr(module, "load_target", lambda *_: pytest.fail("no model is loaded"))
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return module


@pytest.fixture
def server():
    with running_chat() as stub:
        yield stub


def run_script(script, server, tmp_path, *more: str, rows=ROWS, output: str = "answers.jsonl") -> dict[str, dict]:
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    benchmark = write_rows(tmp_path / "benchmark.jsonl", [{"turns": ["Name the capital of France."]}])
    settings = ["--max-new-tokens", "5", "--batch-size", "4", "--max-prompt-tokens", "250", "--server", server.url]
    script.main(["--prompts", prompts, "--output", str(tmp_path / output), "--exclude", benchmark, *settings, *more])
    records = [json.loads(line) for line in (tmp_path / output).read_text(encoding="utf-8").splitlines()]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


def test_the_output_is_that_of_a_model_at_hand(script, server, tmp_path, capsys):
    records = run_script(script, server, tmp_path)
    assert set(records) == {"a", "b", "c", "g"}, "duplicates, benchmarks and long prompts are left out"
    assert "Left out: 1 too long" in capsys.readouterr().err
    assert list(records["a"]) == ["id", "task", "source", "licence", "temperature", "finished", "messages"]
    assert {name: record["temperature"] for name, record in records.items()} == {"a": 0, "b": 0.7, "c": 0, "g": 0}
    assert records["b"]["messages"] == [
        {"role": "user", "content": "Count to ten."},
        {"role": "assistant", "content": "0.7: Count to ten."},
    ]
    assert {name: record["finished"] for name, record in records.items()} == {
        "a": True,
        "b": False,
        "c": True,
        "g": True,
    }


def test_what_the_server_is_asked(script, server, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    run_script(script, server, tmp_path, "--top-k", "20")
    asked = {request["messages"][0]["content"]: request for request in server.requests}
    request = asked["Count to ten."]
    assert (request["model"], request["max_tokens"], request["top_k"]) == ("the-target", 5, 20)
    assert request["key"] == "Bearer secret" and len(request["messages"]) == 1
    seeds = [request["seed"] for request in asked.values()]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**31 for seed in seeds)
    server.requests.clear()
    run_script(script, server, tmp_path, "--server-model", "other", "--top-k", "0", output="again.jsonl")
    again = {request["messages"][0]["content"]: request for request in server.requests}
    assert [again[question]["seed"] for question in asked] == seeds, "a prompt keeps its seed"
    assert again["Count to ten."]["model"] == "other" and "top_k" not in again["Count to ten."]


def test_many_requests_are_in_flight_and_no_more_than_asked_for(script, server, tmp_path):
    server.seconds = 0.05
    rows = [{"id": str(number), "prompt": f"Question number {number}"} for number in range(24)]
    assert len(run_script(script, server, tmp_path, rows=rows)) == 24
    assert 2 <= server.most <= 4 and len(server.requests) == 24


def test_the_script_goes_on_after_a_stop(script, server, tmp_path):
    whole = run_script(script, server, tmp_path)
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(lines[0] + lines[1][:25])
    server.requests.clear()
    assert run_script(script, server, tmp_path, output="cut.jsonl") == whole
    questions = {request["messages"][0]["content"] for request in server.requests}
    assert json.loads(lines[0])["messages"][0]["content"] not in questions


def chat(script, server, **settings):
    module = sys.modules["_server"]
    return module.ChatServer(server.url, first_wait=0.001, **settings), module.ChatRequest


def test_a_busy_server_is_asked_again(script, server):
    asking, request = chat(script, server)
    server.failures = [503, 429, 500]
    answers = list(asking.answers([request(0, [{"role": "user", "content": "Hi."}], 0.0, 1)], in_flight=2))
    assert [answer.text for answer in answers] == ["0.0: Hi."] and len(server.requests) == 4


def test_a_prompt_that_is_rejected_is_handed_back(script, server):
    asking, request = chat(script, server)
    server.longest = 5
    asked = [
        request(key, [{"role": "user", "content": text}], 0.0, 1) for key, text in enumerate(("Hi.", "Too long."))
    ]
    answers = {answer.key: answer for answer in asking.answers(asked, in_flight=2)}
    assert answers[0].text == "0.0: Hi." and answers[1].text is None and answers[1].reason == "HTTP 400"


def test_a_server_that_is_not_there_is_named(script, server, tmp_path):
    asking, request = chat(script, server)
    server.failures = [401]
    with pytest.raises(ConnectionError, match="got HTTPError: HTTP Error 401.*expected answers of /chat/completions"):
        list(asking.answers([request(0, [{"role": "user", "content": "Hi."}], 0.0, 1)], in_flight=1))
    server.failures = [503] * 6
    with pytest.raises(ConnectionError, match="HTTP Error 503"):
        list(asking.answers([request(0, [{"role": "user", "content": "Hi."}], 0.0, 1)], in_flight=1))
    module = sys.modules["_server"]
    with pytest.raises(ConnectionError, match="See that it runs and that --server ends with /v1"):
        module.ChatServer("http://127.0.0.1:9/v1", first_wait=0.001)
