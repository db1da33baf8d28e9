"""What the objective itself can give, before any PPO, and how much of it a PPO run reached.

Samples of pi_sft, weighted, stand for the closed-form optimum (`optimum.py`); samples of the PPO checkpoints stand for
themselves, on the same prompts. It tells an optimiser's failure (the optimum is good, PPO is far from it) from a
reward's (PPO is at the optimum, and the optimum is no better).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from srppo.analysis.optimum import (
    Draws,
    Point,
    Reached,
    beta_grid,
    measured,
    optimum,
    point_of,
    reached_of,
)
from srppo.analysis.ppo_arms import PpoArm, ppo_arms
from srppo.analysis.questions import Question, load_questions, sample
from srppo.analysis.samples import rewarded
from srppo.config import RewardConfig
from srppo.console import Console, duration
from srppo.errors import ConfigError, UserError
from srppo.models.language_model import LanguageModel
from srppo.models.pair import Pair, load_pair
from srppo.reward_kinds import REWARD_KINDS

PROMPTS = 120
SAMPLES, PPO_SAMPLES = 256, 16  # a prompt: of the SFT model, of each checkpoint
PPO_GROUPS = ("demonstrated", "prompted")  # embedded groups that PPO prompts come from; `unseen` is told apart


@dataclass(frozen=True)
class ForecastResult:
    """Everything the tables, plots and sentences are made of. `training`: by PPO stage, rows of metrics.jsonl.

    checkpoints: every step of every PPO stage whose weights are left. reached: of those, the ones with an optimum."""

    sft: str
    base: str
    anchor: str
    beta: float
    samples: int
    prompts: int
    points: tuple[Point, ...]
    start: Point
    checkpoints: tuple[Point, ...] = ()
    reached: tuple[Reached, ...] = ()
    training: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    notes: tuple[str, ...] = field(default=())

    @property
    def own(self) -> Point | None:
        """The optimum of the recipe's own objective."""
        return self.optimum_of(self.anchor, self.beta)

    def optimum_of(self, anchor: str, beta: float) -> Point | None:
        """The optimum of an objective; None where it was not forecast."""
        return next((point for point in self.points if (point.anchor, point.beta) == (anchor, beta)), None)


def forecast_command(
    run: Path | None = None,
    *,
    sft: str | None = None,
    base: str | None = None,
    seed: int | None = None,
    prompts: Path | None = None,
    limit: int | None = PROMPTS,
    samples: int = SAMPLES,
    betas: Sequence[float] = (),
    anchors: Sequence[str] = ("sft", "base"),
    checkpoints: bool = True,
    device: str = "cpu",
    console: Console,
) -> ForecastResult:
    """Forecast a run's objective (or that of two given models under the default recipe) over `betas` and `anchors`.

    `prompts`: a JSONL file (prompt, and may hold answer, group); default the development items. `samples`: of the SFT
    model, a prompt. `checkpoints`: measure the run's PPO checkpoints on the same prompts.
    """
    _check_options(samples, betas, anchors)
    pair = load_pair(run, sft=sft, base=base, seed=seed, device=device)
    arms, set_aside = _arms(pair) if checkpoints else ([], [])
    config = _objective(pair, arms)
    notes = [*_notes(pair, config), *set_aside]
    if pair.stage is not None:
        notes.append(f"Training seed {pair.recipe.seed} alone: the intervals say nothing of other seeds.")
    questions = load_questions(pair, prompts, limit, console)
    draws = _draw(pair, pair.sft, questions, samples, config, console, "SFT")
    groups = np.array([question.group for question in questions])
    ours_Q = _seen_by_ppo(groups, notes)
    points = [
        point_of(optimum(draws, a, b), groups, ours_Q, f"{a} {b:g}", anchor=a, beta=b, k=samples)
        for a, b in _grid(config, [arm.config for arm in arms], betas, anchors)
    ]
    measured_arms, reached = [], []
    for arm in arms:
        objective = (arm.config.anchor, arm.config.beta or 0.0)
        sft_Q = measured(draws, *objective)
        best_Q = optimum(draws, *objective) if arm.config.beta else None
        for step, which, policy in arm.checkpoints(pair):
            name = f"{arm.name}, step {step}" + (f" ({which})" if which else "")
            arm_Q = measured(_draw(pair, policy, questions, PPO_SAMPLES, arm.config, console, name), *objective)
            measured_arms.append(point_of(arm_Q, groups, ours_Q, name, arm=arm.name, step=step))
            if best_Q is not None:
                reached.append(reached_of(name, objective, arm_Q, sft_Q, best_Q, ours_Q))
    return ForecastResult(
        pair.sft_name,
        pair.base_name,
        config.anchor,
        config.beta,
        samples,
        int(ours_Q.sum()),
        tuple(points),
        point_of(measured(draws, config.anchor, config.beta), groups, ours_Q, "SFT"),
        tuple(measured_arms),
        tuple(reached),
        {arm.name: arm.rows for arm in arms if arm.rows},
        tuple(notes),
    )


