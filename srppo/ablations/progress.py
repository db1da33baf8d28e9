"""How far a sweep has come, read from the record alone: the same for every engine, and for a second terminal.

The table of cells is redrawn in place on a terminal; elsewhere a line says what has ended.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path

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
    step: int | None = None
    total: int | None = None
    seconds_left: float | None = None

    def __str__(self) -> str:
        """`step 5 of 20, 12 s left`."""
        where = "starting" if self.step is None else f"step {self.step} of {self.total}"
        left = f", {duration(self.seconds_left)} left" if self.seconds_left is not None else ""
        return f"{where}{left}"


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
        found = []
        for cell in self.plan.sweep.cells():
            statuses, running, reasons = {}, [], []
            for seed in self.plan.sweep.seeds:
                key = self.plan.measured_by[cell, seed]
                statuses[seed] = states[key].status
                running += [self.running(self.plan.tasks[key])] if states[key].status == "running" else []
                reasons += [f"seed {seed}: {states[key].reason}"] if states[key].reason else []
            found.append(CellProgress(cell, statuses, tuple(running), tuple(dict.fromkeys(reasons))))
        return found

    def running(self, task: Task) -> Running:
        """How far a running stage is."""
        stage = self.ledger.stage(task)
        attempt = stage.attempts()[-1:] if stage else []
        events = read_lines(attempt[0] / "events.jsonl") if attempt else []
        begun = next((event for event in reversed(events) if event.get("event") == "training"), None)
        if begun is None:
            return Running(task)
        start, total = int(begun["start"]), int(begun["total"])
        step = _last_step(attempt[0] / "metrics.jsonl", start)
        seconds = time.time() - datetime.fromisoformat(begun["time"]).timestamp()
        return Running(task, step, total, seconds / (step - start) * (total - step) if step > start else None)


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


def _last_step(path: Path, start: int) -> int:
    """From the end of the log, without reading all of it."""
    if not path.exists():
        return start
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        whole = file.read().split(b"\n")[1 if path.stat().st_size > 8192 else 0 : -1]
    return max([start, *(int(json.loads(line)["step"]) for line in whole[-1:])])


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
        for width in (34, 20, 22):
            table.add_column(max_width=width, overflow="ellipsis", no_wrap=True)
        shown, last = _most_telling(cells, max(self.console.height - 6 - self.slots, 5)), None
        for each in shown:
            marks = Text.assemble(*((GLYPHS[status], STYLES[status]) for status in each.statuses.values()))
            table.add_row(each.cell.point if each.cell.point != last else "", each.cell.arm, marks)
            last = each.cell.point
        hidden = len(cells) - len(shown)
        lines = [Text(f"{hidden} more cells", "dim")] if hidden else []
        at_work = list({r.task.key: r for each in cells for r in each.running}.values())
        for running in at_work[: self.slots + 2]:
            lines.append(Text(f"{self.plan.title(running.task.key)}: {running}", "yellow"))
        return Group(Text(self.summary(), "bold"), table, *lines, Text(LEGEND, "dim"))


def _most_telling(cells: list[CellProgress], room: int) -> list[CellProgress]:
    """Cells that fit: those at work or in trouble first, then those that wait, in table order."""
    rank = {"running": 0, "failed": 1, "diverged": 1, "waiting": 2, "done": 3}
    ranked = sorted(range(len(cells)), key=lambda i: (min(rank[s] for s in cells[i].statuses.values()), i))
    return [cells[i] for i in sorted(ranked[:room])]
