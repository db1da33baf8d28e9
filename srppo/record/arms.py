"""A record seen from outside: whether it is a run or a sweep, and why a stage of it has no good result. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from srppo.errors import RecordError
from srppo.record.store import Run, Stage

ArmsOf = Callable[[Run], Mapping[str, Sequence[Stage]]]
"""The stages of each arm of a run, by its name in tables."""


def is_sweep(spec: Mapping[str, Any]) -> bool:
    """Whether the spec of a record is a sweep's, not a plain run's."""
    return "sweep" in spec


def one_run(folder: Path) -> Run:
    """The run in a folder. Raises RecordError for a sweep: its points have arms and seeds of the same names."""
    run = Run.load(folder)
    if is_sweep(run.spec):
        raise RecordError(
            f"{folder} is a sweep, whose points have arms of the same names; give one run, or the `model` folder of "
            f"one of its stages ({folder / 'stages'}/<id>/model), or read the whole with: srppo report {folder}"
        )
    return run


def stages_by_kind(run: Run) -> dict[str, list[Stage]]:
    """The arms of a run by themselves: each kind of stage is one."""
    found: dict[str, list[Stage]] = {}
    for stage in sorted(run.stages(), key=lambda s: s.identity["config"]["seed"]):
        found.setdefault(stage.identity["kind"], []).append(stage)
    return found


def problem_of(stage: Stage, result: Mapping[str, Any] | None) -> str | None:
    """Why a stage has no good result, with its seed, in one line; None where it has one."""
    seed = stage.identity["config"]["seed"]
    if result is None:
        return f"seed {seed} is not finished; run the same command to go on"
    if result["status"] == "ok":
        return None
    return f"seed {seed} {result['status']}: {result['figures'].get('reason', 'no reason recorded')}"
