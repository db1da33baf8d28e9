"""The forecast against enumeration, where pi* and every expectation under it are exact (docs/method.md)."""

from __future__ import annotations

import json
import math
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import EOS, LIMIT, PROMPTS, SEQUENCES, base_and_sft, quiet_console, sequence_logprobs
from worlds import make_world, run_world

from srppo.analysis.forecast import ForecastResult, _draw, forecast_command
from srppo.analysis.optimum import (
    Draws,
    PerPrompt,
    Reached,
    beta_grid,
    effective,
    enough,
    measured,
    optimum,
    point_of,
    samples_needed,
    share_reached,
)
from srppo.analysis.samples import Question
from srppo.config import build_recipe
from srppo.errors import UserError
from srppo.models.pair import Pair, load_pair
from srppo.report.forecast import report_forecast, sentences
from srppo.report.plots import frontier_plot
from srppo.statistics.intervals import Estimate, item_interval
from srppo.world.items import Item

CASES = [("sft", 0.5), ("sft", 1.0), ("base", 0.3), ("base", 0.6), ("base", 1.0), ("base", 2.0)]
NAMES = ("reward_Q", "kl_sft_Q", "kl_anchor_Q", "objective_Q", "length_Q", "right_Q")


@cache
def enumerated() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """log pi_sft, r, length and rightness of all 85 responses to the first prompt; ending in token 1 is right."""
    base, sft = base_and_sft()
    sft_log, base_log = (sequence_logprobs(model, PROMPTS[0]).double().numpy() for model in (sft, base))
    length = np.array([len(y) for y in SEQUENCES], dtype=float)
    right = np.array([float(1 in y) for y in SEQUENCES])
    return sft_log, sft_log - base_log, length, right


def exact(anchor: str, beta: float, reward: np.ndarray | None = None) -> dict[str, float]:
    """Every figure of pi* by enumeration, from pi_anchor exp(r'/beta) itself."""
    sft_log, r, length, right = enumerated()
    reward = r if reward is None else reward
    anchor_log = sft_log if anchor == "sft" else sft_log - r
    star = anchor_log + reward / beta
    star = star - np.log(np.exp(star).sum())
    p = np.exp(star)
    kl_anchor = float(p @ (star - anchor_log))
    expected = float(p @ reward)
    return {
        "reward_Q": expected,
        "kl_sft_Q": float(p @ (star - sft_log)),
        "kl_anchor_Q": kl_anchor,
        "objective_Q": expected - beta * kl_anchor,
        "length_Q": float(p @ length),
        "right_Q": float(p @ right),
    }


def draws(prompts: int, samples: int, seed: int = 0, clip: float | None = None) -> Draws:
    """Independent samples of the enumerated pi_sft: `prompts` replicates of one prompt."""
    sft_log, r, length, right = enumerated()
    p = np.exp(sft_log) / np.exp(sft_log).sum()
    chosen = np.random.default_rng(seed).choice(len(p), size=(prompts, samples), p=p)
    reward = r if clip is None else r.clip(-clip, clip)
    return Draws(reward[chosen], r[chosen], length[chosen], right[chosen], np.zeros((prompts, samples)))


@pytest.mark.parametrize(("anchor", "beta"), CASES)
def test_it_converges_to_the_enumeration(anchor: str, beta: float) -> None:
    truth, found = exact(anchor, beta), optimum(draws(1, 200_000), anchor, beta)
    for name in NAMES:
        assert float(getattr(found, name)[0]) == pytest.approx(truth[name], abs=0.02), name
    assert found.ess_Q[0] > 1000


def test_a_clipped_reward_has_its_own_optimum() -> None:
    """r' differs from r, so anchor base needs both: log w = r'/beta - r."""
    reward = enumerated()[1].clip(-0.5, 0.5)
    truth, found = exact("base", 0.5, reward), optimum(draws(1, 200_000, clip=0.5), "base", 0.5)
    for name in NAMES:
        assert float(getattr(found, name)[0]) == pytest.approx(truth[name], abs=0.02), name