def _check_options(samples: int, betas: Sequence[float], anchors: Sequence[str]) -> None:
    if samples < 2:
        raise UserError(f"--samples {samples} is too few to weigh; give at least 2, rather {SAMPLES}")
    if bad := [beta for beta in betas if not beta > 0]:
        raise UserError(f"--beta {bad[0]:g} has no closed-form optimum; give values above 0")
    if unknown := set(anchors) - {"sft", "base"}:
        raise UserError(f"--anchor {min(unknown)} is unknown; give sft or base")


def _seen_by_ppo(groups: np.ndarray, notes: list[str]) -> np.ndarray:
    """Q bool, the prompts that the figures are over: those of tasks that PPO sees, or all where none is named so."""
    ours_Q = np.isin(groups, PPO_GROUPS)
    if not ours_Q.any():
        return np.ones(len(groups), dtype=bool)
    if not ours_Q.all():
        others = ", ".join(sorted(set(groups[~ours_Q])))
        notes.append(
            f"Figures are over the {int(ours_Q.sum())} prompts of tasks that PPO sees; {others}: by group only."
        )
    return ours_Q


def _grid(
    config: RewardConfig, others: Sequence[RewardConfig], betas: Sequence[float], anchors: Sequence[str]
) -> list[tuple[str, float]]:
    """(anchor, beta) to forecast; the recipe's own and those of the PPO stages are always among them."""
    grid = [(a, b) for a in anchors for b in (sorted(set(betas), reverse=True) or beta_grid(config.beta))]
    own = [(each.anchor, each.beta) for each in (config, *others) if each.beta]
    return list(dict.fromkeys([*grid, *own]))


def _arms(pair: Pair) -> tuple[list[PpoArm], list[str]]:
    """PPO stages with the recipe's reward, or else the last one's; notes on the others, other training seeds too."""
    arms, notes = ppo_arms(pair, pair.recipe.reward)
    if not arms:
        arms, notes = ppo_arms(pair, None)
    seeds = [
        s.identity["config"]["seed"] for s in (pair.run.stages() if pair.run else []) if s.identity["kind"] == "ppo"
    ]
    rest = sorted({*seeds} - {arm.stage.identity["config"]["seed"] for arm in arms})
    if rest:
        notes.append(
            f"PPO of training seeds {', '.join(map(str, rest))} started from other SFT models, which have frontiers of "
            "their own: --seed."
        )
    return arms, notes


def _objective(pair: Pair, arms: Sequence[PpoArm]) -> RewardConfig:
    """The recipe's reward where a PPO stage has it, or there is none; else that of the last stage."""
    configs = [arm.config for arm in arms]
    return pair.recipe.reward if not configs or pair.recipe.reward in configs else configs[-1]


def _notes(pair: Pair, config: RewardConfig) -> list[str]:
    """Where the recipe's PPO does not aim at the closed form. Raises ConfigError where there is none."""
    if REWARD_KINDS[config.kind].among is not None:
        raise ConfigError(
            f"reward.kind = {config.kind} pays by other rollouts, so it has no closed-form optimum to forecast"
        )
    notes = []
    if config.kl == "k3":
        notes.append("reward.kl = k3 in the loss is biased: this PPO aims elsewhere than at the optimum shown")
    if config.at_limit == "drop":
        notes.append("reward.at_limit = drop leaves rollouts out of the loss; the optimum shown keeps them")
    if pair.recipe.ppo.gamma < 1:
        notes.append(f"ppo.gamma = {pair.recipe.ppo.gamma:g} discounts; the optimum shown is for gamma 1")
    return notes


def _draw(
    pair: Pair,
    policy: LanguageModel,
    questions: Sequence[Question],
    samples: int,
    config: RewardConfig,
    console: Console,
    name: str,
) -> Draws:
    """Samples of a policy with their rewards. PPO samples at the rollout temperature, whose distribution it optimises;
    weights need samples of pi_sft at temperature 1."""
    own = policy is not pair.sft
    temperature = pair.recipe.rollout.temperature if own else 1.0
    console.say(f"{name}: {samples} samples of {len(questions)} prompts")
    drawn = sample(
        pair,
        policy,
        questions,
        samples,
        purpose=f"forecast {name}",
        temperature=temperature,
        progress=_Progress(console, name),
    )
    return rewarded(pair, questions, drawn, config, policy=policy if own else None, temperature=temperature)


class _Progress:
    """A line with the time left, at most every ten seconds."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        self.began = self.said = console.clock()

    def __call__(self, done: int, total: int) -> None:
        now = self.console.clock()
        if now - self.said > 10 and done < total:
            self.said = now
            left = duration((now - self.began) / done * (total - done))
            self.console.say(f"{self.name}: {done:,} of {total:,} samples, {left} left")
