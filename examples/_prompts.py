"""Lists of prompts for the examples: five of their own, JSON lines, parquet, or a data set of the Hub. Knows no model."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from confu_hf.errors import marked, refusal

SHAPES = "a string `prompt`, a list `messages` of role/content, or a list of strings `turns` (the first is used)"


@dataclass(frozen=True)
class Prompt:
    """A conversation that waits for the model's answer, and where it came from."""

    id: str
    task: str
    messages: list[dict[str, str]]
    source: str = ""
    licence: str = ""


def _demo(task: str, text: str) -> Prompt:
    return Prompt(f"demo-{task}", task, [{"role": "user", "content": text}], "confu_hf examples", "Apache-2.0")


DEMO_PROMPTS = [
    _demo("chat", "Write a short, friendly letter to a neighbour who watered your plants while you were away."),
    _demo("explain", "Explain step by step how a bicycle stays upright while it is moving."),
    _demo("code", "Write a Python function that returns the three most frequent words of a text, with an example."),
    _demo(
        "math", "A train leaves at 9:40 and arrives at 13:05. It stops twice for 10 minutes. How long does it move?"
    ),
    _demo(
        "summarization",
        "Summarize in two sentences: The old lighthouse at the harbour was built of granite in 1871. For ninety years "
        "a keeper lived in it and lit the lamp by hand every evening. When the lamp was made automatic, the town "
        "wanted to tear the tower down, but fishermen collected money and bought it. Today it holds a small museum "
        "about storms and shipwrecks, a school class repaints the door each spring, and on clear nights visitors may "
        "climb the 134 steps to watch the ferries come in.",
    ),
]


def read_prompts(sources: Sequence[str | Path], limit: int | None = None) -> list[Prompt]:
    """Read JSON lines (`.jsonl`, `.jsonl.gz`), `.parquet` files, or data sets of the Hub (`NAME`, `NAME:SPLIT`).

    Each row has one of `prompt`, `messages` (a closing answer is dropped) or `turns`. `limit` takes that many, evenly
    spaced, so that a file sorted by task keeps its mixture.
    """
    prompts = [prompt for source in sources for prompt in _read(source)]
    return evenly(prompts, limit)


def read_questions(sources: Sequence[str | Path]) -> list[str]:
    """All that users say in the rows of `sources`, later turns included: what a benchmark asks."""
    questions = []
    for source in sources:
        for number, row in enumerate(_rows(source), start=1):
            if isinstance(row.get("turns"), list):
                questions += [turn for turn in row["turns"] if isinstance(turn, str)]
            else:
                questions += user_texts(_messages(row, f"{source}, row {number}"))
    return questions


def user_texts(messages: Sequence[dict[str, str]]) -> list[str]:
    """What the user says in a conversation."""
    return [message["content"] for message in messages if message["role"] == "user"]


def evenly(items: list, limit: int | None) -> list:
    """`limit` of the items in their order, evenly spaced: 3 of [0 .. 9] are 0, 3, 6."""
    if limit is None or limit >= len(items):
        return items
    return [items[index * len(items) // limit] for index in range(limit)]


def chat_text(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> str:
    """The text the model continues. Special tokens are part of it: tokenize it with `add_special_tokens=False`."""
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def _read(source: str | Path) -> Iterator[Prompt]:
    path = Path(source)
    name = path.name.removesuffix(".gz").removesuffix(".jsonl").removesuffix(".parquet")
    for number, row in enumerate(_rows(source), start=1):
        messages = _messages(row, f"{source}, row {number}")
        key = row.get("id", row.get("question_id", number))
        yield Prompt(
            id=key if isinstance(key, str) else f"{name}-{key}",
            task=str(row.get("task") or row.get("category") or "all"),
            messages=messages,
            source=str(row.get("source") or name),
            licence=str(row.get("licence") or row.get("license") or ""),
        )


def _rows(source: str | Path) -> Iterator[dict[str, Any]]:
    path = Path(source)
    return _read_lines(path) if path.suffix in {".jsonl", ".json", ".gz"} else _read_dataset(str(source))


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        raise _no_file(path, "no such file")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise _no_object(path, number, line) from error
            if not isinstance(row, dict):
                raise _no_object(path, number, line)
            yield row


def _no_object(path: Path, number: int, line: str) -> ValueError:
    got, expected = repr(line[:80]), "one JSON object a line"
    return refusal(f"{path}, line {number}", got=got, expected=expected, fix="Write it as JSON lines.")


def _read_dataset(name: str) -> Iterator[dict[str, Any]]:
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise marked(
            ImportError(
                f"{name!r} is no .jsonl or .jsonl.gz file; to read it as a data set: pip install -e '.[train]'"
            )
        ) from error
    path, _, split = name.partition(":")
    try:
        if name.endswith(".parquet"):
            rows = load_dataset("parquet", data_files=name, split="train")
        else:
            rows = load_dataset(path, split=split or "train")
    except (FileNotFoundError, ConnectionError) as error:
        raise _no_file(name, str(error).partition("\n")[0]) from error
    yield from rows


def _no_file(source: str | Path, got: str) -> FileNotFoundError:
    expected = "a file of prompts (.jsonl, .jsonl.gz, .parquet) or a data set of the Hub (NAME, NAME:SPLIT)"
    fix = "Look for a misspelt path; a data set must be in the cache, or the Hub in reach."
    return refusal(str(source), got=got, expected=expected, fix=fix, error=FileNotFoundError)


def _messages(row: dict[str, Any], where: str) -> list[dict[str, str]]:
    if isinstance(row.get("prompt"), str):
        messages = [{"role": "user", "content": row["prompt"]}]
    elif isinstance(row.get("turns"), list) and row["turns"]:
        messages = [{"role": "user", "content": row["turns"][0]}]
    elif isinstance(row.get("messages"), list):
        messages = [{"role": turn["role"], "content": turn["content"]} for turn in row["messages"]]
        if messages and messages[-1]["role"] == "assistant":
            messages.pop()
    else:
        raise refusal(where, got=f"the fields {sorted(row)}", expected=SHAPES, fix="Rename the field of the prompt.")
    if not messages or not messages[-1]["content"].strip():
        raise refusal(where, got="an empty prompt", expected="some text", fix="Leave the row out.")
    return messages
