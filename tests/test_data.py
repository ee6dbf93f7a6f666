"""Chat answers become ids, labels, batches and a draft vocabulary."""

from __future__ import annotations

import json

import datasets
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from confu_hf.training.data import (
    IGNORED,
    ConversationCollator,
    frequent_tokens,
    load_conversations,
    split_held_out,
    tokenize_conversation,
)

WORDS = ["<pad>", "<s>", "</s>", "user:", "assistant:", *"abcdefgh"]
END = WORDS.index("</s>")
TEMPLATE = (
    "<s> {% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, chat_template=TEMPLATE, eos_token="</s>", pad_token="<pad>")


@pytest.fixture(autouse=True)
def _no_cache_outside(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def talk(prompt: str, answer: str, **fields) -> dict:
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **fields}


def words_of(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def test_labels_are_the_answer_and_its_end_token(tokenizer):
    row = tokenize_conversation(talk("a b", "c d e"), tokenizer, 100, END)
    assert words_of(row["input_ids"]) == "<s> user: a b assistant: c d e </s>"
    assert row["labels"] == [IGNORED] * 5 + row["input_ids"][5:]


def test_only_the_last_message_is_an_answer(tokenizer):
    turns = {"messages": talk("a", "b")["messages"] + talk("c", "d e")["messages"]}
    row = tokenize_conversation(turns, tokenizer, 100, END)
    assert words_of(row["input_ids"]) == "<s> user: a assistant: b user: c assistant: d e </s>"
    assert words_of([label for label in row["labels"] if label != IGNORED]) == "d e </s>"


def test_an_answer_that_a_limit_cut_gets_no_end_token(tokenizer):
    row = tokenize_conversation(talk("a", "b c", finished=False), tokenizer, 100, END)
    assert words_of(row["input_ids"]) == "<s> user: a assistant: b c"
    assert tokenize_conversation(talk("a", "b c", finished=True), tokenizer, 100, END)["input_ids"][-1] == END


@pytest.mark.parametrize("max_length", [3, 5, 7, 9])
def test_longer_examples_are_cut_on_the_right(tokenizer, max_length):
    whole = tokenize_conversation(talk("a b", "c d e"), tokenizer, 100, END)
    cut = tokenize_conversation(talk("a b", "c d e"), tokenizer, max_length, END)
    assert cut == {name: ids[:max_length] for name, ids in whole.items()}


def test_load_conversations(tokenizer, tmp_path):
    path = tmp_path / "answers.jsonl"
    rows = [
        talk("a", "b c d e f", task="x", temperature=0.0),
        talk("a", "b c", task="y", temperature=0.0),  # too short
        talk("a b", "c d e", task="z", temperature=0.7),
    ]
    Dataset.from_list(rows).to_json(path)
    loaded = load_conversations([str(path)], tokenizer, max_length=7, eos_token_id=END, min_answer=2)
    assert set(loaded.column_names) == {"input_ids", "labels", "length", "task", "greedy", "index"}
    assert words_of(loaded[0]["input_ids"]) == "<s> user: a assistant: b c d"
    loaded = load_conversations([str(path)], tokenizer, max_length=100, eos_token_id=END)
    assert list(loaded["index"]) == [0, 1] and list(loaded["length"]) == [10, 9]
    assert list(loaded["task"]) == ["x", "z"] and list(loaded["greedy"]) == [True, False]
    assert words_of(loaded[1]["input_ids"]) == "<s> user: a b assistant: c d e </s>"


def test_an_answer_that_the_cut_leaves_too_short_is_left_out(tokenizer, tmp_path):
    path = tmp_path / "answers.parquet"
    Dataset.from_list([talk("a b c d e f", "b c d e f"), talk("a", "b c d e f")]).to_parquet(path)
    loaded = load_conversations([str(path)], tokenizer, max_length=10, eos_token_id=END)
    assert [words_of(ids) for ids in loaded["input_ids"]] == ["<s> user: a assistant: b c d e f </s>"]
    assert list(loaded["index"]) == [0]


def test_files_without_messages_are_refused(tokenizer, tmp_path):
    path = tmp_path / "prompts.jsonl"
    Dataset.from_list([{"prompt": "a"}]).to_json(path)
    with pytest.raises(ValueError, match=r"got columns \['prompt'\], expected `messages`. Make answers with"):
        load_conversations([str(path)], tokenizer, max_length=8, eos_token_id=END)


@pytest.mark.parametrize(
    ("rows", "got"),
    [([], "no answers"), ([talk("a", "b c"), talk("a", "b")], "2 shorter answers")],
    ids=["empty", "short"],
)
def test_files_that_nothing_can_be_learned_from_are_refused(tokenizer, tmp_path, rows, got):
    path = tmp_path / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = f"got {got}, expected `messages` files with answers of at least 4 tokens. Give --max_minutes more"
    with pytest.raises(ValueError, match=expected):
        load_conversations([str(path)], tokenizer, max_length=40, eos_token_id=END)


def test_an_empty_file_beside_another_is_passed_over(tokenizer, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "answers.jsonl").write_text(json.dumps(talk("a", "b c d e")) + "\n")
    files = [str(tmp_path / "empty.jsonl"), str(tmp_path / "answers.jsonl")]
    assert len(load_conversations(files, tokenizer, max_length=40, eos_token_id=END)) == 1


def test_missing_files_are_refused(tokenizer, tmp_path):
    expected = "nonesuch.jsonl'.*: got no such file, expected `messages` files .* Look for a misspelt path"
    with pytest.raises(FileNotFoundError, match=expected):
        load_conversations([str(tmp_path / "nonesuch.jsonl")], tokenizer, max_length=40, eos_token_id=END)


def test_one_answer_cannot_be_split():
    rows = Dataset.from_list([{"input_ids": [3, 4], "greedy": True, "index": 0}])
    expected = "got 1 that is long enough, expected at least 2: one to train on, one to hold out. Give --max_minutes"
    with pytest.raises(ValueError, match=expected):
        split_held_out(rows, 1)


def test_batches_are_padded_on_the_right():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7], "index": 4},
        {"input_ids": [8], "labels": [8], "index": 1},
    ]
    batch = ConversationCollator(pad_token_id=2)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 2, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert batch["index"].tolist() == [4, 1]
    assert all(part.dtype == torch.long for part in batch.values())


def test_the_draft_vocabulary_is_the_answers_most_frequent_tokens():
    rows = [{"labels": [IGNORED, 7, 7, 3]}, {"labels": [3, 7, 5, 5]}]  # 7 thrice, 3 and 5 twice
    kept, coverage = frequent_tokens(rows, vocab_size=10, draft_vocab_size=2)
    assert kept.tolist() == [3, 7] and coverage == pytest.approx(5 / 7)  # among equals the smaller id
    kept, coverage = frequent_tokens(rows, vocab_size=10, draft_vocab_size=2, always=[9])
    assert kept.tolist() == [7, 9] and coverage == pytest.approx(3 / 7)
    kept, coverage = frequent_tokens(rows, vocab_size=10, draft_vocab_size=10)
    assert kept.tolist() == list(range(10)) and coverage == 1.0
