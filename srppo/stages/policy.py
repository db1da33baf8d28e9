"""The stages that train a policy on prompts, and the points of PPO's curve.

A point is what the policy answers to test items after some steps of training, and how far it is from the SFT model.

A curve chooses nothing: the kept step is development items' choice, whatever test items say.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from srppo.models.language_model import LanguageModel
from srppo.models.loading import to_train
from srppo.stages.kinds import KINDS
from srppo.stages.run import Figures, PreparedRun, Stages, answers_of, finish, publish_answers, sft_model
from srppo.training.batch import Generated
from srppo.training.distil import train_distil
from srppo.training.loop import Row, Session, Workbench
from srppo.training.ppo import train_ppo
from srppo.training.reward import rewards_before_kl
from srppo.training.rollout import LocalSampler, Sampler, generate
from srppo.training.scores import full_kl, score_log_ratio

SERVED = "served"  # of a stage's folder: the weights that a server reads


def ppo_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """PPO from the SFT model that it has for a parent: SRPPO, and its controls. With eval.curve the figure `curve`, a
    point a step (`curve_point`)."""
    sft = _start(run, bench, done)
    policy = to_train(sft, run.recipe.model)

    def after_step(step: int) -> Row:
        return {"curve": curve_point(run, bench, policy, sft, step)} if step in run.recipe.eval.curve else {}

    session = _train(partial(train_ppo, after_step=after_step), run, bench, policy, sft)
    curve = [row["curve"] for row in bench.stage.metrics() if "curve" in row]  # of all attempts
    return finish(run, bench, policy, session) | ({"curve": curve} if curve else {})


def distil_stage(run: PreparedRun, bench: Workbench, done: Stages) -> Figures:
    """On-policy distillation of decode-time extrapolation, from the SFT model."""
    sft = _start(run, bench, done)
    policy = to_train(sft, run.recipe.model)
    train = partial(train_distil, stop_ids=run.stops)
    return finish(run, bench, policy, _train(train, run, bench, policy, sft))


def _start(run: PreparedRun, bench: Workbench, done: Stages) -> LanguageModel:
    (start,) = KINDS[bench.stage.identity["kind"]].parents
    return sft_model(run, done, start)


def _train(
    train: Callable[..., Session], run: PreparedRun, bench: Workbench, policy: LanguageModel, sft: LanguageModel
) -> Session:
    sampler = _sampler(run, bench)
    session = train(run.recipe, bench, policy, sft, run.base, run.data.prompts, run.development, sampler)
    shutil.rmtree(bench.stage.path / SERVED, ignore_errors=True)
    return session


def _sampler(run: PreparedRun, bench: Workbench) -> Sampler:
    """Who writes the rollouts: this process, or the server that the recipe names."""
    rollout = run.recipe.rollout
    if rollout.server is None:
        return LocalSampler(run.stops, run.pad_id)
    from srppo.training.server import ServerSampler

    folder = bench.stage.path / SERVED
    return ServerSampler(rollout.server, folder, run.stops, run.pad_id, timeout_s=rollout.server_timeout_s)


def curve_point(run: PreparedRun, bench: Workbench, policy: LanguageModel, sft: LanguageModel, step: int) -> Row:
    """What the policy is after a step: its test figures, and by group of items, over the sampled answers, `kl` to the
    SFT model and the recipe's `reward`, nats a response, with the standard error of the first over items (`kl_error`).

    The answers go to eval/step-N-<decoding>/samples.jsonl.
    """
    drawn: list[Generated] = []

    def decode(model: LanguageModel, prompts: Any, *, temperature: Sequence[float | None], **how: Any) -> Generated:
        generated = generate(model, prompts, temperature=temperature, **how)
        drawn.append(generated.rows(torch.tensor([i for i, each in enumerate(temperature) if each is not None])))
        return generated

    figures = publish_answers(bench.attempt, answers_of(run, policy, decode), f"step-{step}")
    (batch,) = drawn  # all answers are one call
    kl_B = full_kl(policy, sft, batch)
    reward_B = rewards_before_kl(run.recipe.reward, score_log_ratio(sft, run.base, batch), batch).sum(dim=1)
    groups = np.array([item.group for item in run.test_items])
    kl_I, reward_I = (_by_item(values_B, len(groups)) for values_B in (kl_B, reward_B))
    names = [str(name) for name in dict.fromkeys(groups)]
    return {
        "step": step,
        "kl": {name: float(kl_I[groups == name].mean()) for name in names},
        "kl_error": {name: _error(kl_I[groups == name]) for name in names},
        "reward": {name: float(reward_I[groups == name].mean()) for name in names},
        **figures,
    }


def _by_item(values_B: torch.Tensor, items: int) -> NDArray[np.float64]:
    """Means over the samples of each item: samples of all items follow one another, one draw after the other."""
    values: NDArray[np.float64] = values_B.double().cpu().numpy().reshape(-1, items).mean(axis=0)
    return values


def _error(values_I: NDArray[np.float64]) -> float:
    return float(values_I.std(ddof=1) / np.sqrt(len(values_I))) if len(values_I) > 1 else 0.0
