"""Regeneration: continuous batching gives the answers of plain generation, whoever the neighbours are; the script
resumes, answers a prompt once, and keeps benchmarks out."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from scipy.stats import chisquare
from tiny_models import ARCHITECTURES, VOCAB_SIZE, keep_softmax_in_float64, tiny_llama

from confu_hf.training.overlap import NGRAM, OverlapIndex, normalised_text, normalised_words
from confu_hf.training.regeneration import (
    Regenerator,
    Request,
    SlotCache,
    prefill_groups,
    sample,
    shared_prefix,
)

NEW_TOKENS = 12
END = 2  # the tiny models' end token


def make_requests(count: int = 9, prefix: tuple[int, ...] = (5, 6, 7), temperatures=(0.0,)) -> list[Request]:
    """Prompts of 1 to 17 tokens behind the prefix."""
    generator = torch.Generator().manual_seed(0)
    bodies = [
        torch.randint(3, VOCAB_SIZE, (1 + 7 * number % 17,), generator=generator).tolist() for number in range(count)
    ]
    return [
        Request((*prefix, *body), temperatures[number % len(temperatures)], seed=number)
        for number, body in enumerate(bodies)
    ]


def plain_answer(model, request: Request) -> tuple[list[int], bool]:
    output = model.generate(torch.tensor([request.tokens]), max_new_tokens=NEW_TOKENS, do_sample=False)
    tokens = output[0, len(request.tokens) :].tolist()
    return [token for token in tokens if token != END], tokens[-1] == END


def all_answers(model, requests: list[Request], **settings) -> dict[int, tuple[list[int], bool]]:
    regenerator = Regenerator(model, max_new_tokens=NEW_TOKENS, **settings)
    answers = list(regenerator.answers(requests))
    assert regenerator.new_tokens == sum(len(answer.tokens) + answer.finished for answer in answers)
    assert sorted(answer.index for answer in answers) == list(range(len(requests)))
    return {answer.index: (answer.tokens, answer.finished) for answer in answers}


@pytest.fixture
def often_ending_target():
    """A tiny Llama whose answers end after a few tokens, at different times."""
    model = tiny_llama()
    head = model.get_output_embeddings().weight
    head.data[END] += 0.6 * head.data[10:40].mean(0) + 0.3 * head.data[END]
    head.data[END] *= 1.6
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_answers_are_those_of_plain_generate(name, monkeypatch):
    keep_softmax_in_float64(monkeypatch)
    model, requests = ARCHITECTURES[name](), make_requests()
    answers = all_answers(model, requests, batch_size=4, refill=2)
    assert answers == {index: plain_answer(model, request) for index, request in enumerate(requests)}


@pytest.mark.parametrize(("batch_size", "refill"), [(1, 1), (2, 1), (3, 3), (4, 2), (30, 8)])
def test_rows_that_end_are_refilled(often_ending_target, batch_size, refill):
    requests = make_requests(14)
    expected = {index: plain_answer(often_ending_target, request) for index, request in enumerate(requests)}
    lengths = {len(tokens) for tokens, _ in expected.values()}
    assert len(lengths) > 3 and {finished for _, finished in expected.values()} == {True, False}
    assert all_answers(often_ending_target, requests, batch_size=batch_size, refill=refill) == expected


def test_a_step_computes_all_rows_and_no_more(often_ending_target, monkeypatch):
    """Refilled at once: fewer steps than batches that wait for their longest row."""
    requests, batch_sizes = make_requests(16), []
    forward = often_ending_target.forward

    def counted(*args, **kwargs):
        batch_sizes.append(kwargs["input_ids"].shape[0])
        return forward(*args, **kwargs)

    monkeypatch.setattr(often_ending_target, "forward", counted)
    answers = all_answers(often_ending_target, requests, batch_size=4, refill=1)
    steps = [len(tokens) + finished for tokens, finished in (answers[index] for index in range(16))]
    assert max(batch_sizes) == 4 and batch_sizes == sorted(batch_sizes, reverse=True)  # it shrinks at the end only
    waiting = sum(4 * max(steps[start : start + 4]) for start in range(0, 16, 4))
    assert sum(steps) <= sum(batch_sizes) < waiting


def test_an_answer_does_not_depend_on_its_neighbours(often_ending_target):
    requests = make_requests(12, temperatures=(0.0, 0.7, 1.0))
    together = all_answers(often_ending_target, requests, batch_size=5, refill=2)
    turned = all_answers(often_ending_target, requests[::-1], batch_size=3, refill=1)
    for index, request in enumerate(requests):
        alone = all_answers(often_ending_target, [request], batch_size=1)
        assert together[index] == turned[len(requests) - 1 - index] == alone[0]


def test_the_seed_decides_a_sampled_answer():
    model, tokens = tiny_llama(), (5, 6, 7)
    requests = [Request(tokens, 1.0, seed) for seed in (1, 1, 2)] + [Request(tokens, 0.0, seed) for seed in (1, 2)]
    answers = all_answers(model, requests, batch_size=5)
    assert answers[0] == answers[1] != answers[2]
    assert answers[3] == answers[4]


def test_first_tokens_follow_the_models_distribution():
    model, tokens = tiny_llama(), (5, 6, 7)
    draws = Regenerator(model, batch_size=500, max_new_tokens=1)
    drawn = Counter((a.tokens or [END])[0] for a in draws.answers([Request(tokens, 0.7, s) for s in range(4000)]))
    logits = model(torch.tensor([tokens])).logits[0, -1]
    observed = torch.tensor([drawn[token] for token in range(VOCAB_SIZE)], dtype=torch.float64)

    def p_value(temperature: float) -> float:
        expected = 4000 * (logits / temperature).softmax(-1)
        common = expected >= 5
        sums = [torch.cat([counts[common], counts[~common].sum()[None]]) for counts in (observed, expected)]
        return chisquare(*(counts.numpy() for counts in sums)).pvalue

    assert p_value(0.7) > 1e-3
    assert p_value(1.0) < 1e-9  # the test would notice another temperature


def test_sampling_inverts_the_cumulative_distribution():
    logits = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(5, -1)
    uniforms = torch.tensor([0.0, 0.49, 0.5, 0.76, 0.999], dtype=torch.float64)
    assert sample(logits, torch.ones(5), uniforms).tolist() == [0, 0, 2, 3, 3]  # never token 1
    assert sample(logits, torch.zeros(5), uniforms).tolist() == [0] * 5
    assert sample(logits, torch.ones(5), uniforms, top_k=1).tolist() == [0] * 5


def test_top_k_keeps_the_most_likely_tokens_and_their_proportions():
    logits = torch.tensor([[0.1, 0.3, 0.2, 0.4]]).log().expand(4, -1)
    uniforms = torch.tensor([0.0, 0.57, 0.58, 0.999], dtype=torch.float64)  # 4 / 7 is 0.571
    assert sample(logits, torch.ones(4), uniforms, top_k=2).tolist() == [3, 3, 1, 1]
    assert sample(logits, torch.ones(4), uniforms, top_k=9).tolist() == [0, 2, 2, 3]


def test_no_end_token_means_answers_of_full_length():
    model = tiny_llama()
    model.generation_config.eos_token_id = None
    answers = all_answers(model, make_requests(3), batch_size=2)
    assert all(len(tokens) == NEW_TOKENS and not finished for tokens, finished in answers.values())


def test_several_end_tokens():
    model, request = tiny_llama(), make_requests(1)[0]
    tokens, _ = all_answers(model, [request])[0]
    first = next(token for token in tokens[3:])
    model.generation_config.eos_token_id = [END, first]
    assert all_answers(model, [request])[0] == (tokens[: tokens.index(first)], True)


def test_no_requests_no_answers():
    assert list(Regenerator(tiny_llama()).answers([])) == []


@pytest.mark.parametrize(
    ("tokens", "length"),
    [([(1, 2, 3), (1, 2, 4)], 2), ([(1, 2), (1, 2, 4)], 1), ([(1,), (1,)], 0), ([(1, 2), (3, 2)], 0)],
)
def test_shared_prefix_leaves_every_request_its_last_token(tokens, length):
    assert shared_prefix([Request(ids) for ids in tokens]) == length


def test_prefill_groups_are_of_similar_length_and_bounded():
    assert prefill_groups([100, 900, 110, 0]) == [[0, 2], [1]]
    assert prefill_groups([100] * 5, max_tokens=250) == [[0, 1], [2, 3], [4]]
    assert prefill_groups([300], max_tokens=250) == [[0]]


def test_the_cache_writes_in_place_and_grows_by_blocks():
    cache = SlotCache(1, rows=3, block_size=4)
    states = torch.randn(3, 2, 1, 8)
    cache.point(None, torch.tensor([[0], [2], [1]]), stop=3)
    keys, _ = cache.update(states, states, 0)
    assert keys.shape == (3, 2, 3, 8) and torch.equal(keys[1, :, 2], states[1, :, 0]) and not keys[1, :, :2].any()
    address = cache.layers[0].keys.data_ptr()
    assert keys.data_ptr() == address  # a view
    cache.point(torch.tensor([1]), torch.tensor([[3]]), stop=4)
    keys, _ = cache.update(states[:1], states[:1], 0)
    assert keys.shape == (1, 2, 4, 8) and torch.equal(keys[0, :, 3], states[0, :, 0])
    assert cache.layers[0].keys.data_ptr() == address
    cache.point(None, torch.tensor([[4], [4], [4]]), stop=5)
    keys, _ = cache.update(states, states, 0)
    assert cache.get_seq_length() == 8 and torch.equal(keys[1, :, 3], states[0, :, 0])


def test_refusals():
    with pytest.raises(ValueError, match="batch_size: got 0, expected at least 1"):
        Regenerator(tiny_llama(), batch_size=0)
    with pytest.raises(ValueError, match="request 1: got no tokens"):
        list(Regenerator(tiny_llama()).answers([Request((1,)), Request(())]))


QUESTION = "Imagine you are writing a blog post about a trip to Hawaii and what to see there this summer."


@pytest.mark.parametrize(
    ("question", "text", "shared"),
    [
        (QUESTION, QUESTION.upper().replace(" ", "\n "), True),
        (QUESTION, f"Some words before. {' '.join(QUESTION.split()[2 : 2 + NGRAM])}", True),
        (QUESTION, f"Some words before. {' '.join(QUESTION.split()[2 : 1 + NGRAM])}, and others follow here.", False),
        (QUESTION, "A blog post about a trip to Hawaii", True),  # a short prompt contained whole
        (QUESTION, "a trip to Hawaii", False),
        ("Name the capital of France.", "Please, name the capital of France!", True),
        ("Name the capital of France.", "Please name the capital of Spain!", False),
        ("Explain why.", "Explain why the sky is blue.", False),  # too short to be looked for inside
        ("Explain why.", "explain WHY", True),
        ("...", "!!!", False),
    ],
)
def test_overlap(question, text, shared):
    assert OverlapIndex([question, "Something else that is asked."]).shares(text) is shared
    assert OverlapIndex([]).shares(text) is False


def test_normalised():
    assert normalised_text(" \ufb01ne\tDAY ") == "fine day"
    assert normalised_words("What's 3+4, snake_case?") == ("what", "s", "3", "4", "snake", "case")


class WordTokenizer:
    """As much of a tokenizer as the script asks for; every character a token."""

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        return "".join(f"{message['role'][0]}:{message['content']}\n" for message in messages) + "a:"

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [3 + ord(letter) % (VOCAB_SIZE - 3) for letter in text]}

    def decode(self, tokens, skip_special_tokens):
        return "".join(chr(65 + token) for token in tokens)


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "examples"))
    for name in ("regenerate", "_prompts"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("regenerate")
    monkeypatch.setattr(module, "load_target", lambda *_: (tiny_llama(), WordTokenizer()))
    return module


def write_rows(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


ROWS = [
    {"id": "a", "prompt": "How are you?", "source": "own", "licence": "CC0-1.0", "task": "chat"},
    {"id": "b", "turns": ["Count to ten.", "And back."]},
    {"id": "c", "messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "dropped"}]},
    {"id": "d", "prompt": "how  are YOU?"},
    {"id": "e", "prompt": "Tell me, name the capital of France."},
    {"id": "f", "prompt": "x" * 300},
    {"id": "g", "prompt": "One more."},
]


def run_script(script, tmp_path, output: str = "answers.jsonl", rows: list[dict] = ROWS) -> dict[str, dict]:
    prompts = write_rows(tmp_path / "prompts.jsonl", rows)
    benchmark = write_rows(tmp_path / "benchmark.jsonl", [{"turns": ["Other.", "Name the capital of France."]}])
    settings = ["--max-new-tokens", "5", "--batch-size", "2", "--max-prompt-tokens", "250", "--device", "cpu"]
    script.main(["--prompts", prompts, "--output", str(tmp_path / output), "--exclude", benchmark, *settings])
    lines = (tmp_path / output).read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert len({record["id"] for record in records}) == len(records)
    return {record["id"]: record for record in records}


def test_the_script_answers_each_prompt_once_and_keeps_the_benchmark_out(script, tmp_path, capsys):
    records = run_script(script, tmp_path)
    assert set(records) == {"a", "b", "c", "g"}
    assert "7 prompts: 1 duplicates, 1 shared with --exclude, 1 too long; 4 to do" in capsys.readouterr().err
    assert list(records["a"]) == ["id", "task", "source", "licence", "temperature", "finished", "messages"]
    assert [message["role"] for message in records["c"]["messages"]] == ["user", "assistant"]
    assert records["b"]["messages"][0]["content"] == "Count to ten."
    assert {name: record["temperature"] for name, record in records.items()} == {"a": 0, "b": 0.7, "c": 0, "g": 0}


def test_the_script_goes_on_after_a_kill(script, tmp_path, capsys):
    whole = run_script(script, tmp_path)
    lines = (tmp_path / "answers.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_bytes(lines[0] + lines[1][:25])
    assert run_script(script, tmp_path, "cut.jsonl") == whole
    assert "cut short" in capsys.readouterr().err
    # Nothing is left to do, and a prompt answered under another id stays answered.
    renamed = [{**row, "id": row["id"].upper()} for row in ROWS]
    assert run_script(script, tmp_path, "cut.jsonl", renamed) == whole
    assert "0 to do" in capsys.readouterr().err


def test_the_script_reads_parquet(script, tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"prompt": "How are you?"}]).to_parquet(str(tmp_path / "more.parquet"))
    (prompt,) = script.read_prompts([str(tmp_path / "more.parquet")])
    assert prompt.id == "more-1" and prompt.messages == [{"role": "user", "content": "How are you?"}]


def test_what_is_no_answer_of_the_script_is_refused(script, tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"prompt": "?"}\n')
    with pytest.raises(ValueError, match="line 1: got .*expected an answer of this script"):
        run_script(script, tmp_path)


def test_similar_lengths_follow_each_other_and_every_job_is_kept(script):
    jobs = [script.Job(None, request) for request in make_requests(40)]
    ordered = script.in_order(jobs, batch_size=2, seed=0)
    assert sorted(map(id, ordered)) == sorted(map(id, jobs))
    stretch = [len(job.request.tokens) for job in ordered[: script.SIMILAR_BATCHES * 2]]
    assert max(stretch) - min(stretch) <= 5
