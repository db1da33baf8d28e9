"""The trainer has no pull of its own: a reward that tells nothing apart changes no answer's length (docs/length.md).

A positive constant paid at the end, over values of 0, with lambda below 1: the shorter answer's tokens get more of it.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from pathlib import Path
from statistics import mean

import pytest
import torch
from tiny import EOS, PROMPTS, Bench, NoDevelopment, base_and_sft, tiny_recipe

from srppo.config import Recipe, load_recipe, with_overrides
from srppo.training.advantage import gae, length_lambda
from srppo.training.batch import RolloutBatch
from srppo.training.ppo import length_warnings, make_targets, train_ppo
from srppo.training.reward import RunningStd, centred, compute_rewards, mean_of_others
from srppo.training.rollout import LocalSampler
from srppo.training.scores import Scores

LETTERS, LONGEST = (1, 2), 6
RESPONSES = [(*body, EOS) for n in range(1, LONGEST + 1) for body in itertools.product(LETTERS, repeat=n - 1)] + list(
    itertools.product(LETTERS, repeat=LONGEST)
)  # 63 that end, 64 at the limit
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.toml"))
CONSTANT = 10.0  # nats, whatever was said


def every_response(per_prompt: int, at: str = "eos") -> tuple[RolloutBatch, Scores]:
    """Each response, with `per_prompt` 2 beside one from the list's other end, under a policy that is the SFT model.

    The reward of each is CONSTANT, at its last token or spread evenly.
    """
    rows = [row for pair in zip(RESPONSES, reversed(RESPONSES), strict=True) for row in pair[:per_prompt]]
    lengths_B1 = torch.tensor([[len(row)] for row in rows])
    mask_BT = torch.arange(LONGEST) < lengths_B1
    tokens_BT = torch.tensor([[*row, *[EOS] * (LONGEST - len(row))] for row in rows])
    one_B1 = torch.ones(len(rows), 1, dtype=torch.long)
    sft_BT = torch.full(mask_BT.shape, -1.0).masked_fill(~mask_BT, 0.0)
    ratio_BT = CONSTANT * (torch.arange(LONGEST) == lengths_B1 - 1) if at == "eos" else CONSTANT / lengths_B1 * mask_BT
    batch = RolloutBatch(
        torch.cat([one_B1, tokens_BT], dim=1),
        torch.cat([one_B1.bool(), mask_BT], dim=1),
        mask_BT,
        torch.tensor([row[-1] == EOS for row in rows]),
        sft_BT,
        sft_BT,
        torch.zeros_like(sft_BT),
    )
    return batch, Scores(ratio_BT, sft_BT, sft_BT - ratio_BT)


def expected_update(recipe: Recipe) -> dict[tuple[tuple[int, ...], int], float]:
    """The expected first update of the logit of each token after each prefix, in units of the step: by enumeration.

    pi(a|s) (A(s, a) - sum over b of pi(b|s) A(s, b)), A(s, a) the mean advantage of what goes on from there, under a
    policy that takes each token with the same probability.
    """
    per_prompt = recipe.rollout.per_prompt
    batch, scores = every_response(per_prompt, recipe.reward.placement)
    rewards = compute_rewards(recipe.reward, scores, batch, RunningStd(), seed=0, per_prompt=per_prompt)
    targets = make_targets(recipe, batch, rewards, scores.anchor_BT(recipe.reward.anchor))
    sums: dict[tuple[int, ...], dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    advantages_BT = targets.advantages_BT.masked_fill(~targets.loss_mask_BT, 0.0)[::per_prompt]
    for response, advantages in zip(RESPONSES, advantages_BT.tolist(), strict=True):
        p = (1 / 3) ** len(response)
        for t, token in enumerate(response):
            cell = sums[response[:t]][token]
            cell[0], cell[1] = cell[0] + p * advantages[t], cell[1] + p
    found = {}
    for prefix, cells in sums.items():
        middle = sum(total for total, _ in cells.values()) / sum(p for _, p in cells.values())
        found |= {(prefix, token): (total / p - middle) / 3 for token, (total, p) in cells.items()}
    return found


def variants() -> list[pytest.param]:
    cases = []
    for path, advantage in itertools.product(RECIPES, ("gae", "rloo")):
        keys = {"ppo.advantage": advantage, "rollout.per_prompt": 1 if advantage == "gae" else 2}
        cases.append(pytest.param(path, {**keys, "ppo.critic_warmup": 0}, id=f"{path.stem}-{advantage}"))
    return cases


@pytest.mark.parametrize(("path", "keys"), variants())
def test_a_constant_reward_moves_no_token(path: Path, keys: dict[str, object]) -> None:
    """Exactly: every recipe that is shipped, with either advantage, and its own rule for the length limit."""
    recipe = with_overrides(load_recipe(path), keys)
    update = expected_update(recipe)
    assert len(update) == 3 * sum(2**n for n in range(LONGEST))
    assert set(update.values()) == {0.0}


@pytest.mark.parametrize("placement", ["eos", "token"])
@pytest.mark.parametrize("at_limit", ["keep", "zero", "drop"])
@pytest.mark.parametrize("per_prompt", [1, 2])
def test_nor_under_any_rule(placement: str, at_limit: str, per_prompt: int) -> None:
    recipe = tiny_recipe(
        reward={"placement": placement, "at_limit": at_limit},
        rollout={"per_prompt": per_prompt},
        ppo={"whiten": False},  # which blows rounding up
    )
    assert all(abs(step) < 1e-5 for step in expected_update(recipe).values())


def test_without_centring_it_raises_eos() -> None:
    """What the default was: EOS gains and the letters lose after every prefix, but where the limit ends both alike."""
    update = expected_update(tiny_recipe(reward={"center": "none"}))
    for (prefix, token), step in update.items():
        if len(prefix) < LONGEST - 1:
            assert step > 0.05 if token == EOS else step < -0.02, (prefix, token, step)


def test_at_the_limit_zero_pays_for_ending_without_centring() -> None:
    recipe = tiny_recipe(
        reward={"center": "none", "at_limit": "zero"}, rollout={"per_prompt": 2}, ppo={"advantage": "rloo"}
    )
    assert expected_update(recipe)[(1, 1, 1, 1, 1), EOS] > 0.05


def test_the_critic_from_the_mean_moves_no_token_either() -> None:
    """Values at the mean return, as `center = critic` sets them at the first step: all deltas are 0."""
    batch, scores = every_response(1)
    values_BT = torch.full_like(scores.log_ratio_BT, CONSTANT).masked_fill(~batch.response_mask_BT, 0.0)
    advantages_BT = gae(scores.log_ratio_BT, values_BT, batch.response_mask_BT, gamma=1.0, lam=0.95)
    assert set(advantages_BT.flatten().tolist()) == {0.0}


def test_the_mean_is_of_the_other_rollouts() -> None:
    x_B = torch.tensor([1.0, 2.0, 4.0, 8.0])
    every_B, some_B = torch.ones(4, dtype=torch.bool), torch.tensor([True, False, True, True])
    assert mean_of_others(x_B, every_B, 1).tolist() == pytest.approx([14 / 3, 13 / 3, 11 / 3, 7 / 3])
    assert mean_of_others(x_B, every_B, 2).tolist() == [2.0, 1.0, 8.0, 4.0]
    # The first has no other in its group that counts: the batch stands in.
    assert mean_of_others(x_B, some_B, 2).tolist() == [6.0, 1.0, 8.0, 4.0]
    assert mean_of_others(x_B, torch.zeros(4, dtype=torch.bool), 2).tolist() == [0.0] * 4


@pytest.mark.parametrize("at", ["eos", "token"])
def test_centring_takes_the_mean_off_where_the_reward_is_paid(at: str) -> None:
    batch, scores = every_response(1)
    rewards_BT = centred(scores.log_ratio_BT, batch.response_mask_BT, batch.ended_B, per_prompt=1, at=at)
    torch.testing.assert_close(rewards_BT.sum(dim=1), torch.zeros(len(rewards_BT)), atol=1e-5, rtol=0)
    places = {"eos": 1, "token": LONGEST}[at]
    assert int(((rewards_BT - scores.log_ratio_BT)[-1] != 0).sum()) == places


def test_lambda_by_length() -> None:
    mask_BT = torch.arange(40) < torch.tensor([[40], [4], [1]])
    assert length_lambda(mask_BT, 0.5).tolist() == pytest.approx([0.95, 0.5, 0.0])
    rewards_BT = torch.zeros(3, 40)
    rewards_BT[:, 0] = 1.0
    rewards_BT[0, 39] = 1.0
    advantages_BT = gae(rewards_BT, torch.zeros(3, 40), mask_BT, gamma=1.0, lam=length_lambda(mask_BT, 0.5))
    assert advantages_BT[:, 0].tolist() == pytest.approx([1 + 0.95**39, 1.0, 1.0])


def test_the_critics_lambda_is_of_its_targets_alone() -> None:
    batch, scores = every_response(1)
    batch.old_values_BT[:] = torch.linspace(-1, 1, LONGEST).masked_fill(~batch.response_mask_BT, 0.0)
    own, other = (tiny_recipe(ppo={"critic_lam": lam, "whiten": False}) for lam in (None, 1.0))
    rewards = compute_rewards(own.reward, scores, batch, RunningStd(), seed=0)
    before, after = (make_targets(recipe, batch, rewards, scores.sft_logprobs_BT) for recipe in (own, other))
    assert torch.equal(before.advantages_BT, after.advantages_BT)
    # Lambda 1: the return itself, which is 0 for all once the mean is off.
    assert after.returns_BT.abs().max() < 1e-5 < before.returns_BT.abs().max()


# ---- a run

LIMIT, STEPS = 16, 8


def drift(folder: Path, center: str, seed: int) -> tuple[float, float]:
    """By how much the mean length and the share of ended rollouts change under the shuffled reward."""
    torch.set_num_threads(1)
    base, sft = base_and_sft(distance=1.0)
    policy = copy.deepcopy(sft)
    recipe = tiny_recipe(
        rollout={"max_new_tokens": LIMIT},
        reward={"kind": "shuffled", "center": center, "beta": 0.05},
        ppo={"steps": STEPS, "lr": 5e-4, "value_lr": 2e-3, "max_kl": 1000.0},
    )
    recipe = with_overrides(recipe, {"seed": seed})
    with Bench(folder, recipe) as bench:
        train_ppo(recipe, bench, policy, sft, base, PROMPTS, NoDevelopment(), LocalSampler([EOS], EOS))
        rows = [row for row in bench.stage.metrics() if "length" in row]
    assert rows[0]["reward"] > 0.9 * rows[0]["reward_std"] > 1
    return rows[-1]["length"] - rows[0]["length"], rows[-1]["ended"] - rows[0]["ended"]


def test_under_a_reward_that_knows_nothing_length_stays_within_its_noise(tmp_path: Path) -> None:
    """Shuffled rewards of a positive mean, three seeds: uncentred, answers lose some 3 of 12 tokens; else they wander,
    by about one either way a seed."""
    found = {
        center: [drift(tmp_path / f"{center}-{seed}", center, seed) for seed in range(3)]
        for center in ("none", "batch", "critic")
    }
    print(found)
    lengths = {center: [length for length, _ in each] for center, each in found.items()}
    assert max(lengths["none"]) < -1.5 and all(ended > 0.05 for _, ended in found["none"])
    for center in ("batch", "critic"):
        assert abs(mean(lengths[center])) < 1.8, center
        assert abs(mean(ended for _, ended in found[center])) < 0.15, center
        assert mean(lengths[center]) > mean(lengths["none"]) + 1, center


# ---- the alarm

ROW = {"reward": 8.6, "reward_std": 6.0, "explained_variance": 0.01}


def test_the_alarm_says_what_follows_and_what_to_set() -> None:
    (text,) = length_warnings(ROW, tiny_recipe(reward={"center": "none"}))
    assert "shorter" in text and "reward.center=batch" in text and "\n" not in text
    (text,) = length_warnings({**ROW, "reward": -8.6}, tiny_recipe(reward={"center": "none"}))
    assert "longer" in text


@pytest.mark.parametrize(
    ("row", "keys"),
    [
        ({}, {}),
        ({}, {"reward.center": "critic"}),
        ({}, {"reward.center": "none", "ppo.lam": 1.0}),
        ({"reward_std": 9.0}, {"reward.center": "none"}),
        ({"explained_variance": 0.5}, {"reward.center": "none"}),
    ],
    ids=["centred", "critic at the mean", "lambda 1", "small mean", "the critic knows"],
)
def test_and_is_silent_elsewhere(row: dict[str, float], keys: dict[str, object]) -> None:
    assert length_warnings({**ROW, **row}, with_overrides(tiny_recipe(), keys)) == []
