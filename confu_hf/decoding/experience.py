"""What an assistant learns of a target over its calls: what rounds cost, how far its draft is to be trusted, and what a
fresh future is worth. It changes how fast a text comes, never the text.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..acceleration.cost_files import CostKey, load_costs, save_costs
from ..acceleration.costs import CostModel, RunningMean
from .memory import AnswerMemory
from .sweep import Bench

# Between these probabilities the draft is wrong in its own way.
CONFIDENCE_EDGES = (0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.97)
# Deeper nodes are judged together.
DEEPEST = 5
# In expected acceptances: how firmly the draft's own word stands at first, and how much of the past counts.
PRIOR, WINDOW = 1.5, 32.0
# Seconds that the first sweep of a model may take, and the row counts it tries, the most telling ones first.
SWEEP_SECONDS, SWEEP_ROWS = 1.0, (1, 16, 8, 4, 32, 2)
# What a fresh future adds to the tokens that the network drafts, as a share of them, as long as nothing else is known:
# in trees of 30 nodes all contemplate tokens raise 1.446 drafted tokens a round to 1.541 (EXPERIMENTS.md, "Is the future
# used"). The rounds that this word stands for: pairs differ by about 0.04 in it, single rounds scatter by about 1.
FUTURE_PRIOR, FUTURE_ROUNDS = 0.066, 600.0
# How many rounds a mean of theirs remembers.
FUTURE_MEMORY = 2400


class Calibration:
    """Turns the draft's conditional probabilities into how often such nodes are accepted once their parent is.

    For every depth and bin of confidence it keeps how many acceptances the draft's word would have meant and how many
    there were. Their ratio, with `PRIOR` more of both, scales the draft's word; a depth starts where all depths are.
    """

    def __init__(self) -> None:
        self._cells: dict[tuple[int, int], list[float]] = {}  # (depth, bin) -> promised, accepted; depth 0 = all
        self._ratios: dict[tuple[int, int], float] = {}

    def __call__(self, probability: float, depth: int) -> float:
        """Depth is that of the node, from 1."""
        key = (min(depth, DEEPEST), bisect_right(CONFIDENCE_EDGES, probability))
        ratio = self._ratios.get(key)
        if ratio is None:
            ratio = self._ratios[key] = self._ratio(key, self._ratio((0, key[1]), 1.0))
        return min(1.0, probability * ratio)

    def learn(self, probability: float, depth: int, accepted: bool) -> None:
        """What became of a node whose parent was accepted."""
        bin_index = bisect_right(CONFIDENCE_EDGES, probability)
        for key in ((0, bin_index), (min(depth, DEEPEST), bin_index)):
            cell = self._cells.setdefault(key, [0.0, 0.0])
            cell[0] += probability
            cell[1] += accepted
            if cell[0] > WINDOW:
                cell[:] = [value * WINDOW / cell[0] for value in cell]
        self._ratios.clear()

    def fade(self, share: float) -> None:
        """Keep only a share of what was learned: the text has changed."""
        for cell in self._cells.values():
            cell[:] = [value * share for value in cell]
        self._ratios.clear()

    def _ratio(self, key: tuple[int, int], prior: float) -> float:
        promised, accepted = self._cells.get(key, (0.0, 0.0))
        return (accepted + PRIOR * prior) / (promised + PRIOR)


class FutureValue:
    """What a round gains if the round before left a future of its last accepted node itself, as a share of the tokens that
    the network drafts.

    The difference between the mean accepted lengths after rounds that did and that did not, each counted from what is
    usual in its text, drawn towards `FUTURE_PRIOR` as `FUTURE_ROUNDS` rounds would: single rounds scatter by a token, the
    value is a few hundredths. With fewer rounds it is chance that decides, and a value that fell to 0 is not tried any more.
    Walks that end where an end was likely are not chosen by lot, so this is an indication, not a measurement.
    """

    def __init__(self) -> None:
        self._means = {True: RunningMean(), False: RunningMean()}
        self._drafted = RunningMean()

    def learn(self, fresh: bool, more: float, drafted: float) -> None:
        """A round that drafted: whether it had a fresh future, the tokens it emitted beyond the usual number, and those
        that were expected of what the network drafted."""
        self._means[fresh].add(more, FUTURE_MEMORY)
        self._drafted.add(drafted, FUTURE_MEMORY)

    @property
    def share(self) -> float:
        """Never negative: at worst a future is not asked for."""
        fresh, stale = self._means[True], self._means[False]
        rounds = seen = 0.0
        if fresh.weight and stale.weight and self._drafted.value:
            rounds = fresh.weight * stale.weight / (fresh.weight + stale.weight)
            seen = (fresh.value - stale.value) / self._drafted.value
        return max(0.0, (rounds * seen + FUTURE_ROUNDS * FUTURE_PRIOR) / (rounds + FUTURE_ROUNDS))


@dataclass
class Experience:
    """What is kept between the calls of an assistant.

    Attributes:
        given: costs of the user, used instead of measured ones.
        costs: measured, by what they depend on. calibrations: of the network, with contemplation and without. lookup: the
            calibration of what was looked up, which knows its odds (matches.py), but not what the network said beside it.
        future: see there.
        rounds_since_plain: rounds since a plain one was timed. rounds_since_future: since one contemplated.
        proof: drafted tokens that were accepted so far, by batch row.
        answers: what the assistant wrote.
    """

    given: CostModel | None = None
    costs: dict[CostKey, CostModel] = field(default_factory=dict)
    calibrations: dict[bool, Calibration] = field(default_factory=lambda: {True: Calibration(), False: Calibration()})
    lookup: Calibration = field(default_factory=Calibration)
    future: FutureValue = field(default_factory=FutureValue)
    rounds_since_plain: int = 0
    rounds_since_future: int = 0
    proof: float = 0.0
    answers: AnswerMemory = field(default_factory=AnswerMemory)

    def give(self, costs: CostModel | Mapping | None) -> None:
        """Take costs from the user: a model, or `CostModel.to_dict()`'s data; None = measure."""
        self.given = CostModel.from_dict(costs) if isinstance(costs, Mapping) else costs

    def costs_for(self, bench: Bench) -> CostModel:
        """Given, known, kept on disk, or measured now."""
        if self.given is not None:
            return self.given
        key = bench.key()
        if key not in self.costs:
            costs = load_costs(key)
            if costs is None:
                costs = CostModel()
                # Few rows wait for weights to be read: a draft step is as much cheaper as its network is smaller.
                costs.sweep(bench.run, SWEEP_ROWS, SWEEP_SECONDS, bench.draft_share())
                save_costs(key, costs)
            self.costs[key] = costs
        if self.costs[key].contemplation is None:
            self.costs[key].contemplation = bench.contemplation()
        return self.costs[key]

    def keep(self, bench: Bench) -> None:
        """Write measured costs to disk."""
        key = bench.key()
        if self.given is None and key in self.costs:
            save_costs(key, self.costs[key])
