"""On-policy distillation: what PPO is after, without a critic, an advantage or a sampled reward. One linear loop:

    1. sample a response to each prompt from the policy
    2. one optimizer step that lowers KL(policy || teacher), over the whole vocabulary, at every token of them

The teacher is decode-time extrapolation, the closed-form optimum of PPO's objective normalised a token at a time
(`reward.tokenwise_optimum`): with anchor sft, pi_sft^(1 + 1/beta) pi_base^(-1/beta). The policy that it makes answers
at the cost of one model. States from the student, a divergence over whole distributions: GKD (Agarwal et al.,
arXiv 2306.13649) with reverse KL and student data only.

Two differences to the objective over sequences, both on purpose (docs/method.md has the figures):

- The samples are constants. The gradient of KL(policy || teacher) over responses has a further term, the log-prob of
  each token times the KL of the states that follow (MiniLLM, arXiv 2306.08543, keeps it, and its variance). Both
  gradients are 0 where the policy is the teacher at every state, which a model that can be both finds by either.
- The teacher is not the optimum over sequences: each state's normaliser, which tells what reward can still be had from
  there, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from srppo.config import Recipe
from srppo.models.flops import forward_flops, update_flops
from srppo.models.language_model import LanguageModel, unflatten
from srppo.models.memory import weight_bytes
from srppo.training import parallel
from srppo.training.batch import Generated
from srppo.training.loop import (
    Measure,
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
from srppo.training.optimizers import EPS, make_optimizer
from srppo.training.ppo import log_rollouts, policy_session, stop_if_diverged
from srppo.training.reward import tokenwise_optimum
from srppo.training.rollout import Sampler, sample_step
from srppo.training.scores import passes, response_reverse_kl


def train_distil(
    recipe: Recipe,
    bench: Workbench,
    policy: LanguageModel,
    sft_policy: LanguageModel,
    base_policy: LanguageModel,
    prompts: Sequence[Sequence[int]],
    development: Measure,
    sampler: Sampler,
    *,
    stop_ids: Sequence[int],
) -> Session:
    """Train `policy` (it starts as the SFT model) in place; resumes by itself. Returns the finished session."""
    config, shared = recipe.distil, recipe.ppo
    optimizer = make_optimizer(shared.optimizer, parameters(policy), config.lr, eps=EPS)
    state = TrainState({"policy": policy}, {"policy": optimizer}, {"flops": 0})
    held = trained_bytes(policy) + weight_bytes(sft_policy, base_policy)
    session = policy_session(recipe, bench, state, policy, development, total=config.steps)
    for step in session.steps():
        watch = Stopwatch()
        chosen, generated = sample_step(recipe, sampler, policy, prompts, step, held=held)
        watch.lap("generate_s")
        lr = config.lr * lr_factor("linear", 0.0, step, config.steps)
        set_lr(optimizer, lr)
        optimizer.zero_grad(set_to_none=True)
        kl_3BT = add_gradient(recipe, policy, sft_policy, base_policy, generated, stop_ids=stop_ids)
        row = distil_metrics(generated, kl_3BT)
        stop_if_diverged(row["kl_sft"], shared.max_kl, step)
        row["grad_norm"] = clip_gradients(policy, shared.max_grad_norm, step)
        optimizer.step()
        watch.lap("update_s")
        state.counters["flops"] += step_flops(policy, sft_policy, base_policy, generated)
        row |= {"lr": lr, "flops": state.counters["flops"]}
        log_rollouts(bench, step, chosen, generated.responses(), (kl_3BT[2] - kl_3BT[1]).sum(dim=1))
        seconds = sum(watch.seconds.values())
        session.end_step(step, row, {**watch.seconds, "tokens_per_s": int(generated.attention_mask_BS.sum()) / seconds})
    return session


def add_gradient(
    recipe: Recipe,
    policy: LanguageModel,
    sft_policy: LanguageModel,
    base_policy: LanguageModel,
    generated: Generated,
    *,
    stop_ids: Sequence[int],
) -> Tensor:
    """Add the gradient of the mean KL(policy || teacher) over all response tokens to the policy's weights.

    Returns KL(policy || x) at each token for x the teacher, the SFT model and the base: 3BT, nats, 0 where masked. The
    mean is over the tokens of the batch, whatever the micro-batch.
    """
    teacher = partial(tokenwise_optimum, recipe.reward, stop_ids=stop_ids)
    count = int(generated.response_mask_BT.sum())
    kl_3BT = torch.zeros((3, *generated.response_mask_BT.shape), device=policy.device)
    for part, inputs in passes(generated, recipe.ppo.micro_tokens, policy):
        temperature = recipe.rollout.temperature
        found = response_reverse_kl(policy, sft_policy, base_policy, inputs, teacher, temperature=temperature)
        (found.total / count).backward()
        for kl_BT, kl_N in zip(kl_3BT, found[1:], strict=True):
            kl_BT[part, : inputs[2]] = unflatten(kl_N, inputs[1][:, -inputs[2] :]).float()
    parallel.add_up_gradients(parameters(policy))
    return parallel.add_up(kl_3BT)


def distil_metrics(generated: Generated, kl_3BT: Tensor) -> dict[str, float]:
    """What a batch of rollouts says before the update, by the names of PPO's metrics. KL and reward: nats a response.

    They are expectations over the next token, summed along the sampled responses: of the same mean as PPO's log-ratios
    of the sampled tokens, and with less noise. reward is the coherent one, whatever the teacher is made of.
    """
    teacher_kl, kl_sft, kl_base = kl_3BT.sum(dim=2).mean(dim=1).tolist()
    return {
        "teacher_kl": teacher_kl,
        "reward": kl_base - kl_sft,
        "kl_sft": kl_sft,
        "kl_base": kl_base,
        "length": float(generated.lengths_B().float().mean()),
        "ended": float(generated.ended_B.float().mean()),
    }


def step_flops(
    policy: LanguageModel, sft_policy: LanguageModel, base_policy: LanguageModel, generated: Generated
) -> int:
    """Counted operations of one step: sampling, both frozen models, and the policy's update."""
    lengths_B, head_tokens = generated.attention_mask_BS.sum(dim=1), int(generated.response_mask_BT.sum())
    own, sft, base = (forward_flops(model, lengths_B, head_tokens) for model in (policy, sft_policy, base_policy))
    return own + update_flops(policy, lengths_B, head_tokens) + sft + base
