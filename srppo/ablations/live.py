"""The live table of a sweep's cells; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from srppo.ablations.ledger import State
from srppo.ablations.plan import Plan
from srppo.ablations.progress import CellProgress, Running, Watch, counts
from srppo.console import Console, duration

GLYPHS = {"waiting": "·", "running": "▸", "done": "●", "failed": "✗", "diverged": "!"}
STYLES = {"waiting": "dim", "running": "yellow", "done": "green", "failed": "bold red", "diverged": "bold red"}
REFRESH_S = 0.5


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


LEGEND = "one mark a seed: " + "  ".join(f"{glyph} {name}" for name, glyph in GLYPHS.items())


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
