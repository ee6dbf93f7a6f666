"""Longer prompts out of short ones: summaries of several texts, questions behind several passages.

    python examples/join_prompts.py --prompts prompts.jsonl.gz --output runs/long.jsonl --count 1000

A draft that has seen short prompts alone is weak behind long ones. Texts of one source are joined: the first prompt's
instruction stays in front ("Summarize:"), or the last prompt's question at the end. Only prompts whose `task` is
summarization or rag can be joined, and of those only what has that form.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _script

    _script.begin()

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path

from _prompts import Prompt, read_prompts

INSTRUCTION = "Summarize: "
BETWEEN = "\n\n"


def parts(prompt: Prompt) -> tuple[str, str] | None:
    """The text of a prompt and what is asked of it, or None where the two cannot be told apart."""
    text = prompt.messages[-1]["content"]
    if prompt.task == "summarization" and text.startswith(INSTRUCTION):
        return text.removeprefix(INSTRUCTION), INSTRUCTION
    passage, _, question = text.rpartition("\n")
    if prompt.task == "rag" and passage.strip() and question.strip().endswith("?"):
        return passage.strip(), question.strip()
    return None


def joined(task: str, chosen: list[tuple[str, str]]) -> str:
    """One prompt of several `(text, asked)`; what is asked is the last one's."""
    text, asked = BETWEEN.join(text for text, _ in chosen), chosen[-1][1]
    return INSTRUCTION + text if task == "summarization" else text + BETWEEN + asked


def join(prompts: list[Prompt], count: int, characters: tuple[int, int], seed: int = 0) -> list[dict]:
    """`count` rows, as near as it goes half of each task, of at least and at most so many characters."""
    chance, sources = random.Random(seed), defaultdict(list)
    for prompt in prompts:
        if (found := parts(prompt)) is not None:
            sources[prompt.task, prompt.source, prompt.licence].append((prompt.id, *found))
    rows = []
    for task in ("summarization", "rag"):
        groups = [(key, found) for key, found in sorted(sources.items()) if key[0] == task]
        for number in range(count // 2 if groups else 0):
            (_, source, licence), found = chance.choices(groups, [len(found) for _, found in groups])[0]
            wanted, chosen = chance.randint(*characters), []
            for entry in chance.sample(found, len(found)):
                if sum(len(text) for _, text, _ in chosen) + len(entry[1]) > wanted:
                    break
                chosen.append(entry)
            if len(chosen) < 2:
                continue
            text = joined(task, [entry[1:] for entry in chosen])
            row = {"id": f"joined-{task}-{number}", "source": source, "licence": licence, "task": task}
            rows.append(row | {"prompt": text, "joined": [entry[0] for entry in chosen]})
    chance.shuffle(rows)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", nargs="+", required=True, help="as regenerate.py")
    parser.add_argument("--output", type=Path, required=True, help="JSON-lines file, for regenerate.py")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--characters", type=int, nargs=2, default=(1500, 4000), metavar=("LEAST", "MOST"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(arguments)
    rows = join(read_prompts(args.prompts), args.count, tuple(args.characters), args.seed)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} prompts in {args.output}")


if __name__ == "__main__":
    main()
