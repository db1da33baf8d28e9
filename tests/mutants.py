"""Mutants of the core, and the test that kills each (`make mutants`).

    python tests/mutants.py [WORD ...]      all, or those whose name or file contains one of the words

Each mutant is one edit of one file, made in a copy of the repository, never in place; only its own tests run, in a
process forked from one that has imported torch but nothing of this package. A mutant is killed when a test fails: one
that cannot be imported or names what is not there, or whose tests cannot be found, does not count.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LIMIT_S = 180
CARELESS = ("NameError", "UnboundLocalError", "AttributeError", "ImportError")  # what no test needs to find


@dataclass(frozen=True)
class Mutant:
    """`old` (found exactly once in `file`) becomes `new`; `tests` (nodes in tests/, by spaces) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str


EVAL, CHECKS, UNLIKE = "test_harness.py::", "test_harness_checks.py::", "test_harness_compare.py::"
REFUSED = "test_harness_refusals.py::"
SCORE, FORECAST = "test_score.py::", "test_forecast.py::"
METHOD, NOISY = "test_methods.py::", "test_noise.py::"
SWEEP, SWEEP_REPORT = "test_sweep_analysis.py::", "test_sweep_report.py::"
GOLDEN, CORE, STORE = "test_goldens.py::", "test_core.py::", "test_store.py::"
POLICY_LOSS = f"{GOLDEN}test_clipped_policy_loss"
VALUE_LOSS = f"{GOLDEN}test_clipped_value_loss"
REWARDS = f"{CORE}test_rewards_by_hand"
TARGETS = f"{CORE}test_targets_by_hand"
STEP = f"{CORE}test_one_optimizer_step_by_hand"
RESUMED = f"{CORE}test_a_resumed_run_ends_with_the_same_state"
WIRING = f"{CORE}test_rewards_are_taken_at_temperature_1_and_kl_from_the_anchor"
LOGPROBS = "test_models.py::test_logprobs_are_the_models_own_under_ragged_padding"
MASKS = "test_rollout.py::test_masks_come_from_lengths_whatever_the_padding"

LOSSES = [
    Mutant(
        "policy loss: sign",
        "losses.py",
        "plain_BT = -advantages_BT * ratio_BT\n",
        "plain_BT = advantages_BT * ratio_BT\n",
        POLICY_LOSS,
    ),
    Mutant(
        "policy loss: clip dropped",
        "losses.py",
        "-advantages_BT * ratio_BT.clamp(1 - clip, 1 + clip)",
        "-advantages_BT * ratio_BT",
        POLICY_LOSS,
    ),
    Mutant(
        "policy loss: min for max",
        "losses.py",
        "    loss = masked_sum(torch.maximum(plain_BT",
        "    loss = masked_sum(torch.minimum(plain_BT",
        POLICY_LOSS,
    ),
    Mutant(
        "policy loss: old over new",
        "losses.py",
        "log_ratio_BT = (logprobs_BT - old_logprobs_BT)",
        "log_ratio_BT = (old_logprobs_BT - logprobs_BT)",
        POLICY_LOSS,
    ),
    Mutant(
        "approx_kl: k1 for k3",
        "losses.py",
        "log_ratio_BT.clamp(max=MAX_LOG_RATIO).expm1() - log_ratio_BT",
        "-log_ratio_BT",
        POLICY_LOSS,
    ),
    Mutant(
        "value loss: clip dropped",
        "losses.py",
        "0.5 * masked_sum(torch.maximum(plain_BT, clipped_BT), mask_BT)",
        "0.5 * masked_sum(plain_BT, mask_BT)",
        VALUE_LOSS,
    ),
    Mutant(
        "value loss: min for max",
        "losses.py",
        "0.5 * masked_sum(torch.maximum(plain_BT, clipped_BT), mask_BT)",
        "0.5 * masked_sum(torch.minimum(plain_BT, clipped_BT), mask_BT)",
        VALUE_LOSS,
    ),
    Mutant(
        "value loss: clipped on one side",
        "losses.py",
        "torch.minimum(torch.maximum(values_BT, old_values_BT - clip), old_values_BT + clip)",
        "torch.maximum(values_BT, old_values_BT - clip)",
        VALUE_LOSS,
    ),
    Mutant(
        "KL k1: sign",
        "losses.py",
        "return (logprobs_BT - anchor_logprobs_BT)",
        "return (anchor_logprobs_BT - logprobs_BT)",
        f"{GOLDEN}test_k1",
    ),
    Mutant(
        "KL k2: half dropped",
        "losses.py",
        "return 0.5 * (log_ratio_BT.sum(dim=1) ** 2)",
        "return (log_ratio_BT.sum(dim=1) ** 2)",
        f"{GOLDEN}test_kl_penalty",
    ),
    Mutant(
        "KL k2: a token at a time",
        "losses.py",
        "(log_ratio_BT.sum(dim=1) ** 2).sum()",
        "(log_ratio_BT**2).sum()",
        f"{GOLDEN}test_kl_penalty",
    ),
    Mutant(
        "KL k3: reversed",
        "losses.py",
        "torch.expm1(-log_ratio_BT) + log_ratio_BT",
        "torch.expm1(log_ratio_BT) - log_ratio_BT",
        f"{GOLDEN}test_kl_penalty",
    ),
    Mutant(
        "masks: inverted",
        "masked.py",
        "kept = x.masked_fill(~mask, 0.0)",
        "kept = x.masked_fill(mask, 0.0)",
        f"{GOLDEN}test_coherent_reward",
    ),
    Mutant(
        "masks: multiplied, so that NaN passes",
        "masked.py",
        "kept = x.masked_fill(~mask, 0.0)",
        "kept = x * mask",
        f"{GOLDEN}test_coherent_reward",
    ),
    Mutant(
        "masks: mean over all positions",
        "masked.py",
        "count = mask.sum() if dim is None",
        "count = mask.new_ones(mask.shape).sum() if dim is None",
        f"{GOLDEN}test_whiten",
    ),
]

ADVANTAGES = [
    Mutant(
        "GAE: rewards shifted by one",
        "advantage.py",
        "rewards_BT[:, t] + gamma",
        "rewards_BT[:, t - 1] + gamma",
        f"{GOLDEN}test_gae",
    ),
    Mutant(
        "GAE: lambda dropped",
        "advantage.py",
        "gamma * lam * next_advantage_B",
        "gamma * next_advantage_B",
        f"{GOLDEN}test_gae",
    ),
    Mutant(
        "GAE: gamma dropped",
        "advantage.py",
        "+ gamma * next_value_B",
        "+ next_value_B",
        f"{GOLDEN}test_gae",
    ),
    Mutant(
        "GAE: bootstraps beyond the end",
        "advantage.py",
        "next_value_B = torch.zeros_like(values_BT[:, 0])",
        "next_value_B = values_BT[:, -1].clone()",
        f"{GOLDEN}test_gae",
    ),
    Mutant(
        "whitening: mean stays",
        "advantage.py",
        "(x_BT - masked_mean(x_BT, mask_BT)) / deviation",
        "x_BT / deviation",
        f"{GOLDEN}test_whiten",
    ),
    Mutant(
        "whitening: variance for deviation",
        "advantage.py",
        "(masked_var(x_BT, mask_BT) + WHITEN_EPS).sqrt()",
        "(masked_var(x_BT, mask_BT) + WHITEN_EPS)",
        f"{GOLDEN}test_whiten",
    ),
]

REWARD = [
    Mutant(
        "reward: base minus SFT",
        "reward.py",
        '"ratio": log_ratio_BT',
        '"ratio": -log_ratio_BT',
        REWARDS,
    ),
    Mutant(
        "reward: sign",
        "reward.py",
        "return masked_sum(log_ratio_BT, mask_BT, dim=1)",
        "return -masked_sum(log_ratio_BT, mask_BT, dim=1)",
        f"{GOLDEN}test_place_reward",
    ),
    Mutant(
        "reward: in the last column",
        "reward.py",
        "positions_T == (mask_BT.sum(dim=1, keepdim=True) - 1)",
        "(positions_T == mask_BT.shape[1] - 1).expand_as(mask_BT)",
        f"{GOLDEN}test_place_reward",
    ),
    Mutant(
        "reward: on the pad after EOS",
        "reward.py",
        "(mask_BT.sum(dim=1, keepdim=True) - 1)",
        "mask_BT.sum(dim=1, keepdim=True)",
        f"{GOLDEN}test_place_reward",
    ),
    Mutant(
        "reward: KL's sign",
        "reward.py",
        "rewards_BT - config.beta * k1(",
        "rewards_BT + config.beta * k1(",
        REWARDS,
    ),
    Mutant(
        "reward: beta x 1.5",
        "reward.py",
        "rewards_BT - config.beta * k1(",
        "rewards_BT - 1.5 * config.beta * k1(",
        REWARDS,
    ),
    Mutant(
        "reward: anchor swapped",
        "reward.py",
        'anchor_BT = sft_logprobs_BT if config.anchor == "sft"',
        'anchor_BT = sft_logprobs_BT if config.anchor == "base"',
        REWARDS,
    ),
    Mutant(
        "scale: divides r alone",
        "reward.py",
        "return Rewards(rewards_BT / scale, score_B",
        "return Rewards(rewards_BT + place_reward(terms_BT, mask_BT, at=config.placement) * (1 / scale - 1), score_B",
        REWARDS,
    ),
    Mutant(
        "scale: deviation of r alone",
        "reward.py",
        "running.update(rewards_BT.sum(dim=1)[trained_B])",
        "running.update(score_B[trained_B])",
        REWARDS,
    ),
    Mutant(
        "scale: batches of another mean",
        "reward.py",
        " + delta * delta * self.count * n / total",
        "",
        f"{GOLDEN}test_running_std",
    ),
    Mutant(
        "limit: penalty on every rollout",
        "reward.py",
        "penalised_BT = last_token(mask_BT) & ~ended_B.unsqueeze(1)",
        "penalised_BT = last_token(mask_BT)",
        f"{CORE}test_the_rule_for_rollouts_at_the_limit",
    ),
]

