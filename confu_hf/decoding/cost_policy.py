"""The policy that weighs what a round costs against the tokens it is expected to bring.

Before drafting it decides whether to draft at all, between draft steps whether to go on, after drafting which nodes are
verified and how many of them contemplate. What it knows is in experience.py; everything here is a number on the host.
On a GPU the depth is decided beforehand and the tree is read back once, so the host waits once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate

from torch import Tensor

from .. import host
from ..acceleration.costs import CostModel, RunningMean
from ..options import TreeOptions
from ..tree.draft_tree import DraftTree
from ..tree.pruning import prune
from .experience import Experience
from .policy import Chosen, RoundPlan, depth_left
from .state import DecodingState
from .stats import Forecast, RoundRecord
from .sweep import Bench
from .weighing import Best, best_number, conditional, ends_by_size, forecast_of, probabilities, ranked

# A plain round is timed anew after so many others: without it nobody knows what drafting is compared with.
REFRESH = 128
# What drafting gains over plain rounds, in tokens a round: what is believed at first, how slowly that changes, and the
# least it is said to be, so that it comes back in a few rounds.
FIRST_GAIN, GAIN_MEMORY, LEAST_GAIN = 0.25, 8, -0.25
# As long as nothing drafted was accepted, a round that drafts may take this much longer than a plain one, as a share of
# it; every accepted token adds a plain round. Where steps and rows are cheap that is no limit.
FIRST_STAKE = 0.6
# Rounds until a first probe while drafting does not pay; the share of the time that probes may cost in the long run; the
# nodes of a probe; what is left of old forecasts after one that paid.
FIRST_PAUSE, PROBE_SHARE, PROBE_NODES, FADE = 4, 0.0075, 4, 0.25
# Where contemplate tokens are not worth their rows, one is run now and then all the same, to learn of their worth: after so
# many rounds without, more where it is dear, so that it takes no more than this share of the time.
EXPLORE, EXPLORE_SHARE = 32, 0.005


@dataclass
class _Round:
    """The round under way: how it was planned, and what was seen of it since.

    Attributes:
        context: decided tokens of the longest batch row. active: which batch rows have not ended.
        probe: drafts only to see if that pays again. steps: of the draft, so far.
        reads_backlog: the draft has more to read than one round's rows, so its seconds say nothing of a step.
        best: what was expected of the nodes chosen.
        log_probs, joint: of each batch row, for all candidates so far: the draft's, and as expected.
        last_layer: tokens expected of the layer before. drafted: of the network's nodes, in a batch row.
    """

    context: int
    active: tuple[bool, ...]
    probe: bool
    reads_backlog: bool
    steps: int = 0
    best: Best | None = None
    log_probs: list[list[float]] = field(default_factory=list)
    joint: list[list[float]] = field(default_factory=list)
    last_layer: float = 1.0
    drafted: float = 0.0


class CostPolicy:
    """Each round as much draft as pays, none if none does. The options are upper limits.

    Args:
        options: the limits. experience: what is known from earlier calls; it goes on learning.
        contemplate_length: contemplate tokens, and so rows, of each contemplated node.
    """

    def __init__(self, options: TreeOptions, experience: Experience, contemplate_length: int = 1):
        self.options, self.experience, self.contemplate_length = options, experience, contemplate_length
        self.calibration = experience.calibrations[options.contemplate]
        self.costs, self.bench = CostModel(), None
        self.gain = RunningMean(FIRST_GAIN, 2)
        self.pause, self.wait = FIRST_PAUSE, 0
        # Tokens expected of each depth, and nodes verified: where no one asks between steps, the depth follows from them.
        self.layers, self.nodes = [], RunningMean()
        self.rounds = 0
        self.round: _Round | None = None
        self.fresh: tuple[bool, ...] = ()  # whether the last round left a fresh future
        self.usual = RunningMean()  # tokens that a round emits in this text
        self.drafted = RunningMean()  # of these, expected of what the network drafts; 0 where it is not asked

    def prepare(self, bench: Bench) -> None:
        """Look the costs up, or measure them."""
        self.bench, self.costs = bench, self.experience.costs_for(bench)

    def finish(self) -> None:
        """Keep what was measured."""
        if self.bench is not None:
            self.experience.keep(self.bench)

    # 1. Before drafting

    def plan(self, state: DecodingState, history: Sequence[RoundRecord]) -> RoundPlan:
        """Draft as long as it pays; else a probe now and then."""
        drafted = self.round is not None and self.round.steps > 0
        if history and self.round is not None:
            self._learn(history[-1])
        depth = depth_left(state, self.options.depth)
        active = tuple(not done for done in state.finished)
        self.round = _Round(max(state.lengths), active, probe=False, reads_backlog=not drafted)
        if depth == 0 or self.options.total_tokens == 0 or self._plain_is_due(state):
            return RoundPlan(0, 0, self.options.top_k)
        if self.gain.value <= 0:
            self.wait -= 1
            if self.wait >= 0:
                return RoundPlan(self.options.total_tokens, 0, self.options.top_k)
            self.round.probe = True
        on_host = not host.waits(state.input_ids.device)
        depth = 1 if self.round.probe else depth if on_host else self._likely_depth(depth)
        self.round.steps = 1
        self.round.log_probs, self.round.joint = [[0.0] for _ in active], [[1.0] for _ in active]
        return RoundPlan(
            total_tokens=self.options.total_tokens,
            depth=depth,
            top_k=self.options.top_k,
            another_step=self._another_step if on_host else None,
        )

    def _plain_is_due(self, state: DecodingState) -> bool:
        """Whether nobody knows what a plain round costs here, or it was timed long ago."""
        if not self.costs.learns or self.rounds == 0:
            return False
        unknown = self.costs.rounds_seen(len(state.finished), max(state.lengths)) == 0
        return unknown or self.experience.rounds_since_plain >= REFRESH

    # 2. Between draft steps

    def _another_step(self, parents: Tensor, log_probs: Tensor) -> bool:
        """[`tree.growing.AnotherStep`]: whether one more layer would bring tokens faster than this tree does.

        The next layer is expected to keep as much of this one as this one kept of the layer before.
        """
        this = self.round
        known = len(this.joint[0])
        for row, (row_parents, row_log_probs) in enumerate(zip(parents.tolist(), log_probs.tolist(), strict=True)):
            joint, past = this.joint[row], this.log_probs[row]
            for parent, log_prob in zip(row_parents, row_log_probs, strict=True):
                joint.append(joint[parent] * self._calibrate(conditional(log_prob, past[parent]), this.steps))
            past += row_log_probs
        best = self._best(this.joint)
        layer = 0.0
        for joint, active in zip(this.joint, this.active, strict=True):
            chosen = ranked(joint)[: best.nodes + 1] if active else []
            layer += sum(joint[node] for node in chosen if node >= known)
        pays = layer > 0 and self._step_pays(best, layer * min(1.0, layer / this.last_layer))
        this.last_layer = layer
        this.steps += pays
        return pays

    def _step_pays(self, best: Best, tokens: float) -> bool:
        """Whether so many more tokens are worth a step and a row."""
        step = self._draft_seconds(self.round.steps + 1) - self._draft_seconds(self.round.steps)
        row = self._pass_seconds(best.nodes + 1) - self._pass_seconds(best.nodes)
        deeper = self.round.steps + 1
        at_stake = self._draft_seconds(deeper) + self._pass_seconds(deeper)
        return at_stake <= self._stake() and tokens * best.seconds > best.tokens * (step + row)

    def _likely_depth(self, limit: int) -> int:
        """The depth that would have paid in the rounds before; at first all that may be risked."""
        if not self.layers:
            at_stake = {depth: self._draft_seconds(depth) + self._pass_seconds(depth) for depth in range(1, limit + 1)}
            return max((depth for depth, seconds in at_stake.items() if seconds <= self._stake()), default=1)
        tokens = [float(sum(self.round.active)), *(layer.value for layer in self.layers)]
        total, best_depth, best_rate = tokens[0], 1, 0.0
        nodes = max(1, round(self.nodes.value))
        for depth in range(1, limit + 1):
            if depth == len(tokens):
                tokens.append(tokens[-1] * min(1.0, tokens[-1] / tokens[-2]) if tokens[-2] else 0.0)
            total += tokens[depth]
            rate = total / (self._draft_seconds(depth) + self._pass_seconds(nodes))
            if rate > best_rate:
                best_depth, best_rate = depth, rate
        return best_depth

    # 3. After drafting

    def prune(self, state: DecodingState, tree: DraftTree, steps: int) -> Chosen:
        """The nodes that pay, and contemplate tokens where they do."""
        this = self.round
        this.steps = steps
        if steps == 0 and tree.tokens.shape[1] == 1:
            return Chosen(tree, 0)
        columns = (tree.parents, tree.depths, tree.looked_up, tree.log_probs)
        rows = []
        for *shape, log_probs in zip(*(column.tolist() for column in host.read(*columns)), strict=True):  # batch rows
            drafted, expected, joint = probabilities(log_probs, *shape, self._calibrate)
            rows.append((*shape, drafted, expected, self._above_threshold(joint, log_probs)))
        joints = [row[-1] for row in rows]
        parents, _, looked_up = zip(*(row[:3] for row in rows), strict=True)
        this.drafted = self._drafted(joints, looked_up, self._best(joints).nodes)
        self.drafted.add(this.drafted, GAIN_MEMORY)
        this.best = self._best(joints, self._futures(joints, parents))
        most = tree.tokens.shape[1] - 1
        number = min(max(this.best.nodes, 1), PROBE_NODES, most) if this.probe else this.best.nodes
        kept = [sorted(ranked(joint)[: number + 1]) for joint in joints]
        if number < most:
            tree = prune(tree, host.send(kept, tree.tokens.device))
        forecasts = tuple(forecast_of(nodes, *row[:-1]) for nodes, row in zip(kept, rows, strict=True))
        joints = [[joint[node] for node in nodes] for nodes, joint in zip(kept, joints, strict=True)]
        self._remember_layers(forecasts, joints)
        contemplate_tokens = this.best.contemplate_tokens
        if not contemplate_tokens and self._contemplates() and self._exploration_is_due(number):
            contemplate_tokens = 1
        if contemplate_tokens:  # where a walk ends is for what is expected to say, not for the draft's own word
            tree = replace(tree, log_probs=host.send(joints, tree.tokens.device, tree.log_probs.dtype).log())
        return Chosen(tree, contemplate_tokens, forecasts)

    def _above_threshold(self, joint: list[float], log_probs: list[float]) -> list[float]:
        """`joint`, 0 where the draft's own word is below the threshold of the options."""
        floor = self.options.confidence_threshold
        return [p if math.exp(raw) >= floor else 0.0 for p, raw in zip(joint, log_probs, strict=True)]

    def _remember_layers(self, forecasts: Sequence[Forecast], joints: Sequence[Sequence[float]]) -> None:
        tokens = [0.0] * self.round.steps
        for forecast, joint, active in zip(forecasts, joints, self.round.active, strict=True):
            for depth, looked_up, probability in zip(forecast.depths, forecast.looked_up, joint, strict=True):
                if 0 < depth <= len(tokens) and not looked_up:  # a drafter of another kind may take no steps
                    tokens[depth - 1] += probability * active
        self.layers += [RunningMean() for _ in range(len(tokens) - len(self.layers))]
        for layer, value in zip(self.layers, tokens, strict=False):
            layer.add(value)
        self.nodes.add(len(joints[0]) - 1)

    def _drafted(self, joints: Sequence[Sequence[float]], looked_up: Sequence[Sequence[int]], nodes: int) -> float:
        """Tokens expected of the best `nodes` that are the network's, in a batch row that has not ended."""
        rows = zip(joints, looked_up, self.round.active, strict=True)
        tokens = [
            sum(joint[node] for node in ranked(joint)[1 : nodes + 1] if not flags[node])
            for joint, flags, active in rows
            if active
        ]
        return sum(tokens) / max(1, len(tokens))

    def _exploration_is_due(self, nodes: int) -> bool:
        """Whether it is long enough ago, in this call or in earlier ones, that a round contemplated."""
        plain = self._pass_seconds(nodes)
        dearer = self._pass_seconds(nodes + self.contemplate_length) + self._beside(True) - plain
        whole = plain + self._draft_seconds(self.round.steps)
        return self.experience.rounds_since_future >= max(EXPLORE, dearer / (EXPLORE_SHARE * whole))

    def _contemplates(self) -> bool:
        return self.options.contemplate and self.gain.value > 0

    def _futures(self, joints: Sequence[Sequence[float]], parents: Sequence[Sequence[int]]) -> list[list[float]]:
        """[`weighing.best_number`]'s: the chance that a walk ends at a contemplated node, times what a fresh future adds
        to the tokens that the network drafts in this text."""
        if not self._contemplates():
            return []
        rows = zip(joints, parents, self.round.active, strict=True)
        trees = [ends_by_size(joint, above, self.options.total_tokens) for joint, above, active in rows if active]
        worth = self.experience.future.share * self.drafted.value
        sizes = [[sum(row) for row in zip(*ends, strict=True)] for ends in zip(*trees, strict=True)]
        return [[worth * tokens for tokens in accumulate(ends[: self.options.contemplate_tokens])] for ends in sizes]

    # 4. After the round

    def _learn(self, record: RoundRecord) -> None:
        """What the round cost, which nodes were accepted, and whether drafting paid."""
        this = self.round
        rows = len(record.accepted) * record.rows
        seconds = dict(record.seconds)
        draft_seconds = seconds.pop("draft", 0.0)
        steps = 0 if this.reads_backlog else this.steps
        whole, width = sum(seconds.values()), self.options.top_k
        beside = self._beside(record.contemplate_tokens > 0)
        self.costs.observe(rows, this.context, whole, steps, width, draft_seconds, beside)
        for forecast, path, ended in zip(record.forecasts, record.path, record.ended, strict=False):
            # Where a text ended, nobody was asked about the children of its last node.
            for node, accepted in forecast.outcomes(path) if not ended else ():
                calibration = self.experience.lookup if forecast.looked_up[node] else self.calibration
                calibration.learn(forecast.drafted[node], forecast.depths[node], accepted)
        if this.steps:  # what was looked up cost nothing, and says nothing of the network
            self._weigh(record.accepted, rows, beside)
            self.experience.proof += (sum(record.accepted) - sum(this.active)) / max(1, sum(this.active))
            learns = self.options.contemplate and not this.probe
            learns = learns and len(self.fresh) == len(record.accepted)  # rows that ended have left
            for fresh, count in zip(self.fresh, record.accepted, strict=True) if learns else ():
                if count:
                    self.usual.add(count)
                    self.experience.future.learn(fresh, count - self.usual.value, this.drafted)
        self.fresh = record.fresh
        self.rounds += 1
        experience = self.experience
        experience.rounds_since_future = 0 if record.contemplate_tokens else experience.rounds_since_future + 1
        self.experience.rounds_since_plain = (
            0 if rows == len(record.accepted) else self.experience.rounds_since_plain + 1
        )

    def _weigh(self, accepted: Sequence[int], rows: int, beside: float) -> None:
        """Whether drafting pays. Judged by what was expected, which scatters less than what came; a probe, which is to
        find out whether expectations are wrong, by what came."""
        this, active = self.round, max(1, sum(self.round.active))
        tokens = sum(accepted) if this.probe else this.best.tokens
        seconds = self._draft_seconds(this.steps) + self.costs.verify(rows, this.context) + beside
        cost = seconds / self.costs.verify(len(accepted), this.context)  # in plain rounds
        gained = tokens / active - cost
        self.gain.add(gained, GAIN_MEMORY)
        self.gain.value = max(self.gain.value, LEAST_GAIN)
        if this.probe and gained > 0:
            self.pause, self.wait = max(FIRST_PAUSE, self.pause // 2), 0
            self.calibration.fade(FADE)
        elif this.probe:
            longest = max(FIRST_PAUSE, math.ceil((cost - 1) / PROBE_SHARE))
            self.pause = self.wait = min(2 * self.pause, longest)
        elif self.gain.value <= 0:
            self.wait = self.pause

    def _calibrate(self, probability: float, depth: int, looked_up: bool = False) -> float:
        """[`weighing.Calibrate`]; a probe takes the draft at its word."""
        if looked_up:
            return self.experience.lookup(probability, depth)
        return probability if self.round.probe else self.calibration(probability, depth)

    def _best(self, joints: Sequence[Sequence[float]], futures: Sequence[Sequence[float]] = ()) -> Best:
        """The number of nodes that pays, of each row the best ones, and of contemplate tokens that bring `futures`."""
        columns = zip(
            *(
                sorted(joint[1:], reverse=True)
                for joint, active in zip(joints, self.round.active, strict=True)
                if active
            ),
            strict=True,
        )
        drafting = self._draft_seconds(self.round.steps)
        limit, stake = self.options.total_tokens, self._stake()
        while limit > 1 and drafting + self._pass_seconds(limit) > stake:
            limit -= 1
        return best_number(
            [sum(column) for column in columns],
            limit,
            sum(self.round.active),
            cache(lambda more: drafting + self._pass_seconds(more)),
            [row[: max(0, limit - nodes) // self.contemplate_length] for nodes, row in enumerate(futures)],
            self.contemplate_length,
            self._beside(True),
        )

    def _beside(self, contemplates: bool) -> float:
        """Seconds of a pass that contemplate tokens take beside their rows."""
        return (self.costs.contemplation or 0.0) if contemplates else 0.0

    def _stake(self) -> float:
        """The most seconds that this round may take, as far as drafting has proved itself."""
        return self._pass_seconds(0) * (1 + FIRST_STAKE + self.experience.proof)

    def _draft_seconds(self, steps: int) -> float:
        return self.costs.draft(steps, self.round.context, self.options.top_k)

    def _pass_seconds(self, more: int) -> float:
        """Of a round without its drafting, with so many rows beside the root in each batch row."""
        return self.costs.verify(len(self.round.active) * (1 + more), self.round.context)
