"""What people see while a command runs: a live panel on a terminal, plain lines elsewhere. Nothing here is the truth.

The truth is metrics.jsonl. Progress, notes, warnings and errors go to stderr; results (`print`) go to stdout.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

from rich.console import Console as RichConsole
from rich.console import RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

PANEL_WIDTH = 80
PLAIN_WIDTH = 119
PLAIN_SECONDS = 2.0  # between plain lines that are neither first, last nor measured
REFRESHES_PER_SECOND = 2
SPARK = "▁▂▃▄▅▆▇█"


def figure(value: Any) -> str:
    """Three to four digits of a number, of any size; `-` for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "-"
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e5):
        return f"{value:.1e}"
    return f"{value:.{2 if size < 100 else 1 if size < 1000 else 0}f}" if size >= 0.1 or not size else f"{value:.3f}"


def percent(value: Any) -> str:
    """A share in percent."""
    return figure(value) if figure(value) in ("-", "nan", "inf", "-inf") else f"{value:.0%}"


def rate(value: Any) -> str:
    """Counts a second, short: 950, 12.3k, 4.5M."""
    if figure(value) in ("-", "nan", "inf", "-inf"):
        return figure(value)
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if abs(value) < 1e9 else f"{value:.1e}"
    return f"{value:.0f}"