ROLLOUT = [
    Mutant("rollout: EOS excluded", "rollout.py", "<= first_B.unsqueeze(1)", "< first_B.unsqueeze(1)", MASKS),
    Mutant(
        "rollout: mask from token ids",
        "rollout.py",
        "response_mask_BT = torch.arange(response_BT.shape[1], device=tokens_BS.device) <= first_B.unsqueeze(1)",
        "response_mask_BT = ~stopped_BT",
        MASKS,
    ),
    Mutant(
        "rollout: top_k = 50",
        "rollout.py",
        "top_k=None if greedy else 0",
        "top_k=None if greedy else 50",
        "test_rollout.py::test_all_of_a_large_vocabulary_can_be_sampled",
    ),
    Mutant(
        "rollout: the model's own generation_config",
        "rollout.py",
        "policy.model.generation_config = GenerationConfig()  #",
        "policy.model.generation_config = own  #",
        "test_rollout.py::test_a_models_own_settings_change_no_response_and_are_put_back",
    ),
    Mutant(
        "rollout: sampled at temperature 1",
        "rollout.py",
        "temperature=None if greedy else temperature",
        "temperature=None if greedy else 1.0",
        "test_rollout.py::test_samples_follow_the_softmax_whatever_the_model_was_shipped_with",
    ),
    Mutant(
        "rollout: old log-probs at temperature 1",
        "rollout.py",
        "score_logprobs(policy, generated, micro_batch=micro_batch, temperature=temperature)",
        "score_logprobs(policy, generated, micro_batch=micro_batch)",
        WIRING,
    ),
    Mutant(
        "rollout: draws from the global random state",
        "rollout.py",
        "            torch.manual_seed(seed)\n",
        "",
        "test_rollout.py::test_seeds_decide_the_samples_and_nothing_else_does",
    ),
    Mutant(
        "prompts: the seed is ignored",
        "rollout.py",
        'derive_seed(seed, "prompt-order", epoch)',
        'derive_seed(0, "prompt-order", epoch)',
        "test_rollout.py::test_the_schedule_is_a_function_of_step_and_seed_alone",
    ),
    Mutant(
        "prompts: each pass in the same order",
        "rollout.py",
        'derive_seed(seed, "prompt-order", epoch)',
        'derive_seed(seed, "prompt-order", 0)',
        "test_rollout.py::test_each_prompt_comes_once_a_pass",
    ),
]

MODELS = [
    Mutant("models: no position ids", "models.py", "    if takes_positions:\n", "    if False:\n", LOGPROBS),
    Mutant(
        "models: log-probs off by one",
        "models.py",
        "return hidden_BSD[:, -response_width - 1 : -1]",
        "return hidden_BSD[:, -response_width:]",
        LOGPROBS,
    ),
    Mutant(
        "models: values off by one",
        "models.py",
        "body_hidden(self.body, inputs, self.precision)[:, -response_width - 1 : -1]",
        "body_hidden(self.body, inputs, self.precision)[:, -response_width:]",
        "test_models.py::test_the_critic_sees_the_state_before_each_token",
    ),
    Mutant(
        "models: dropout stays",
        "models.py",
        "            module.p = 0.0\n",
        "            pass\n",
        "test_models.py::test_dropout_is_off_and_passes_repeat",
    ),
    Mutant(
        "models: left in train mode",
        "models.py",
        "    model.eval()\n",
        "",
        "test_models.py::test_dropout_is_off_and_passes_repeat",
    ),
    Mutant(
        "critic: shares the policy's weights",
        "models.py",
        "copy.deepcopy(start.model.base_model)",
        "start.model.base_model",
        "test_models.py::test_the_critic_starts_at_zero_and_shares_nothing",
    ),
    Mutant(
        "critic: head not zero",
        "models.py",
        "nn.init.zeros_(self.head.weight)",
        "nn.init.normal_(self.head.weight)",
        "test_models.py::test_the_critic_starts_at_zero_and_shares_nothing",
    ),
    Mutant(
        "models: 16-bit master weights",
        "models.py",
        "            dtype=torch.float32,\n",
        '            dtype="auto",\n',
        "test_models.py::test_a_bf16_checkpoint_is_loaded_as_fp32",
    ),
    Mutant(
        "kernel: log-probs rounded to bf16",
        "kernels/reference.py",
        "return logp_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1)",
        "return logp_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1).bfloat16().float()",
        f"{GOLDEN}test_token_logprobs",
    ),
    Mutant(
        "kernel: logits rounded to bf16",
        "kernels/native.cpp",
        "            V z = load(column + v * LANES);\n",
        "            V z = load(column + v * LANES);\nz = (V)((I)z & -65536);\n",
        "test_models.py::test_bf16_stays_in_the_body",
    ),
    Mutant(
        "kernel: temperature ignored",
        "kernels/cpu.py",
        "1.0 / transform.temperature",
        "1.0",
        LOGPROBS,
    ),
]

KERNELS = [
    Mutant(
        "fast kernel: leading -inf not guarded",
        "kernels/native.cpp",
        "shift = next == all(-INF) ? V{} : next;",
        "shift = next;",
        "test_kernels.py::test_leading_blocks_of_minus_infinity",
    ),
    Mutant(
        "fast kernel: earlier sums not rescaled",
        "kernels/native.cpp",
        "        sum = sum * factor;\n",
        "",
        "test_native.py::test_where_there_is_a_compiler_they_are_built_and_pass_their_check",
    ),
    Mutant(
        "fast kernel: odd last entry dropped",
        "kernels/native.cpp",
        "        if (entries % 2) add_terms",
        "        if (false) add_terms",
        "test_kernels.py::test_linear_operations_are_as_accurate_as_fp32",
    ),
    Mutant(
        "fast kernel: later hidden dimensions overwrite",
        "kernels/native.cpp",
        "for (int64_t k = 0; k < depth; k += SUM_DEPTH, add = true)",
        "for (int64_t k = 0; k < depth; k += SUM_DEPTH)",
        "test_kernels.py::test_a_head_of_real_size_has_fp32_accuracy",
    ),
    Mutant(
        "fast kernel: entropy without the move",
        "kernels/native.cpp",
        "weighted = factor * (weighted + (sum > V{} ? sum * delta : V{}));",
        "weighted = factor * weighted;",
        "test_kernels.py::test_linear_operations_are_as_accurate_as_fp32",
    ),
    Mutant(
        "fast kernel: cap before scale",
        "kernels/native.cpp",
        "        x = x * scale;\n        if (softcap != 0.0f) x = softcap * tanh_of(x / softcap);\n",
        "        if (softcap != 0.0f) x = softcap * tanh_of(x / softcap);\n        x = x * scale;\n",
        "test_kernels.py::test_transforms_in_all_combinations",
    ),
    Mutant(
        "fast kernel: slope of the cap ignored",
        "kernels/native.cpp",
        "(all(1.0f) - bent * bent) * (transform",
        "all(1.0f) * (transform",
        "test_kernels.py::test_gradients_pass_gradcheck_and_transforms",
    ),
    Mutant(
        "fast kernel: gradient of the wrong column",
        "kernels/native.cpp",
        "one_hot[token - first - c] = 1.0f",
        "one_hot[(token - first - c + 1) % WIDTH] = 1.0f",
        "test_kernels.py::test_gradients_are_as_accurate_as_fp32",
    ),
    Mutant(
        "twin: leading -inf not guarded",
        "kernels/cpu.py",
        "shift_N = next_N.masked_fill(next_N == -torch.inf, 0.0)",
        "shift_N = next_N",
        "test_kernels.py::test_leading_blocks_of_minus_infinity",
    ),
    Mutant(
        "twin: few rows not padded",
        "kernels/cpu.py",
        "    missing = FEW_ROWS - (len(x) % ROWS or ROWS)\n",
        "    missing = 0\n",
        "test_kernels.py::test_a_row_has_the_same_bits_in_every_batch",
    ),
    Mutant(
        "kernels: rows without upstream gradient take part",
        "kernels/autograd.py",
        "whole = len(kept) == len(grad_N)",
        "whole = True",
        "test_kernels.py::test_rows_without_upstream_gradient_take_no_part_in_backward",
    ),
    Mutant(
        "kernels: dW of a frozen head",
        "kernels/cpu.py",
        "torch.empty_like(weight_VD) if needs[1] else None",
        "torch.empty_like(weight_VD)",
        "test_kernels.py::test_only_what_is_asked_for_gets_a_gradient",
    ),
    Mutant(
        "kernels: an ignored row is scored",
        "kernels/checks.py",
        "tokens_N.masked_fill(ignored_N | wrong_N, IGNORED), ignored_N,",
        "tokens_N.masked_fill(wrong_N, IGNORED), torch.zeros_like(ignored_N),",
        "test_kernels.py::test_ignored_rows_give_0",
    ),
    Mutant(
        "kernels: padding columns keep their share",
        "kernels/checks.py",
        "    return Head(head.hidden_ND, head.weight_VD[:columns]",
        "    return Head(head.hidden_ND, head.weight_VD[:]",
        "test_kernels.py::test_padding_has_no_share",
    ),
    Mutant(
        "kernels: difference of rounded log-probs",
        "kernels/types.py",
        "(sft.centred_N - base.centred_N) - (sft.log_sum_N - base.log_sum_N)",
        "(sft.centred_N + sft.max_N) - sft.lse_N - (base.centred_N + base.max_N) + base.lse_N",
        "test_kernels.py::test_offsets_of_1e4_in_one_model",
    ),
]

