"""Where the time of decoding goes: milliseconds of a verify pass by its rows and by the context, and a trace of ten rounds.

    python examples/profile_decoding.py                             # the table of passes and the phases of a round
    python examples/profile_decoding.py --trace runs/trace.json     # and a trace for chrome://tracing or Perfetto
    python examples/profile_decoding.py --context 512 2048 8192     # how the passes grow with the tokens in the cache

"decode" is a step of plain `generate`: one row, a DynamicCache, which copies what it holds. Passes alternate between the ways and the numbers of rows in one process; medians of CPU time and of wall-clock time.
Other work on the machine shows in both: threads that share a core or its memory slow each other down. Compiled products
are no operators of torch: in the trace they are what lies between two operators.
"""

from __future__ import annotations

if __name__ == "__main__":
    import _script

    _script.begin()

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import torch
from _smollm2 import load_target
from transformers import DynamicCache, PreTrainedModel

from confu_hf import ConFuAssistant
from confu_hf.acceleration.attention import grouped_queries
from confu_hf.acceleration.packing import PackedLinears
from confu_hf.acceleration.products import build_products
from confu_hf.compat import cache_keyword
from confu_hf.decoding.stats import PHASES
from confu_hf.target.cache import TreeCache
from confu_hf.target.passes import prefill, verify
from confu_hf.tree.draft_tree import DraftTree
from confu_hf.tree.layout import VerifyLayout, verify_layout

CARD = Path(__file__).parent.parent / "hub_cards" / "confu-smollm2-135m-instruct"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", help="Hub id or folder; SmolLM2-135M-Instruct by default")
    parser.add_argument("--confu", default=str(CARD), help="the pair, Hub id or folder")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="nodes of a verify pass")
    parser.add_argument("--context", type=int, nargs="+", default=[256], help="tokens in the cache")
    parser.add_argument("--times", type=int, default=9, help="how often each pass is timed")
    parser.add_argument("--rounds", type=int, default=10, help="rounds that are traced")
    parser.add_argument("--no-compile", action="store_true", help="leave out the compiled products")
    parser.add_argument("--trace", type=Path, help="write the trace of these rounds here")
    return parser.parse_args()


def some_tree(rows: int) -> DraftTree:
    """A binary tree of so many nodes."""
    parents = [-1] + [(node - 1) // 2 for node in range(1, rows)]
    depths = [(node + 1).bit_length() - 1 for node in range(rows)]
    tokens = torch.arange(5, 5 + rows)[None]
    return DraftTree(tokens, torch.tensor([parents]), torch.tensor([depths]), torch.zeros(1, rows))


def layouts(cache: TreeCache, rows: list[int]) -> Iterator[VerifyLayout]:
    for count in rows:
        tree = some_tree(count)
        yield verify_layout(
            tree,
            tree.tokens[:, :0],
            slot_position_ids=cache.slot_position_ids,
            soft_prompt_length=0,
            has_gaps=cache.has_gaps,
        )


Seconds = dict[tuple[str, int], list[tuple[float, float]]]


def timed(run: Callable[[], object]) -> tuple[float, float]:
    """Seconds of CPU time and by the clock."""
    start = time.process_time(), time.perf_counter()
    run()
    return time.process_time() - start[0], time.perf_counter() - start[1]


def ways_to_run(model: PreTrainedModel, compiled: bool) -> dict[str, Callable[[], list[AbstractContextManager]]]:
    packed = PackedLinears(model)
    ways = {"plain": lambda: [], "packed": lambda: [grouped_queries(model), packed.active()]}
    if compiled:
        products = PackedLinears(model, products=build_products())
        ways["compiled"] = lambda: [grouped_queries(model), products.active()]
    return ways


def time_passes(
    model: PreTrainedModel, ways: dict, context: int, args: argparse.Namespace, layer_ids: list[int]
) -> Seconds:
    """Seconds of every pass behind so many tokens, by way and rows; ("decode", 1) is plain decoding's."""
    cache = TreeCache(model.config.get_text_config(decoder=True).num_hidden_layers, capacity=context + max(args.rows))
    ids = torch.arange(context)[None] % 1000 + 5
    prefill(model, ids, cache, layer_ids)
    cache.set_mask(torch.ones_like(ids))
    dynamic = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids, use_cache=True, logits_to_keep=1, **cache_keyword(model, dynamic))
    passes = dict(zip(args.rows, layouts(cache, args.rows), strict=True))
    seconds: Seconds = {}
    for _ in range(args.times):
        with torch.no_grad():
            step = timed(lambda: model(ids[:, :1], use_cache=True, **cache_keyword(model, dynamic)))
        seconds.setdefault(("decode", 1), []).append(step)
        for way, contexts in ways.items():
            with ExitStack() as stack:
                for entered in contexts():
                    stack.enter_context(entered)
                for rows, layout in passes.items():
                    spent = timed(lambda layout=layout: verify(model, layout, None, cache, layer_ids))
                    seconds.setdefault((way, rows), []).append(spent)
    return seconds