def duration(seconds: float | None) -> str:
    """24 s, 3:05 min, 2:05 h."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = round(max(seconds, 0.0))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def sparkline(values: Sequence[float], width: int = 24) -> str:
    """The course of a series in at most `width` characters."""
    finite = [v for v in values if math.isfinite(v)]
    count = min(width, len(finite))
    if count < 2:
        return ""
    chosen = [finite[i * (len(finite) - 1) // (count - 1)] for i in range(count)]
    low, high = min(chosen), max(chosen)
    if not high > low:
        return SPARK[3] * count
    return "".join(SPARK[min(int((v / 2 - low / 2) / (high / 2 - low / 2) * 8), 7)] for v in chosen)


@dataclass(frozen=True)
class _Field:
    key: str
    words: str  # in the panel
    short: str  # in plain lines
    form: Callable[[Any], str] = figure


_PPO = (
    _Field("reward", "reward", "reward"),
    _Field("kl_sft", "KL to SFT", "kl_sft"),
    _Field("kl_base", "KL to base", "kl_base"),
    _Field("length", "length", "len"),
    _Field("ended", "ended by EOS", "eos", percent),
    _Field("entropy", "entropy", "ent"),
    _Field("clip_share", "clip share", "clip", percent),
    _Field("explained_variance", "expl. variance", "ev"),
)
_SFT = (
    _Field("loss", "loss", "loss"),
    _Field("grad_norm", "gradient norm", "grad"),
    _Field("lr", "learning rate", "lr", lambda v: figure(v) if figure(v) in ("-", "nan") else f"{v:.1e}"),
)


class StageView:
    """The progress of one stage. `update(row)` takes the rows of metrics.jsonl and never raises for what they lack."""

    def __init__(self, console: Console, name: str, total: int) -> None:
        self.name, self.total, self._console, self._clock = name, total, console, console.clock
        self.step: int | None = None
        self.row: dict[str, Any] = {}
        self._fields: tuple[_Field, ...] = ()
        self._history: list[float] = []  # of the first field: reward, or loss
        self._dev: tuple[int, dict[str, Any]] | None = None
        self._first_dev: float | None = None
        self._began = self._last = self._clock()
        self._first_step: int | None = None
        self._seconds_per_step: float | None = None
        self._printed_at: float | None = None

    def update(self, row: Mapping[str, Any]) -> None:
        """Take in a step's row. Row 0 holds measurements of the start only."""
        now, step = self._clock(), int(row["step"])
        if self._first_step is None:
            self._first_step, self._origin = step, now
            laps = [v for k, v in (row.get("timing") or {}).items() if k.endswith("_s") and k != "tokens_per_s"]
            self._seconds_per_step = float(sum(laps)) if step and laps else None
        elif step > self._first_step:  # resumed steps took no time here and do not count
            self._seconds_per_step = (now - self._origin) / (step - self._first_step)
        self.step, self._last = step, now
        dev = {key[4:]: value for key, value in row.items() if key.startswith("dev/")}
        if dev:
            self._dev = (step, dev)
            if self._first_dev is None and isinstance(dev.get("accuracy"), float):
                self._first_dev = dev["accuracy"]
        if step or len(row) > len(dev) + 2:
            self.row = dict(row)
            self._fields = self._fields or (_PPO if "reward" in row else _SFT)
            lead = row.get(self._fields[0].key)
            if isinstance(lead, int | float):
                self._history.append(float(lead))
        due = self._printed_at is None or now - self._printed_at >= PLAIN_SECONDS or step == self.total
        if self._console.plain and not self._console.quiet and (dev or due):
            self._print_plain(now, measured=bool(dev))

    def _print_plain(self, now: float, measured: bool) -> None:
        head = f"{self.name} {self.step:>{len(str(self.total))}}/{self.total}"
        if self.row:
            self._printed_at = now
            parts = [head, *(f"{f.short} {f.form(self.row.get(f.key))}" for f in self._fields)]
            timing = self.row.get("timing") or {}
            if "tokens_per_s" in timing:
                parts.append(f"{rate(timing['tokens_per_s'])} tok/s")
            if self.step != self.total:
                parts.append(f"left {duration(self.seconds_left())}")
            line = "  ".join(parts)
            self._console.say((line if len(line) <= PLAIN_WIDTH else " ".join(parts))[:PLAIN_WIDTH])
        if measured and self._dev:
            dev = self._dev[1]
            self._console.say(_fit([f"{head}  dev", *_dev_parts(dev, _groups(dev) + _overall(dev))], PLAIN_WIDTH))

    def seconds_left(self) -> float | None:
        """From the mean time of the steps seen here; None before the first."""
        if self._seconds_per_step is None or self.step is None:
            return None
        return max(self._seconds_per_step * (self.total - self.step) - (self._clock() - self._last), 0.0)

    def __rich__(self) -> RenderableType:
        """The live panel: at most 80 columns and about nine lines."""
        # Ctrl-C echoes two characters after the last line; room for them, or they wrap and the panel is not cleared.
        width = min(self._console.width, PANEL_WIDTH) - len("^C")
        inner = max(width - 4, 8)
        lines = [self._bar(inner)]
        cells = [(f.words, f.form(self.row.get(f.key)), i == 0) for i, f in enumerate(self._fields)]
        if cells:
            cells.append(("tokens/s", rate((self.row.get("timing") or {}).get("tokens_per_s")), False))
        columns = 2 if inner >= 60 else 1
        for i in range(0, len(cells), columns):
            line = Text()
            for words, value, leads in cells[i : i + columns]:
                spark = sparkline(self._history, 11) if leads else ""
                line.append(f"{words:<15}", "dim").append(f"{value:>8}", "bold").append(f"  {spark:<13}", "cyan")
            lines.append(line)
        if self._dev:
            step, dev = self._dev
            for head, keys in ((f"dev at step {step}", _groups(dev)), ("", _overall(dev))):
                shown = _fit([f"{head:<15}", *_dev_parts(dev, keys)], inner)
                if keys:
                    lines.append(Text(shown[:15], "dim").append(shown[15:], "green"))
        if not cells:
            lines.append(Text("waiting for the first step", "dim"))
        for line in lines:
            line.truncate(inner)
        return Panel(Text("\n").join(lines), title=Text(self.name, "bold"), title_align="left", width=width)

    def _bar(self, width: int) -> Text:
        step, now = self.step or 0, self._clock()
        left = self.seconds_left()
        tail = f"  {step}/{self.total}  {duration(now - self._began)}" + (
            f", {duration(left)} left" if left is not None else ""
        )
        size = max(width - len(tail), 4)
        done = min(round(size * step / max(self.total, 1)), size)
        return Text("━" * done, "green").append("━" * (size - done), "bright_black").append(tail)

    def summary(self, stopped: bool = False) -> str:
        """The line that stays: steps, time, reward or loss from first to last, KL, development accuracy."""
        parts = [f"{'stopped at ' if stopped else ''}{self.step or 0}/{self.total} steps"]
        if self._first_step is not None and self._first_step > 1:
            parts[0] += f" (resumed at {self._first_step - 1})"
        parts.append(duration(self._clock() - self._began))
        if self._history:
            first, last = figure(self._history[0]), figure(self._history[-1])
            parts.append(f"{self._fields[0].words} {first + ' -> ' if len(self._history) > 1 else ''}{last}")
        if "kl_sft" in self.row:
            parts.append(f"KL to SFT {figure(self.row['kl_sft'])}")
        if self._dev and "accuracy" in self._dev[1]:
            last = figure(self._dev[1]["accuracy"])
            parts.append(f"dev accuracy {'' if self._first_dev is None else figure(self._first_dev) + ' -> '}{last}")
        return f"{self.name}  {', '.join(parts)}"


