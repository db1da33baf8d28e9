"""What the objective itself can give, before any PPO, and how much of it a PPO run reached.

Samples of pi_sft, weighted, stand for the closed-form optimum (`optimum.py`); samples of the PPO checkpoints stand for
themselves, on the same prompts. It tells an optimiser's failure (the optimum is good, PPO is far from it) from a
reward's (PPO is at the optimum, and the optimum is no better).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from srppo.analysis.optimum import Draws, Point, Reached, beta_grid, measured, optimum, point_of, reached_of
from srppo.analysis.samples import Question, load_questions, rewarded, sample
from srppo.config import RewardConfig
from srppo.console import Console
from srppo.errors import ConfigError, UserError
from srppo.evaluation.meter import Meter
from srppo.evaluation.results import dotted
from srppo.models.language_model import LanguageModel
from srppo.models.pair import Pair, load_pair
from srppo.record.store import Stage
from srppo.reward_kinds import REWARD_KINDS
from srppo.training.loop import load_weights

PROMPTS = 120
SAMPLES, PPO_SAMPLES = 256, 16  # a prompt: of the SFT model, of each checkpoint
PPO_GROUPS = ("demonstrated", "prompted")  # embedded groups that PPO prompts come from; `unseen` is told apart
OBJECTIVE = {"anchor", "beta"}
"""What of a reward's settings moves PPO's optimum along the frontier; all others make another reward, another plane."""
MOST_NAMED = 2  # settings in the name of a PPO stage


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
    if samples < 2:
        raise UserError(f"--samples {samples} is too few to weigh; give at least 2, rather {SAMPLES}")
    if bad := [beta for beta in betas if not beta > 0]:
        raise UserError(f"--beta {bad[0]:g} has no closed-form optimum; give values above 0")
    if unknown := set(anchors) - {"sft", "base"}:
        raise UserError(f"--anchor {min(unknown)} is unknown; give sft or base")
    pair = load_pair(run, sft=sft, base=base, seed=seed, device=device)
    arms, set_aside = ppo_arms(pair) if checkpoints else ([], [])
    configs = [arm.config for arm in arms]
    config = pair.recipe.reward if not configs or pair.recipe.reward in configs else configs[-1]
    notes = [*_notes(pair, config), *set_aside]
    if pair.stage is not None:
        notes.append(f"Training seed {pair.recipe.seed} alone: the intervals say nothing of other seeds.")
    questions = load_questions(pair, prompts, limit, console)
    draws = _draw(pair, pair.sft, questions, samples, config, console, "SFT")
    groups = np.array([question.group for question in questions])
    ours_Q = np.isin(groups, PPO_GROUPS)  # the prompts that the figures are over: of tasks that PPO sees
    if not ours_Q.any():  # or all, where none is named so
        ours_Q[:] = True
    elif not ours_Q.all():
        others = ", ".join(sorted(set(groups[~ours_Q])))
        notes.append(f"Figures are over the {ours_Q.sum()} prompts of tasks that PPO sees; {others}: by group only.")
    grid = [(a, b) for a in anchors for b in (sorted(set(betas), reverse=True) or beta_grid(config.beta))]
    grid += [(each.anchor, each.beta) for each in (config, *configs) if each.beta]  # always: what PPO aimed at
    points = [
        point_of(optimum(draws, a, b), groups, ours_Q, f"{a} {b:g}", anchor=a, beta=b, k=samples)
        for a, b in dict.fromkeys(grid)
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
    purpose = f"forecast {name}"
    with Meter(console, name, samples * len(questions)) as meter:
        drawn = sample(
            pair, policy, questions, samples, purpose=purpose, temperature=temperature, progress=meter.finish
        )
    return rewarded(pair, questions, drawn, config, policy=policy if own else None, temperature=temperature)


# ---- the PPO stages that started from the SFT model


@dataclass(frozen=True)
class PpoArm:
    """One PPO stage. config: its reward. rows: of metrics.jsonl where reward and KL were measured, by step."""

    name: str
    stage: Stage
    config: RewardConfig
    rows: tuple[Mapping[str, Any], ...]

    def checkpoints(self, pair: Pair) -> Iterator[tuple[int, str, LanguageModel]]:
        """(step, which, model) of every step whose weights are left, the kept one first; none of an unfinished stage.

        A model is good until the next one is asked for.
        """
        if not self.stage.done:
            return
        figures = (self.stage.result() or {})["figures"]
        kept, last = figures["kept_step"], figures["steps"]
        policy = pair.load(str(self.stage.path / "model"))
        yield kept, "kept", policy
        for step in self.stage.checkpoint_steps():
            if step != kept:
                load_weights(policy, self.stage.checkpoint(step))
                yield step, "last" if step == last else "", policy


def ppo_arms(pair: Pair) -> tuple[list[PpoArm], list[str]]:
    """PPO stages from this SFT model whose reward is the recipe's but for OBJECTIVE, or else the last stage's.

    And notes that name the others, those of other training seeds too, and stages that are not finished, of which
    training's rows are all there is.
    """
    stages, notes = pair.ppo_stages(), []
    rewards = [RewardConfig.model_validate(stage.identity["config"]["reward"]) for stage in stages]
    own, *planes = (reward.model_dump(exclude=OBJECTIVE) for reward in (pair.recipe.reward, *rewards))
    wanted = own if own in planes or not planes else planes[-1]
    found: list[PpoArm] = []
    for name, stage, reward, plane in zip(_names(stages), stages, rewards, planes, strict=True):
        if plane != wanted:
            notes.append(f"{name} has another reward than the one forecast here, and is not drawn.")
            continue
        if not stage.done:
            notes.append(f"{name} is not finished or failed: drawn as far as training measured it.")
        rows = tuple(row for row in stage.metrics() if "kl_sft" in row and "reward" in row)
        found.append(PpoArm(name, stage, reward, rows))
    every = pair.run.stages() if pair.run else []
    seeds = {s.identity["config"]["seed"] for s in every if s.identity["kind"] == "ppo"}
    if rest := sorted(seeds - {arm.stage.identity["config"]["seed"] for arm in found}):
        notes.append(
            f"PPO of training seeds {', '.join(map(str, rest))} started from other SFT models, which have frontiers of "
            "their own: --seed."
        )
    return found, notes


def _names(stages: Sequence[Stage]) -> list[str]:
    """`PPO`, and of several what tells them apart: training seeds and settings, or else the stage's id."""
    if len(stages) < 2:
        return ["PPO"] * len(stages)
    every = [dotted(stage.identity["config"]) for stage in stages]
    keys = [
        key for key in dict.fromkeys(k for one in every for k in one) if len({str(one.get(key)) for one in every}) > 1
    ]
    names = [
        "PPO " + ", ".join(f"{key.rpartition('.')[2]} {one.get(key)}" for key in keys[:MOST_NAMED]) for one in every
    ]
    return names if len(set(names)) == len(names) else [f"PPO {stage.id[:8]}" for stage in stages]
