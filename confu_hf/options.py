"""What a user may set for the draft tree; each option is said once, here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import GenerationConfig

from .configuration_confu import ConFuConfig
from .errors import refusal


@dataclass(frozen=True)
class TreeOptions:
    """What a round may spend. Lives on the assistant's `generation_config`; each can be an argument of `generate`.

    Args:
        total_tokens: drafted tokens verified per round (`T`); the root comes on top. 0 = plain decoding.
        depth: the most tokens drafted in a row; the draft runs this many times a round.
        top_k: nodes expanded per draft step, and children considered for each.
        confidence_threshold: drafted tokens to which the draft gives a smaller joint probability (from the root down)
            are not verified, and drafting stops when none is left. 0 = always the whole tree.
        contemplate_tokens: nodes that contemplate per round (`M`), those most likely to be the last accepted; each has
            one contemplate token, or as many as the pair has `future_words`. None = every node.
        contemplate: False switches contemplation off (EAGLE-3 mode).
        lookup: what followed where the text read alike before joins the tree as further branches.
        lookup_memory: tokens of its own earlier answers that an assistant looks up in besides, across calls; the oldest
            are forgotten. 0 = of this call's text alone, and what was remembered is forgotten. Texts stay as they are;
            how fast one comes tells what was written before, so use 0 where callers must not learn that of each other.
        draft_sampling: when `generate` samples, draw the tree from the draft's distribution instead of taking its best
            guesses, and verify by recursive rejection: near temperature 1 more is accepted. The text has the target's
            distribution, but not the random numbers of plain decoding. Such trees have `total_tokens` nodes in every
            round, whatever `policy`, `confidence_threshold` and `lookup` say.
        policy: "auto" decides in each round, from measured costs and from what is accepted, how much is drafted and
            verified; the options above are its upper limits. "fixed" = the tree that they describe, in every round.
        pack_weights: on CPU, decode with a copy of the linear layers packed for small batches of rows, the draft's in
            bfloat16 if the CPU multiplies that, or after `compile()`; None = if that copy stays below 2 GiB.
    """

    total_tokens: int = 30
    depth: int = 5
    top_k: int = 8
    confidence_threshold: float = 0.0
    contemplate_tokens: int | None = None
    contemplate: bool = True
    lookup: bool = True
    lookup_memory: int = 100_000
    draft_sampling: bool = False
    policy: str = "auto"
    pack_weights: bool | None = None


# The sampling option `top_k` of `generate` keeps its meaning, so the tree's goes by another name there.
OPTION_ARGUMENTS = {field.name: field.name for field in fields(TreeOptions)} | {"top_k": "draft_top_k"}


class ConFuGenerationConfig(GenerationConfig):
    """Generation config of an assistant: the tree options, saved in `generation_config.json`.

    Args:
        total_tokens: drafted nodes of a tree.
        depth: depth of the deepest drafted node.
        top_k: how many nodes are expanded per layer, and children per node. Not the sampling option: an assistant does
            not sample. As an argument of `generate`, where that name is taken, it is `draft_top_k`.
        confidence_threshold: drafted nodes of a smaller joint probability are not verified.
        contemplate_tokens: nodes of a verify pass that contemplate; None = every node and the root.
        contemplate: False = EAGLE-3 mode.
        lookup: whether what followed earlier, alike places of the text joins the tree.
        lookup_memory: tokens of earlier answers that are looked up in as well; 0 = none.
        draft_sampling: when `generate` samples, draw the tree and verify it by recursive rejection.
        policy: "auto" = as much of that as pays; "fixed" = exactly that.
        pack_weights: on CPU, decode with packed copies of the linear layers; None = if they are small.
        **kwargs: of `GenerationConfig`.
    """

    def __init__(self, **kwargs: Any):
        super().__init__(**{**asdict(TreeOptions()), **kwargs})

    def validate(self, strict: bool = False, user_set_attributes: set[str] | None = None) -> None:
        """As in `GenerationConfig`, with its `strict` and `user_set_attributes`; `top_k` is no sampling option here."""
        width, self.top_k = self.top_k, None  # it would look like one without `do_sample=True`
        try:
            super().validate(strict=strict, user_set_attributes=user_set_attributes)
        finally:
            self.top_k = width


def check_options(options: TreeOptions, config: ConFuConfig) -> None:
    """Raise a `ValueError` unless the options describe a tree."""
    limits = {
        "total_tokens": (0, None),
        "depth": (1, None),
        "top_k": (1, config.draft_vocab_size),
        "lookup_memory": (0, None),
        "contemplate_tokens": (1, None),  # more than there are nodes is one for every node
    }
    for name, (least, most) in limits.items():
        value = getattr(options, name)
        if name == "contemplate_tokens" and value is None:
            continue
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if not is_int or value < least or (most is not None and value > most):
            raise _misfit(
                options, name, f"an integer of at least {least}{'' if most is None else f', at most {most}'}"
            )
    threshold = options.confidence_threshold
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold < 1:
        raise _misfit(options, "confidence_threshold", "a number of at least 0, below 1")
    choices = {
        "contemplate": (True, False),
        "lookup": (True, False),
        "draft_sampling": (True, False),
        "pack_weights": (True, False, None),
        "policy": ("auto", "fixed"),
    }
    for name, allowed in choices.items():
        value = getattr(options, name)
        if not any(value is choice or (isinstance(choice, str) and value == choice) for choice in allowed):
            raise _misfit(options, name, f"one of {allowed}")


def _misfit(options: TreeOptions, name: str, expected: str) -> ValueError:
    return refusal(
        "Tree options",
        got=f"{name}={getattr(options, name)!r}",
        expected=expected,
        fix=f"Set `confu.generation_config.{name}`, or pass `{OPTION_ARGUMENTS[name]}` to generate.",
    )