PPO = [
    Mutant(
        "ppo: reward at the sampling temperature",
        "rollout.py",
        "            with_parts=True,\n            impl=sft.kernels,\n",
        "            with_parts=True,\n            impl=sft.kernels,\n            temperature=0.6,\n",
        WIRING,
    ),
    Mutant(
        "ppo: anchor of the loss swapped",
        "ppo.py",
        'sft_logprobs_BT if recipe.reward.anchor == "sft"',
        'sft_logprobs_BT if recipe.reward.anchor == "base"',
        WIRING,
    ),
    Mutant(
        "ppo: SFT and base exchanged",
        "ppo.py",
        "sft_logprobs_BT=scores.sft_logprobs_BT,\n            base_logprobs_BT=scores.base_logprobs_BT,\n",
        "sft_logprobs_BT=scores.base_logprobs_BT,\n            base_logprobs_BT=scores.sft_logprobs_BT,\n",
        WIRING,
    ),
    Mutant(
        "ppo: KL in the loss not over the scale", "ppo.py", "kl_scale = 1.0 / rewards.scale", "kl_scale = 1.0", TARGETS
    ),
    Mutant(
        "ppo: KL in the loss not over the whitening",
        "ppo.py",
        "kl_scale /= float(whitening_std(advantages_BT, loss_mask_BT))",
        "kl_scale /= 1.0",
        TARGETS,
    ),
    Mutant(
        "ppo: whitening takes in what is left out",
        "ppo.py",
        "advantages_BT = whiten(advantages_BT, loss_mask_BT)",
        "advantages_BT = whiten(advantages_BT, batch.response_mask_BT)",
        TARGETS,
    ),
    Mutant(
        "ppo: returns of whitened advantages",
        "ppo.py",
        "returns_BT = advantages_BT + batch.old_values_BT",
        "returns_BT = whiten(advantages_BT, loss_mask_BT) + batch.old_values_BT",
        TARGETS,
    ),
    Mutant(
        "ppo: KL in the loss without its scale",
        "ppo.py",
        "recipe.reward.beta * targets.kl_scale * penalty",
        "recipe.reward.beta * penalty",
        STEP,
    ),
    Mutant(
        "ppo: tokens counted a micro-batch (policy)",
        "ppo.py",
        "advantages_BT, mask_BT, clip=config.clip, token_count=count",
        "advantages_BT, mask_BT, clip=config.clip",
        STEP,
    ),
    Mutant(
        "ppo: tokens counted a micro-batch (critic)",
        "ppo.py",
        "returns_BT, mask_BT, clip=config.value_clip, token_count=count",
        "returns_BT, mask_BT, clip=config.value_clip",
        STEP,
    ),
    Mutant(
        "ppo: new log-probs at temperature 1",
        "ppo.py",
        "rows.tokens_BS, rows.attention_mask_BS, width, temperature=recipe.rollout.temperature",
        "rows.tokens_BS, rows.attention_mask_BS, width",
        STEP,
    ),
    Mutant(
        "ppo: gradients pile up over minibatches",
        "ppo.py",
        "    learners.policy_optimizer.zero_grad(set_to_none=True)\n",
        "",
        f"{CORE}test_gradients_are_clipped_to_the_norm_and_reported_as_they_were",
    ),
    Mutant(
        "ppo: the critic's head stands still",
        "ppo.py",
        "torch.optim.Adam(value.parameters()",
        "torch.optim.Adam(value.body.parameters()",
        f"{CORE}test_every_weight_of_policy_and_critic_moves_and_the_frozen_models_stand",
    ),
    Mutant(
        "ppo: the SFT model is trained along",
        "ppo.py",
        "learners = Learners.start(policy, config)",
        "policy.model = sft_policy.model; learners = Learners.start(policy, config)",
        f"{CORE}test_every_weight_of_policy_and_critic_moves_and_the_frozen_models_stand",
    ),
    Mutant(
        "ppo: warm-up of the critic one step short",
        "ppo.py",
        "trains_policy = step > config.critic_warmup",
        "trains_policy = step >= config.critic_warmup",
        f"{CORE}test_the_policy_stands_still_while_the_critic_warms_up",
    ),
    Mutant(
        "ppo: schedule off by one",
        "ppo.py",
        "lr_factor(config.schedule, config.warmup, step, config.steps)",
        "lr_factor(config.schedule, config.warmup, step - 1, config.steps)",
        f"{CORE}test_training_follows_the_schedule",
    ),
    Mutant(
        "ppo: running deviation not restored",
        "ppo.py",
        'running.load_state_dict(state.counters["running"])',
        "pass",
        RESUMED,
    ),
    Mutant(
        "ppo: running deviation not in the checkpoint",
        "ppo.py",
        'state.counters["running"] = running.state_dict()',
        "pass",
        RESUMED,
    ),
]

STATS, COMPARE, RESULTS = "test_stats.py::", "test_compare.py::", "test_results.py::"
COMPARISONS = [
    Mutant(
        "comparison: np.abs(sums) >= observed))",
        "significance.py",
        "np.abs(sums) >= observed))",
        "np.abs(sums) > observed + 1e-6))",
        f"{STATS}test_sign_flip_is_scipys_paired_permutation_test",
    ),
    Mutant(
        "comparison: abs(float(values.sum())) - 1e-9 * float(",
        "significance.py",
        "abs(float(values.sum())) - 1e-9 * float(moving.sum())",
        "float(values.sum()) - 1e-9 * float(moving.sum())",
        f"{STATS}test_sign_flip_is_scipys_paired_permutation_test",
    ),
    Mutant(
        "comparison: (reached + 1) / (draws + 1)",
        "significance.py",
        "(reached + 1) / (draws + 1)",
        "reached / draws",
        f"{STATS}test_sign_flip_edges",
    ),
    Mutant(
        "comparison: (len(p_values) - rank) * p_values[i]",
        "significance.py",
        "(len(p_values) - rank) * p_values[i]",
        "len(p_values) * p_values[i]",
        f"{STATS}test_holm_golden",
    ),
    Mutant(
        "comparison: largest = max(largest, (len",
        "significance.py",
        "largest = max(largest, (len",
        "largest = max(0, (len",
        f"{STATS}test_holm_golden",
    ),
    Mutant(
        "comparison: quantile(1 - alpha / 2)",
        "significance.py",
        "quantile(1 - alpha / 2)",
        "quantile(1 - alpha)",
        f"{STATS}test_detectable_differences",
    ),
    Mutant(
        "comparison: squares[0] + squares[1] - squares[2]",
        "stats.py",
        "squares[0] + squares[1] - squares[2]",
        "squares[0] + squares[1]",
        f"{STATS}test_crossed_error_by_hand",
    ),
    Mutant(
        "comparison: float(scipy_stats.t.ppf((1 + confidence)",
        "stats.py",
        "float(scipy_stats.t.ppf((1 + confidence) / 2, df)) * error / (plain",
        "1.96 * error / (plain",
        f"{STATS}test_one_seed_is_a_t_interval_for_well_behaved_items",
    ),
    Mutant(
        "comparison: places[name] for name in clusters], (val",
        "stats.py",
        "places[name] for name in clusters], (values - means).T",
        "places[name] for name in clusters], values.T",
        f"{STATS}test_cluster_values_are_the_ratio_estimator",
    ),
    Mutant(
        "comparison: np.take_along_axis(values, drawn, axis=1",
        "stats.py",
        "np.take_along_axis(values, drawn, axis=1)",
        "values",
        f"{STATS}test_interquartile_means",
    ),
    Mutant(
        "comparison: units = float(values.mean()), cluster_va",
        "stats.py",
        "units = float(values.mean()), cluster_values(values, clusters)",
        "units = float(values.mean()), values",
        f"{STATS}test_cluster_values_are_the_ratio_estimator",
    ),
    Mutant(
        "comparison: p_holm <= alpha and (interval.low > 0 or",
        "compare.py",
        "p_holm <= alpha and (interval.low > 0 or interval.high < 0)",
        "p_holm <= alpha",
        f"{COMPARE}test_seeds_that_agree_on_few_items_are_not_enough",
    ),
    Mutant(
        "comparison: p_holm <= alpha and (interval",
        "compare.py",
        "p_holm <= alpha and (interval",
        "case.tested.p <= alpha and (interval",
        f"{COMPARE}test_holm_is_over_tasks_and_models_of_a_decoding",
    ),
    Mutant(
        "comparison: (interval.mean > 0) == first.higher_is_b",
        "compare.py",
        "(interval.mean > 0) == first.higher_is_better",
        "interval.mean > 0",
        f"{COMPARE}test_less_may_be_better",
    ),
    Mutant(
        "comparison: if paired.clusters is None and paired.bi",
        "compare.py",
        "if paired.clusters is None and paired.binary",
        "if paired.binary",
        f"{COMPARE}test_clusters_flip_together",
    ),
    Mutant(
        "comparison: else math.inf",
        "compare.py",
        "else math.inf",
        "else 0.0",
        f"{COMPARE}test_several_seeds_are_sign_flips_and_few_cannot_tell",
    ),
    Mutant(
        "comparison: confidence=1 - alpha)     shown",
        "compare.py",
        "confidence=1 - alpha)\n    shown",
        "confidence=0.95)\n    shown",
        f"{COMPARE}test_a_smaller_alpha_asks_for_more",
    ),
    Mutant(
        "comparison: if not reasons:             items",
        "matching.py",
        "if not reasons:\n            items",
        "if True:\n            items",
        f"{COMPARE}test_what_cannot_be_paired_is_named",
    ),
    Mutant(
        "comparison: each[side][item] for item in items",
        "matching.py",
        "each[side][item] for item in items",
        "list(each[side].values())[n] for n, item in enumerate(items)",
        f"{COMPARE}test_items_are_paired_by_id_not_by_place",
    ),
    Mutant(
        "comparison: if math.isnan(value):             reason",
        "results.py",
        "if math.isnan(value):\n            reasons",
        "if False:\n            reasons",
        f"{RESULTS}test_round_trip",
    ),
    Mutant(
        "comparison: not stage.done",
        "results.py",
        "not stage.done",
        "False",
        f"{RESULTS}test_a_run_reads_as_arms_seeds_and_groups",
    ),
    Mutant(
        "comparison: and (reason := damage(folder))",
        "results.py",
        "and (reason := damage(folder))",
        "and (reason := None)",
        f"{RESULTS}test_nothing_and_damage_are_one_line",
    ),
    Mutant(
        "comparison: sum(each) / len(each) for each",
        "results.py",
        "sum(each) / len(each) for each",
        "each[0] for each",
        f"{RESULTS}test_round_trip",
    ),
    Mutant(
        "comparison: replace(each, model=arm, seed=seed)",
        "results.py",
        "replace(each, model=arm, seed=seed)",
        "each",
        f"{RESULTS}test_a_run_reads_as_arms_seeds_and_groups",
    ),
]

