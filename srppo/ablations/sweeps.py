"""The sweeps we ship, each a question: functions from options to a `Sweep`. Their defaults are the embedded world's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from srppo.ablations.spec import Ablation, Analysis, Arm, Sweep, every
from srppo.config import Recipe

SFT = Arm("SFT", "sft")
SRPPO = Arm("SRPPO", "ppo")
LONGER = Arm("longer SFT", "longer-sft", shares=(1.0, 1 / 4, 1 / 16, 1 / 64))
GROUP, DECODING = "unseen", "greedy"  # the mission's question: does it generalise?


@dataclass(frozen=True)
class Options:
    """What a command line may change. None and () mean the sweep's own default."""

    recipe: Recipe
    seeds: int | None = None
    sizes: tuple[int, ...] = ()
    rates: tuple[float, ...] = ()
    axes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    quick: bool = False

    @property
    def seed_list(self) -> tuple[int, ...]:
        """Consecutive from the recipe's own; 10 unless said, 3 for a quick look."""
        count = self.seeds or (3 if self.quick else 10)
        return tuple(range(self.recipe.seed, self.recipe.seed + count))


def data_size(options: Options) -> Sweep:
    """Nested prefixes of the demonstrations; the same epochs at every size, and the same steps."""
    sizes = options.sizes or ((8, 32, 128) if options.quick else (4, 8, 16, 32, 64, 128))
    steps = options.recipe.sft.steps or max(4, round(options.recipe.sft.epochs * 32 / options.recipe.sft.batch))
    budgets: dict[str, dict[str, Any]] = {"epochs": {"sft.steps": None}, "steps": {"sft.steps": steps}}
    if options.quick:
        budgets.pop("epochs")
    points = tuple(
        Ablation(
            f"{size} demonstrations, fixed {budget}",
            {"data.size": size, **keys},
            {"size": size, "budget": budget},
        )
        for budget, keys in budgets.items()
        for size in sizes
    )
    arms = (SFT, SRPPO) if options.quick else (SFT, LONGER, SRPPO)
    family = every(points, "SRPPO", *(arm.name for arm in arms if arm.name != "SRPPO"))
    return Sweep(
        name="data-size",
        question="How many demonstrations does SRPPO need, and does it gain most where there are few?",
        recipe=options.recipe,
        axes=("size", "budget"),
        points=points,
        arms=arms,
        seeds=options.seed_list,
        analysis=Analysis(GROUP, DECODING, family, trend="size", scale="log2"),
        notes=(f"fixed steps: {steps} optimizer steps at every size",),
    )
