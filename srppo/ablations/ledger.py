"""What is known of each task, on disk: its stage, its failed tries, its logs. No torch.

    RUN/tasks/<key>/stage               id of the stage, once it is known
                    failures.jsonl      a line a failed try: reason, time, host; a try that was only killed with its
                                        worker leaves none
                    log-<time>-<pid>.txt    what each try printed
    RUN/limits.json                     what the last start of the sweep has set and no result depends on: seconds that
                                        a stage may take, and the keys of `config.FREE`

Whether a stage is done, running or diverged is what the stage itself says; nothing here can contradict it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from srppo.ablations.plan import Task
from srppo.config import Recipe, canonical_json, free_settings
from srppo.record.files import storing, write_atomic, write_whole
from srppo.record.json import read_json, read_lines
from srppo.record.lease import now
from srppo.record.store import Run, Stage

Status = Literal["waiting", "running", "done", "failed", "diverged"]


@dataclass(frozen=True)
class State:
    """Where a task stands. reason: why it failed or diverged. holder: who runs it."""

    status: Status
    reason: str = ""
    holder: Mapping[str, Any] | None = None


class Ledger:
    """The tasks' folders in a record. `tries`: failures after which a task is given up."""

    def __init__(self, run: Run, tries: int) -> None:
        self.run, self.tries = run, tries

    def folder(self, task: Task) -> Path:
        return self.run.path / "tasks" / task.key

    def stage(self, task: Task) -> Stage | None:
        """The stage of a task, where one has begun."""
        try:
            name = (self.folder(task) / "stage").read_text()
        except FileNotFoundError:
            return None
        return Stage(self.run.path / "stages" / name)

    def link(self, task: Task, stage: Stage) -> None:
        """Remember which stage a task is; said before the stage runs."""
        path = self._made(task) / "stage"
        with storing(path):
            write_whole(path, stage.id)  # not synced: what a power cut takes, the next try says again

    def state(self, task: Task) -> State:
        """As the stage says; where it says nothing, as the failures do."""
        stage = self.stage(task)
        result = stage.result() if stage else None
        if result and result["status"] == "ok":
            return State("done")
        if result and result["status"] == "diverged":
            return State("diverged", result["figures"].get("reason", "no reason recorded"))
        if stage and (holder := stage.holder()):
            return State("running", holder=holder)
        failures = self.failures(task)
        if failures and failures[-1].get("final"):
            return State("failed", failures[-1]["reason"])
        return State("waiting")

    def failures(self, task: Task) -> list[dict[str, Any]]:
        """The failed tries, oldest first."""
        return read_lines(self.folder(task) / "failures.jsonl")

    def fail(self, task: Task, reason: str, *, final: bool = False) -> None:
        """Write down a failed try. final: another one would fail the same way; so is the last that is allowed."""
        final = final or len(self.failures(task)) + 1 >= self.tries
        line = canonical_json({"reason": reason, "final": final, "time": now(), "host": socket.gethostname()}) + "\n"
        path = self._made(task) / "failures.jsonl"
        with storing(path), open(path, "ab", buffering=0) as file:
            file.write(line.encode())

    def forgive(self, task: Task) -> None:
        """Let a task that was given up be tried again; its failures stay readable."""
        path = self.folder(task) / "failures.jsonl"
        if path.exists():
            with storing(path):
                path.rename(path.with_name(f"failures-{time.time_ns()}.jsonl"))

    def limit(self, timeout_s: float, recipe: Recipe, paces: Mapping[str, Any] | None = None) -> None:
        """Set how long a stage may take and what else no result depends on, also for workers that join later.

        paces: what was measured where it starts, for who starts it again.
        """
        limits = {"timeout_s": timeout_s, "settings": free_settings(recipe), "paces": paces or {}}
        write_atomic(self.run.path / "limits.json", canonical_json(limits))

    @property
    def limits(self) -> dict[str, Any]:
        """What the last start has set: `timeout_s`, None where nobody has started yet, and `settings`, the keys of
        `config.FREE` by `section.key`, and `paces`."""
        return limits_of(self.run.path)

    def log_path(self, task: Task) -> Path:
        """Where a new try prints."""
        return self._made(task) / f"log-{time.time_ns()}-{os.getpid()}.txt"

    def _made(self, task: Task) -> Path:
        folder = self.folder(task)
        with storing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return folder


def limits_of(folder: Path) -> dict[str, Any]:
    """`Ledger.limits` of a sweep's folder, which need not be there."""
    path = folder / "limits.json"
    return {"timeout_s": None, "settings": {}, "paces": {}} | (read_json(path) if path.exists() else {})