LOOP = [
    Mutant(
        "loop: gradient clipping does not clip",
        "loop.py",
        "nn.utils.clip_grad_norm_(module.parameters(), max_norm)",
        "nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])",
        f"{CORE}test_gradients_are_clipped_to_the_norm_and_reported_as_they_were",
    ),
    Mutant(
        "loop: schedule reaches 0 too early",
        "loop.py",
        "done = (step - ramp - 1) / max(total - ramp, 1)",
        "done = (step - ramp) / max(total - ramp, 1)",
        f"{CORE}test_learning_rates_by_hand",
    ),
    Mutant(
        "loop: optimizers not restored",
        "loop.py",
        'optimizer.load_state_dict(state["optimizers"][name])',
        "pass",
        RESUMED,
    ),
    Mutant("loop: weights not restored", "loop.py", "tensor.data.copy_(saved[name])", "pass", RESUMED),
    Mutant("loop: counters not restored", "loop.py", 'self.counters.update(state["counters"])', "pass", RESUMED),
    Mutant(
        "loop: the kept step is not kept",
        "loop.py",
        'keep={self.state.counters["kept_step"]}',
        "keep=()",
        RESUMED,
    ),
    Mutant(
        "loop: ties go to the later step",
        "loop.py",
        'score > counters["kept_score"]',
        'score >= counters["kept_score"]',
        RESUMED,
    ),
    Mutant(
        "loop: Ctrl-C in a last step is swallowed",
        "loop.py",
        "                if stopped.is_set():\n",
        "                if stopped.is_set() and step < self.total:\n",
        "test_resume.py::test_ctrl_c_in_the_last_step_does_not_let_the_next_stage_begin",
    ),
    Mutant(
        "pipeline: the last step is exported for the kept",
        "pipeline.py",
        'load_weights(model.model, kept_checkpoint(bench.stage, kept) / "policy.safetensors")',
        "pass",
        f"{CORE}test_the_kept_step_is_measured_and_exported",
    ),
]

SFT = [
    Mutant(
        "sft: loss on the prompt too",
        "sft.py",
        "splits = [max(row.prompt_tokens, 1) for row in rows]",
        "splits = [1 for row in rows]",
        f"{CORE}test_the_sft_loss_counts_answers_with_eos_and_nothing_else",
    ),
    Mutant(
        "sft: mean a micro-batch",
        "sft.py",
        "(nll / answer_tokens).backward()",
        "(nll / sum(len(r.ids) - max(r.prompt_tokens, 1) for r in batch[part])).backward()",
        f"{CORE}test_an_sft_step_is_a_mean_over_all_answer_tokens_whatever_the_micro_batch",
    ),
    Mutant(
        "sft: every epoch in the same order",
        "sft.py",
        "prompt_schedule(len(rows), len(rows), epoch,",
        "prompt_schedule(len(rows), len(rows), 0,",
        f"{CORE}test_sft_epochs_take_each_row_once_in_a_seeded_order_each",
    ),
    Mutant(
        "sft: the seed is ignored",
        "sft.py",
        'derive_seed(seed, "sft-order")',
        'derive_seed(0, "sft-order")',
        f"{CORE}test_sft_epochs_take_each_row_once_in_a_seeded_order_each",
    ),
    Mutant(
        "data: answers without EOS",
        "chat.py",
        "return (*tail, stops[0])",
        "return tail",
        "test_data.py::test_loss_begins_where_the_answer_begins"
        " test_data.py::test_plain_text_is_all_answer_and_its_first_token_has_no_predictor"
        " test_data.py::test_answers_end_in_a_stop_token_whatever_the_template_puts_there",
    ),
]

RECORD = [
    Mutant(
        "checkpoint: files not synced",
        "checkpoint.py",
        "    for path in paths:\n        sync(path)\n",
        "",
        f"{STORE}test_everything_is_synced_before_it_is_moved_into_place_and_the_folder_after",
    ),
    Mutant(
        "checkpoint: folder not synced after the rename",
        "checkpoint.py",
        "        os.replace(source, target)\n    sync(target.parent)\n",
        "        os.replace(source, target)\n",
        f"{STORE}test_everything_is_synced_before_it_is_moved_into_place_and_the_folder_after",
    ),
    Mutant(
        "checkpoint: written in place",
        "checkpoint.py",
        "            move(target, old)\n        move(aside, target)\n",
        "            move(target, old)\n        shutil.copytree(aside, target)\n        shutil.rmtree(aside)\n",
        f"{STORE}test_everything_is_synced_before_it_is_moved_into_place_and_the_folder_after",
    ),
    Mutant(
        "checkpoint: checksums not compared",
        "checkpoint.py",
        'if found["sha256"] != expected["sha256"]:',
        "if False:",
        f"{STORE}test_a_torn_checkpoint_is_named_and_the_one_before_is_used",
    ),
    Mutant(
        "checkpoint: one that stepped aside is lost",
        "checkpoint.py",
        "    elif old.exists():\n        move(old, target)\n",
        "",
        f"{STORE}test_what_the_dead_left_behind_is_swept_and_what_may_be_alive_is_not",
    ),
    Mutant(
        "store: commit not fenced",
        "store.py",
        'if not Lease.claim(self.stage.path, self.number + 1, {"state": "committed", "result": result}):',
        "if False:",
        f"{STORE}test_a_holder_that_slept_through_its_lease_changes_nothing[commit]",
    ),
    Mutant(
        "store: a checkpoint of one who lost his lease",
        "store.py",
        "            self.check()  # writing may take long enough to lose the lease\n",
        "",
        f"{STORE}test_a_holder_that_slept_through_its_lease_changes_nothing[write]",
    ),
    Mutant(
        "lease: a live holder is not respected",
        "lease.py",
        "            if cls.live(stage, number, record, timeout_s):\n",
        "            if False:\n",
        f"{STORE}test_whose_lease_is_taken_over",
    ),
    Mutant(
        "store: leases expire by this machine's clock",
        "lease.py",
        "            now = os.fstat(file.fileno()).st_mtime\n",
        "            now = time.time()\n",
        f"{STORE}test_a_lease_expires_by_the_file_servers_clock_whatever_ours_says",
    ),
    Mutant(
        "store: rows of discarded steps stay",
        "store.py",
        'row["step"] <= min(starts)]',
        'row["step"] >= -1]',
        f"{STORE}test_rows_of_a_resumed_attempt_replace_those_it_discarded",
    ),
    Mutant(
        "store: torn checkpoints are used",
        "store.py",
        "            if reason is None:\n                return step, path\n",
        "            return step, path\n",
        f"{STORE}test_a_torn_checkpoint_is_named_and_the_one_before_is_used",
    ),
]

