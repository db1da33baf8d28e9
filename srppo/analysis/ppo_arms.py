"""The PPO stages that started from one SFT model: their names, what weights are left, and what training measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from srppo.config import RewardConfig
from srppo.evaluation.results import dotted
from srppo.models.language_model import LanguageModel
from srppo.models.pair import Pair
from srppo.record.store import Stage
from srppo.training.loop import load_weights

OBJECTIVE = ("anchor", "beta")
"""What of a reward's settings moves PPO's optimum along the frontier; all others make another reward, another plane."""
MOST_NAMED = 2  # settings in a name


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
                load_weights(policy.model, self.stage.checkpoint(step) / "policy.safetensors")
                yield step, "last" if step == last else "", policy


def ppo_arms(pair: Pair, config: RewardConfig | None) -> tuple[list[PpoArm], list[str]]:
    """Every PPO stage from this SFT model whose reward is that of `config` but for OBJECTIVE (None: of the last stage).

    And notes that name the others, and stages that are not finished, of which training's rows are all there is.
    """
    stages = pair.ppo_stages()
    names = _names(stages)
    rewards = [RewardConfig.model_validate(stage.identity["config"]["reward"]) for stage in stages]
    wanted = config or (rewards[-1] if rewards else None)
    found: list[PpoArm] = []
    notes: list[str] = []
    for name, stage, reward in zip(names, stages, rewards, strict=True):
        rows = tuple(row for row in stage.metrics() if "kl_sft" in row and "reward" in row)
        if wanted is None or _plane(reward) != _plane(wanted):
            notes.append(f"{name} has another reward than the one forecast here, and is not drawn.")
            continue
        if not stage.done:
            notes.append(f"{name} is not finished or failed: drawn as far as training measured it.")
        found.append(PpoArm(name, stage, reward, rows))
    return found, notes


def _plane(reward: RewardConfig) -> dict[str, Any]:
    return reward.model_dump(exclude=set(OBJECTIVE))


def _names(stages: Sequence[Stage]) -> list[str]:
    """`PPO`, and of several what tells them apart: training seeds and settings, or else the stage's id."""
    if len(stages) < 2:
        return ["PPO"] * len(stages)
    every = [dotted(stage.identity["config"]) for stage in stages]
    every_key = dict.fromkeys(key for one in every for key in one)
    keys = [key for key in every_key if len({str(one.get(key)) for one in every}) > 1]
    names = [
        "PPO " + ", ".join(f"{key.rpartition('.')[2]} {one.get(key)}" for key in keys[:MOST_NAMED]) for one in every
    ]
    if len(set(names)) < len(names):
        names = [f"PPO {stage.id[:8]}" for stage in stages]
    return names
