"""What a round costs: seconds of a verify pass by its rows, of drafting by its steps, as running estimates at the usual
pace of the machine.

Whole rounds are what is timed. A short sweep of bare passes gives the curve its first shape; every round then moves
it. Numbers only: who runs the passes is decoding/sweep.py, who reads a round's seconds decoding/experience.py, where
the numbers are kept cost_files.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import refusal

# A running mean moves by 1 / (times seen), at least by 1 / MEMORY: what a pass costs changes while a process lives.
MEMORY = 32
# The pace of the machine is that of the newest rounds: other work comes and goes within seconds. At most it
# slows rounds down, or speeds them up, by this factor.
PACE_MEMORY, MOST_PACE = 8, 8.0
# How far a round's seconds may lie above the estimate and still count in full, once a few were seen: a page fault says
# nothing of rows.
OUTLIER, TRUSTED = 2.0, 3
# What all counts have in common weighs as much as so many rounds of one group of counts; and what is left of the weight of a
# group for each round of another one: counts that were dear once and are avoided since would never be found cheaper.
COMMON_ROUNDS, FADING = 4.0, 0.98
# Attention reads the context: contexts of up to 512 tokens share a curve, then up to 1024, 2048, ...
SHORTEST_RANGE = 512
# How often the sweep runs each number of rows, where its budget allows it.
SWEEPS = 3


@dataclass
class RunningMean:
    """A mean that forgets: the newest value weighs 1 / min(times, memory)."""

    value: float = 0.0
    weight: float = 0.0

    def add(self, value: float, memory: int = MEMORY) -> None:
        self.weight = min(self.weight + 1, memory)
        self.value += (value - self.value) / self.weight


def group(count: int) -> int:
    """Counts that learn together: 1, 2, 3 and 4, 5 to 8, 9 to 16, ... Kernels work in blocks of such sizes."""
    return (count - 1).bit_length()


@dataclass
class Curve:
    """Seconds by a count (rows, or draft steps): a shape, times a ratio learned for each group of counts.

    Attributes:
        shape: seconds at some counts, in between on straight lines; below the least the same, beyond the greatest on
            through the last two points.
        ratios: seconds seen, divided by the shape, by group. overall: the same of all counts.
    """

    shape: dict[int, float]
    ratios: dict[int, RunningMean] = field(default_factory=dict)
    overall: RunningMean = field(default_factory=lambda: RunningMean(1.0))

    def __post_init__(self):
        self._known: dict[int, float] = {}

    def __call__(self, count: int) -> float:
        if count not in self._known:
            self._known[count] = self._shape_at(count) * self._ratio(group(count))
        return self._known[count]

    def seen(self, count: int) -> float:
        """How many rounds of this count, or of its group, are behind the estimate, at most `MEMORY`."""
        mean = self.ratios.get(group(count))
        return 0.0 if mean is None else mean.weight

    def add(self, count: int, seconds: float) -> None:
        """One measurement."""
        ratio = seconds / self._shape_at(count)
        if self.seen(count) >= TRUSTED:
            ratio = min(ratio, OUTLIER * self._ratio(group(count)))
        for index, mean in self.ratios.items():
            if index != group(count):
                mean.weight *= FADING
        self.ratios.setdefault(group(count), RunningMean()).add(ratio)
        self.overall.add(ratio)
        self._known.clear()

    def rebased(self) -> Curve:
        """A curve that starts where this one is, with nothing seen."""
        return Curve({count: self(count) for count in self.shape})

    def _ratio(self, index: int) -> float:
        mean = self.ratios.get(index, RunningMean())
        return (COMMON_ROUNDS * self.overall.value + mean.weight * mean.value) / (COMMON_ROUNDS + mean.weight)

    def _shape_at(self, count: int) -> float:
        counts = sorted(self.shape)
        if len(counts) == 1 or count <= counts[0]:
            return self.shape[counts[0]]
        above = next((index for index, known in enumerate(counts) if known >= count), len(counts) - 1)
        low, high = counts[above - 1], counts[above]
        slope = max(0.0, (self.shape[high] - self.shape[low]) / (high - low))
        return self.shape[low] + slope * (count - low)


class CostModel:
    """Seconds of whole rounds: of all but the drafting by rows, of the drafting by steps, per range of contexts.

    Args:
        verify: seconds by rows of a verify pass (nodes and contemplate tokens of all batch rows), at least for one
            count; None = nothing known: rows cost nothing until they are seen.
        draft_step: seconds of a draft step; None = nothing known: drafting costs nothing until it is timed.
        learns: whether rounds move the estimates.

    Attributes:
        contemplation: seconds that contemplate tokens add to a pass beside their rows, whatever their number: the calls of
            a gated LoRA's products. None = not known, counted as nothing.

    Example:
        confu.costs = CostModel({1: 0.040, 8: 0.052, 16: 0.089}, draft_step=0.004)
    """

    def __init__(
        self, verify: Mapping[int, float] | None = None, draft_step: float | None = None, learns: bool = True
    ):
        _check_seconds(verify, draft_step)
        self.learns = learns
        self._curves: dict[tuple[str, int], Curve] = {("verify", 0): Curve(dict(verify or {1: 1.0}))}
        self._draft_step = draft_step
        self._pace = RunningMean(1.0)
        self.contemplation: float | None = None

    def verify(self, rows: int, context: int) -> float:
        """A round without its drafting."""
        return self._curve("verify", context)(rows)

    def draft(self, steps: int, context: int, width: int) -> float:
        """Drafting with so many steps of `width` rows each."""
        if steps == 0:
            return 0.0
        curve = self._curve(f"draft {width}", context)
        return 0.0 if curve is None else curve(steps) * steps

    def rounds_seen(self, rows: int, context: int) -> float:
        """How many rounds of so many rows are behind the estimate."""
        curve = self._curves.get(("verify", _range(context)))
        return 0.0 if curve is None else curve.seen(rows)

    def observe(
        self,
        rows: int,
        context: int,
        verify_seconds: float,
        steps: int = 0,
        width: int = 0,
        draft_seconds: float = 0.0,
        beside: float = 0.0,
    ) -> None:
        """A round: its seconds without drafting, and those of its drafting (0 steps: not timed). `beside`: of the former, at
        the usual pace, those that are no matter of rows.

        What makes rounds of every kind slower for a while is no one's cost: it is divided out as the machine's pace.
        """
        if not self.learns or verify_seconds <= 0:
            return
        curve = self._own_curve("verify", context)
        expected = curve(rows) + beside
        self._pace.add(min(max(verify_seconds / expected, 1 / MOST_PACE), MOST_PACE), PACE_MEMORY)
        # In proportion: noise of a round must not fall on its rows alone.
        curve.add(rows, verify_seconds / self._pace.value * curve(rows) / expected)
        if steps and draft_seconds > 0:
            step = draft_seconds / self._pace.value / steps
            self._own_curve(f"draft {width}", context, default=step).add(steps, step)

    def sweep(
        self, run: Callable[[int], float], rows: Sequence[int], budget: float, draft_share: float | None = None
    ) -> None:
        """The first shape: the least seconds of a few bare passes, never less for more rows.

        Args:
            run: runs one pass of so many rows, returns its seconds. rows: wanted, the most telling ones first.
            budget: seconds. If the first pass takes them all it is the only one; beyond two row counts, no pass is begun
                that would go beyond the budget.
            draft_share: what a draft step costs at first, as a share of a pass of one row; None = nothing.
        """
        spent = run(rows[0])  # the first pass of all pays for what later ones find ready
        shape = {} if spent < budget else {rows[0]: spent}
        for count in [*rows] * SWEEPS if spent < budget else []:
            if len(shape) >= 2:
                largest = max(shape)
                expected = shape.get(count, shape[largest] * max(1.0, count / largest))
                if spent + expected > budget:
                    continue
            seconds = run(count)
            spent += seconds
            shape[count] = min(seconds, shape.get(count, seconds))
        shape = {count: min(shape[more] for more in shape if more >= count) for count in shape}
        self._curves = {("verify", 0): Curve(shape)}
        self._draft_step = None if draft_share is None else draft_share * shape[min(shape)]

    def _curve(self, kind: str, context: int) -> Curve | None:
        """That of the context's range, else of the nearest range below, else above."""
        for index in (*range(_range(context), -1, -1), *range(_range(context) + 1, 64)):
            if (kind, index) in self._curves:
                return self._curves[kind, index]
        return None if self._draft_step is None else Curve({1: self._draft_step})

    def _own_curve(self, kind: str, context: int, default: float = 1.0) -> Curve:
        key = (kind, _range(context))
        if key not in self._curves:
            nearest = self._curve(kind, context)
            self._curves[key] = Curve({1: default}) if nearest is None else nearest.rebased()
        return self._curves[key]

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON; [`from_dict`] reads it."""
        curves = [
            {
                "kind": kind,
                "range": index,
                "shape": {str(count): seconds for count, seconds in curve.shape.items()},
                "ratios": {str(count): [mean.value, mean.weight] for count, mean in curve.ratios.items()},
                "overall": [curve.overall.value, curve.overall.weight],
            }
            for (kind, index), curve in self._curves.items()
        ]
        return {"curves": curves, "draft_step": self._draft_step, "contemplation": self.contemplation}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CostModel:
        """A model that goes on learning from [`to_dict`]'s data.

        Raises:
            ValueError: if it is not such data.
        """
        try:
            model = cls(draft_step=data.get("draft_step"))
            curves = {(str(entry["kind"]), int(entry["range"])): _curve_from(entry) for entry in data["curves"]}
            if not any(kind == "verify" for kind, _ in curves):
                raise KeyError("verify")
            beside = data.get("contemplation")
            model.contemplation = None if beside is None else float(beside)
            if beside is not None and not 0 <= model.contemplation < math.inf:
                raise ValueError(f"contemplation of {beside} seconds")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise refusal(
                "Costs", got=f"data that cannot be read ({error})", expected="CostModel.to_dict()", fix="Measure anew."
            ) from error
        model._curves = curves
        return model


def _range(context: int) -> int:
    """0 for contexts of up to 512 tokens, 1 up to 1024, 2 up to 2048, ..."""
    return max(0, math.ceil(math.log2(max(context, 1) / SHORTEST_RANGE)))


def _check_seconds(verify: Mapping[int, float] | None, draft_step: float | None) -> None:
    rows = {} if verify is None else verify
    good = all(isinstance(count, int) and count > 0 and 0 < seconds < math.inf for count, seconds in rows.items())
    if not good or (verify is not None and not verify) or (draft_step is not None and not 0 <= draft_step < math.inf):
        raise refusal(
            "Costs",
            got=f"verify={verify!r}, draft_step={draft_step!r}",
            expected="seconds by rows, such as {1: 0.04, 8: 0.05}, and seconds of a draft step",
            fix="Measure them, or leave them out.",
        )


def _curve_from(entry: Mapping[str, Any]) -> Curve:
    def mean(pair: Sequence[float]) -> RunningMean:
        value, weight = map(float, pair)
        if not (0 <= value < math.inf and 0 <= weight <= MEMORY):
            raise ValueError(f"a mean of {pair}")
        return RunningMean(value, weight)

    shape = {int(count): float(seconds) for count, seconds in entry["shape"].items()}
    if not shape or not all(count > 0 and 0 < seconds < math.inf for count, seconds in shape.items()):
        raise ValueError(f"a shape of {shape}")
    return Curve(shape, {int(count): mean(pair) for count, pair in entry["ratios"].items()}, mean(entry["overall"]))
