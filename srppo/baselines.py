"""What SRPPO must beat: more of the same SFT, within the compute that SFT and PPO took together."""

from __future__ import annotations

from collections.abc import Sequence

from srppo.config import Recipe
from srppo.models import LanguageModel
from srppo.sft import steps_within
from srppo.types import EncodedDemonstration

SHARES = (1.0, 1 / 4, 1 / 16, 1 / 64)
"""Of the budget: the whole is "longer SFT at equal compute"; the one that development items pick is "epochs chosen"."""


def longer_sft_steps(
    recipe: Recipe, model: LanguageModel, rows: Sequence[EncodedDemonstration], budget_flops: int
) -> list[int]:
    """Optimizer steps of each longer SFT, longest first; each is a training of its own, with its own schedule.

    Geometric, because the best number of epochs on few demonstrations is far below what PPO's compute would pay for;
    a step along the longest run is no substitute, since its learning rate would still be near the peak.
    """
    whole = steps_within(model, rows, recipe, budget_flops)
    return list(dict.fromkeys(max(round(whole * share), 1) for share in SHARES))
