"""From a sweep to the stages it takes: each once, however many cells share it, in an order that respects parents.

A task is a stage that is to be run, named before any data are read: its key is made as the stage's id is, from the
names of data, items and models instead of their content.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from srppo.ablations.spec import Cell, Sweep
from srppo.config import Recipe, canonical_json
from srppo.record.store import stage_id
from srppo.stages.kinds import KINDS, kind_of, stage_settings


@dataclass(frozen=True)
class Task:
    """A stage to be run. needs: keys of the tasks that must be done before."""

    key: str
    kind: str
    recipe: Recipe
    needs: tuple[str, ...]

    @property
    def name(self) -> str:
        """For lines in a log."""
        return f"{self.titled(self.kind)}, {self.key[:8]}"

    def titled(self, name: str) -> str:
        """With its seed."""
        return f"{name}, seed {self.recipe.seed}"


class Plan:
    """The tasks of a sweep in an order in which they can run, and which of them measure each cell."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.tasks: dict[str, Task] = {}
        self.measured_by: dict[tuple[Cell, int], str] = {}
        self._titles: dict[str, str] = {}
        for seed in sweep.seeds:  # seed by seed: a sweep that is stopped has whole seeds
            for cell in sweep.cells():
                arm, recipe = sweep.arm(cell.arm), sweep.recipe_of(cell, seed)
                key = self.measured_by[cell, seed] = self._add(arm.kind, recipe)
                self._titles.setdefault(key, f"{cell.arm} at {cell.point}" if len(sweep.points) > 1 else cell.arm)

    def title(self, key: str) -> str:
        """A task as people know it: the first cell that it measures, or what it is a parent for, and its seed."""
        return self.tasks[key].titled(self._titles.get(key, self.tasks[key].kind))

    def _add(self, kind: str, recipe: Recipe) -> str:
        needs = tuple(self._add(parent, recipe) for parent in KINDS[kind].parents)
        key = task_key(kind, recipe, needs)
        self.tasks.setdefault(key, Task(key, kind, recipe, needs))
        return key


def task_key(kind: str, recipe: Recipe, needs: Sequence[str] = ()) -> str:
    """Equal for cells that share a stage: same kind, settings, data, model and parents."""
    name, data, model = kind_of(kind, recipe).name, recipe.data, recipe.model
    beside = {"eval_items": recipe.eval.items}
    models = canonical_json([model.base, model.sft, model.trust_remote_code, model.allow_pickle])
    sources = [data.demonstrations, data.prompts if KINDS[name].needs_prompts else None]
    return stage_id(name, stage_settings(recipe, name) | beside, [models, *needs], canonical_json(sources))
