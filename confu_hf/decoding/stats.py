"""What a call of `generate` did: counted while it runs, then frozen for the user as `confu.stats`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from ..metrics import ReliabilityBin, acceptance_by_depth, mean_accepted_length, reliability

PHASES = ("policy", "draft", "verify", "accept", "cache")


@dataclass(frozen=True)
class Forecast:
    """What was expected of one tree; one entry per node, the root's first.

    Attributes:
        parents, depths: as in `DraftTree`.
        drafted: the draft's probability of a node, once its parent is accepted; 1 for the root.
        expected: the same as calibrated by what was accepted before.
        looked_up: as in `DraftTree`.
    """

    parents: tuple[int, ...]
    depths: tuple[int, ...]
    drafted: tuple[float, ...]
    expected: tuple[float, ...]
    looked_up: tuple[bool, ...]

    def outcomes(self, path: tuple[int, ...]) -> list[tuple[int, bool]]:
        """Nodes whose parent was accepted, and whether they were: of the others nothing was learned."""
        return [(node, node in path) for node, parent in enumerate(self.parents) if node > 0 and parent in path]


@dataclass(frozen=True)
class RoundRecord:
    """One round.

    Attributes:
        accepted: tokens emitted, by batch row; 0 for a row that had ended.
        nodes: tree nodes of a batch row that went through the target, root included.
        contemplate_tokens: of them, those with contemplate tokens.
        seconds: wall time of each of [`PHASES`], as the device saw it.
        path: accepted nodes of each batch row, the root's 0 first; empty for a row that had ended.
        ended: whether a row ended in this round, or before.
        fresh: whether a row's last accepted node carried a contemplate token of its own.
        forecasts: what the policy expected, by batch row; empty if it calculated nothing.
        looked_up: how many of the accepted tokens were drafted by lookup, by batch row.
        contemplate_length: contemplate tokens behind each contemplated node.
    """

    accepted: tuple[int, ...]
    nodes: int
    contemplate_tokens: int
    seconds: dict[str, float]
    path: tuple[tuple[int, ...], ...] = ()
    ended: tuple[bool, ...] = ()
    fresh: tuple[bool, ...] = ()
    forecasts: tuple[Forecast, ...] = ()
    looked_up: tuple[int, ...] = ()
    contemplate_length: int = 1

    @property
    def rows(self) -> int:
        """Of a batch row, in the verify pass."""
        return self.nodes + self.contemplate_length * self.contemplate_tokens


@dataclass(frozen=True)
class GenerationStats:
    """What the last call of `generate` did. Every count is per call, over all rows of its batch.

    Attributes:
        new_tokens: tokens that were written, end tokens included.
        rounds: forward passes of the target after prefill.
        mean_accepted_length: tokens emitted per round (and batch row), bonus included; nan without any round.
        acceptance_by_depth: share of rounds whose accepted path reached depth 1, 2, ...
        verified_nodes: tree nodes that went through the target, roots included.
        contemplate_tokens: contemplate tokens that went through the target.
        looked_up_tokens: emitted tokens that were drafted by lookup.
        seconds_draft, seconds_verify, seconds_rest: wall time in seconds (the rest: prefill, acceptance, caches).
        reliability: how often nodes that the network drafted were accepted, beside how often they were expected to be.
        lookup_reliability: the same of nodes that were looked up.
        compiled: whether the target computed with what `confu.compile()` built; if not,
            `not_compiled_because` says why.
        single_rows_plain: whether passes of one row, rounds that draft nothing, went through its layers as in plain
            decoding: nothing is packed, or a measurement found nothing faster.
        records: one per round.
    """

    new_tokens: int
    rounds: int
    mean_accepted_length: float
    acceptance_by_depth: tuple[float, ...]
    verified_nodes: int
    contemplate_tokens: int
    seconds_draft: float
    seconds_verify: float
    seconds_rest: float
    reliability: tuple[ReliabilityBin, ...] = ()
    lookup_reliability: tuple[ReliabilityBin, ...] = ()
    looked_up_tokens: int = 0
    compiled: bool = False
    not_compiled_because: str | None = None
    single_rows_plain: bool = True
    records: tuple[RoundRecord, ...] = field(default=(), repr=False)


class Stopwatch:
    """Times the phases of a round on a device.

    A GPU works behind the host's back: there, marks are recorded in its own stream and read once the round is over, so
    timing makes nothing wait that does not wait anyway.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        self.on_gpu = torch.device(device).type == "cuda"
        self._spans: list[tuple[str, object, object]] = []

    def _mark(self, on_gpu: bool) -> object:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times what happens inside; of a GPU's last phase only what the host spends."""
        on_gpu = self.on_gpu and name != PHASES[-1]
        start = self._mark(on_gpu)
        yield
        self._spans.append((name, start, self._mark(on_gpu)))

    def read(self) -> dict[str, float]:
        """Seconds by phase since the last reading."""
        seconds = dict.fromkeys(PHASES, 0.0)
        events = [end for _, _, end in self._spans if not isinstance(end, float)]
        if events:
            events[-1].synchronize()  # no one waits: the host has read the target's word before
        for name, start, end in self._spans:
            seconds[name] += end - start if isinstance(end, float) else start.elapsed_time(end) / 1000
        self._spans.clear()
        return seconds


@dataclass
class Tally:
    """Collects records while the loop runs."""

    started: float = field(default_factory=time.perf_counter)
    records: list[RoundRecord] = field(default_factory=list)

    def stats(self, new_tokens: int) -> GenerationStats:
        """What is shown to the user."""
        paths = [count for record in self.records for count in record.accepted if count]
        seconds = {name: sum(record.seconds[name] for record in self.records) for name in PHASES}
        elapsed = time.perf_counter() - self.started
        return GenerationStats(
            new_tokens=new_tokens,
            rounds=len(self.records),
            mean_accepted_length=mean_accepted_length(paths),
            acceptance_by_depth=acceptance_by_depth(paths),
            verified_nodes=sum(record.nodes * len(record.accepted) for record in self.records),
            contemplate_tokens=sum((record.rows - record.nodes) * len(record.accepted) for record in self.records),
            seconds_draft=seconds["draft"],
            seconds_verify=seconds["verify"],
            seconds_rest=elapsed - seconds["draft"] - seconds["verify"],
            reliability=reliability(self._outcomes(looked_up=False)),
            lookup_reliability=reliability(self._outcomes(looked_up=True)),
            looked_up_tokens=sum(sum(record.looked_up) for record in self.records),
            records=tuple(self.records),
        )

    def _outcomes(self, looked_up: bool) -> list[tuple[float, bool]]:
        """Every node of one origin whose parent was accepted: the probability expected, and whether it was accepted."""
        return [
            (forecast.expected[node], accepted)
            for record in self.records
            for forecast, path in zip(record.forecasts, record.path, strict=False)
            for node, accepted in forecast.outcomes(path)
            if forecast.looked_up[node] == looked_up
        ]
