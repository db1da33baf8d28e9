"""What bf16 bodies cost the reward is measured at the start of PPO, beside the deviation that it has to tell apart."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import make, ragged
from tiny import EOS, PROMPTS, Bench, NoDevelopment, base_and_sft, tiny_recipe

from srppo.console import Console
from srppo.models.language_model import LanguageModel
from srppo.training.batch import Generated
from srppo.training.ppo import precision_line, train_ppo
from srppo.training.rollout import LocalSampler
from srppo.training.scores import precision_gap, score_log_ratio


def batch() -> Generated:
    tokens_BS, mask_BS, width, _ = ragged()
    return Generated(tokens_BS, mask_BS, mask_BS[:, -width:], torch.ones(len(tokens_BS), dtype=torch.bool))


@pytest.mark.parametrize("which", ["both", "sft", "base"])
def test_the_gap_is_that_to_models_in_fp32(which: str) -> None:
    narrow = {"sft": ("sft",), "base": ("base",), "both": ("sft", "base")}[which]
    models = {
        name: make("llama", precision="bf16" if name in narrow else "fp32", seed=i)
        for i, name in enumerate(("sft", "base"))
    }
    exact = {name: make("llama", seed=i) for i, name in enumerate(("sft", "base"))}
    scores = score_log_ratio(models["sft"], models["base"], batch())
    wanted = score_log_ratio(exact["sft"], exact["base"], batch())
    gaps_B = (scores.log_ratio_BT - wanted.log_ratio_BT).sum(dim=1)
    found = precision_gap(models["sft"], models["base"], batch(), scores)
    assert found == pytest.approx(float(gaps_B.square().mean().sqrt()), rel=1e-3) and found > 1e-4
    assert {name: model.precision for name, model in models.items()} == {
        name: "bf16" if name in narrow else "fp32" for name in models
    }
    assert precision_gap(exact["sft"], exact["base"], batch(), wanted) == 0.0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_says_it_once(precision: str, tmp_path: Path) -> None:
    base, sft = base_and_sft()
    for model in (base, sft):
        model.precision = precision
    text, recipe = io.StringIO(), tiny_recipe(rollout={"batch": 16}, ppo={"steps": 2, "epochs": 1})
    bench = Bench(tmp_path, recipe)
    with bench as work:
        told: Any = copy.copy(work)
        object.__setattr__(told, "console", Console(plain=True, file=text))
        policy = LanguageModel(copy.deepcopy(sft.model))
        train_ppo(recipe, told, policy, sft, base, PROMPTS, NoDevelopment(), LocalSampler([EOS], EOS))
        rows = work.stage.metrics()
    assert ["precision_gap" in row for row in rows] == [False, precision == "bf16", False]
    assert text.getvalue().count("bf16 bodies move the reward of a response by") == (precision == "bf16")


def test_more_than_a_tenth_of_the_deviation_is_a_warning() -> None:
    assert precision_line(0.027, 0.163).endswith("its deviation is 0.163: more than a tenth; set model.scoring = fp32")
    assert precision_line(0.016, 0.163).endswith("by 0.016 nats; its deviation is 0.163")
