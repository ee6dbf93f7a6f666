"""One generation to look at: the text by rounds, every tree with its accepted path, what rounds cost, what contemplation did.

    python examples/trace.py --output runs/trace                       # trace.html, trace.png, trace.json
    python examples/trace.py --prompt "Why is the sky blue?" --policy fixed --contemplate-tokens 4 --output runs/trace

The page needs nothing but a browser, no network either. Rounds are watched by `_rounds.py`, gathered by `_trace.py`, drawn
by `_trace_page.py` and, with matplotlib, `_trace_plot.py`.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _allocator
    import _script

    _script.begin()
    _allocator.keep_freed_memory()

import argparse
from pathlib import Path

import torch
from _browser import screenshot
from _contemplation import TracedConFu
from _measure import environment, write_json
from _methods import add_tree_arguments, decoding, encode, settings, tree_options
from _prompts import DEMO_PROMPTS, Prompt
from _rounds import Watched, add_model_arguments, watched
from _smollm2 import load_target
from _trace import trace
from _trace_page import page
from transformers import PreTrainedModel

WARM_UP_TOKENS = 16


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--prompt", default=DEMO_PROMPTS[-1].messages[-1]["content"])
    parser.add_argument("--max-new-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--no-contemplate", action="store_true", help="EAGLE-3 mode")
    parser.add_argument("--no-plot", action="store_true", help="do without matplotlib")
    parser.add_argument(
        "--screenshot", type=Path, metavar="PNG", help="a picture of the page, by an installed Chromium"
    )
    parser.add_argument("--size", type=int, nargs=2, default=(1200, 1800), help="of that picture, in pixels")
    add_tree_arguments(parser)
    return parser.parse_args(arguments)


def load_assistant(model: PreTrainedModel, args: argparse.Namespace) -> Watched:
    """What [`watched`] finds, with the tree that is asked for."""
    assistant = watched(model, args, TracedConFu)
    tree_options(assistant.generation_config, args)
    assistant.generation_config.contemplate &= not args.no_contemplate
    return assistant.compile(args.compile)


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    model, tokenizer = load_target(args.target, args.dtype, args.device)
    assistant = load_assistant(model, args)
    prompt = Prompt("prompt", "all", [{"role": "user", "content": args.prompt}])
    inputs = encode(tokenizer, prompt, model.device)
    # The first call pays for what later ones do not: packing weights, measuring costs. Its text is forgotten.
    warm_up = decoding(args) | {"max_new_tokens": WARM_UP_TOKENS, "lookup_memory": 0}
    model.generate(**inputs, assistant_model=assistant, **warm_up)
    torch.manual_seed(args.seed)
    document = {
        "prompt": args.prompt,
        "settings": settings(args),
        "environment": environment(model),
        **trace(model, tokenizer, inputs, assistant, **decoding(args)),
    }
    write_json(args.output / "trace.json", document)
    files = [args.output / "trace.json", args.output / "trace.html"]
    files[-1].write_text(page(document), encoding="utf-8")
    if not args.no_plot:
        files.append(draw_plot(document, args.output / "trace.png"))
    if args.screenshot:
        files.append(screenshot(args.output / "trace.html", args.screenshot, *args.size))
    print("\n".join(map(str, files)))


def draw_plot(document: dict, file: Path) -> Path:
    try:
        from _trace_plot import draw
    except ImportError as error:
        raise SystemExit(f'{error}: the plot needs `pip install -e ".[bench]"`; or pass --no-plot.') from error
    return draw(document, file)


if __name__ == "__main__":
    main()