EVALUATION = [
    Mutant(
        "eval: key without the weights",
        "harness/session.py",
        '        "weights": weights,\n        "precision"',
        '        "precision"',
        f"{EVAL}test_changing_one_weight_the_data_or_the_checker_changes_the_key",
    ),
    Mutant(
        "eval: key without the seed of samples",
        "harness/session.py",
        "[sampling.samples, sampling.temperature, sampling.seed]",
        "[sampling.samples, sampling.temperature]",
        f"{EVAL}test_a_known_result_is_found_without_loading_the_model",
    ),
    Mutant(
        "eval: any earlier result is accepted",
        "harness/session.py",
        'f"*@{key}/{SUMMARY}"',
        'f"*@*/{SUMMARY}"',
        f"{EVAL}test_a_known_result_is_found_without_loading_the_model",
    ),
    Mutant(
        "eval: checker's code not in the key",
        "harness/digest.py",
        '"skipped": sorted(skipped), "code": code}',
        '"skipped": sorted(skipped)}',
        f"{EVAL}test_changing_one_weight_the_data_or_the_checker_changes_the_key",
    ),
    Mutant(
        "eval: template ignored",
        "harness/preflight.py",
        "chat_template=model.apply_chat_template if templated else None",
        "chat_template=None",
        f"{EVAL}test_the_embedded_suite_is_what_training_measures",
    ),
    Mutant(
        "eval: samples decoded greedily",
        "harness/session.py",
        "temperature=options.temperature if options.samples else None",
        "temperature=None",
        f"{EVAL}test_samples_repeat_and_depend_on_the_seed_and_the_prompt_alone",
    ),
    Mutant(
        "eval: seed not passed to the model",
        "harness/session.py",
        "            seed=options.seed,\n            temperature",
        "            seed=0,\n            temperature",
        f"{EVAL}test_samples_repeat_and_depend_on_the_seed_and_the_prompt_alone",
    ),
    Mutant(
        "eval: every sample of a prompt the same",
        "harness/model.py",
        'f"{draw}/{repeat}/{prompt}"',
        'f"{repeat}/{prompt}"',
        f"{EVAL}test_samples_repeat_and_depend_on_the_seed_and_the_prompt_alone",
    ),
    Mutant(
        "eval: samples by their place in the batch",
        "harness/model.py",
        "row_seed(self.seed, text, self.draw, seen[text])",
        "row_seed(self.seed, str(len(seeds)), self.draw, seen[text])",
        f"{EVAL}test_samples_do_not_depend_on_the_prompts_before",
    ),
    Mutant(
        "eval: stop texts stay in the response",
        "harness/model.py",
        "postprocess_generated_text(text, list(how.until), None)",
        "text",
        f"{EVAL}test_scores_are_those_of_lm_evals_own_call",
    ),
    Mutant(
        "eval: log-probs of the token before",
        "harness/model.py",
        "target_BT = tokens_BS[:, -width:]",
        "target_BT = tokens_BS[:, -width - 1 : -1]",
        f"{EVAL}test_scores_are_those_of_lm_evals_own_call",
    ),
    Mutant(
        "eval: item ids by position",
        "harness/scores.py",
        'entry["doc_hash"] + copy',
        'str(entry["doc_id"]) + copy',
        f"{EVAL}test_scores_are_those_of_lm_evals_own_call",
    ),
    Mutant(
        "eval: prompts not scored count as failed",
        "harness/scores.py",
        '            "not_scored": reason,\n',
        '            "not_scored": reason,\n            "exact_match": 0.0,\n',
        f"{CHECKS}test_prompts_that_do_not_fit_are_listed_when_told_so",
    ),
    Mutant(
        "eval: loose for strict",
        "harness/session.py",
        '"metric": numeric[0]',
        '"metric": numeric[-1]',
        f"{CHECKS}test_ifeval_without_its_packages",
    ),
    Mutant(
        "eval: a share of instructions as a mean of prompts",
        "harness/scores.py",
        "    if (weights == 1).all() and len(set(places.values())) == len(places):\n",
        "    if True:\n",
        f"{CHECKS}test_the_instruction_level_interval_is_of_a_ratio_of_sums",
    ),
    Mutant(
        "eval: the task's YAML is not in its content",
        "harness/digest.py",
        'canonical_json({"config": own, "code": code})',
        'canonical_json({"code": code})',
        f"{UNLIKE}test_a_task_that_was_edited_is_refused",
    ),
    Mutant(
        "eval: draws of examples not recorded",
        "harness/preflight.py",
        "FEWSHOT_SEED + seed if drawn",
        "FEWSHOT_SEED if drawn",
        f"{UNLIKE}test_options_that_ask_otherwise_are_refused",
    ),
    Mutant(
        "eval: batches by the memory that is free",
        "harness/batches.py",
        "psutil.virtual_memory().total",
        "psutil.virtual_memory().available",
        f"{EVAL}test_batches_are_the_same_whatever_memory_is_free_and_are_recorded",
    ),
    Mutant(
        "eval: time left counts the reading of prompts as writing",
        "harness/progress.py",
        "        if not self._start:",
        "        if False:",
        "test_harness_progress.py::test_time_left_before_the_first_batch_is_a_bound_from_the_tokens_after_the_first",
    ),
    Mutant(
        "comparison: with and without a template",
        "matching.py",
        'settings["templated"] = settings["chat_template"] is not None',
        'settings["templated"] = True',
        f"{COMPARE}test_results_that_were_asked_otherwise_are_refused",
    ),
    Mutant(
        "comparison: settings of the first seed alone",
        "matching.py",
        "_made_alike([result for each in pairs for result in each])",
        "_made_alike([*pairs[0]])",
        f"{COMPARE}test_all_that_differs_is_named_at_once_and_at_any_seed",
    ),
    Mutant(
        "comparison: clusters lost",
        "results.py",
        "tuple(clusters[item] for item in values) if clusters else None",
        "None",
        f"{RESULTS}test_round_trip",
    ),
    Mutant(
        "eval: items dealt anew for the score",
        "harness/tasks.py",
        "    setattr(task, method, lambda: rows)\n",
        "",
        "test_harness_paper.py::test_the_suite_runs_and_scores",
    ),
    Mutant(
        "eval: choices by what else is asked for",
        "harness/tasks.py",
        "            random.seed(0)  #",
        "            #",
        "test_harness_paper.py::test_the_suite_runs_and_scores",
    ),
    Mutant(
        "eval: examples in one turn",
        "harness/preflight.py",
        "fewshot_as_multiturn=MULTITURN and templated",
        "fewshot_as_multiturn=False",
        f"{EVAL}test_scores_are_those_of_lm_evals_own_call",
    ),
    Mutant(
        "eval: metrics of the whole set found late",
        "harness/trial.py",
        "    _try_metrics(loaded, {metric: found for (metric, _), found in values.items()})\n",
        "",
        f"{REFUSED}test_metrics_that_cannot_be_used",
    ),
    Mutant(
        "eval: invented responses always choose the first",
        "harness/trial.py",
        "place == number % len(each)",
        "place == 0",
        f"{REFUSED}test_metrics_that_cannot_be_used",
    ),
    Mutant(
        "eval: a checker's error as a traceback",
        "harness/call.py",
        'with quiet(seed), restating(prepared.task.name, vars(task.config), "scored"):',
        "with quiet(seed):",
        f"{REFUSED}test_a_checker_that_fails_late_is_one_line",
    ),
    Mutant(
        "eval: the place of results not tried",
        "harness/run.py",
        "            check_place(target.parent)\n",
        "            pass\n",
        f"{REFUSED}test_a_place_that_cannot_be_written",
    ),
    Mutant(
        "a tried place is left behind",
        "place.py",
        "            shutil.rmtree(trial, ignore_errors=True)\n",
        "            pass\n",
        f"{CHECKS}test_a_trap_is_one_line_before_any_generation",
    ),
    Mutant(
        "eval: weights of later arms not looked at",
        "harness/run.py",
        "            check_weights(target.spec, target.config)\n",
        "            pass\n",
        f"{REFUSED}test_weights_of_the_last_arm_are_checked_first",
    ),
    Mutant(
        "eval: a given SFT model is no arm",
        "harness/targets.py",
        ', "given-sft": recipe.model.sft',
        "",
        f"{REFUSED}test_a_given_sft_model_is_an_arm_and_arms_left_out_are_named",
    ),
    Mutant(
        "eval: arms left out in silence",
        "harness/targets.py",
        '        say(f"not evaluated, {line}")\n',
        "        pass\n",
        f"{REFUSED}test_a_given_sft_model_is_an_arm_and_arms_left_out_are_named",
    ),
    Mutant(
        "eval: a damaged result is known",
        "harness/session.py",
        "                read_result(known)\n",
        "                pass\n",
        f"{REFUSED}test_a_damaged_result_is_made_again",
    ),
    Mutant(
        "a sweep is taken for a run",
        "arms.py",
        "    if is_sweep(run.spec):\n",
        "    if False:\n",
        f"{REFUSED}test_a_sweep_is_refused",
    ),
    Mutant(
        "eval: without the system message of training",
        "harness/preflight.py",
        "system_instruction=system,",
        "system_instruction=None,",
        f"{REFUSED}test_a_run_is_asked_with_the_system_message_it_was_trained_with",
    ),
    Mutant(
        "eval: prompts not scored are listed in part",
        "harness/run.py",
        "for row in rows)\n            write_atomic",
        "for row in rows[:1])\n            write_atomic",
        f"{REFUSED}test_prompts_not_scored_are_all_in_a_file",
    ),
    Mutant(
        "eval: one problem at a time",
        "harness/problems.py",
        "            self.found.setdefault(str(error), error)\n",
        "            raise\n",
        f"{REFUSED}test_all_problems_of_all_tasks_are_said_together",
    ),
    Mutant(
        "eval: fewer examples not tried",
        "harness/room.py",
        "for fewer in range(shots - 1, -1, -1):",
        "for fewer in range(0, -1, -1):",
        f"{REFUSED}test_how_many_prompts_fit_with_fewer_examples",
    ),
    Mutant(
        "eval: another version is a missing package",
        "harness/restate.py",
        "    if find_spec(top) is None:\n",
        "    if True:\n",
        f"{REFUSED}test_what_is_said_of_packages",
    ),
    Mutant(
        "eval: clusters not written",
        "harness/scores.py",
        "return {} if name is None else",
        "return {} if True else",
        f"{UNLIKE}test_items_of_one_cluster_are_one_unit",
    ),
    Mutant(
        "eval: intervals as if clusters were items",
        "harness/scores.py",
        'str(row.get(CLUSTER) or row["item"])',
        'row["item"]',
        f"{UNLIKE}test_an_interval_is_over_clusters",
    ),
]

