"""A limited time, split among the stages of a run, over interruptions: what is done is noted in a small JSON file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import refusal

WRITE_EVERY = 5.0  # seconds


class Budget:
    """How much of `seconds` is left, and which stages are done.

    A stage gets its share of what is left when it starts, measured against the shares of the stages to come: what one does
    not use goes to the others.

    Args:
        path: of the state file; a run that was interrupted goes on from it.
        identity: what the run is of; a state file of another one is refused.
        shares: of each stage, in their order.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        shares: Mapping[str, float],
        seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.path, self.shares, self.seconds, self.clock = path, dict(shares), seconds, clock
        self.state = {"identity": dict(identity), "spent": 0.0, "stages": {}}
        if path.exists():
            self.state = json.loads(path.read_text())
            if self.state["identity"] != self.state["identity"] | dict(identity):
                raise refusal(
                    str(path),
                    got=f"a run of {self.state['identity']}",
                    expected=dict(identity),
                    fix="Give --output_dir another folder, or delete this one.",
                )
        self._since = self._written = clock()

    @property
    def left(self) -> float:
        """Seconds."""
        return max(self.seconds - self._spent(), 0.0)

    def _spent(self) -> float:
        return self.state["spent"] + self.clock() - self._since

    def done(self, stage: str) -> bool:
        return bool(self.state["stages"].get(stage, {}).get("done"))

    def results(self, stage: str) -> dict[str, Any]:
        """What a stage noted."""
        return self.state["stages"].get(stage, {})

    def start(self, stage: str) -> StageClock:
        """The clock of a stage, of one that was interrupted as well."""
        waiting = {name: share for name, share in self.shares.items() if not self.done(name)}
        used = self.results(stage).get("seconds", 0.0)
        # An interrupted stage goes on to where its share would have ended.
        limit = (self.left + used) * waiting[stage] / sum(waiting.values())
        return StageClock(self, stage, used, limit)

    def note(self, stage: str, force: bool = True, **fields: Any) -> None:
        """Keep what a stage reports; without `force` at most every few seconds."""
        self.state["stages"].setdefault(stage, {}).update(fields)
        now = self.clock()
        if not force and now - self._written < WRITE_EVERY:
            return
        self.state["spent"], self._since, self._written = self._spent(), now, now
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.state, indent=2) + "\n")
        partial.replace(self.path)  # an interruption leaves the old file or the new one


class StageClock:
    """The time of one stage. `limit`: seconds that it may take, those before an interruption included."""

    def __init__(self, budget: Budget, name: str, used: float, limit: float):
        self.budget, self.name, self.limit = budget, name, limit
        self._used, self._since = used, budget.clock()

    @property
    def seconds(self) -> float:
        return self._used + self.budget.clock() - self._since

    def progress(self) -> float:
        """From 0 at the start to 1 when the time is over."""
        return min(self.seconds / self.limit, 1.0) if self.limit > 0 else 1.0

    def over(self) -> bool:
        return self.progress() >= 1.0

    def tick(self) -> None:
        """Note the time, now and then."""
        self.budget.note(self.name, force=False, seconds=self.seconds)

    def finish(self, **results: Any) -> None:
        """The stage is done."""
        self.budget.note(self.name, seconds=round(self.seconds, 1), done=True, **results)
