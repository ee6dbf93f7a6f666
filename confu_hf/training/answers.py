"""Answers of a target for a recipe: prompts in the order given, until the time is over, as JSON lines.

Batching is regeneration.py's. `examples/regenerate.py` is the tool for large, separate runs; the files are alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .regeneration import Regenerator, Request

# So many batches of prompts are sorted by length together.
SORTED_BATCHES = 8


@dataclass(frozen=True)
class Question:
    """A conversation that waits for an answer; `extra` fields are written with it."""

    id: str
    task: str
    messages: list[dict[str, str]]
    extra: dict[str, Any] = field(default_factory=dict)


def write_answers(
    output: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    temperatures: Sequence[float],
    max_new_tokens: int,
    max_prompt_tokens: int,
    batch_size: int,
    seed: int,
    stop: Callable[[], bool],
) -> dict[str, int]:
    """Append answers to `output` until `stop()`; those that it holds are kept.

    Returns:
        `answers` in the file, and `new_tokens` of this call.
    """
    done = _answered(output)
    waiting = [(n, question) for n, question in enumerate(questions) if question.id not in done]
    regenerator = Regenerator(model, batch_size, max_new_tokens, stop=stop)
    output.parent.mkdir(parents=True, exist_ok=True)
    size, count = SORTED_BATCHES * batch_size, len(done)
    with output.open("a", encoding="utf-8") as file:
        for start in range(0, len(waiting), size):
            if stop():
                break
            for row in _rows(
                regenerator, tokenizer, waiting[start : start + size], temperatures, max_prompt_tokens, seed
            ):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                count += 1
            file.flush()
    return {"answers": count, "new_tokens": regenerator.new_tokens}


def _rows(
    regenerator: Regenerator,
    tokenizer: PreTrainedTokenizerBase,
    numbered: Sequence[tuple[int, Question]],
    temperatures: Sequence[float],
    max_prompt_tokens: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    jobs = []
    for number, question in numbered:
        text = tokenizer.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
        tokens = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(tokens) <= max_prompt_tokens:
            digest = hashlib.sha256(f"{seed}\n{question.id}".encode()).digest()
            temperature = temperatures[number % len(temperatures)]
            jobs.append((Request(tokens, temperature, int.from_bytes(digest[:6])), question))
    jobs.sort(key=lambda job: len(job[0].tokens))
    for answer in regenerator.answers([request for request, _ in jobs]):
        request, question = jobs[answer.index]
        text = tokenizer.decode(answer.tokens, skip_special_tokens=True)
        text = text if answer.finished else text.rstrip("\ufffd")  # the end may fall within a character
        messages = [*question.messages, {"role": "assistant", "content": text}]
        fields = {"id": question.id, "task": question.task, **question.extra}
        yield {**fields, "temperature": request.temperature, "finished": answer.finished, "messages": messages}


def _answered(output: Path) -> set[str]:
    """Ids in the file; a last line that an interruption cut short is removed from it."""
    if not output.exists():
        return set()
    lines = output.read_bytes().splitlines(keepends=True)
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
        output.write_bytes(b"".join(lines))
    return {json.loads(line)["id"] for line in lines}
