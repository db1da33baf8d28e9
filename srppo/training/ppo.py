"""Stage 2: PPO on prompts without answers, from the SFT model, with the coherent reward. One linear loop:

    1. sample a response y to each prompt x from the policy
    2. score it: old log-probs, values, log pi_sft, log pi_base
    3. reward r = log pi_sft(y|x) - log pi_base(y|x) at EOS, minus beta KL to the anchor, less its mean, over a running
       deviation
    4. advantages by GAE, returns, whitening; or leave-one-out (ppo.advantage = "rloo"), which has no critic
    5. several passes of clipped policy and value updates

Anchored at the SFT model its optimum is pi_sft^(1 + 1/beta) pi_base^(-1/beta) (docs/method.md): beta of order 1, not
the 0.01-0.05 usual with reward models.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from srppo.config import PpoConfig, Recipe, derive_seed
from srppo.errors import Diverged
from srppo.models.flops import forward_flops, update_flops
from srppo.models.language_model import LanguageModel
from srppo.models.memory import weight_bytes
from srppo.models.value_model import ValueModel
from srppo.training import parallel
from srppo.training.advantage import gae, length_lambda, rloo, whiten, whitening_std
from srppo.training.batch import RolloutBatch, micro_batches
from srppo.training.loop import (
    Measure,
    Row,
    Session,
    Stopwatch,
    TrainState,
    Workbench,
    clip_gradients,
    lr_factor,
    parameters,
    set_lr,
    trained_bytes,
)
from srppo.training.losses import (
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    importance_weights,
    kl_penalty,
)
from srppo.training.masked import masked_mean
from srppo.training.optimizers import EPS, make_optimizer
from srppo.training.reward import (
    Rewards,
    RunningStd,
    centred,
    compute_rewards,
    reward_diagnostics,
    reward_warnings,
)
from srppo.training.rollout import Sampler, sample_step, to_batch
from srppo.training.scores import Scores, precision_gap, score_log_ratio

ROLLOUTS_LOGGED = 16  # responses a step that are written down
GAP_SHARE = 0.1  # of the reward's deviation, beyond which the error of bf16 is too large
CRITIC_KNOWS = 0.1  # explained variance above which the critic says something


@dataclass(frozen=True)
class Learners:
    """The two trained models with their optimizers; without a critic (RLOO), value and value_optimizer are None."""

    policy: LanguageModel
    value: ValueModel | None
    policy_optimizer: torch.optim.Optimizer
    value_optimizer: torch.optim.Optimizer | None

    @classmethod
    def start(cls, policy: LanguageModel, config: PpoConfig) -> Learners:
        """The critic starts as a copy of the policy's body, which is the SFT model's, or on that itself, under a zero
        head."""
        policy_optimizer = make_optimizer(config.optimizer, parameters(policy), config.lr, eps=EPS)
        if config.advantage == "rloo":
            return cls(policy, None, policy_optimizer, None)
        value = ValueModel(policy, shared=config.critic == "shared")
        value_optimizer = make_optimizer(config.optimizer, parameters(value), config.value_lr, eps=EPS)
        return cls(policy, value, policy_optimizer, value_optimizer)

    def set_lr(self, config: PpoConfig, factor: float) -> None:
        """Set both learning rates to a share of their peaks."""
        set_lr(self.policy_optimizer, config.lr * factor)
        if self.value_optimizer is not None:
            set_lr(self.value_optimizer, config.value_lr * factor)


@dataclass(frozen=True)
class Targets:
    """What the updates of one step aim at; BT fp32, 0 where masked. kl_scale: from nats to units of the advantages."""

    batch: RolloutBatch
    loss_mask_BT: Tensor
    advantages_BT: Tensor
    returns_BT: Tensor
    anchor_logprobs_BT: Tensor
    kl_scale: float


def train_ppo(
    recipe: Recipe,
    bench: Workbench,
    policy: LanguageModel,
    sft_policy: LanguageModel,
    base_policy: LanguageModel,
    prompts: Sequence[Sequence[int]],
    development: Measure,
    sampler: Sampler,
    *,
    after_step: Callable[[int], Row] = lambda step: {},
) -> Session:
    """Train `policy` (it starts as the SFT model) in place; resumes by itself. Returns the finished session.

    after_step: what else is measured of the policy after a step, for the step's row.
    """
    config, rollout = recipe.ppo, recipe.rollout
    learners, running = Learners.start(policy, config), RunningStd()
    state = TrainState(
        {"policy": policy, "value": learners.value},
        {"policy": learners.policy_optimizer, "value": learners.value_optimizer},
        {"flops": 0},
        running=running,
    )
    held = trained_bytes(policy, learners.value) + weight_bytes(sft_policy, base_policy)
    session = policy_session(recipe, bench, state, policy, development, total=config.steps)
    for step in session.steps():
        watch = Stopwatch()
        # 1. Sample: prompts and random numbers are functions of the step alone.
        chosen, generated = sample_step(recipe, sampler, policy, prompts, step, held=held)
        watch.lap("generate_s")
        # 2. Score, all by the same path as training.
        batch = to_batch(
            generated, policy, learners.value, micro_tokens=config.micro_tokens, temperature=rollout.temperature
        )
        scores = score_log_ratio(sft_policy, base_policy, batch, micro_tokens=config.micro_tokens)
        # 3. Reward.
        shuffle = derive_seed(recipe.seed, "shuffle", step)
        rewards = compute_rewards(recipe.reward, scores, batch, running, shuffle, per_prompt=rollout.per_prompt)
        if learners.value is not None and recipe.reward.center == "critic" and step == 1:
            usual = float(rewards.rewards_BT.sum(dim=1)[rewards.trained_B].double().mean())
            batch = replace(batch, old_values_BT=learners.value.start_at(usual, batch.response_mask_BT))
        watch.lap("score_s")
        # 4. Advantages and returns.
        targets = make_targets(recipe, batch, rewards, scores.anchor_BT(recipe.reward.anchor))
        row = rollout_metrics(batch, rewards, scores)
        if learners.value is not None:
            row["explained_variance"] = explained_variance(
                batch.old_values_BT, targets.returns_BT, batch.response_mask_BT
            )
        stop_if_diverged(row["kl_sft"], config.max_kl, step)
        # 5. Update.
        factor = lr_factor(config.schedule, config.warmup, step, config.steps)
        learners.set_lr(config, factor)
        metrics, done = update(recipe, learners, targets, step)
        watch.lap("update_s")
        state.counters["flops"] += step_flops(
            learners,
            batch,
            updates=(done, config.minibatches),
            critic_only=step <= config.critic_warmup,
            trained_B=rewards.trained_B,
        )
        row |= metrics | {"lr": config.lr * factor, "flops": state.counters["flops"]}
        if step == 1 and (gap := precision_gap(sft_policy, base_policy, batch, scores)):
            row["precision_gap"] = gap
            tell = bench.console.warn if gap > GAP_SHARE * row["reward_std"] else bench.console.say
            tell(precision_line(gap, row["reward_std"]))
        for warning in [*reward_warnings(row, recipe.reward.kind), *length_warnings(row, recipe)]:
            bench.console.warn(warning)
        log_rollouts(bench, step, chosen, generated.responses(), rewards.score_B)
        seconds = sum(watch.seconds.values())
        session.end_step(
            step,
            row | after_step(step),
            {**watch.seconds, "tokens_per_s": int(batch.attention_mask_BS.sum()) / seconds},
        )
    return session


def policy_session(
    recipe: Recipe, bench: Workbench, state: TrainState, policy: LanguageModel, development: Measure, *, total: int
) -> Session:
    """The session of a policy that is trained on its own samples for `total` steps: measured every eval.every."""
    return Session(
        bench,
        state,
        total=total,
        measure_at=lambda step: recipe.eval.every > 0 and step % recipe.eval.every == 0,
        measure=lambda: development.measure(policy),
        keep=recipe.eval.keep,
        checkpoint_every=recipe.ppo.checkpoint_every,
    )


def stop_if_diverged(kl_sft: float, limit: float, step: int) -> None:
    """Raise Diverged where the KL to the SFT model, nats a response, is beyond the limit."""
    if kl_sft > limit:
        raise Diverged(
            f"step {step}: KL to the SFT model is {kl_sft:.1f} nats a response, beyond ppo.max_kl = {limit:g}; "
            "raise reward.beta, lower ppo.lr, or set reward.token_clip"
        )


def make_targets(recipe: Recipe, batch: RolloutBatch, rewards: Rewards, anchor_logprobs_BT: Tensor) -> Targets:
    """Advantages (whitened over what is trained on) and returns of a batch.

    RLOO's baseline takes in the rollouts that are left out of the loss: they are responses to the prompt all the same.
    """
    rewards_BT, mask_BT = rewards.rewards_BT, batch.response_mask_BT
    per_prompt, place = recipe.rollout.per_prompt, recipe.reward.placement
    loss_mask_BT = mask_BT & rewards.trained_B.unsqueeze(1)
    if recipe.ppo.advantage == "rloo":
        advantages_BT = rloo(rewards_BT, mask_BT, per_prompt=per_prompt)
        returns_BT = torch.zeros_like(advantages_BT)  # no critic reads them
    else:
        if recipe.reward.center == "batch":
            rewards_BT = centred(rewards_BT, mask_BT, rewards.trained_B, per_prompt=per_prompt, at=place)
        estimate = partial(gae, rewards_BT, batch.old_values_BT, mask_BT, gamma=recipe.ppo.gamma)
        by_length, critic_lam = recipe.ppo.lam_length, recipe.ppo.critic_lam
        lam = recipe.ppo.lam if by_length is None else length_lambda(mask_BT, by_length)
        advantages_BT = estimate(lam=lam)
        returns_BT = estimate(lam=lam if critic_lam is None else critic_lam) + batch.old_values_BT
    kl_scale = 1.0 / rewards.scale
    if recipe.ppo.whiten:
        kl_scale /= float(whitening_std(advantages_BT, loss_mask_BT))
        advantages_BT = whiten(advantages_BT, loss_mask_BT)
    if recipe.rollout.server is not None:
        cap = recipe.rollout.importance_cap
        advantages_BT = advantages_BT * importance_weights(
            batch.old_logprobs_BT, batch.sampled_logprobs_BT, mask_BT, cap=cap
        )
    return Targets(batch, loss_mask_BT, advantages_BT, returns_BT, anchor_logprobs_BT, kl_scale)


def update(recipe: Recipe, learners: Learners, targets: Targets, step: int) -> tuple[dict[str, float], int]:
    """Passes of minibatch updates over one batch: metrics, each the mean over the minibatches that have it, and the
    number of minibatches done.

    Once KL(old || new) a token exceeds ppo.target_kl, nothing further is done with this batch.
    """
    sums: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    done = 0
    for indices in minibatches(recipe, len(targets.batch.ended_B), step):
        metrics = minibatch_update(recipe, learners, targets, indices, step)
        done += 1
        counts.update(metrics.keys())
        for name, number in metrics.items():
            sums[name] += number
        if moved_too_far(metrics, recipe.ppo):
            break
    return {name: number / counts[name] for name, number in sums.items()}, done


def minibatches(recipe: Recipe, rollouts: int, step: int) -> Iterator[Tensor]:
    """Indices of the rollouts of each minibatch, in order within it: passes over all, each cut up at random."""
    for epoch in range(recipe.ppo.epochs):
        seed = derive_seed(recipe.seed, "minibatches", step * recipe.ppo.epochs + epoch)
        order = torch.randperm(rollouts, generator=torch.Generator().manual_seed(seed))
        for indices in order.tensor_split(recipe.ppo.minibatches):
            yield indices.sort().values


def moved_too_far(metrics: dict[str, float], config: PpoConfig) -> bool:
    """KL early stop: whether KL(old || new) a token is beyond ppo.target_kl."""
    return config.target_kl is not None and metrics.get("approx_kl", 0.0) > config.target_kl


def minibatch_update(
    recipe: Recipe, learners: Learners, targets: Targets, indices: Tensor, step: int
) -> dict[str, float]:
    """One optimizer step of policy and critic over the rollouts at `indices`, in micro-batches.

    During the critic's warm-up the policy stands still, and a trunk that both share with it; once the policy has moved
    too far, neither takes the step.
    Returns what was measured, and nothing of what was not: no norm of a step not taken, and no loss where every rollout
    was left out by reward.at_limit = "drop".
    """
    config, count = recipe.ppo, int(targets.loss_mask_BT[indices].sum())
    policy, value = learners.policy, learners.value
    trains_policy = step > config.critic_warmup
    one_trunk = value is not None and value.shared
    learners.policy_optimizer.zero_grad(set_to_none=True)
    if learners.value_optimizer is not None:
        learners.value_optimizer.zero_grad(set_to_none=True)
    metrics: defaultdict[str, float] = defaultdict(float)
    if count == 0:
        return {}
    indices = indices[targets.loss_mask_BT[indices].any(dim=1).cpu()]  # the others have no loss
    lengths_B = targets.batch.attention_mask_BS.sum(dim=1)
    for part in micro_batches(lengths_B[indices], config.micro_tokens, shared=True):
        chosen = indices[part]
        rows = targets.batch.rows(chosen)
        width = rows.response_mask_BT.shape[1]
        inputs = rows.tokens_BS, rows.attention_mask_BS, width
        mask_BT, advantages_BT, returns_BT, anchor_BT = (
            x[chosen][:, :width]
            for x in (targets.loss_mask_BT, targets.advantages_BT, targets.returns_BT, targets.anchor_logprobs_BT)
        )
        hidden_ND, loss = None, torch.zeros(())
        if one_trunk:  # one pass for both heads, and one backward
            with torch.set_grad_enabled(trains_policy):
                hidden_ND = policy.hidden_rows(*inputs)
        if trains_policy:
            logprobs_BT = policy.response_logprobs(*inputs, temperature=recipe.rollout.temperature, hidden_ND=hidden_ND)
            surrogate = clipped_policy_loss(
                logprobs_BT, rows.old_logprobs_BT, advantages_BT, mask_BT, clip=config.clip, token_count=count
            )
            loss = surrogate.loss
            if recipe.reward.kl != "k1":
                penalty = kl_penalty(logprobs_BT, anchor_BT, mask_BT, form=recipe.reward.kl, token_count=count)
                loss = loss + recipe.reward.beta * targets.kl_scale * penalty
            if not one_trunk:
                loss.backward()
            metrics["policy_loss"] += float(surrogate.loss.detach())
            metrics["clip_share"] += float(surrogate.clip_share)
            metrics["approx_kl"] += float(surrogate.approx_kl)
        if value is not None:
            values_BT = value.response_values(*inputs, hidden_ND=hidden_ND)
            critic = clipped_value_loss(
                values_BT, rows.old_values_BT, returns_BT, mask_BT, clip=config.value_clip, token_count=count
            )
            (loss + config.value_coef * critic.loss if one_trunk else critic.loss).backward()
            metrics["value_loss"] += float(critic.loss.detach())
            metrics["value_clip_share"] += float(critic.clip_share)
    found = parallel.add_up_numbers(dict(metrics))
    if moved_too_far(found, config):
        return found
    return found | optimizer_steps(learners, config, step, trains_policy=trains_policy)


def optimizer_steps(learners: Learners, config: PpoConfig, step: int, *, trains_policy: bool) -> dict[str, float]:
    """Add up the gradients of all processes, clip them and step; the norms as they were before."""
    norms = {}
    for model in (learners.policy, learners.value):
        if model is not None:
            parallel.add_up_gradients(parameters(model))
    if learners.value is not None and learners.value_optimizer is not None:
        norms["value_grad_norm"] = clip_gradients(learners.value, config.max_grad_norm, step)
        learners.value_optimizer.step()
    if trains_policy:
        norms["grad_norm"] = clip_gradients(learners.policy, config.max_grad_norm, step)
        learners.policy_optimizer.step()
    return norms


def rollout_metrics(batch: RolloutBatch, rewards: Rewards, scores: Scores) -> dict[str, Any]:
    """What a batch of rollouts says before any update. KL: k1 over the sampled responses, nats a response.

    The entropy is its sampled estimate, the mean of -log pi over the sampled tokens, nats a token. sampler_gap: how far
    the sampler's own log-probs of them are from those that training works with, the mean of the distance, nats a token.
    """
    mask_BT, lengths_B = batch.response_mask_BT, batch.lengths_B().float()
    return {
        "reward": float(rewards.score_B.mean()),
        "reward_std": float(rewards.score_B.std(correction=0)),
        "reward_per_token": float(rewards.score_B.sum() / lengths_B.sum()),
        "kl_sft": float((batch.old_logprobs_BT - scores.sft_logprobs_BT).sum(dim=1).mean()),
        "kl_base": float((batch.old_logprobs_BT - scores.base_logprobs_BT).sum(dim=1).mean()),
        "length": float(lengths_B.mean()),
        "ended": float(batch.ended_B.float().mean()),
        "entropy": float(-masked_mean(batch.old_logprobs_BT, mask_BT)),
        "sampler_gap": float(masked_mean((batch.old_logprobs_BT - batch.sampled_logprobs_BT).abs(), mask_BT)),
        "scale": rewards.scale,
        **reward_diagnostics(scores.log_ratio_BT, scores.base_logprobs_BT, rewards.score_B, mask_BT),
    }


def precision_line(gap: float, deviation: float) -> str:
    """What bf16 bodies cost the reward, beside what it has to tell apart."""
    said = f"bf16 bodies move the reward of a response by {gap:.3g} nats; its deviation is {deviation:.3g}"
    if gap > GAP_SHARE * deviation:
        said += ": more than a tenth; set model.scoring = fp32"
    return said


def length_warnings(row: dict[str, Any], recipe: Recipe) -> list[str]:
    """Whether the reward's mean alone makes ending pay (docs/length.md): no value knows it, and lambda discounts it."""
    centred = recipe.reward.center != "none" or row.get("explained_variance", 1.0) > CRITIC_KNOWS
    if centred or recipe.ppo.lam == 1 or abs(row["reward"]) <= row["reward_std"]:
        return []
    what = "shorter" if row["reward"] > 0 else "longer"
    return [
        "the reward's mean is above its deviation, the critic knows nothing of it and ppo.lam is below 1: answers will "
        f"grow {what} whatever they say; set reward.center=batch, or ppo.lam=1, or train the critic first "
        "(ppo.critic_warmup)"
    ]