def _groups(dev: Mapping[str, Any]) -> list[str]:
    return [key for key in dev if key not in ("accuracy", "nll")]


def _overall(dev: Mapping[str, Any]) -> list[str]:
    return [key for key in ("accuracy", "nll") if key in dev]


def _dev_parts(dev: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    words = {"accuracy": "all items", "nll": "held-out NLL"}
    return [f"{words.get(key, key)} {figure(dev[key])}" for key in keys]


def _fit(parts: Sequence[str], width: int) -> str:
    """As many parts as fit, and how many more there are."""
    for count in range(len(parts), 0, -1):
        rest = len(parts) - count
        line = "  ".join([*parts[:count], *([f"+{rest} more"] if rest else [])])
        if len(line) <= width:
            return line
    return parts[0][:width]


class Console:
    """Where a command talks. plain: lines instead of a live panel (None: unless stderr is a terminal that can do it).

    quiet leaves warnings, errors and results. `file` takes everything, for tests and logs.
    """

    def __init__(
        self,
        plain: bool | None = None,
        file: TextIO | None = None,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.quiet, self.clock, self._file = quiet, clock, file
        self._err = RichConsole(file=file, stderr=file is None, highlight=False, markup=False, emoji=False)
        self.plain = not self._can_animate() if plain is None else plain
        self._warned: set[str] = set()

    @property
    def width(self) -> int:
        """Columns of the terminal; 80 where there is none."""
        return self._err.width

    @property
    def height(self) -> int:
        """Lines of the terminal."""
        return self._err.height

    def live(self, renderable: RenderableType, *, refresh_per_second: float) -> Live:
        """A display that is redrawn in place until its context is left; what is printed meanwhile goes above it."""
        return Live(renderable, console=self._err, refresh_per_second=refresh_per_second)

    def say(self, text: str) -> None:
        """A note; hidden by quiet."""
        if not self.quiet:
            self._line(text)

    def warn(self, text: str) -> None:
        """`warning: text`; each distinct text once."""
        if text not in self._warned:
            self._warned.add(text)
            self._line(f"warning: {text}", "yellow")

    def error(self, text: str) -> None:
        """`error: text`."""
        self._line(f"error: {text}", "bold red")

    def print(self, renderable: RenderableType) -> None:
        """A result (a rich table, a text), to stdout."""
        out = self._err if self._file else RichConsole(highlight=False, markup=False, emoji=False)
        if not out.is_terminal:
            out.width = PANEL_WIDTH
        out.print(renderable)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[StageView]:
        """Progress of one stage of `total` steps; on leaving, also by an exception, one line of summary stays."""
        view = StageView(self, name, total)
        finished = False
        try:
            if self.plain or self.quiet:
                yield view
            else:
                with Live(view, console=self._err, refresh_per_second=REFRESHES_PER_SECOND, transient=True):
                    yield view
            finished = True
        finally:
            self.say(view.summary(stopped=not finished))

    def _line(self, text: str, style: str | None = None) -> None:
        """One line as it is, never read as markup and legible in any encoding; a terminal wraps it between words."""
        if self.plain or self.quiet:
            stream = self._file or sys.stderr
            encoding = getattr(stream, "encoding", None) or "utf-8"
            stream.write(text.encode(encoding, "replace").decode(encoding) + "\n")
            stream.flush()
        else:
            self._err.print(Text(text, style or ""))

    def _can_animate(self) -> bool:
        stream = self._file or sys.stderr
        encoding = (getattr(stream, "encoding", None) or "").lower().replace("-", "")
        return stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown") and encoding == "utf8"
