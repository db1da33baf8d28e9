"""Progress of a long measurement with the time left: lines every few seconds, or a live bar on a terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TextColumn
from rich.progress import TaskID as BarId

from srppo.console import Console, duration

LINE_SECONDS = 5.0


class Meter:
    """Counts work (rows, and parts of rows) of one task; `advance` is cheap enough for every decoding step."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        self.console, self.name, self.total = console, name, total
        self.done, self.whole = 0.0, 0
        self._began = self._said = console.clock()
        self._start, self._first = 0.0, self._began
        self._bar: Progress | None = None
        self._id = BarId(0)

    def __enter__(self) -> Meter:
        if not (self.console.plain or self.console.quiet):
            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"))
            to = RichConsole(stderr=True, highlight=False, emoji=False)
            self._bar = Progress(*columns, console=to, transient=True, refresh_per_second=2)
            self._id = self._bar.add_task(self.name, total=self.total, words="")
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def advance(self, rows: float) -> None:
        """So many more rows (or parts of them) are done."""
        self._set(self.done + rows)

    def finish(self, rows: int) -> None:
        """A batch of so many rows is done, maybe long before its last possible token."""
        self.whole += rows
        self._set(self.whole)

    def _set(self, done: float) -> None:
        self.done = min(done, float(self.total))
        now = self.console.clock()
        if not self._start:  # the first token of all: what came before was reading, and it does not repeat
            self._start, self._first = self.done, now
        if self._bar is not None:
            self._bar.update(self._id, completed=self.done, words=self.words(now))
        elif now - self._said >= LINE_SECONDS:
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
