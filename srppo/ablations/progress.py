"""How far a sweep has come, read from the record alone: the same for every engine, and for a second terminal."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from srppo.ablations.ledger import Ledger, State, Status
from srppo.ablations.plan import Plan, Task
from srppo.ablations.spec import Cell
from srppo.record.json import read_lines
from srppo.record.store import Stage


@dataclass(frozen=True)
class Running:
    """A stage at work: `step` of `total`, and seconds left by its own pace; None where it is not known yet."""

    task: Task
    step: int | None
    total: int | None
    seconds_left: float | None


@dataclass(frozen=True)
class CellProgress:
    """A cell, seed by seed. reasons: of what failed or diverged, each once."""

    cell: Cell
    statuses: Mapping[int, Status]
    running: tuple[Running, ...]
    reasons: tuple[str, ...]


class Watch:
    """Reads states again and again, and what is done only once."""

    def __init__(self, plan: Plan, ledger: Ledger) -> None:
        self.plan, self.ledger = plan, ledger
        self._done: dict[str, State] = {}

    def states(self) -> dict[str, State]:
        """Of every task; one whose parent failed has failed too."""
        found: dict[str, State] = {}
        for key, task in self.plan.tasks.items():
            state = self._done.get(key) or self.ledger.state(task)
            if state.status == "done":
                self._done[key] = state
            lost = [need for need in task.needs if found[need].status in ("failed", "diverged")]
            if lost and state.status == "waiting":
                state = found[lost[0]]
            found[key] = state
        return found

    def cells(self, states: Mapping[str, State] | None = None) -> list[CellProgress]:
        """Every cell of the sweep in table order."""
        states = self.states() if states is None else states
        return [self._cell(cell, states) for cell in self.plan.sweep.cells()]

    def _cell(self, cell: Cell, states: Mapping[str, State]) -> CellProgress:
        statuses, running, reasons = {}, [], []
        for seed in self.plan.sweep.seeds:
            keys = self.plan.measured_by[cell, seed]
            statuses[seed] = _joined([states[key].status for key in keys])
            running += [self.running(self.plan.tasks[key]) for key in keys if states[key].status == "running"]
            reasons += [f"seed {seed}: {states[key].reason}" for key in keys if states[key].reason]
        return CellProgress(cell, statuses, tuple(running), tuple(dict.fromkeys(reasons)))

    def running(self, task: Task) -> Running:
        """How far a running stage is."""
        stage = self.ledger.stage(task)
        attempts = stage.attempts() if stage else []
        if not attempts:
            return Running(task, None, None, None)
        events = read_lines(attempts[-1] / "events.jsonl")
        begun = next((event for event in reversed(events) if event.get("event") == "training"), None)
        if begun is None:
            return Running(task, None, None, None)
        step = _last_step(attempts[-1], int(begun["start"]))
        did = step - int(begun["start"])
        seconds = time.time() - datetime.fromisoformat(begun["time"]).timestamp()
        left = seconds / did * (int(begun["total"]) - step) if did else None
        return Running(task, step, int(begun["total"]), left)


def counts(states: Mapping[str, State]) -> Counter[str]:
    """Tasks by status."""
    return Counter(state.status for state in states.values())


def stage_seconds(stage: Stage) -> float | None:
    """Wall time from the first attempt's start to the commit, less the time between attempts; None if unknown."""
    result = stage.result()
    if result is None or "time" not in result:
        return None
    committed = datetime.fromisoformat(result["time"]).timestamp()
    spans = []
    for folder in stage.attempts():
        events = read_lines(folder / "events.jsonl")
        times = [datetime.fromisoformat(event["time"]).timestamp() for event in events if "time" in event]
        if not times or min(times) > committed:  # killed before its first word; or of another folder, united by copying
            continue
        rows = folder / "metrics.jsonl"
        spans.append((min(times), max(times + ([rows.stat().st_mtime] if rows.exists() else []))))
    if not spans:
        return None
    spans.sort()
    # A copied file has the time of copying: no attempt lasted beyond the next one's start.
    ends = [min(end, start) for (_, end), (start, _) in pairwise(spans)] + [committed]
    return sum(end - start for (start, _), end in zip(spans, ends, strict=True))


def _joined(statuses: Sequence[Status]) -> Status:
    """Of a cell that several stages measure: the worst news first, done only when all are."""
    order: tuple[Status, ...] = ("failed", "diverged", "running", "waiting", "done")
    return min(statuses, key=order.index)


def _last_step(attempt: Any, start: int) -> int:
    """From the end of the log, without reading all of it."""
    path = attempt / "metrics.jsonl"
    if not path.exists():
        return start
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().split(b"\n")[1 if path.stat().st_size > 8192 else 0 : -1]
    import json

    return max([start, *(int(json.loads(line)["step"]) for line in lines[-1:])])
