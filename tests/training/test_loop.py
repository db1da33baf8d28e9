"""Learning rates and gradients of any trained stage."""

from __future__ import annotations

import math
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from tiny import tiny_llama

from srppo.errors import Diverged
from srppo.models.language_model import LanguageModel
from srppo.models.value_model import ValueModel
from srppo.training.loop import Session, clip_gradients, lr_factor


def test_a_gradient_that_is_not_finite_stops_the_run() -> None:
    model = ValueModel(LanguageModel(tiny_llama()))
    model.head.weight.grad = torch.full((1, 32), math.inf)
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


@pytest.mark.parametrize(
    ("counters", "said"),
    [
        (
            {"start_score": 0.8, "kept_score": 0.4, "kept_step": 5},
            "development score 0.4 at step 5, which is kept, 0.8",
        ),
        ({"start_score": 0.8, "kept_score": 0.8, "kept_step": 5}, None),
        ({"start_score": None, "kept_score": -math.inf, "kept_step": 5}, None),  # nothing to measure by
        ({"kept_score": 0.4, "kept_step": 5}, None),  # a stage that does not measure its start
    ],
)
def test_training_that_is_worse_than_its_start_says_so(counters: dict[str, Any], said: str | None) -> None:
    session = Session(Mock(), Mock(counters=counters), 10, lambda step: False, Mock(), "best", 10)
    assert session.harm is None if said is None else said in (session.harm or "")