@pytest.mark.parametrize(("anchor", "beta"), [("sft", 0.6), ("base", 0.4)])
def test_few_samples_are_unbiased_after_the_jackknife(anchor: str, beta: float) -> None:
    """Over 4000 replicates of 24 samples the plug-in is off by many standard errors, the jackknife is not."""
    many, truth = draws(4000, 24, seed=1), exact(anchor, beta)
    found, plug_in = optimum(many, anchor, beta), optimum(many, anchor, beta, jackknife=False)

    def error(values: PerPrompt, name: str) -> tuple[float, float]:
        column = getattr(values, name)
        return float(column.mean()) - truth[name], float(column.std() / np.sqrt(len(column)))

    for name in NAMES:
        off, standard = error(found, name)
        assert abs(off) < 4 * standard + 0.1 * abs(error(plug_in, name)[0]), name
    off, standard = error(plug_in, "objective_Q")
    assert off < -4 * standard, "log mean w is low by Jensen's inequality"
    off, standard = error(plug_in, "kl_sft_Q")
    assert abs(off) > 4 * standard, "without the correction this test would show nothing"


def test_plug_in_kl_is_that_of_the_normalised_weights() -> None:
    """E*[log w] - log Z = sum W log(K W), the other way to write it."""
    some = draws(3, 50)
    found = optimum(some, "sft", 0.5, jackknife=False)
    w = np.exp(some.reward_QK / 0.5)
    w /= w.sum(axis=1, keepdims=True)
    assert found.kl_sft_Q == pytest.approx((w * np.log(50 * w)).sum(axis=1))
    assert found.kl_anchor_Q == pytest.approx(found.kl_sft_Q)
    assert found.ess_Q == pytest.approx(1 / (w**2).sum(axis=1))


@pytest.mark.parametrize("prompts", [8, 30])
def test_intervals_over_prompts_cover(prompts: int) -> None:
    """Of 200 forecasts with 64 samples a prompt, about 95% of the intervals hold the truth."""
    truth, trials = exact("sft", 0.7), 200
    values = optimum(draws(prompts * trials, 64, seed=2), "sft", 0.7)
    for name in ("kl_sft_Q", "objective_Q", "reward_Q"):
        found = [item_interval(row, limits=None) for row in getattr(values, name).reshape(trials, prompts)]
        held = np.mean([each.low <= truth[name] <= each.high for each in found])
        print(f"\ncoverage, {name}, {prompts} prompts: {held:.3f}")
        assert 0.91 <= held <= 0.99


def test_one_prompt_has_no_interval() -> None:
    values = optimum(draws(1, 64), "sft", 0.7)
    point = point_of(values, np.array(["all"]), np.array([True]), "one", k=64)
    assert np.isnan([point.reward.low, point.kl_sft.high, point.objective.low, point.length.high]).all()
    assert point.accuracy is not None and point.accuracy.high - point.accuracy.low > 0.5


def test_anchor_base_at_beta_one_is_sft_itself() -> None:
    some = draws(5, 40)
    found, itself = optimum(some, "base", 1.0), measured(some, "base", 1.0)
    for name in NAMES:
        assert getattr(found, name) == pytest.approx(getattr(itself, name), abs=1e-9), name
    assert found.ess_Q == pytest.approx(np.full(5, 40.0))


def test_the_rule_refuses_where_single_samples_decide() -> None:
    assert enough(optimum(draws(20, 200), "sft", 1.0).ess_Q)
    strong = optimum(draws(20, 8), "sft", 0.05)
    assert not enough(strong.ess_Q)
    assert samples_needed(strong.ess_Q, 8) > 8
    assert samples_needed(np.array([1.0, 1.5]), 8) == 0, "single samples hold the weight: no number can be said"
    assert enough(np.array([200.0] * 19 + [1.0])), "19 prompts at 200 and one at 1: harmonic mean 18"
    assert not enough(np.array([200.0] * 9 + [1.0])), "one in ten: harmonic mean 9.6"
    assert samples_needed(np.array([5.0, 5.0]), 64) == 130


def test_a_weight_that_holds_everything_gives_finite_numbers() -> None:
    some = draws(2, 6)
    some.reward_QK[0, 0] = 900.0
    for values in optimum(some, "sft", 0.1):
        assert values is not None and np.isfinite(values).all()


def test_share_of_the_objective() -> None:
    start, best = np.zeros(50), np.linspace(0.5, 1.5, 50)
    share = share_reached(0.6 * best + 3, start + 3, best + 3)  # where SFT stands does not matter
    assert share is not None and share.mean == pytest.approx(0.6)
    assert np.isnan(share.low), "where no prompt departs from the ratio, nothing says how far others would"
    assert share_reached(best[:1], start[:1], best[:1]) is None, "one prompt says nothing of others"
    noise = np.random.default_rng(0).normal(size=50)
    assert share_reached(best, start, noise - noise.mean()) is None, "no gain to be told from none"


def test_the_grid_holds_the_recipes_beta() -> None:
    assert 0.3 in beta_grid(0.3) and beta_grid(0.3) == sorted(beta_grid(0.3), reverse=True)
    assert beta_grid(0.0) == beta_grid(None)


