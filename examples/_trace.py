"""One generation as data: tokens with how they came, and for every round its tree, its cost and what contemplation did.

Pages and plots are made of it by `_trace_page.py` and `_trace_plot.py`, which know no model.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from _contemplation import Opinions, TracedConFu, second_opinions
from _rounds import TARGET, RoundStreamer, TokenText, Watched, accepted_path
from torch import Tensor
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from confu_hf.decoding.policy import Chosen
from confu_hf.decoding.stats import RoundRecord
from confu_hf.tree.ends import likeliest_ends

COSTS = ("draft", "verify", "rest")
INVISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


def trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    inputs: BatchEncoding,
    assistant: Watched,
    **generate_arguments: Any,
) -> dict[str, Any]:
    """Generate once, watched.

    Returns:
        `tokens`: each with `text`, `origin` and `round` (0 = prefill). `rounds`: each with `nodes`, `emitted` tokens,
        the `bonus` token, milliseconds of [`COSTS`] and, if there was a future to draft with, `opinions`. And
        `seconds`, `new_tokens`, `mean_accepted_length`.
    """
    emitted: list[list[int]] = []
    came: list[list[str]] = []

    def see(tokens: list[int], origins: list[str]) -> None:
        emitted.append(tokens)
        came.append(origins)

    start = time.perf_counter()
    output = model.generate(
        **inputs, assistant_model=assistant, streamer=RoundStreamer(assistant, see), **generate_arguments
    )
    seconds = time.perf_counter() - start
    stats = assistant.stats
    opinions = [None] * stats.rounds
    if isinstance(assistant, TracedConFu):
        opinions = second_opinions(assistant, output[0])
    parts = zip(assistant.chosen, stats.records, emitted[1:], opinions, strict=True)
    return {
        "tokens": _tokens(tokenizer, emitted, came),
        "rounds": [_round(tokenizer, *part) for part in parts],
        "seconds": seconds,
        "new_tokens": stats.new_tokens,
        "mean_accepted_length": stats.mean_accepted_length if stats.rounds else None,
    }


def _tokens(
    tokenizer: PreTrainedTokenizerBase, emitted: Sequence[Sequence[int]], came: Sequence[Sequence[str]]
) -> list[dict[str, Any]]:
    text = TokenText(tokenizer, skip_special_tokens=False)
    found = [
        {"text": text.push(token), "origin": origin, "round": number}
        for number, (tokens, origins) in enumerate(zip(emitted, came, strict=True))
        for token, origin in zip(tokens, origins, strict=True)
    ]
    if rest := text.rest():
        found.append({"text": rest, "origin": TARGET, "round": len(emitted) - 1})
    return found


def _round(
    tokenizer: PreTrainedTokenizerBase,
    chosen: Chosen,
    record: RoundRecord,
    emitted: Sequence[int],
    opinions: Opinions | None,
) -> dict[str, Any]:
    tree = chosen.tree
    path = accepted_path(tree, emitted)
    # The loop contemplates on these (decoding/contemplation.py).
    contemplated = likeliest_ends(tree, record.contemplate_tokens)[0].tolist()
    columns = (tree.tokens, tree.parents, tree.depths, tree.log_probs.exp(), tree.looked_up)
    names = ("token", "parent", "depth", "probability", "looked_up")
    nodes = [dict(zip(names, row, strict=True)) for row in zip(*(c[0].tolist() for c in columns), strict=True)]
    for number, node in enumerate(nodes):
        node["text"] = visible(tokenizer, node.pop("token"))
        node |= {"accepted": number in path, "contemplated": number in contemplated}
    seconds = record.seconds
    costs = {"draft": seconds["draft"], "verify": seconds["verify"]}
    costs["rest"] = sum(seconds.values()) - sum(costs.values())
    return {
        "nodes": nodes,
        "emitted": len(emitted),
        "bonus": visible(tokenizer, emitted[-1]),
        "milliseconds": {name: 1000 * costs[name] for name in COSTS},
        "opinions": None if opinions is None else _opinions(tokenizer, opinions),
    }


def _opinions(tokenizer: PreTrainedTokenizerBase, opinions: Opinions) -> dict[str, dict[str, Any]]:
    found = asdict(opinions)
    for guess in found.values():
        guess["first"] = visible(tokenizer, guess["first"])
    return found


def visible(tokenizer: PreTrainedTokenizerBase, token: int | Tensor) -> str:
    """A token's text with its spaces to be seen."""
    return tokenizer.decode([token]).translate(INVISIBLE)
