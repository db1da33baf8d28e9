"""How far a sweep has come, read from the record alone: the same for every engine, and for a second terminal.

The table of cells is redrawn in place on a terminal; elsewhere a line says what has ended.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from srppo.ablations.ledger import Ledger, State, Status
from srppo.ablations.plan import Plan, Task
from srppo.ablations.spec import Cell
from srppo.console import Console, duration
from srppo.record.json import read_lines
from srppo.record.store import Stage

GLYPHS = {"waiting": "·", "running": "▸", "done": "●", "failed": "✗", "diverged": "!"}
STYLES = {"waiting": "dim", "running": "yellow", "done": "green", "failed": "bold red", "diverged": "bold red"}
REFRESH_S = 0.5
LEGEND = "one mark a seed: " + "  ".join(f"{glyph} {name}" for name, glyph in GLYPHS.items())


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


# ---- on the screen


class LiveTable:
    """Called often, draws seldom: a table on a terminal, a line a finished stage in a log."""

    def __init__(self, plan: Plan, watch: Watch, console: Console, slots: int) -> None:
        self.plan, self.watch, self.console, self.slots = plan, watch, console, slots
        self._began = self._drawn = time.monotonic()
        self._states: dict[str, State] = watch.states()
        self._at_start = counts(self._states)["done"]
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Iterator[LiveTable]:
        """Keep the table on the screen; what is printed meanwhile goes above it."""
        if self.console.plain or self.console.quiet:
            yield self
            self._look()
            return
        with self.console.live(self.render(), refresh_per_second=1 / REFRESH_S) as self._live:
            yield self
            self._look()

    def __call__(self) -> None:
        if time.monotonic() - self._drawn >= REFRESH_S:
            self._look()

    def _look(self) -> None:
        """Read the states, and show what changed."""
        self._drawn = time.monotonic()
        before, self._states = self._states, self.watch.states()
        if self._live:
            self._live.update(self.render())
            return
        for key, state in self._states.items():
            if state.status != before[key].status and state.status in ("done", "failed", "diverged"):
                reason = f": {state.reason}" if state.reason else ""
                self.console.say(f"{self.summary()}; {self.plan.title(key)} {state.status}{reason}")

    def summary(self) -> str:
        """`12 of 60 stages, 8:20 left`."""
        found, total = counts(self._states), len(self._states)
        ended = found["done"] + found["failed"] + found["diverged"]
        did = found["done"] - self._at_start
        left = (time.monotonic() - self._began) / did * (total - ended) if did else None
        bad = found["failed"] + found["diverged"]
        lost = f", {bad} failed or diverged" if bad else ""
        return f"{ended} of {total} stages{lost}" + (f", {duration(left)} left" if left and ended < total else "")

    def render(self) -> RenderableType:
        """The table and what runs now; at most 80 columns."""
        cells = self.watch.cells(self._states)
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(max_width=34, overflow="ellipsis", no_wrap=True)
        table.add_column(max_width=20, overflow="ellipsis", no_wrap=True)
        table.add_column(max_width=22, overflow="ellipsis", no_wrap=True)
        room = max(self.console.height - 6 - self.slots, 5)
        shown, hidden = _most_telling(cells, room)
        last = None
        for each in shown:
            name = each.cell.point if each.cell.point != last else ""
            last = each.cell.point
            table.add_row(name, each.cell.arm, _glyphs(each.statuses))
        lines = [Text(f"{hidden} more cells", "dim")] if hidden else []
        at_work = list({r.task.key: r for each in cells for r in each.running}.values())
        for running in at_work[: self.slots + 2]:
            lines.append(Text(f"{self.plan.title(running.task.key)}: {running_text(running)}", "yellow"))
        return Group(Text(self.summary(), "bold"), table, *lines, Text(LEGEND, "dim"))


def running_text(running: Running) -> str:
    """`step 5 of 20, 12 s left`."""
    where = "starting" if running.step is None else f"step {running.step} of {running.total}"
    left = f", {duration(running.seconds_left)} left" if running.seconds_left is not None else ""
    return f"{where}{left}"


def _glyphs(statuses: Mapping[int, str]) -> Text:
    text = Text()
    for status in statuses.values():
        text.append(GLYPHS[status], STYLES[status])
    return text


def _most_telling(cells: list[CellProgress], room: int) -> tuple[list[CellProgress], int]:
    """Cells that fit: those at work or in trouble first, then those that wait, in table order."""
    if len(cells) <= room:
        return cells, 0
    rank = {"running": 0, "failed": 1, "diverged": 1, "waiting": 2, "done": 3}
    ranked = sorted(range(len(cells)), key=lambda i: (min(rank[s] for s in cells[i].statuses.values()), i))
    return [cells[i] for i in sorted(ranked[:room])], len(cells) - room