def test_at_the_border_of_the_rule_little_bias_is_left() -> None:
    """Normal rewards: the case that MIN_ESS is argued from. KL and E*[r] have closed forms."""
    sigma, beta, k = 0.45, 0.25, 96
    reward = np.random.default_rng(5).normal(0, sigma, size=(6000, k))
    none = np.zeros_like(reward)
    some = Draws(reward, reward, none, None, none)
    found, plug_in = optimum(some, "sft", beta), optimum(some, "sft", beta, jackknife=False)
    truth = sigma**2 / beta**2 / 2
    assert 9.5 < effective(found.ess_Q) < 10.5
    assert abs(found.kl_sft_Q.mean() / truth - 1) < 0.09 and plug_in.kl_sft_Q.mean() / truth - 1 < -0.12
    assert found.reward_Q.mean() == pytest.approx(sigma**2 / beta, rel=0.05)
    assert found.objective_Q.mean() == pytest.approx(sigma**2 / beta / 2, rel=0.02)


class Digits:
    """A tokenizer of the enumerable world: ids as digits."""

    eos_token_id = pad_token_id = EOS

    def batch_decode(self, rows: list[list[int]], **_: object) -> list[str]:
        return ["".join(str(token) for token in row if token != EOS) for row in rows]


def enumerable(temperature: float = 1.0) -> tuple[Pair, list[Question]]:
    base, sft = base_and_sft()
    recipe = build_recipe({"rollout": {"max_new_tokens": LIMIT, "temperature": temperature}})
    pair = Pair(sft, base, Digits(), recipe, "sft", "base")  # type: ignore[arg-type]
    return pair, [
        Question(name, ids, Item(name, "1", "task", "group"))
        for name, ids in zip(("first", "second"), PROMPTS, strict=False)
    ]


@pytest.mark.parametrize(("anchor", "beta"), [("sft", 0.6), ("base", 0.4)])
def test_the_models_own_samples_give_the_enumerated_optimum(anchor: str, beta: float) -> None:
    """Through generation, scoring and rightness of real models, on the prompt that is enumerated. Weights are of
    samples at temperature 1, whatever PPO samples at."""
    pair, questions = enumerable(temperature=0.5)
    torch.set_num_threads(1)
    found = optimum(_draw(pair, pair.sft, questions, 6000, pair.recipe.reward, quiet_console(), "SFT"), anchor, beta)
    truth = exact(anchor, beta)
    only_one = np.array([float([t for t in y if t != EOS] == [1]) for y in SEQUENCES])
    sft_log, r, _, _ = enumerated()
    star = np.exp((sft_log if anchor == "sft" else sft_log - r) + r / beta)
    truth["right_Q"] = float(star @ only_one / star.sum())
    for name in NAMES:
        assert float(getattr(found, name)[0]) == pytest.approx(truth[name], abs=0.06), name


def test_another_policy_is_measured_under_its_own_samples() -> None:
    """With the base as the "PPO" policy: KL(base || sft), KL to the base 0, by enumeration."""
    pair, questions = enumerable()
    found = _draw(pair, pair.base, questions, 4000, pair.recipe.reward, quiet_console(), "PPO")
    sft_log, r, _, _ = enumerated()
    kl = float(np.exp(sft_log - r) @ -r)
    by_anchor = {anchor: measured(found, anchor, 0.5) for anchor in ("sft", "base")}
    assert by_anchor["sft"].kl_anchor_Q[0] == by_anchor["sft"].kl_sft_Q[0] == pytest.approx(kl, abs=0.05)
    assert by_anchor["base"].kl_anchor_Q[0] == pytest.approx(0.0, abs=1e-5)
    assert by_anchor["sft"].objective_Q[0] == pytest.approx(-kl - 0.5 * kl, abs=0.1)