def step_flops(
    learners: Learners,
    batch: RolloutBatch,
    *,
    updates: tuple[int, int],
    critic_only: bool,
    trained_B: Tensor | None = None,
) -> int:
    """Counted operations of one step: sampling, scoring by policy, SFT model, base and critic, and the updates.

    updates: minibatches done, and how many make a pass. trained_B: which rollouts they go through; None: all.
    """
    of_all = batch.attention_mask_BS.sum(dim=1), int(batch.response_mask_BT.sum())
    kept = slice(None) if trained_B is None else trained_B
    of_trained = of_all[0][kept], int(batch.response_mask_BT[kept].sum())
    return rollout_flops(learners, of_all, of_trained, updates=updates, critic_only=critic_only)


def rollout_flops(
    learners: Learners,
    of_all: tuple[Tensor, int],
    of_trained: tuple[Tensor, int],
    *,
    updates: tuple[int, int],
    critic_only: bool,
) -> int:
    """As `step_flops`, of rollouts by their (lengths B, response tokens): all of them, and those that are trained."""
    policy, value = forward_flops(learners.policy, *of_all), 0
    trained = 0 if critic_only else update_flops(learners.policy, *of_trained)
    if learners.value is not None:
        value = forward_flops(learners.value, *of_all)
        trained += update_flops(learners.value, *of_trained)
        if critic_only and learners.value.shared:  # the trunk is read, and stands still
            trained += forward_flops(learners.policy, *of_trained)
    return 4 * policy + value + trained * updates[0] // updates[1]


def log_rollouts(
    bench: Workbench, step: int, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], score_B: Tensor
) -> None:
    """Write the first few rollouts of a step, as text, to the attempt's rollouts.jsonl."""
    decode = bench.tokenizer.decode
    for prompt, response, score in list(zip(prompts, responses, score_B.tolist(), strict=True))[:ROLLOUTS_LOGGED]:
        row = {"step": step, "prompt": decode(list(prompt)), "response": decode(list(response))}
        bench.attempt.log_rollout(row | {"tokens": len(response), "reward": score})