LOOK_INSIDE = [
    Mutant(
        "forecast: weights of the worst",
        "optimum.py",
        "return draws.reward_QK / beta - (",
        "return -draws.reward_QK / beta - (",
        f"{FORECAST}test_it_converges_to_the_enumeration",
    ),
    Mutant(
        "forecast: times beta",
        "optimum.py",
        "return draws.reward_QK / beta - (",
        "return draws.reward_QK * beta - (",
        f"{FORECAST}test_it_converges_to_the_enumeration",
    ),
    Mutant(
        "forecast: anchor base adds r",
        "optimum.py",
        "- (draws.log_ratio_QK if anchor",
        "+ (draws.log_ratio_QK if anchor",
        f"{FORECAST}test_anchor_base_at_beta_one_is_sft_itself",
    ),
    Mutant(
        "forecast: r for r'",
        "optimum.py",
        "return draws.reward_QK / beta - (",
        "return draws.log_ratio_QK / beta - (",
        f"{FORECAST}test_a_clipped_reward_has_its_own_optimum",
    ),
    Mutant(
        "forecast: ESS without the square",
        "optimum.py",
        "total_Q1[:, 0] ** 2 / (w_QK**2)",
        "total_Q1[:, 0] / (w_QK**2)",
        f"{FORECAST}test_plug_in_kl_is_that_of_the_normalised_weights",
    ),
    Mutant(
        "forecast: arithmetic mean of ESS",
        "optimum.py",
        "float(1 / (1 / ess_Q).mean())",
        "float(ess_Q.mean())",
        f"{FORECAST}test_the_rule_refuses_where_single_samples_decide",
    ),
    Mutant(
        "forecast: the rule by the median",
        "optimum.py",
        "return effective(ess_Q) >= MIN_ESS",
        "return bool(np.median(ess_Q) >= MIN_ESS)",
        f"{FORECAST}test_the_rule_refuses_where_single_samples_decide",
    ),
    Mutant(
        "forecast: log Z without its peak",
        "optimum.py",
        " + peak_Q1[:, 0]\n",
        "\n",
        f"{FORECAST}test_it_converges_to_the_enumeration",
    ),
    Mutant(
        "forecast: both KLs swapped",
        "optimum.py",
        "        expected(log_w_QK) - log_z_Q,\n        reward_Q / beta - log_z_Q,\n",
        "        reward_Q / beta - log_z_Q,\n        expected(log_w_QK) - log_z_Q,\n",
        f"{FORECAST}test_it_converges_to_the_enumeration",
    ),
    Mutant(
        "forecast: objective without beta",
        "optimum.py",
        "        beta * log_z_Q,\n",
        "        log_z_Q,\n",
        f"{FORECAST}test_it_converges_to_the_enumeration",
    ),
    Mutant(
        "forecast: jackknife dropped",
        "optimum.py",
        "if jackknife else whole_Q",
        "if False else whole_Q",
        f"{FORECAST}test_few_samples_are_unbiased_after_the_jackknife",
    ),
    Mutant(
        "forecast: jackknife of K for K - 1",
        "optimum.py",
        "np.log(rest_QK / (k - 1))",
        "np.log(rest_QK / k)",
        f"{FORECAST}test_few_samples_are_unbiased_after_the_jackknife",
    ),
    Mutant(
        "forecast: measured KL to the base",
        "optimum.py",
        "kl_sft_Q + (draws.log_ratio_QK.mean",
        "kl_sft_Q - (draws.log_ratio_QK.mean",
        f"{FORECAST}test_another_policy_is_measured_under_its_own_samples",
    ),
    Mutant(
        "forecast: measured objective adds the KL",
        "optimum.py",
        "reward_Q - beta * kl_anchor_Q",
        "reward_Q + beta * kl_anchor_Q",
        f"{FORECAST}test_another_policy_is_measured_under_its_own_samples",
    ),
    Mutant(
        "forecast: the last PPO stage alone",
        "pair.py",
        'return sorted(ours, key=lambda stage: int(stage.identity["config"]["seed"]))',
        'return sorted(ours, key=lambda stage: int(stage.identity["config"]["seed"]))[-1:]',
        f"{FORECAST}test_every_stage_and_every_step_with_weights_is_drawn",
    ),
    Mutant(
        "forecast: the kept step alone",
        "ppo_arms.py",
        "            if step != kept:",
        "            if False:",
        f"{FORECAST}test_every_stage_and_every_step_with_weights_is_drawn",
    ),
    Mutant(
        "intervals: items by bootstrap alone",
        "stats.py",
        "        calibrated_interval(values[None, :], limits=limits, seed=seed, draws=draws,",
        "        crossed_interval(values[None, :], seed=seed, draws=draws,",
        "test_coverage.py::test_items_of_four_samples test_stats.py::test_items_that_agree_are_no_certainty",
    ),
    Mutant(
        "intervals: AUC by bootstrap alone",
        "association.py",
        "scale * (np.quantile",
        "(np.quantile",
        "test_coverage.py::test_few_prompts_have_wider_intervals_than_their_bootstrap",
    ),
    Mutant(
        "choice: questions count twice",
        "compare.py",
        "once, repeated = without_repeats(arms)",
        "once, repeated = arms, []",
        "test_choice.py::test_the_embedded_suite_and_a_runs_own_tests_count_once",
    ),
    Mutant(
        "choice: the suite whatever it holds",
        "choice.py",
        "if _scores_of(suite) < _scores_of(own) else (own, suite)",
        "if False else (own, suite)",
        "test_choice.py::test_the_fuller_of_both_stays",
    ),
    Mutant(
        "choice: a name is enough",
        "choice.py",
        " or not _is_of_world(own, group)",
        "",
        "test_choice.py::test_a_test_of_that_name_on_other_items_is_no_repeat",
    ),
    Mutant(
        "choice: the oldest way",
        "choice.py",
        "max(_time(r) for _, r in found)",
        "-max(_time(r) for _, r in found)",
        "test_choice.py::test_evaluating_again_with_another_seed_compares_the_newest_that_all_share",
    ),
    Mutant(
        "choice: a way that one model lacks",
        "choice.py",
        "if {name for name, _ in found} == on.keys()}",
        "if found}",
        "test_choice.py::test_all_seeds_before_few_and_all_items_before_few",
    ),
    Mutant(
        "report: nothing of srppo eval",
        "report/evaluated.py",
        'result.path.parent.name == "eval"',
        'result.path.parent.name == ""',
        "test_report_evaluated.py::test_every_evaluated_task_of_every_arm_is_shown",
    ),
    Mutant(
        "forecast: share from zero, not from SFT",
        "optimum.py",
        "ratio_interval(policy_Q - start_Q, gain_Q, draws=draws)",
        "ratio_interval(policy_Q, best_Q, draws=draws)",
        f"{FORECAST}test_share_of_the_objective",
    ),
    Mutant(
        "forecast: a share of no gain",
        "optimum.py",
        "if not item_interval(gain_Q, limits=None, draws=draws).low > 0:",
        "if False:",
        f"{FORECAST}test_share_of_the_objective",
    ),
    Mutant(
        "forecast: SFT sampled at the rollout temperature",
        "forecast.py",
        "pair.recipe.rollout.temperature if own else 1.0",
        "pair.recipe.rollout.temperature",
        f"{FORECAST}test_the_models_own_samples_give_the_enumerated_optimum",
    ),
    Mutant(
        "association: ties by place",
        "association.py",
        "rankdata(score)[right > 0]",
        'rankdata(score, method="ordinal")[right > 0]',
        f"{SCORE}test_auc_and_rank_correlation_against_scipy",
    ),
    Mutant(
        "association: AUC of the wrong",
        "association.py",
        "rankdata(score)[right > 0]",
        "rankdata(-score)[right > 0]",
        f"{SCORE}test_auc_and_rank_correlation_against_scipy",
    ),
    Mutant(
        "association: rank correlation's sign",
        "association.py",
        "return float(a @ b) / norm",
        "return -float(a @ b) / norm",
        f"{SCORE}test_auc_and_rank_correlation_against_scipy",
    ),
    Mutant(
        "association: values for ranks",
        "association.py",
        "a, b = rankdata(x), rankdata(y)",
        "a, b = np.array(x), np.array(y)",
        f"{SCORE}test_auc_and_rank_correlation_against_scipy",
    ),
    Mutant(
        "association: AUC across prompts",
        "association.py",
        "    for chosen in _rows_by(prompts):\n        count",
        "    for chosen in [np.arange(len(a))]:\n        count",
        f"{SCORE}test_auc_within_a_prompt_by_hand",
    ),
    Mutant(
        "association: responses resampled, not prompts",
        "association.py",
        "    rows = _rows_by(prompts)\n",
        "    rows = [np.array([i]) for i in range(len(prompts))]\n",
        f"{SCORE}test_intervals_take_a_prompts_responses_together",
    ),
    Mutant(
        "pieces: parts of a character shown",
        "pieces.py",
        "whole = not now.endswith(INCOMPLETE) or i == len(ids) - 1",
        "whole = True",
        f"{SCORE}test_a_character_of_several_bytes_goes_to_its_last_token",
    ),
    Mutant(
        "pieces: a token with those before it",
        "pieces.py",
        "texts[i] = now[len(before) :]",
        "texts[i] = now",
        f"{SCORE}test_special_tokens_stand_alone",
    ),
    Mutant(
        "score: off-support by the ratio",
        "score.py",
        "return self.base_logprob < OFF_SUPPORT_NATS",
        "return self.log_ratio < OFF_SUPPORT_NATS",
        f"{SCORE}test_shares_of_the_tokens_that_carry_the_reward",
    ),
    Mutant(
        "score: carriers by sign",
        "score.py",
        "key=lambda i: -abs(self.tokens[i].log_ratio)",
        "key=lambda i: -self.tokens[i].log_ratio",
        f"{SCORE}test_shares_of_the_tokens_that_carry_the_reward",
    ),
    Mutant(
        "score: responses in the order of lengths",
        "score.py",
        "for i, ratios_T, bases_T in zip(chunk, ",
        "for i, ratios_T, bases_T in zip(range(start, start + len(chunk)), ",
        f"{SCORE}test_a_given_response_is_scored_as_in_training",
    ),
    Mutant(
        "score: an EOS that was not written",
        "score.py",
        '    if row.get("ended") is False:\n',
        "    if False:\n",
        f"{SCORE}test_an_answer_without_its_end",
    ),
    Mutant(
        "score: top and bottom swapped",
        "report/score_text.py",
        "key=lambda each: -each.reward",
        "key=lambda each: each.reward",
        f"{SCORE}test_ranking_takes_each_response_once",
    ),
]

