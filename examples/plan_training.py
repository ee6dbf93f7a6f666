"""How much memory and time training a pair takes on a node of GPUs. A calculation, not a measurement.

    python examples/plan_training.py
    python examples/plan_training.py --devices 8 --peak 989 --efficiency 0.35 --sequences 500000 --epochs 2

Products are counted by the formulas below, which a test compares with what a training step really does. What they cost is an
assumption, and traffic between devices is not counted: `--efficiency` is the share of a device's peak that a step reaches, `--write_rate` how many tokens a second a
device writes while it regenerates answers, per billion parameters of the target. Give what you measured.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

GIGA = 1e9


@dataclass(frozen=True)
class Shape:
    """A target of Llama's kind: what its products depend on."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int

    @property
    def attention(self) -> int:
        """Weights of one layer's attention."""
        return self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def layer(self) -> int:
        """Weights of one layer."""
        return self.attention + 3 * self.hidden * self.intermediate

    @property
    def head(self) -> int:
        return self.hidden * self.vocab

    @property
    def parameters(self) -> int:
        """Embeddings and head counted apart."""
        return self.layers * self.layer + 2 * self.head

    def draft(self, draft_vocab: int) -> int:
        """Weights of an EAGLE-3 draft of its width: `fc`, one layer that reads twice the width, a small head."""
        wider = self.hidden * self.head_dim * (self.heads + 2 * self.kv_heads)
        return 3 * self.hidden**2 + self.layer + wider + self.hidden * draft_vocab


TARGETS = [
    Shape("1B (Llama-3.2-1B's shape)", 2048, 16, 32, 8, 64, 8192, 128256),
    Shape("8B (Llama-3.1-8B's shape)", 4096, 32, 32, 8, 128, 14336, 128256),
    Shape("70B (Llama-3.1-70B's shape)", 8192, 80, 64, 8, 128, 28672, 128256),
]


@dataclass(frozen=True)
class Batch:
    """One sequence: `positions` in all, of which `rows` are trained for `steps` test-time steps; `anchors` contemplate."""

    positions: int
    rows: int
    steps: int
    anchors: int
    draft_vocab: int


def products(shape: Shape, batch: Batch) -> dict[str, float]:
    """Floating-point operations of one sequence's step, by part: two per weight and row forward, two more for each gradient.

    Attention's scores are counted at half of the square, as causal attention needs them.
    """
    causal = batch.positions**2 * shape.heads * shape.head_dim
    keys = batch.positions * shape.heads * shape.head_dim
    layer = shape.layer + shape.hidden * shape.head_dim * (shape.heads + 2 * shape.kv_heads)
    first = shape.hidden * shape.head_dim * 2 * 2 * shape.kv_heads  # keys and values of all first-step rows
    fused = 3 * shape.hidden**2 * batch.positions
    drafted = batch.rows * batch.steps
    parts = {
        "target reads": 2 * shape.layers * shape.layer * batch.positions + 2 * shape.layers * causal,
        "target's head": 2 * shape.head * (batch.rows + 2),
        "draft, both ways": 6 * (layer * drafted + first * batch.positions + fused) + 12 * keys * drafted,
        "loss with the draft's head": 6 * shape.hidden * batch.draft_vocab * drafted,
    }
    if batch.anchors:
        # Through the frozen layers forward and back to the inputs, no weight gradients.
        through = 4 * shape.layers * (shape.layer + 2 * keys) * batch.anchors
        parts["contemplate tokens, both ways"] = through + 18 * shape.hidden**2 * batch.anchors
    return parts


def memory(shape: Shape, batch: Batch, devices: int, sequences: int, sharded: bool) -> dict[str, float]:
    """Bytes on one device: bfloat16 target, float32 draft with gradient and two optimizer states, `sequences` at once."""
    weights = 2 * shape.layers * shape.layer / (devices if sharded else 1) + 2 * 2 * shape.head
    gathered = 2 * 2 * shape.layer if sharded else 0  # the layer that runs, and the next
    cache = 2 * shape.layers * 2 * shape.kv_heads * shape.head_dim * batch.positions
    said = (2 * shape.vocab + 8 * batch.draft_vocab) * batch.rows + 2 * 4 * shape.hidden * batch.positions
    states = 2 * batch.steps * batch.rows * (20 * shape.hidden + 4 * shape.intermediate)
    kept = 2 * batch.anchors * shape.layers * (12 * shape.hidden + 4 * shape.intermediate)
    scores = 4 * batch.steps * shape.heads * batch.rows * batch.positions
    return {
        "target": weights + gathered,
        "draft": 16 * shape.draft(batch.draft_vocab),
        "batch": sequences * (cache + said + states + kept + scores),
    }


def plan(shape: Shape, arguments: argparse.Namespace) -> list[str]:
    """One line of the table."""
    batch = Batch(arguments.positions, arguments.rows, arguments.steps, arguments.anchors, arguments.draft_vocab)
    sharded = 2 * shape.parameters > 0.6 * arguments.memory * GIGA
    used = memory(shape, batch, arguments.devices, arguments.per_device, sharded)
    parts = products(shape, batch)
    speed = arguments.peak * 1e12 * arguments.efficiency * arguments.devices
    train = arguments.sequences * arguments.epochs * sum(parts.values()) / speed / 3600
    # A pair that does not fit one device is written by groups of devices: as many tokens per device and parameter.
    rate = arguments.write_rate / (shape.parameters / GIGA) * arguments.devices
    write = arguments.sequences * arguments.rows / rate / 3600
    share = max(parts, key=parts.get)
    return [
        shape.name,
        "shards" if sharded else "whole",
        *(f"{used[name] / GIGA:.1f}" for name in ("target", "draft", "batch")),
        f"{sum(used.values()) / GIGA:.0f}" + ("" if sum(used.values()) < arguments.memory * GIGA else " (too much)"),
        f"{sum(parts.values()) / 1e12:.1f}",
        f"{share} {parts[share] / sum(parts.values()):.0%}",
        f"{write:.1f}",
        f"{train:.1f}",
    ]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--memory", type=float, default=80.0, help="gigabytes of one device")
    parser.add_argument("--peak", type=float, default=989.0, help="TFLOP/s of one device in bfloat16 (H100: 989)")
    parser.add_argument("--efficiency", type=float, default=0.35, help="assumed share of the peak")
    parser.add_argument(
        "--write_rate",
        type=float,
        default=20000.0,
        help="assumed tokens/s of one device for a target of 1B parameters",
    )
    parser.add_argument("--sequences", type=int, default=500_000)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--positions", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--rows", type=int, default=700, help="of these, in the answer")
    parser.add_argument("--steps", type=int, default=7, help="test-time steps")
    parser.add_argument("--anchors", type=int, default=64, help="contemplate tokens; 0 = EAGLE-3's stage")
    parser.add_argument("--draft_vocab", type=int, default=32000)
    parser.add_argument("--per_device", type=int, default=2, help="sequences on a device at once")
    return parser.parse_args(arguments)


HEADER = [
    "target",
    "target is",
    "target GB",
    "draft GB",
    "batch GB",
    "sum GB",
    "TFLOP a sequence",
    "largest part",
    "hours to write answers",
    "hours to train",
]


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    print("A calculation from these assumptions, not a measurement:")
    print(", ".join(f"{name} {value:g}" for name, value in vars(args).items()), end="\n\n")
    for row in [HEADER, ["---"] * len(HEADER), *(plan(shape, args) for shape in TARGETS)]:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
