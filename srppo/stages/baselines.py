"""What SRPPO must beat: more of the same SFT, within the compute that SFT and PPO took together."""

from __future__ import annotations

from collections.abc import Sequence

from srppo.config import Recipe
from srppo.data.types import EncodedDemonstration
from srppo.models.language_model import LanguageModel
from srppo.training.sft import steps_within

SHARES = (1.0, 1 / 4, 1 / 16, 1 / 64)
"""Of the budget: the whole is "longer SFT at equal compute"; the one that development items pick is "epochs chosen"."""


def longer_sft_steps(
    recipe: Recipe, model: LanguageModel, rows: Sequence[EncodedDemonstration], budget_flops: int, share: float = 1.0
) -> int:
    """Optimizer steps of a longer SFT that takes a share of a budget; each is a training with a schedule of its own.

    Shares are geometric, because the best number of epochs on few demonstrations is far below what PPO's compute would
    pay for; a step along the longest run is no substitute, since its learning rate would still be near the peak.
    """
    return max(round(steps_within(model, rows, recipe, budget_flops) * share), 1)
