"""Writes the card of a pair: metadata for the Hub, tables and plot out of what was measured, training, data, limits.

    python examples/make_card.py hub_cards/confu-smollm2-135m-instruct --speed runs/benchmark/results.json \\
        --accepted runs/accepted.json --plot runs/benchmark/speed_up.png

`--speed` is `results.json` of `benchmark.py`; `--accepted` are files of `quickstart.py --json`, of `benchmark.py` or of
`accepted_length.py`, a table each; `--training` the `training.json` that `train.py` leaves, in the order of the stages.
What no file can know stands in `--facts`, by default the YAML file beside the folder, with fields of `CardContent`
(confu_hf/hub/card.py), of which `data` may be a table by licence (`sources`, licence: sources), and with

    shared: another YAML file beside it, whose fields are taken where this one has none
    stages: what was trained in which order: `text` and `commands` of each, for stages that left no training.json
    benchmark: `type` and `name` of the questions, for the metadata

The folder's adapter gets its own card. Figures are never typed in: no file, no figure.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _script

    _script.begin()

import argparse
import shutil
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from _card_figures import accepted_results, accepted_section, read, speed_results, speed_section
from transformers.utils import CONFIG_NAME

from confu_hf import ConFuConfig
from confu_hf.errors import refusal
from confu_hf.hub.card import CardContent, adapter_card, pair_card

OWN_FIELDS = {"shared", "stages", "sources", "benchmark"}
# These come from elsewhere: files, or the folder.
MEASURED = {"figures", "training", "plot", "evaluations"}
BENCHMARK = {"type": "spec-bench", "name": "Spec-Bench"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="a saved pair; its README.md is written")
    parser.add_argument("--facts", type=Path, help="YAML file (default: FOLDER.yaml)")
    parser.add_argument("--repository", help="what from_pretrained takes (default: FOLDER)")
    parser.add_argument("--speed", type=Path, help="results.json of benchmark.py")
    parser.add_argument("--accepted", type=Path, nargs="+", default=[], help="JSON files with accepted lengths")
    parser.add_argument("--training", type=Path, nargs="+", default=[], help="training.json of each stage, in order")
    parser.add_argument("--plot", type=Path, help="PNG that is copied into the folder")
    return parser.parse_args(arguments)


def read_facts(path: Path) -> dict[str, Any]:
    """The author's fields, those of `shared` among them; unknown ones are refused."""
    if not path.is_file():
        raise refusal(
            "The facts of a card", got=f"no {path}", expected="a YAML file", fix="Write it, or name --facts."
        )
    facts = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    if "shared" in facts:
        facts = {**read_facts(path.parent / facts.pop("shared")), **facts}
    known = {field.name for field in fields(CardContent)} - MEASURED | OWN_FIELDS
    if unknown := sorted(set(facts) - known):
        raise refusal(f"The facts in {path}", got=unknown, expected=sorted(known), fix="Correct or remove them.")
    for line in (*facts.get("notes", ()), *facts.get("limits", ())):
        if not isinstance(line, str):
            raise refusal(f"A line of {path}", got=line, expected="text", fix="Put it into quotation marks.")
    return facts


def data_section(facts: dict[str, Any]) -> str | None:
    """What the author says of the data, and the table of its sources."""
    rows = [f"| {licence} | {sources} |" for licence, sources in facts.get("sources", {}).items()]
    table = ["| licence | sources |", "|---|---|", *rows] if rows else []
    parts = [facts.get("data"), "\n".join(table)]
    return "\n\n".join(part.strip() for part in parts if part) or None


def training_section(facts: dict[str, Any], records: Sequence[dict[str, Any]]) -> str | None:
    """The stages as the author tells them, then those that left a record: a table, and their commands."""
    stages = facts.get("stages", ())
    parts = [stage["text"].strip() for stage in stages if "text" in stage]
    if records:
        head = ["stage", "steps", "sequences a step", "answer tokens", "learning rate", "dtype", "trained on"]
        rows = [
            [
                record["stage"],
                str(record["steps"]),
                str(record["sequences_per_step"]),
                f"{record['answer_tokens']:,}",
                f"{record['learning_rate']:g}",
                record["dtype"],
                f"{record['environment']['device']}, {record['environment']['cpus']} cores; torch "
                f"{record['environment']['torch']}, transformers {record['environment']['transformers']}",
            ]
            for record in records
        ]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows]))
    commands = [command.strip() for stage in stages for command in stage.get("commands", ())]
    commands += [f"python {record['environment']['command']}" for record in records]
    if commands:
        parts.append("\n".join(["```bash", *commands, "```"]))
    return "\n\n".join(parts) or None


def content_of(args: argparse.Namespace, config: ConFuConfig) -> CardContent:
    """Everything that the arguments name, as the sections of a card."""
    facts = read_facts(args.facts or args.folder.with_suffix(".yaml"))
    benchmark = {**BENCHMARK, **facts.get("benchmark", {})}
    method = "confu" if config.contemplate else "eagle3"
    speed = read(args.speed) if args.speed else None
    accepted = [read(path) for path in args.accepted]
    sections = [speed_section(speed)] if speed else []
    sections += [accepted_section(document) for document in accepted]
    evaluations = [result for document in accepted for result in accepted_results(document, method, benchmark)]
    evaluations += speed_results(speed, method, benchmark) if speed else []
    plain = {name: value for name, value in facts.items() if name not in OWN_FIELDS | {"data"}}
    return CardContent(
        **plain,
        data=data_section(facts),
        training=training_section(facts, [read(path) for path in args.training]),
        figures="\n\n".join(sections) or None,
        plot=args.plot.name if args.plot else None,
        evaluations=evaluations,
    )


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    config = ConFuConfig.from_json_file(args.folder / CONFIG_NAME)
    repository, content = args.repository or args.folder.as_posix(), content_of(args, config)
    (args.folder / "README.md").write_text(pair_card(config, repository, content), encoding="utf-8")
    if args.plot:
        shutil.copyfile(args.plot, args.folder / args.plot.name)
    if (args.folder / "adapter").is_dir():
        (args.folder / "adapter" / "README.md").write_text(adapter_card(config, repository, content), encoding="utf-8")
    print(f"Wrote {args.folder / 'README.md'}")


if __name__ == "__main__":
    main()
