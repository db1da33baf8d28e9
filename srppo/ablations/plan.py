"""From a sweep to the stages it takes: each once, however many cells share it, in an order that respects parents.

A task is a stage that is to be run, named before any data are read: its key is a hash of all that decides the stage.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from srppo.ablations.spec import Arm, Cell, Sweep
from srppo.config import Recipe, canonical_json
from srppo.stages.kinds import stage_settings

PARENTS: Mapping[str, tuple[str, ...]] = {
    "base": (),
    "sft": (),
    "ppo": ("sft",),
    "longer-sft": ("sft", "ppo"),
    "extrapolated": ("sft",),
    "decoded": ("sft",),
    "samples": ("sft",),
    "resampled": ("samples",),
    "best-of-n": ("samples",),
}
"""Kinds of stages, and the stages that each needs."""


@dataclass(frozen=True)
class Task:
    """A stage to be run. needs: keys of the tasks that must be done before. share: of compute, for longer SFT."""

    key: str
    kind: str
    recipe: Recipe
    needs: tuple[str, ...]
    share: float | None = None

    @property
    def name(self) -> str:
        """For lines in a log."""
        share = f" ({self.share:g} of the compute)" if self.share is not None else ""
        return f"{self.kind}{share}, seed {self.recipe.seed}, {self.key[:8]}"


class Plan:
    """The tasks of a sweep in an order in which they can run, and which of them measure each cell."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.tasks: dict[str, Task] = {}
        self.measured_by: dict[tuple[Cell, int], tuple[str, ...]] = {}
        self._titles: dict[str, str] = {}
        for seed in sweep.seeds:  # seed by seed: a sweep that is stopped has whole seeds
            for cell in sweep.cells():
                arm, recipe = sweep.arm(cell.arm), sweep.recipe_of(cell, seed)
                keys = self.measured_by[cell, seed] = self._of_arm(arm, recipe)
                for key in keys:
                    self._titles.setdefault(key, f"{cell.arm} at {cell.point}" if len(sweep.points) > 1 else cell.arm)

    def title(self, key: str) -> str:
        """A task as people know it: the first cell that it measures, or what it is a parent for, and its seed."""
        task = self.tasks[key]
        of = self._titles.get(key, task.kind)
        share = f" ({task.share:g} of the compute)" if task.share is not None else ""
        return f"{of}{share}, seed {task.recipe.seed}"

    def _of_arm(self, arm: Arm, recipe: Recipe) -> tuple[str, ...]:
        if not arm.shares:
            return (self._add(arm.kind, recipe),)
        return tuple(self._add(arm.kind, recipe, share) for share in arm.shares)

    def _add(self, kind: str, recipe: Recipe, share: float | None = None) -> str:
        needs = tuple(self._add(parent, recipe) for parent in PARENTS[kind])
        key = task_key(kind, recipe, needs, share)
        self.tasks.setdefault(key, Task(key, kind, recipe, needs, share))
        return key


def task_key(kind: str, recipe: Recipe, needs: Sequence[str] = (), share: float | None = None) -> str:
    """Equal for cells that share a stage: same kind, settings, data, model and parents."""
    dump = recipe.model_dump(mode="json")
    content: dict[str, Any] = {
        "kind": kind,
        "settings": stage_settings(recipe, kind),
        "model": {key: dump["model"][key] for key in ("base", "sft", "trust_remote_code", "allow_pickle")},
        "demonstrations": dump["data"]["demonstrations"],
        "prompts": dump["data"]["prompts"] if kind == "ppo" else None,
        "items": dump["eval"]["items"],
        "needs": list(needs),
        "share": share,
    }
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()[:16]
