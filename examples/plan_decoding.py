"""What decoding with draft trees gives for targets that were not run here. A calculation, not a measurement.

    python examples/plan_decoding.py
    python examples/plan_decoding.py --machine cpu

A pass takes what reading the weights and the context takes, or its products, whichever is more; a round is the draft's
steps, one pass over nodes and contemplate tokens, and what the loop adds to that. Accepted lengths are the paper's
(arXiv 2603.08899, SpecBench, greedy; trees of 30 nodes with a contemplate token each); it has none for 70B, there those
of 8B are assumed. What is assumed beside:

- the share of a data sheet's bandwidth and peak that kernels reach, and that no pass waits for the host (CUDA graphs);
- that a target on several devices is as much faster as they are many, without traffic between them;
- that the loop adds a tenth of a round, as measured on a CPU (figures.md: milliseconds a round, compiled layers)
  of the 135M model; no larger target was timed.

No GPU has timed `generate` here yet: give what you measure there. Bare passes of the 8B shape without graphs took 22 to 27 ms
on an H100, whatever their rows (EXPERIMENTS.md, "A quarter of an hour of one GPU"): there the host is what they wait for.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace

from plan_training import GIGA, TARGETS, Shape

NODES = 30


def read_by_a_pass(shape: Shape) -> int:
    """Weights: all but the embeddings."""
    return shape.layers * shape.layer + shape.head


@dataclass(frozen=True)
class Machine:
    """One device: bytes and products a second that it reaches, bytes that it holds, and bytes of a weight on it."""

    name: str
    bandwidth: float
    peak: float
    memory: float
    weight: int

    @property
    def free_rows(self) -> float:
        """Rows of a pass until its products take longer than reading the weights."""
        return self.weight * self.peak / (2 * self.bandwidth)


SMOLLM2 = Shape("135M (SmolLM2's shape)", 576, 30, 9, 3, 64, 1536, 49152)
MACHINES = {
    # Data sheet (3350 GB/s, 989 TFLOP/s in bfloat16) times assumed shares.
    "h100": Machine("H100, bfloat16", 0.8 * 3350 * GIGA, 0.5 * 989e12, 80 * GIGA, 2),
    # What passes of SmolLM2-135M took after `compile()`: 19 ms with one row, 29 with 24 (EXPERIMENTS.md, "Layers in C++").
    "cpu": Machine(
        "two cores of an EPYC with AVX-512, float32",
        4 * read_by_a_pass(SMOLLM2) / 0.019,
        2 * 24 * read_by_a_pass(SMOLLM2) / 0.029,
        math.inf,
        4,
    ),
}


@dataclass(frozen=True)
class Method:
    """A way to draft, and the tokens that a round brings by the paper, with the ratio to plain decoding measured there."""

    name: str
    contemplates: bool
    accepted: float
    paper_ratio: float | None


SHAPE_3B = Shape("3B (Llama-3.2-3B's shape)", 3072, 28, 24, 8, 128, 8192, 128256)
PAPER = {
    SHAPE_3B: (Method("EAGLE-3", False, 4.00, 1.83), Method("ConFu", True, 4.41, 2.11)),
    TARGETS[1]: (Method("EAGLE-3", False, 4.59, 2.36), Method("ConFu", True, 5.01, 2.69)),
    TARGETS[2]: (Method("EAGLE-3", False, 4.59, None), Method("ConFu", True, 5.01, None)),
}


def pass_bytes(shape: Shape, context: int, weight: int) -> float:
    """Weights, keys and values."""
    return weight * (read_by_a_pass(shape) + 2 * shape.layers * shape.kv_heads * shape.head_dim * context)


def pass_products(shape: Shape, nodes: int, more: int, context: int) -> float:
    """Floating-point operations of a pass over nodes, and over more rows, which need no logits."""
    attention = 4 * shape.layers * shape.heads * shape.head_dim * (context + nodes + more)
    return (nodes + more) * (2 * shape.layers * shape.layer + attention) + 2 * nodes * shape.head


def pass_seconds(shape: Shape, machine: Machine, nodes: int, more: int, context: int) -> float:
    """Of one forward pass of the target."""
    reading = pass_bytes(shape, context, machine.weight) / machine.bandwidth
    return max(reading, pass_products(shape, nodes, more, context) / machine.peak)


def draft_seconds(shape: Shape, machine: Machine, width: int, draft_vocab: int) -> float:
    """Of one draft step of `width` rows."""
    weights = shape.draft(draft_vocab)
    return max(machine.weight * weights / machine.bandwidth, 2 * width * weights / machine.peak)


def devices(shape: Shape, machine: Machine) -> int:
    """How many hold the target."""
    return max(1, math.ceil(1.1 * machine.weight * shape.parameters / machine.memory))


def plan(shape: Shape, method: Method, machine: Machine, args: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of plain decoding's step and of a round's parts, and the ratio of both a token."""
    count = devices(shape, machine)
    together = replace(machine, bandwidth=count * machine.bandwidth, peak=count * machine.peak)
    futures = min(args.contemplate_tokens, NODES + 1) if method.contemplates else 0
    plain = pass_seconds(shape, together, 1, 0, args.context)
    # The draft stays on one device.
    draft = args.depth * draft_seconds(shape, machine, args.top_k, args.draft_vocab)
    verify = pass_seconds(shape, together, NODES + 1, futures, args.context)
    whole = (draft + verify) / (1 - args.overhead)
    return {
        "devices": count,
        "rows": NODES + 1 + futures,
        "plain": 1000 * plain,
        "draft": 1000 * draft,
        "verify": 1000 * verify,
        "round": 1000 * whole,
        "ratio": method.accepted * plain / whole,
    }


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--machine", choices=sorted(MACHINES), default="h100")
    parser.add_argument(
        "--contemplate_tokens", type=int, default=NODES + 1, help="of ConFu's passes; one for every node by default"
    )
    parser.add_argument("--depth", type=int, default=7, help="draft steps of a round")
    parser.add_argument("--top_k", type=int, default=10, help="rows of a draft step")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--draft_vocab", type=int, default=32000)
    parser.add_argument("--overhead", type=float, default=0.1, help="share of a round beside draft and target")
    return parser.parse_args(arguments)


