"""What a call of `generate` did: counted while it runs, then frozen for the user as `confu.stats`."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True)
class GenerationStats:
    """What the last call of `generate` did. Every count is per call; `rounds` are target forwards after prefill.

    Attributes:
        mean_accepted_length: tokens emitted per round, bonus included; nan without any round.
        acceptance_by_depth: share of rounds whose accepted path reached depth 1, 2, ...
        verified_nodes: tree nodes that went through the target, roots included.
        contemplate_tokens: contemplate tokens that went through the target.
        seconds_draft, seconds_verify, seconds_rest: wall time (the rest: prefill, acceptance, caches).
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


@dataclass
class Tally:
    """Counts while the loop runs."""

    started: float = field(default_factory=time.perf_counter)
    seconds: dict[str, float] = field(default_factory=lambda: {"draft": 0.0, "verify": 0.0})
    accepted: list[int] = field(default_factory=list)
    verified_nodes: int = 0
    contemplate_tokens: int = 0

    @contextmanager
    def phase(self, name: str):
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    def add_round(self, path_length: int, nodes: int, contemplate_tokens: int) -> None:
        self.accepted.append(path_length)
        self.verified_nodes += nodes
        self.contemplate_tokens += contemplate_tokens

    def stats(self, new_tokens: int) -> GenerationStats:
        rounds = len(self.accepted)
        # A path of 3 rows is the root and two drafted tokens: it reached depth 2.
        deepest = max(self.accepted, default=1) - 1
        by_depth = tuple(sum(length > d for length in self.accepted) / rounds for d in range(1, deepest + 1))
        return GenerationStats(
            new_tokens=new_tokens,
            rounds=rounds,
            mean_accepted_length=sum(self.accepted) / rounds if rounds else float("nan"),
            acceptance_by_depth=by_depth,
            verified_nodes=self.verified_nodes,
            contemplate_tokens=self.contemplate_tokens,
            seconds_draft=self.seconds["draft"],
            seconds_verify=self.seconds["verify"],
            seconds_rest=time.perf_counter() - self.started - sum(self.seconds.values()),
        )
