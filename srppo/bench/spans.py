"""Seconds by name, counted by wrapping functions in a process that ends soon."""

from __future__ import annotations

import functools
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import srppo.pipeline
from srppo.ablations.warm import Warm
from srppo.pipeline import Pipeline
from srppo.store import Attempt, Run


class Spans:
    """Seconds by name, as `clock` counts them."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._clock = clock
        self._inside: list[float] = []  # of each open span: seconds that belong to spans within it

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
        """Time every call of a function or method. For a process that ends soon: it is never undone."""
        setattr(owner, attribute, self.timing(getattr(owner, attribute), name))

    def timing(self, plain: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The same function, with every call timed."""

        @functools.wraps(plain)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return plain(*args, **kwargs)

        return timed

    def wrap_all(self) -> None:
        for train in ("train_sft", "train_ppo"):
            self.wrap(srppo.pipeline, train, "training")
        self.wrap(Pipeline, "measure", "measuring")
        self.wrap(Pipeline, "__post_init__", "data")
        self.wrap(Pipeline, "load", "models")
        self.wrap(Warm, "tokenizer", "models")
        untrained = Pipeline.untrained
        Pipeline.untrained = lambda self_, kind, parents, measure, *rest, **more: untrained(  # type: ignore[method-assign,assignment]
            self_, kind, parents, self.timing(measure, "measuring"), *rest, **more
        )
        for method in ("__init__", "log_metrics", "log_rollout", "log_event", "save_checkpoint", "publish", "commit"):
            self.wrap(Attempt, method, "record")
        for method in ("stage", "write_data_manifest"):
            self.wrap(Run, method, "record")
        self.wrap(os, "fsync", "sync")