HEADER = [
    "target",
    "devices",
    "method",
    "accepted (paper)",
    "rows",
    "ms plain",
    "ms draft",
    "ms pass",
    "ms round",
    "ratio, calculated",
    "ratio, paper",
    "efficiency",
]


def line(shape: Shape, method: Method, machine: Machine, args: argparse.Namespace) -> list[str]:
    """One line of the table."""
    found = plan(shape, method, machine, args)
    return [
        shape.name,
        f"{found['devices']}",
        method.name,
        f"{method.accepted:.2f}" + ("" if method.paper_ratio else " (8B's)"),
        f"{found['rows']}",
        *(f"{found[name]:.2f}" for name in ("plain", "draft", "verify", "round", "ratio")),
        "-" if method.paper_ratio is None else f"{method.paper_ratio:.2f}",
        f"{found['ratio'] / method.accepted:.2f}",
    ]


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    machine = MACHINES[args.machine]
    print("A calculation from these assumptions, not a measurement:")
    print(
        f"{machine.name}: {machine.bandwidth / GIGA:.0f} GB/s, {machine.peak / 1e12:g} TFLOP/s, so up to "
        f"{machine.free_rows:.0f} rows cost what one costs; "
        + ", ".join(f"{name} {value}" for name, value in vars(args).items()),
        end="\n\n",
    )
    lines = [line(shape, method, machine, args) for shape, methods in PAPER.items() for method in methods]
    for row in [HEADER, ["---"] * len(HEADER), *lines]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
