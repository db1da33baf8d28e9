"""Optimizers by name: each lowers a loss, and those that are not installed are one line before any work."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import get_args

import pytest
import torch
import worlds
from torch import nn

from srppo.config import PpoConfig, SftConfig
from srppo.errors import ConfigError
from srppo.training.optimizers import _KNOWN, make_optimizer

HERE = importlib.util.find_spec("bitsandbytes") is not None
NAMES = {name for section in (SftConfig, PpoConfig) for name in get_args(section.model_fields["optimizer"].annotation)}


def test_a_recipe_knows_the_same_names() -> None:
    assert set(_KNOWN) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_lowers_a_loss(name: str) -> None:
    if name.endswith("8bit") and not HERE:
        pytest.skip("bitsandbytes is not installed")
    torch.manual_seed(0)
    weight, aim = nn.Parameter(torch.randn(64, 128)), torch.randn(64, 128)
    optimizer = make_optimizer(name, [weight], 0.01)
    losses = []
    for _ in range(30):
        optimizer.zero_grad(set_to_none=True)
        loss = (weight - aim).square().sum() / 2
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.99 * losses[0]


def test_weight_decay_and_eps_reach_the_optimizer() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    (group,) = make_optimizer("adamw", [weight], 0.5, weight_decay=0.25, eps=0.125).param_groups
    assert (group["lr"], group["weight_decay"], group["eps"]) == (0.5, 0.25, 0.125)


@pytest.mark.skipif(HERE, reason="bitsandbytes is installed")
@pytest.mark.parametrize("key", ["sft.optimizer=adamw8bit", "ppo.optimizer=paged-adam8bit"])
def test_what_is_not_installed_is_said_before_any_work(key: str, tmp_path: Path) -> None:
    name, _, value = key.partition("=")
    world = worlds.make_world(tmp_path)
    with pytest.raises(ConfigError, match=r"Adam\w*8bit comes from the package bitsandbytes.*pip install bitsandbytes"):
        worlds.run_world(world.recipe({name: value}), tmp_path / "run")
    assert not (tmp_path / "run").exists()