METHODS = [
    Mutant(
        "rloo: own response in the baseline",
        "advantage.py",
        "others_PK = (returns_PK.sum(dim=1, keepdim=True) - returns_PK) / (per_prompt - 1)",
        "others_PK = returns_PK.mean(dim=1, keepdim=True)",
        f"{METHOD}test_leave_one_out_by_hand",
    ),
    Mutant(
        "rloo: divisor k",
        "advantage.py",
        "- returns_PK) / (per_prompt - 1)",
        "- returns_PK) / per_prompt",
        f"{METHOD}test_leave_one_out_by_hand",
    ),
    Mutant(
        "rloo: padding is paid",
        "advantage.py",
        "returns_B = rewards_BT.masked_fill(~mask_BT, 0.0).sum(dim=1)\n    returns_PK",
        "returns_B = rewards_BT.sum(dim=1)\n    returns_PK",
        f"{METHOD}test_leave_one_out_by_hand",
    ),
    Mutant(
        "rloo: prompts interleaved",
        "rollout.py",
        "indices += [orders[epoch][offset]] * per_prompt",
        "indices.append(orders[epoch][offset])\n    indices = indices * per_prompt",
        f"{METHOD}test_responses_to_one_prompt_stand_in_a_row_and_prompts_keep_their_order",
    ),
    Mutant(
        "rloo: critic counted",
        "ppo.py",
        "value = 0 if learners.value is None else forward_flops(learners.value, lengths_B, head_tokens)",
        "value = forward_flops(learners.policy if learners.value is None else learners.value, lengths_B, head_tokens)",
        f"{METHOD}test_rloo_counts_no_critic",
    ),
    Mutant(
        "rloo: a critic all the same",
        "ppo.py",
        'if config.advantage == "rloo":\n            return',
        'if config.advantage == "none":\n            return',
        f"{METHOD}test_rloo_has_no_critic_anywhere",
    ),
    Mutant(
        "weights: alpha counted from the base",
        "extrapolation.py",
        "weights[1][name] + alpha * (weights[1][name] - weights[2][name])",
        "weights[2][name] + alpha * (weights[1][name] - weights[2][name])",
        f"{METHOD}test_weights_by_hand",
    ),
    Mutant(
        "weights: ties to the larger",
        "extrapolation.py",
        "for alpha in sorted(alphas):",
        "for alpha in sorted(alphas, reverse=True):",
        f"{METHOD}test_development_items_choose_alpha_and_ties_go_to_the_smaller",
    ),
    Mutant(
        "weights: left at the last alpha",
        "extrapolation.py",
        '    extrapolate(target, sft, base, best["alpha"])\n',
        "",
        f"{METHOD}test_development_items_choose_alpha_and_ties_go_to_the_smaller",
    ),
    Mutant(
        "decoding: anchors exchanged",
        "extrapolation.py",
        '(sft_BV if config.anchor == "sft" else base_BV)',
        '(sft_BV if config.anchor == "base" else base_BV)',
        f"{METHOD}test_next_token_distribution_by_hand",
    ),
    Mutant(
        "decoding: beta for 1/beta",
        "extrapolation.py",
        "terms_BV / config.beta",
        "terms_BV * config.beta",
        f"{METHOD}test_next_token_distribution_by_hand",
    ),
    Mutant(
        "resampling: mode of single samples",
        "resampling.py",
        "by_text[answer.text] = by_text.get(answer.text, 0.0) + weight",
        "by_text[answer.text] = weight",
        f"{METHOD}test_the_mode_of_the_weighted_set_adds_up_equal_texts",
    ),
    Mutant(
        "resampling: items share draws",
        "resampling.py",
        'derive_seed(seed, "resample", i)',
        'derive_seed(seed, "resample")',
        f"{METHOD}test_draws_follow_the_weights_and_the_seed",
    ),
    Mutant(
        "resampling: weights ignored",
        "resampling.py",
        "size=count, p=weights_K",
        "size=count",
        f"{METHOD}test_draws_follow_the_weights_and_the_seed",
    ),
    Mutant(
        "resampling: the anchor is ignored",
        "resampling.py",
        "log_weights(draws, config.anchor, config.beta)",
        'log_weights(draws, "sft", config.beta)',
        f"{METHOD}test_weights_and_effective_samples_by_hand",
    ),
    Mutant(
        "best of n: parts overlap",
        "resampling.py",
        "[:, g * size : (g + 1) * size].argmax(axis=1) + g * size",
        "[:, : (g + 1) * size].argmax(axis=1)",
        f"{METHOD}test_best_of_n_by_hand",
    ),
    Mutant(
        "best of n: the worst",
        "resampling.py",
        ".argmax(axis=1) + g * size",
        ".argmin(axis=1) + g * size",
        f"{METHOD}test_best_of_n_by_hand",
    ),
    Mutant(
        "identity: new keys change old ids",
        "identity.py",
        '"rollout": {"per_prompt": 1},',
        '"rollout": {},',
        f"{METHOD}test_stages_made_before_these_keys_came_keep_their_ids",
    ),
    Mutant(
        "sft.steps: measured at epochs",
        "sft.py",
        "evenly(total, MEASURED) if config.steps else",
        "evenly(total, MEASURED) if False else",
        f"{METHOD}test_sft_by_steps_is_measured_evenly",
    ),
    Mutant(
        "decoding: positions count padding",
        "extrapolation.py",
        'inputs["position_ids"] = (mask_BS.long().cumsum(dim=1) - 1).clamp(min=0)[:, -new_BS.shape[1] :]',
        'inputs["position_ids"] = torch.arange(mask_BS.shape[1]).expand_as(mask_BS)[:, -new_BS.shape[1] :]',
        f"{METHOD}test_reading_with_a_cache_gives_the_logits_of_unpadded_rows",
    ),
    Mutant(
        "decoding: padding is read",
        "extrapolation.py",
        '"attention_mask": mask_BS.long()',
        '"attention_mask": torch.ones_like(mask_BS).long()',
        f"{METHOD}test_reading_with_a_cache_gives_the_logits_of_unpadded_rows",
    ),
    Mutant(
        "decoding: the cache is lost",
        "extrapolation.py",
        "self.cache = out.past_key_values",
        "self.cache = None",
        f"{METHOD}test_greedy_decoding_is_the_argmax_without_cache_or_padding",
    ),
    Mutant(
        "decoding: a model with itself",
        "extrapolation.py",
        "readers = _Reader(sft), _Reader(base)",
        "readers = _Reader(sft), _Reader(sft)",
        f"{METHOD}test_greedy_decoding_is_the_argmax_without_cache_or_padding",
    ),
    Mutant(
        "samples: saved in 32 bits",
        "resampling.py",
        "arrays = {name: getattr(self.draws, name) for name in _SAVED",
        "arrays = {name: getattr(self.draws, name).astype(np.float32) for name in _SAVED",
        f"{METHOD}test_samples_survive_a_folder_to_the_bit",
    ),
    Mutant(
        "samples: other bytes every time",
        "resampling.py",
        "gzip.compress(json.dumps(self.answers).encode(), mtime=0)",
        "gzip.compress(json.dumps(self.answers).encode(), mtime=len(str(folder)) + ord(folder.name[-1]))",
        f"{METHOD}test_samples_survive_a_folder_to_the_bit",
    ),
    Mutant(
        "samples: of each anchor and beta",
        "identity.py",
        '"samples": {"reward": _SCORE,',
        '"samples": {"reward": (*_SCORE, "anchor", "beta"),',
        f"{METHOD}test_all_that_choose_share_the_samples_of_an_sft_model",
    ),
    Mutant(
        "samples: drawn for each who chooses",
        "ablations/plan.py",
        '"resampled": ("samples",),',
        '"resampled": ("sft",),',
        "test_sweep_spec.py::test_what_a_point_leaves_alone_is_run_once",
    ),
    Mutant(
        "samples: their files are not listed",
        "methods.py",
        ', measure, files=[Path("samples")])',
        ", measure)",
        f"{METHOD}test_resampling_and_best_of_n_choose_from_the_same_samples",
    ),
    Mutant(
        "identity: resampling forgets beta",
        "identity.py",
        '"resampled": {"reward": ("anchor", "beta")',
        '"resampled": {"reward": ("anchor",)',
        f"{METHOD}test_a_stage_is_known_by_the_settings_it_reads_and_no_others",
    ),
    Mutant(
        "export: the SFT model for the extrapolated",
        "methods.py",
        'pipeline.export(attempt, target, "weight extrapolation"',
        'pipeline.export(attempt, start, "weight extrapolation"',
        f"{METHOD}test_the_extrapolated_model_is_exported_as_measured",
    ),
]

NOISE = [
    Mutant(
        "noise: rates are not nested",
        "noise.py",
        'f"noise order {row_content(rows[i])}"',
        'f"noise order {rate} {row_content(rows[i])}"',
        f"{NOISY}test_masks_are_exact_and_nested_with_the_same_answers",
    ),
    Mutant(
        "noise: kinds mask other rows",
        "noise.py",
        'f"noise order {row_content(rows[i])}"',
        'f"noise order {kind} {row_content(rows[i])}"',
        f"{NOISY}test_the_same_rows_are_noised_by_every_kind_wherever_they_stand",
    ),
    Mutant(
        "noise: a derangement over all tasks",
        "noise.py",
        "return row.task or re.sub",
        'return "" or re.sub',
        f"{NOISY}test_a_derangement_at_rate_1_exchanges_the_answers_of_each_task",
    ),
    Mutant(
        "noise: across, from the same task",
        "noise.py",
        "if task != own and differs(right, answer)",
        "if differs(right, answer)",
        f"{NOISY}test_answers_across_come_from_other_tasks",
    ),
    Mutant(
        "noise: words of the answer itself",
        "noise.py",
        "if at != place and w != pieces[spot]",
        "if w != pieces[spot]",
        f"{NOISY}test_corrupted_words_are_words_of_other_answers",
    ),
    Mutant(
        "noise: an edit that changes nothing",
        "edits.py",
        'random.choice(letters.replace(own, ""))',
        "random.choice(letters)",
        f"{NOISY}test_a_near_miss_is_one_edit",
    ),
    Mutant(
        "noise: not applied to training",
        "data.py",
        "    train = replace(train, ids=noise.applied(train.ids))\n",
        "",
        f"{NOISY}test_noise_changes_answers_of_masked_rows_and_nothing_else",
    ),
    Mutant(
        "prompts: shares count unused rows",
        "data.py",
        "choose_prompts(config, usable, used, questions",
        "choose_prompts(config, usable, usable, questions",
        f"{NOISY}test_the_share_asked_for_is_the_share_measured",
    ),
    Mutant(
        "prompts: shared ones drawn again",
        "mixing.py",
        "drawn = encoded(kept, encode, count - shared)",
        "drawn = encoded(ordered, encode, count - shared)",
        f"{NOISY}test_a_share_that_cannot_be_met_says_why",
    ),
    Mutant(
        "prompts: shares are not nested",
        "mixing.py",
        "for turn in reversed(range(shared))]",
        "for turn in range(shared)]",
        f"{NOISY}test_larger_shares_keep_what_stays_in_its_place",
    ),
    Mutant(
        "world: wrong tasks of other groups",
        "world/items.py",
        "for other in _of(task.group)}",
        "for other in TASKS}",
        f"{NOISY}test_wrong_tasks_answer_the_same_words_within_the_group",
    ),
    Mutant(
        "world: prompts of the training words",
        "world/items.py",
        'Random(f"{name}:{seed}"), _PROMPTS)',
        'Random(f"{name}:{seed}"), TRAIN)',
        f"{NOISY}test_prompts_of_a_group_leak_nothing",
    ),
    Mutant(
        "identity: the share of prompts moves SFT",
        "identity.py",
        '("prompts_size", "overlap", "overlap_share")',
        '("prompts_size", "overlap")',
        f"{NOISY}test_stages_know_the_keys_that_concern_them",
    ),
]

