"""The registry of rewards: a kind that is added here, in one entry, is trained, swept, explained and refused by its
facts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_layers import imports
from tiny import EOS, PROMPTS, Bench, NoDevelopment, base_and_sft, tiny_recipe
from torch import Tensor
from worlds import make_world, run_world

import srppo.reward_kinds
from srppo.ablations.plan import Plan
from srppo.ablations.spec import Cell
from srppo.ablations.sweeps import Options, reward
from srppo.config import RewardConfig, load_recipe
from srppo.errors import ConfigError
from srppo.models.language_model import LanguageModel
from srppo.reward_kinds import REWARD_KINDS, RewardKind, described
from srppo.stages.extrapolation import check_decodable
from srppo.stages.resampling import check_ranks, check_resamples
from srppo.training.ppo import train_ppo
from srppo.training.reward import Written, reward_terms
from srppo.training.rollout import LocalSampler
from srppo.training.scores import Scores


def frugal(scores: Scores, written: Written) -> Tensor:
    """-0.1 nats a token, whatever the models say."""
    return torch.full_like(scores.sft_logprobs_BT, -0.1)


def register(monkeypatch: pytest.MonkeyPatch, **facts: Any) -> None:
    monkeypatch.setitem(REWARD_KINDS, "frugal", RewardKind("frugal", "-0.1 a token", frugal, **facts))


def test_a_new_kind_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    torch.set_num_threads(1)
    base, sft = base_and_sft()
    policy = LanguageModel(copy.deepcopy(sft.model))
    recipe = tiny_recipe(reward={"kind": "frugal"}, rollout={"batch": 16}, ppo={"steps": 2, "epochs": 1})
    with Bench(tmp_path, recipe) as bench:
        train_ppo(recipe, bench, policy, sft, base, PROMPTS, NoDevelopment(), LocalSampler([EOS], EOS))
        rows = bench.stage.metrics()[1:]
    assert len(rows) == 2 and not torch.equal(policy.model.lm_head.weight, sft.model.lm_head.weight)
    for row in rows:
        assert row["reward"] == pytest.approx(-0.1 * row["length"], rel=1e-5)


def test_a_new_kind_is_an_arm_of_the_sweep_and_one_of_its_stages_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "world").mkdir()
    recipe = make_world(tmp_path / "world").recipe()
    register(monkeypatch)
    assert "frugal" in {arm.name for arm in reward(Options(recipe)).arms}
    axes = {"reward.kind": ("frugal", "ratio"), "reward.beta": (0.5,)}
    sweep = reward(Options(recipe, quick=True, seeds=1, axes=axes))
    assert [arm.name for arm in sweep.arms] == ["SFT", "longer SFT", "coherent reward", "frugal"]
    curves = sweep.analysis.curves
    assert curves and (curves.start, curves.model, curves.others) == ("SFT", "coherent reward", ("frugal",))
    plan = Plan(sweep)
    key = plan.measured_by[Cell("beta 0.5", "frugal"), 0]
    task = plan.tasks[key]
    assert task.kind == "ppo" and task.recipe.reward.kind == "frugal"
    for row in run_world(task.recipe, tmp_path / "run").metrics("ppo")[1:]:
        assert row["reward"] == pytest.approx(-0.1 * row["length"], rel=1e-5)


def test_a_new_kind_is_known_to_configuration_and_help(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^reward\.kind: the kinds of reward are ratio, .*, found 'frugal'$"):
        load_recipe(None, ["reward.kind=frugal"])
    register(monkeypatch)
    assert load_recipe(None, ["reward.kind=frugal"]).reward.kind == "frugal"
    assert "frugal: -0.1 a token" in described(REWARD_KINDS)


def test_help_explains_every_kind() -> None:
    words = str(RewardConfig.model_fields["kind"].description)
    assert all(f"{name}: {kind.description}" in words for name, kind in REWARD_KINDS.items())
    assert RewardConfig().kind == next(iter(REWARD_KINDS)) == srppo.reward_kinds.COHERENT


@pytest.mark.parametrize(
    ("facts", "decodes", "ranks"),
    [
        ({}, True, True),
        ({"by_token": False}, False, True),
        ({"among": lambda terms_BT, mask_BT, seed: terms_BT.flip(0)}, False, False),
    ],
    ids=["of single tokens", "of the response", "of the batch"],
)
def test_a_kind_is_refused_where_its_facts_say_so(
    facts: dict[str, Any], decodes: bool, ranks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(monkeypatch, **facts)
    config = RewardConfig(kind="frugal")
    for check, allowed, words in (
        (check_decodable, decodes, r"reward\.kind = frugal is about whole responses"),
        (check_ranks, ranks, r"reward\.kind = frugal pays by other rollouts"),
        (check_resamples, ranks, r"reward\.kind = frugal pays by other rollouts"),
    ):
        if allowed:
            check(config)
        else:
            with pytest.raises(ConfigError, match=words):
                check(config)


def test_a_kind_may_pay_a_rollout_what_others_earned(monkeypatch: pytest.MonkeyPatch) -> None:
    """`among` takes the terms after clips of tokens and length normalisation, and the seed; the clip of the sum comes
    after it."""
    seen: list[tuple[Tensor, int]] = []

    def swapped(terms_BT: Tensor, mask_BT: Tensor, seed: int) -> Tensor:
        seen.append((terms_BT, seed))
        return 3 * terms_BT

    register(monkeypatch, among=swapped)
    mask_BT = torch.tensor([[True, True], [True, False]])
    scores = Scores(*(torch.zeros(2, 2) for _ in range(3)))
    config = RewardConfig(kind="frugal", token_clip=0.06, length_norm=True, clip=0.1)
    found_BT = reward_terms(config, scores, Written(torch.zeros(2, 2, dtype=torch.int64), mask_BT, ~mask_BT), seed=5)
    torch.testing.assert_close(seen[0][0], torch.tensor([[-0.03, -0.03], [-0.06, 0.0]]))
    assert seen[0][1] == 5
    torch.testing.assert_close(found_BT.sum(dim=1), torch.tensor([-0.1, -0.1]))


@pytest.mark.parametrize("lengths", [[3, 1, 4, 1, 5, 2], [4, 4, 4], [2], [1, 3]])
def test_the_ratio_falls_into_what_goes_with_length_and_what_does_not(lengths: list[int]) -> None:
    mask_BT = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ratio_BT = torch.randn(mask_BT.shape, generator=torch.Generator().manual_seed(len(lengths)))
    written = Written(torch.ones_like(mask_BT, dtype=torch.long), mask_BT, torch.zeros_like(mask_BT))

    def paid(kind: str) -> Tensor:
        terms_BT = reward_terms(RewardConfig(kind=kind), Scores(ratio_BT, ratio_BT, ratio_BT), written)  # type: ignore[arg-type]
        assert not terms_BT[~mask_BT].any()
        return terms_BT.sum(dim=1).double()

    ratio, along, beyond = paid("ratio"), paid("by-length"), paid("beyond-length")
    torch.testing.assert_close(along + beyond - ratio.mean(), ratio, rtol=1e-5, atol=1e-5)
    n = np.array(lengths, dtype=float)
    line = (
        np.poly1d(np.polyfit(n, ratio.numpy(), 1))(n) if len(set(lengths)) > 1 else np.full(len(n), float(ratio.mean()))
    )
    np.testing.assert_allclose(along.numpy(), line, rtol=1e-5, atol=1e-5)
    assert float(beyond.mean()) == pytest.approx(float(ratio.mean()), abs=1e-5)
    assert float(((n - n.mean()) * beyond.numpy()).sum()) == pytest.approx(0.0, abs=1e-4)


def test_the_registry_needs_no_torch() -> None:
    assert not [name for name, _ in imports(Path(srppo.reward_kinds.__file__)) if name.startswith(("torch", "trans"))]
