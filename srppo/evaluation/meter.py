"""Progress of a long measurement with the time left: lines every few seconds, or a live bar on a terminal."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from srppo.console import Console, duration

LINE_SECONDS = 5.0


class RowsWritten:
    """As `until` of `generate`: no row is done, and `reach` hears at each step how many rows are, parts of rows counted
    by their share of the `most` tokens."""

    def __init__(self, most: int, reach: Callable[[float], object]) -> None:
        self.most, self.reach, self.begun = most, reach, 0

    def __call__(self, responses: list[list[int]]) -> list[bool]:
        self.begun += sum(len(row) == 1 for row in responses)
        self.reach(self.begun - len(responses) + sum(map(len, responses)) / self.most)
        return [False] * len(responses)


class Meter:
    """Counts work (rows, and parts of rows) of one task; `advance` is cheap enough for every decoding step."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        self.console, self.name, self.total = console, name, total
        self.done, self.whole = 0.0, 0
        self._began = self._said = console.clock()
        self._start, self._first = 0.0, self._began
        self._live: Live | None = None

    def __enter__(self) -> Meter:
        if not (self.console.plain or self.console.quiet):
            self._live = self.console.live(self, refresh_per_second=2)
            self._live.transient = True
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def __rich__(self) -> RenderableType:
        """Name, bar and words, in one line."""
        row = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=self.total, completed=self.done, width=40)
        row.add_row(self.name, bar, self.words(self.console.clock()))
        return row

    def advance(self, rows: float) -> None:
        """So many more rows (or parts of them) are done."""
        self._set(self.done + rows)

    def reach(self, rows: float) -> None:
        """Of the batch that is worked on so many rows (or parts of them) are done."""
        self._set(self.whole + rows)

    def finish(self, rows: int) -> None:
        """A batch of so many rows is done, maybe long before its last possible token."""
        self.whole += rows
        self._set(self.whole)

    def _set(self, done: float) -> None:
        self.done = min(done, float(self.total))
        now = self.console.clock()
        if not self._start:  # the first token of all: what came before was reading, and it does not repeat
            self._start, self._first = self.done, now
        if self.console.plain and now - self._said >= LINE_SECONDS:
            self._said = now
            self.console.say(f"{self.name}  {self.words(now)}")

    def words(self, now: float) -> str:
        """Rows done, time taken, and time left: from whole batches, before the first from tokens, an upper bound."""
        since, already = (self._began, 0.0) if self.whole else (self._first, self._start)
        new = self.done - already
        about = "" if self.whole else "at most "
        left = (
            f"{about}{duration((now - since) / new * (self.total - self.done))} left" if new > 0 else "reading prompts"
        )
        return f"{int(self.done)}/{self.total}  {duration(now - self._began)}, {left}"
