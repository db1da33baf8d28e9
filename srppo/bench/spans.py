"""Where the time of a computation goes: functions wrapped with timers, a span within another taken out of it."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Spans:
    """Seconds by name. clock: seconds, of whatever kind; None: wall time."""

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock = clock or (lambda: time.perf_counter())
        self._inside: list[float] = []  # of each open span: seconds that belong to spans within it
        self._plain: list[tuple[Any, str, Any]] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        began = self._clock()
        self._inside.append(0.0)
        try:
            yield
        finally:
            took = self._clock() - began
            self.seconds[name] += took - self._inside.pop()
            if self._inside:
                self._inside[-1] += took

    def wrap(self, owner: Any, attribute: str, name: str) -> None:
        """Time every call of a function or method, until `unwrap`."""
        plain = getattr(owner, attribute)
        self._plain.append((owner, attribute, plain))
        setattr(owner, attribute, self.timing(plain, name))

    def timing(self, plain: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function, with every call timed."""

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return plain(*args, **kwargs)

        return timed

    def unwrap(self) -> None:
        """Put back what was wrapped."""
        while self._plain:
            owner, attribute, plain = self._plain.pop()
            setattr(owner, attribute, plain)