SWEEPS = [
    Mutant(
        "sweep report: a comparison is left out",
        "report/sweep_layout.py",
        "    for each in family:\n        model, baseline = each.model.arm",
        "    for each in family[:-1]:\n        model, baseline = each.model.arm",
        f"{SWEEP_REPORT}test_every_planned_comparison_and_cell_is_shown[lone]",
    ),
    Mutant(
        "sweep report: no result, cannot tell",
        "report/sweep_answer.py",
        "found.verdict if found else NO_RESULT",
        'found.verdict if found else "cannot tell"',
        f"{SWEEP_REPORT}test_failed_and_diverged",
    ),
    Mutant(
        "sweep report: dropped training is free",
        "report/sweep_tables.py",
        "return (cell.flops + extra) / at[0].flops",
        "return cell.flops / at[0].flops",
        f"{SWEEP_REPORT}test_compute_by_hand",
    ),
    Mutant(
        "sweep report: the mean at the low end",
        "report/sweep_tables.py",
        'marks[place(estimate.mean)] = "●"',
        'marks[place(estimate.low)] = "●"',
        f"{SWEEP_REPORT}test_whiskers",
    ),
    Mutant(
        "sweep report: no seed ever failed",
        "report/sweep_files.py",
        "row |= {status: cell.statuses.get(status, 0) for status in STATUSES}",
        "row |= {status: 0 for status in STATUSES}",
        f"{SWEEP_REPORT}test_failed_and_diverged",
    ),
    Mutant(
        "sweep report: _ as it is in LaTeX",
        "report/sweep_latex.py",
        'for each in "&%$#_{}"',
        'for each in "&%$#{}"',
        f"{SWEEP_REPORT}test_special_characters_are_escaped",
    ),
    Mutant(
        "sweep report: a trend by its mean",
        "report/sweep_words.py",
        'return "rises" if low > 0 else',
        'return "rises" if trend.slope.mean > 0 else',
        f"{SWEEP_REPORT}test_trends_in_words",
    ),
    Mutant(
        "sweep report: no interval, no slope",
        "report/sweep_words.py",
        'return "0" if abs(trend.slope.mean) <= ROUNDING else',
        'return "0" if True else',
        f"{SWEEP_REPORT}test_a_slope_that_all_seeds_and_items_share_is_no_zero",
    ),
    Mutant(
        "sweep: seeds are not paired",
        "ablations/analysis.py",
        "{s: baseline[s] for s in seeds}], metric)",
        "{s: baseline[s] for s in reversed(seeds)}], metric)",
        f"{SWEEP}test_differences_are_paired_by_seed",
    ),
    Mutant(
        "sweep: baseline minus model",
        "ablations/analysis.py",
        "return after - before, seeds",
        "return before - after, seeds",
        f"{SWEEP}test_differences_are_paired_by_seed",
    ),
    Mutant(
        "sweep: the family shrinks",
        "ablations/analysis.py",
        "holm([*flips, *[1.0] * (len(pairs) - len(usable))])",
        "holm(flips)",
        f"{SWEEP}test_the_family_does_not_shrink_with_what_is_missing",
    ),
    Mutant(
        "sweep: verdicts before correction",
        "ablations/analysis.py",
        "if p_holm <= alpha and",
        "if p <= alpha and",
        f"{SWEEP}test_the_family_does_not_shrink_with_what_is_missing",
    ),
    Mutant(
        "sweep: items are not compared",
        "ablations/analysis.py",
        "if result.items != items:",
        "if len(result.items) != len(items):",
        f"{SWEEP}test_other_items_are_not_paired",
    ),
    Mutant(
        "sweep: chosen by test items",
        "ablations/analysis.py",
        'score = figures.get("score")',
        'score = figures.get("test", {}).get("unseen", {}).get("greedy", {}).get("mean")',
        f"{SWEEP}test_development_items_choose_the_length_of_longer_sft",
    ),
    Mutant(
        "sweep: the longer at a tie",
        "ablations/analysis.py",
        '-float(figures.get("steps") or 0))',
        'float(figures.get("steps") or 0))',
        f"{SWEEP}test_development_items_choose_the_length_of_longer_sft",
    ),
    Mutant(
        "sweep: longer SFT pays for PPO",
        "ablations/analysis.py",
        'if task.kind != "longer-sft" else []',
        'if task.kind != "longer" else []',
        f"{SWEEP}test_development_items_choose_the_length_of_longer_sft",
    ),
    Mutant(
        "sweep: what is chosen is dropped too",
        "ablations/analysis.py",
        "_flops(stage) for stage in candidates if stage.id != chosen.id)",
        "_flops(stage) for stage in candidates)",
        f"{SWEEP}test_development_items_choose_the_length_of_longer_sft",
    ),
    Mutant(
        "sweep: a choice of some candidates",
        "ablations/analysis.py",
        'if all(states[key].status == "done" for key in keys):',
        'if any(states[key].status == "done" for key in keys):',
        f"{SWEEP}test_a_choice_waits_for_all_its_candidates",
    ),
    Mutant(
        "sweep: only the parents are paid",
        "ablations/analysis.py",
        "(plan.tasks[key], *_ancestors(plan, plan.tasks[key]))",
        "(plan.tasks[key],)",
        f"{SWEEP}test_all_training_on_the_way_to_a_cell_is_paid_once",
    ),
    Mutant(
        "sweep: the parents are free",
        "ablations/analysis.py",
        "(plan.tasks[key], *_ancestors(plan, plan.tasks[key]))",
        "_ancestors(plan, plan.tasks[key])",
        f"{SWEEP}test_all_training_on_the_way_to_a_cell_is_paid_once",
    ),
    Mutant(
        "sweep: the median ESS",
        "ablations/analysis.py",
        'figures["ess"]["harmonic"]',
        'figures["ess"]["median"]',
        f"{SWEEP}test_all_training_on_the_way_to_a_cell_is_paid_once",
    ),
    Mutant(
        "sweep: slopes of the wrong scale",
        "ablations/trends.py",
        "((xs - xs.mean()) ** 2).sum()",
        "((xs - xs.mean()) ** 2).mean()",
        f"{SWEEP}test_a_slope_is_least_squares_per_doubling",
    ),
    Mutant(
        "sweep: slopes per unit, not per doubling",
        "ablations/trends.py",
        'math.log2(x) if scale == "log2" else x for',
        "x for",
        f"{SWEEP}test_a_slope_is_least_squares_per_doubling",
    ),
    Mutant(
        "sweep: peaks at the least mean",
        "ablations/trends.py",
        "at = max(values, key",
        "at = min(values, key",
        f"{SWEEP_REPORT}test_where_an_arm_peaks_and_what_its_ends_lack",
    ),
    Mutant(
        "sweep: ends minus the peak",
        "ablations/trends.py",
        "values[at] - values[x]",
        "values[x] - values[at]",
        f"{SWEEP_REPORT}test_where_an_arm_peaks_and_what_its_ends_lack",
    ),
    Mutant(
        "sweep report: overshoots at both ends",
        "report/sweep_words.py",
        "in LOOSENS_DOWNWARDS and value < peak.at else",
        "in LOOSENS_DOWNWARDS else",
        f"{SWEEP_REPORT}test_peaks_in_words",
    ),
    Mutant(
        "sweep: every model is a line of its own",
        "ablations/spec.py",
        "if key != axis and not _one_to_one(self.points, key, axis)]",
        "if key != axis]",
        f"{SWEEP_REPORT}test_models_are_named_and_their_sizes_are_the_axis",
    ),
    Mutant(
        "sweep: a failed stage is tried again at once",
        "ablations/local.py",
        "time.monotonic() + RETRY_S * 2 ** (failed - 1)",
        "0.0",
        "test_local_engine.py::test_a_failed_stage_is_tried_again_after_a_while_and_others_go_on_meanwhile",
    ),
]

MUTANTS = [
    *LOSSES,
    *ADVANTAGES,
    *REWARD,
    *ROLLOUT,
    *MODELS,
    *KERNELS,
    *PPO,
    *LOOP,
    *SFT,
    *RECORD,
    *COMPARISONS,
    *EVALUATION,
    *LOOK_INSIDE,
    *METHODS,
    *NOISE,
    *SWEEPS,
]


def problems(root: Path = ROOT) -> list[str]:
    """What is wrong with the list itself: names that repeat, text not there exactly once, tests that do not exist."""
    found = [f"{name}: the name is there {n} times" for name, n in Counter(m.name for m in MUTANTS).items() if n > 1]
    for mutant in MUTANTS:
        times = (root / "srppo" / mutant.file).read_text().count(mutant.old)
        if times != 1:
            found.append(f"{mutant.name}: its text is {times} times in {mutant.file}")
        for node in mutant.tests.split():
            file, _, function = node.partition("::")
            if f"def {function.partition('[')[0]}(" not in (root / "tests" / file).read_text():
                found.append(f"{mutant.name}: there is no test {node}")
    return found


class Watcher:
    """A pytest plugin: the first test that fails and why, and how many ran."""

    def __init__(self) -> None:
        self.failed: str | None = None
        self.why = ""
        self.ran = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ran += report.when == "call"
        if report.failed and self.failed is None:
            self.failed = report.nodeid
            self.why = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", ""))[:200]


def run_tests(root: Path, tests: list[str], answer: Path) -> None:
    """In a forked process: pytest on the copy, quiet; writes what happened, and does not return."""
    import pytest

    devnull = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(devnull, stream)
    os.chdir(root)
    sys.dont_write_bytecode = True  # a mutant of the same size and second would find the last one's
    sys.path[:0] = [str(root), str(root / "tests")]
    watcher, code, wrong = Watcher(), 70, ""
    try:
        nodes = [f"tests/{node}" for node in tests]
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *nodes], plugins=[watcher]))
        import srppo

        if not str(srppo.__file__).startswith(str(root)):
            wrong = f"{srppo.__file__} was tested, which is not the copy"
    except BaseException as error:
        wrong = repr(error)
    if watcher.why.startswith(CARELESS):
        wrong = f"the mutant is no working program: {watcher.why}"
    answer.write_text(json.dumps({"code": code, "failed": watcher.failed, "ran": watcher.ran, "wrong": wrong}))
    os._exit(0)


def outcome(root: Path, tests: list[str]) -> dict[str, Any]:
    """What pytest says of these tests in the copy."""
    answer = root / "answer.json"
    answer.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        run_tests(root, tests, answer)
    end = time.monotonic() + LIMIT_S
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"code": 124, "failed": None, "ran": 0, "wrong": f"no answer in {LIMIT_S} s"}
        time.sleep(0.01)
    if not answer.exists():
        return {"code": 70, "failed": None, "ran": 0, "wrong": "the tests' process died"}
    return dict(json.loads(answer.read_text()))


def main(words: list[str]) -> int:
    if wrong := problems():
        print("\n".join(wrong))
        return 1
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.file} {m.name}" for word in words)]
    os.environ["OMP_NUM_THREADS"] = "1"
    # What the tests import beside this package, once; forking is safe while there is one thread.
    import hypothesis
    import numpy  # noqa: F401
    import scipy.stats
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    assert hypothesis and scipy.stats and transformers and not any(name.startswith("srppo") for name in sys.modules)
    began, bad = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="srppo-mutants-") as name:
        root = Path(name)
        for part in ("srppo", "tests"):
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        nodes = sorted({node for mutant in chosen for node in mutant.tests.split()})
        whole = outcome(root, nodes)
        if whole["code"] != 0 or whole["wrong"]:
            print(f"without any mutant the tests do not pass: {whole}")
            return 1
        print(f"{len(nodes)} test functions pass without a mutant, {time.monotonic() - began:.0f} s")
        for mutant in chosen:
            start, file = time.monotonic(), root / "srppo" / mutant.file
            text = file.read_text()
            file.write_text(text.replace(mutant.old, mutant.new))
            found = outcome(root, mutant.tests.split())
            file.write_text(text)
            killed = found["code"] == 1 and found["failed"] is not None and not found["wrong"]
            bad += not killed
            verdict = found["failed"] if killed else f"SURVIVES, or the test did not run: {found}"
            print(f"{mutant.name:<50} {time.monotonic() - start:5.1f} s  {verdict}", flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - bad} killed, {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