def cell(spent: list[tuple[float, float]]) -> str:
    """Median milliseconds: of CPU time, by the clock."""
    cpu, wall = (1000 * statistics.median(column) for column in zip(*spent, strict=True))
    return f"{cpu:.0f} ({wall:.0f})"


def show_passes(seconds: dict[int, Seconds]) -> None:
    """Print a table by rows for each context, and one by context if there are several."""
    for context, found in seconds.items():
        rows = sorted({count for _, count in found})
        print(f"\nMilliseconds of a verify pass, context {context}: CPU time (wall-clock time), medians\n")
        print("| rows | " + " | ".join(map(str, rows)) + " |\n" + "|---" * (len(rows) + 1) + "|")
        for way in dict.fromkeys(way for way, _ in found):
            print(f"| {way} | " + " | ".join(cell(found[way, n]) if (way, n) in found else "" for n in rows) + " |")
    if len(seconds) > 1:
        print("\nThe same by context\n\n| context | " + " | ".join(map(str, seconds)) + " |")
        print("|---" * (len(seconds) + 1) + "|")
        for way, rows in next(iter(seconds.values())):
            print(f"| {way}, {rows} rows | " + " | ".join(cell(found[way, rows]) for found in seconds.values()) + " |")


def trace_rounds(model: PreTrainedModel, tokenizer, confu: ConFuAssistant, args: argparse.Namespace) -> None:
    """Print what a round spends on each phase, and which operators cost most."""
    inputs = tokenizer("Write a story about a cat that learns to sail. " * 8, return_tensors="pt").to(model.device)
    arguments = {"assistant_model": confu, "do_sample": False, "lookup_memory": 0}  # one text, written three times
    model.generate(**inputs, **arguments, max_new_tokens=8)  # warm: weights are packed, costs measured
    tokens = max(2, round(args.rounds * confu.stats.mean_accepted_length))
    model.generate(**inputs, **arguments, max_new_tokens=tokens)
    records = confu.stats.records
    phases = {name: 1000 * statistics.median(record.seconds[name] for record in records) for name in PHASES}
    print(f"\n{len(records)} rounds, compiled: {confu.stats.compiled}; milliseconds by phase, medians:")
    print(", ".join(f"{name} {value:.1f}" for name, value in phases.items()))
    with torch.profiler.profile() as profile:
        model.generate(**inputs, **arguments, max_new_tokens=tokens)
    print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=45))
    if args.trace is not None:
        args.trace.parent.mkdir(parents=True, exist_ok=True)
        profile.export_chrome_trace(str(args.trace))
        print(f"Trace: {args.trace}")


def main() -> None:
    args = parse_arguments()
    model, tokenizer = load_target(args.target)
    confu = ConFuAssistant.from_pretrained(args.confu, target=model)
    if not args.no_compile:
        confu.compile()
    ways = ways_to_run(model, compiled=not args.no_compile)
    layer_ids = confu.config.target_layer_ids
    show_passes({context: time_passes(model, ways, context, args, layer_ids) for context in args.context})
    trace_rounds(model, tokenizer, confu, args)


if __name__ == "__main__":
    main()