def test_a_run_its_report_and_its_mistakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    world = make_world(tmp_path)
    folder = tmp_path / "runs" / "newest"
    run_world(world.recipe({"reward.beta": 1.0}), folder)
    console = quiet_console()
    result = forecast_command(folder, samples=32, betas=(2.0, 0.02), console=console)
    assert result.own is not None and result.own.answered and (result.own.anchor, result.own.beta) == ("sft", 1.0)
    assert result.checkpoints[0].name.endswith("(kept)") and len(result.training["PPO"]) == 2
    assert {"demonstrated", "unseen"} == result.start.by_group.keys() and result.start.reward.n == result.prompts
    assert not next(p for p in result.points if p.beta == 0.02).answered
    path = report_forecast(result, tmp_path / "out", console)
    content = json.loads(path.read_text())
    assert content["sentences"] == sentences(result) and len(content["points"]) == 5
    printed = console._file.getvalue()  # type: ignore[union-attr]
    assert "cannot say" in printed and "sft 1*" in printed and max(map(len, printed.splitlines())) <= 120
    assert (tmp_path / "out" / "frontier.svg").exists()
    monkeypatch.chdir(tmp_path)
    assert load_pair().sft_name.endswith(str(Path(load_pair(folder).sft_name).relative_to(tmp_path))), (
        "without arguments: the newest run below runs/"
    )
    with pytest.raises(UserError, match="has no finished SFT model of seed 7"):
        forecast_command(folder, seed=7, console=console)
    with pytest.raises(UserError, match="no closed-form optimum"):
        forecast_command(folder, betas=(0.0,), console=console)
    with pytest.raises(UserError, match="--anchor rl is unknown"):
        forecast_command(folder, anchors=("rl",), console=console)


def estimate(mean: float, half: float = 0.01) -> Estimate:
    return Estimate(mean, mean - half, mean + half, 40)


@pytest.mark.parametrize(
    ("better", "left", "words"),
    [
        (-0.2, 0.0, "The reward fails"),
        (0.005, 0.0, "Cannot tell whether the reward helps"),
        (0.2, 0.1, "that is the optimiser's part"),
        (0.2, -0.1, "is more accurate than that optimum"),
        (0.2, 0.005, "cannot be told from that optimum in accuracy"),
        (math.nan, 0.1, "Cannot tell whether the reward helps"),
    ],
)
def test_the_verdict(better: float, left: float, words: str) -> None:
    values = measured(draws(40, 20), "sft", 0.5)
    groups, ours = np.array(["all"] * 40), np.ones(40, dtype=bool)
    own = point_of(optimum(draws(40, 200), "sft", 0.5), groups, ours, "sft 0.5", anchor="sft", beta=0.5, k=200)
    arm = point_of(values, groups, ours, "PPO, step 3", arm="PPO", step=3)
    differences = {"optimum - SFT": estimate(better), "optimum - PPO": estimate(left), "PPO - SFT": estimate(0.0)}
    reached = Reached("PPO, step 3", "sft", 0.5, estimate(0.6), differences)
    result = ForecastResult("s", "b", "sft", 0.5, 200, 40, (own,), arm, (arm,), (reached,))
    said = sentences(result)
    assert "reached 60% [59%, 61%] of what its own objective allows" in said[0] and "optimum scores" in said[0]
    assert words in said[-1]


def test_every_stage_and_every_step_with_weights_is_drawn(tmp_path: Path) -> None:
    """A given SFT model, PPO of two training seeds, of which the weights of some steps are left, and one unfinished."""
    torch.set_num_threads(1)
    world = make_world(tmp_path)
    sft = {"model.sft": str(tmp_path / "sft"), "reward.beta": 1.0, "ppo.steps": 3, "ppo.checkpoint_every": 1}
    folder = tmp_path / "run"
    for seed in (0, 1, 2):
        run_world(world.recipe(sft | {"seed": seed}), tmp_path / f"seed-{seed}")
        shutil.copytree(tmp_path / f"seed-{seed}", folder, dirs_exist_ok=True)
    stages = {stage.identity["config"]["seed"]: stage for stage in load_pair(folder).ppo_stages()}
    (stages[2].path / "result.json").unlink()
    shutil.rmtree(stages[2].path / "lease")  # it holds the result too
    result = forecast_command(folder, samples=8, limit=4, betas=(2.0,), console=quiet_console())
    shown = {(point.arm, point.step) for point in result.checkpoints}
    for seed in (0, 1):
        kept = stages[seed].result()["figures"]["kept_step"]
        assert {s for arm, s in shown if arm == f"PPO seed {seed}"} == {kept, *stages[seed].checkpoint_steps()}
        assert len(stages[seed].checkpoint_steps()) > 1
    assert not any("seed 2" in arm for arm, _ in shown) and any("seed 2 is not finished" in n for n in result.notes)
    assert list(result.training) == ["PPO seed 0", "PPO seed 1", "PPO seed 2"], "training's rows are left of all"
    assert [each.name for each in result.reached] == [point.name for point in result.checkpoints]
    svg = frontier_plot(result, tmp_path / "frontier")[1].read_text()
    assert svg.count("as measured in training, by step") == 3 and "PPO seed 1, checkpoints" in svg
    assert svg.count("kept</text>") == 4, "two kept steps in two panels"
