"""What SRPPO must beat: more of the same SFT, at the compute that SFT and PPO took together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from srppo.config import Recipe
from srppo.loop import Session, Workbench
from srppo.models import LanguageModel
from srppo.sft import steps_within, train_sft
from srppo.types import EncodedDemonstration

if TYPE_CHECKING:
    from srppo.evaluate import Development


def train_longer_sft(
    recipe: Recipe,
    bench: Workbench,
    model: LanguageModel,
    rows: Sequence[EncodedDemonstration],
    development: Development,
    *,
    pad_id: int,
    budget_flops: int,
) -> Session:
    """SFT of the base for the number of steps whose counted operations come nearest to `budget_flops`.

    Its schedule spans the whole of it. Its last step is "longer SFT at equal compute"; the step that development items
    pick is "SFT with its epochs chosen". It is measured as often as the PPO arm, so that both choose among as many.
    """
    measurements = -(-recipe.ppo.steps // recipe.eval.every) if recipe.eval.every else 1
    total = steps_within(model, rows, recipe, budget_flops)
    return train_sft(
        recipe, bench, model, rows, development, pad_id=pad_id, total=total, measurements=min(measurements, total)
    )
