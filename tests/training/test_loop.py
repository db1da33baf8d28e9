"""Learning rates and gradients of any trained stage."""

from __future__ import annotations

import math

import pytest
import torch

from srppo.errors import Diverged
from srppo.training.loop import clip_gradients, lr_factor


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    model = torch.nn.Linear(2, 1)
    model.weight.grad = torch.full((1, 2), math.inf)
    with pytest.raises(Diverged, match="step 7: the gradient norm is"):
        clip_gradients(model, 1.0, 7)


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1, 1]),
        ("constant", 0.5, [1 / 3, 2 / 3, 1, 1, 1]),
        ("linear", 0.0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 0.2, [1, 1, 0.75, 0.5, 0.25]),
        ("cosine", 0.4, [0.5, 1, 1, 0.75, 0.25]),
        ("linear", 1.0, [0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_learning_rates_by_hand(schedule: str, warmup: float, expected: list[float]) -> None:
    assert [lr_factor(schedule, warmup, step, 5) for step in range(1, 6)] == pytest.approx(expected)
