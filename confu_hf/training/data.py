"""Chat answers -> token ids and labels, batches, and the draft's vocabulary.

Knows tokenizers and `datasets`, no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from transformers import PreTrainedTokenizerBase

from ..errors import refusal

IGNORED = -100
MORE_ANSWERS = (
    "Give --max_minutes more where a recipe writes them (the same command goes on), or more prompts to "
    "examples/regenerate.py."
)


def tokenize_conversation(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerBase, max_length: int, eos_token_id: int
) -> dict[str, list[int]]:
    """One conversation whose last message is the target's answer.

    Args:
        example: `messages` (list of `role`/`content`), and optionally `finished` (False: the answer was cut by a
            length limit, no end token is added).
        max_length: longer examples are cut on the right.

    Returns:
        `input_ids`, and `labels` of the same length: the token itself inside the answer, -100 in the prompt. Labels
        are not shifted.
    """
    messages = example["messages"]
    prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"]
    if example.get("finished", True):
        answer_ids = answer_ids + [eos_token_id]
    input_ids = (prompt_ids + answer_ids)[:max_length]
    labels = ([IGNORED] * len(prompt_ids) + answer_ids)[:max_length]
    return {"input_ids": input_ids, "labels": labels}


def load_conversations(
    data_files: list[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    eos_token_id: int,
    min_answer: int = 4,
) -> Dataset:
    """Read `messages` files into `input_ids`, `labels`, `length`, `task`, `greedy` (no `temperature`, or 0) and `index`.

    jsonl, jsonl.gz, parquet: anything `datasets` opens by extension. Answers of fewer than `min_answer` tokens teach the
    draft nothing and are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: rows without `messages`, or no answer that is long enough.
    """
    wanted = f"`messages` files with answers of at least {min_answer} tokens"
    files = [file for file in data_files if not _is_empty(Path(file))]  # `datasets` knows no empty file
    if not files:
        raise refusal(str(data_files), got="no answers", expected=wanted, fix=MORE_ANSWERS)
    suffix = files[0].removesuffix(".gz").rsplit(".", 1)[-1]
    try:
        raw = load_dataset({"jsonl": "json"}.get(suffix, suffix), data_files=files, split="train")
    except FileNotFoundError as error:
        raise refusal(
            str(data_files),
            got="no such file",
            expected=wanted,
            fix="Look for a misspelt path, or make answers with examples/regenerate.py.",
            error=FileNotFoundError,
        ) from error
    if "messages" not in raw.column_names:
        raise refusal(
            str(data_files),
            got=f"columns {raw.column_names}",
            expected="`messages`",
            fix="Make answers with examples/regenerate.py.",
        )

    def convert(example: dict[str, Any]) -> dict[str, Any]:
        tokens = tokenize_conversation(example, tokenizer, max_length, eos_token_id)
        task, greedy = example.get("task") or "all", not example.get("temperature")
        return {**tokens, "length": len(tokens["input_ids"]), "task": task, "greedy": greedy}

    tokens = raw.map(convert, remove_columns=raw.column_names)
    tokens = tokens.filter(lambda row: sum(label != IGNORED for label in row["labels"]) >= min_answer)
    if len(tokens) == 0:
        raise refusal(str(data_files), got=f"{len(raw)} shorter answers", expected=wanted, fix=MORE_ANSWERS)
    return tokens.add_column("index", range(len(tokens)))


def _is_empty(file: Path) -> bool:
    return file.is_file() and file.stat().st_size == 0


def split_held_out(rows: Dataset, number: int) -> tuple[Dataset, Dataset]:
    """Rows to train on and `number` to hold out, a fifth at most: greedy answers, where there are any, for those are what
    trees are counted on. Which ones follows from the texts: a longer file of answers keeps what it can.

    Raises:
        ValueError: fewer than two rows.
    """
    if len(rows) < 2:
        raise refusal(
            "Answers to learn from",
            got=f"{len(rows)} that is long enough",
            expected="at least 2: one to train on, one to hold out",
            fix=MORE_ANSWERS,
        )
    keys = [hashlib.sha256(repr(list(ids)).encode()).digest() for ids in rows["input_ids"]]
    greedy = rows["greedy"]
    order = sorted(range(len(rows)), key=lambda place: (not greedy[place], keys[place]))
    held_out = sorted(order[: max(1, min(number, len(rows) // 5))])
    kept = sorted(set(range(len(rows))) - set(held_out))
    return rows.select(kept), rows.select(held_out)


def answer_lengths(rows: Dataset | Iterable[dict[str, Any]]) -> list[int]:
    """Answer tokens of each of the rows."""
    column = rows["labels"] if isinstance(rows, Dataset) else (row["labels"] for row in rows)
    return [sum(label != IGNORED for label in labels) for labels in column]


def total_lengths(rows: Dataset | Iterable[dict[str, Any]]) -> list[int]:
    """Tokens of each of the rows, prompts included."""
    column = rows["input_ids"] if isinstance(rows, Dataset) else (row["input_ids"] for row in rows)
    return [len(input_ids) for input_ids in column]


class ConversationCollator:
    """Pads on the right to the longest sequence of the batch.

    `input_ids`, `attention_mask`, `labels`, each `(B, N)` long; and `index` `(B,)`.
    """

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)

        def pad(name: str, filler: int) -> torch.Tensor:
            return torch.tensor([list(row[name]) + [filler] * (length - len(row[name])) for row in rows])

        attention_mask = torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (length - len(row["input_ids"])) for row in rows]
        )
        return {
            "input_ids": pad("input_ids", self.pad_token_id),
            "attention_mask": attention_mask,
            "labels": pad("labels", IGNORED),
            "index": torch.tensor([row["index"] for row in rows]),
        }


def frequent_tokens(
    rows: Iterable[dict[str, Any]], vocab_size: int, draft_vocab_size: int, always: Iterable[int] = ()
) -> tuple[torch.Tensor, float]:
    """The draft's vocabulary: the answers' most frequent tokens.

    Args:
        rows: with `labels`.
        always: token ids kept in any case (end tokens).

    Returns:
        `(draft_vocab_size,)` long, sorted target ids, and the share of answer tokens that they cover.
    """
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for row in rows:
        labels = torch.as_tensor(row["labels"])
        counts += torch.bincount(labels[labels != IGNORED], minlength=vocab_size)
    ranked = counts.clone()
    ranked[list(always)] = counts.max() + 1
    kept = ranked.argsort(descending=True, stable=True)[:draft_vocab_size].sort().values
    return kept, (counts[kept].sum() / counts.sum()).item()
