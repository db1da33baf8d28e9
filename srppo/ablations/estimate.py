"""What a sweep will take and what it could show, before it starts. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from srppo.ablations.options import test_items
from srppo.ablations.pace import Pace
from srppo.ablations.plan import Plan, Task
from srppo.config import Recipe
from srppo.statistics.tests import detectable, seeds_needed

SEED_SD, ITEM_SD, REST_SD = 0.06, 0.30, 0.45
"""Of a paired difference of accuracies: between seeds, between items, and within both; what ten seeds of `srppo demo`
gave for SRPPO minus SFT (0.05, 0.34, 0.43) and minus longer SFT (0.07, 0.17, 0.48), greedy."""
POWER = 0.8


@dataclass(frozen=True)
class Estimate:
    """seconds: of each task, by key. least: the smallest difference such a sweep shows with 80% power before
    correction, NaN where its seeds cannot show any."""

    seconds: Mapping[str, float]
    least: float
    lines: tuple[str, ...]

    @property
    def core_hours(self) -> float:
        return sum(self.seconds.values()) / 3600


def estimate(plan: Plan, paces: Mapping[str, Pace]) -> Estimate:
    """paces: measured, by `model.base`."""
    seconds = {key: task_seconds(task, paces[task.recipe.model.base]) for key, task in plan.tasks.items()}
    items = test_items(plan.sweep.recipe)[plan.sweep.analysis.group]
    return Estimate(seconds, could_show(plan, items), tuple(power_lines(plan, items)))


def task_seconds(task: Task, pace: Pace) -> float:
    """Of one stage: starting, training, development items, and test items greedy and sampled."""
    recipe = task.recipe
    tests = pace.test_items * (1 + recipe.eval.samples) * pace.answer_s
    dev = pace.dev_items * pace.answer_s
    if task.kind == "samples":
        return pace.start_s + pace.test_items * recipe.methods.samples * pace.answer_s
    if task.kind in ("resampled", "best-of-n"):  # they choose from what is written
        return pace.start_s
    fixed = pace.start_s + tests
    if task.kind == "sft":
        steps, measured = _sft_steps(recipe, pace)
        return fixed + steps * pace.sft_step_s + (measured + 1) * dev
    if task.kind == "ppo":
        every = recipe.eval.every or recipe.ppo.steps
        return fixed + recipe.ppo.steps * pace.ppo_step_s + (math.ceil(recipe.ppo.steps / every) + 1) * dev
    if task.kind == "longer-sft":  # by counted compute, whose rate is taken to be the same
        train = recipe.ppo.steps * pace.ppo_step_s + _sft_steps(recipe, pace)[0] * pace.sft_step_s
        return fixed + (task.share or 1.0) * train + dev
    return fixed


def _sft_steps(recipe: Recipe, pace: Pace) -> tuple[int, int]:
    """(optimizer steps, measurements) of SFT."""
    rows = recipe.data.size or pace.rows
    if recipe.sft.steps:
        return recipe.sft.steps, min(recipe.sft.steps, 5)
    return recipe.sft.epochs * math.ceil(rows / recipe.sft.batch), recipe.sft.epochs


def could_show(plan: Plan, items: int) -> float:
    """The smallest difference shown with 80% power at these seeds and items, on the spreads assumed above."""
    seeds, alpha = len(plan.sweep.seeds), plan.sweep.analysis.alpha
    if seeds < seeds_needed(alpha, max(len(plan.sweep.analysis.family), 1)) or not items:
        return math.nan
    error = math.sqrt(SEED_SD**2 / seeds + ITEM_SD**2 / items + REST_SD**2 / (seeds * items))
    return detectable(error, seeds - 1, alpha=alpha)


def power_lines(plan: Plan, items: int) -> list[str]:
    """In plain words: what could be significant, and a warning where nothing could."""
    analysis, seeds = plan.sweep.analysis, len(plan.sweep.seeds)
    tests, needed = len(analysis.family), seeds_needed(analysis.alpha, max(len(analysis.family), 1))
    if not tests:
        return ["the plan tests no difference: its figures describe, and show nothing"]
    if seeds < needed:
        alone = seeds_needed(analysis.alpha)
        return [
            f"warning: with {_many(seeds, 'seed')} no difference can be significant: {_many(tests, 'test')} of the "
            f"plan take {needed} seeds (one alone {alone}); read the intervals, or give --seeds"
        ]
    return [
        f"{seeds} seeds and {items} items a group show differences of about {could_show(plan, items):.2f} or more with "
        f"80% power before Holm's correction over {tests} (assumed spreads: {SEED_SD:g} between seeds, {ITEM_SD:g} "
        f"between items, {REST_SD:g} within)"
    ]


def _many(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
