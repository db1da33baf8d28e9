"""PPO's losses and the KL estimators. Pure functions of tensors.

Every sum is divided by `token_count`, the number of counted tokens of the whole minibatch: micro-batches then add up to
the same loss, gradient and metrics, whatever their size. Masked positions may hold anything.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from srppo.training.masked import masked_sum, masked_var

MAX_LOG_RATIO = 60.0  # beyond it exp overflows fp32 and the gradient would be NaN; such a token is far outside the clip


class PolicyLoss(NamedTuple):
    """loss; clip_share: share of tokens whose clipped branch is active; approx_kl: KL(old || new) a token, nats."""

    loss: Tensor
    clip_share: Tensor
    approx_kl: Tensor


class ValueLoss(NamedTuple):
    """loss; clip_share: share of tokens whose clipped square is the larger."""

    loss: Tensor
    clip_share: Tensor


def clipped_policy_loss(
    logprobs_BT: Tensor,
    old_logprobs_BT: Tensor,
    advantages_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip: float,
    token_count: int | Tensor | None = None,
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, arXiv 1707.06347, eq. 7), negated: smaller is better.

    approx_kl is Schulman's k3, (ratio - 1) - log ratio: never negative, unbiased for KL(old || new).
    """
    count = mask_BT.sum() if token_count is None else token_count
    log_ratio_BT = (logprobs_BT - old_logprobs_BT).masked_fill(~mask_BT, 0.0)
    advantages_BT = advantages_BT.masked_fill(~mask_BT, 0.0)
    ratio_BT = log_ratio_BT.clamp(max=MAX_LOG_RATIO).exp()
    plain_BT = -advantages_BT * ratio_BT
    clipped_BT = -advantages_BT * ratio_BT.clamp(1 - clip, 1 + clip)
    loss = masked_sum(torch.maximum(plain_BT, clipped_BT), mask_BT) / count
    with torch.no_grad():
        clip_share = ((clipped_BT > plain_BT) & mask_BT).sum() / count
        approx_kl = masked_sum(log_ratio_BT.clamp(max=MAX_LOG_RATIO).expm1() - log_ratio_BT, mask_BT) / count
    return PolicyLoss(loss, clip_share, approx_kl)


def clipped_value_loss(
    values_BT: Tensor,
    old_values_BT: Tensor,
    returns_BT: Tensor,
    mask_BT: Tensor,
    *,
    clip: float | None,
    token_count: int | Tensor | None = None,
) -> ValueLoss:
    """Half the squared error to the returns, against the larger of the plain and the clipped value.

    `clip` is in units of the (scaled) reward; None leaves the value free.
    """
    count = mask_BT.sum() if token_count is None else token_count
    values_BT, old_values_BT, returns_BT = (
        x.masked_fill(~mask_BT, 0.0) for x in (values_BT, old_values_BT, returns_BT)
    )
    plain_BT = (values_BT - returns_BT) ** 2
    if clip is None:
        return ValueLoss(0.5 * masked_sum(plain_BT, mask_BT) / count, torch.zeros_like(plain_BT).sum())
    near_BT = torch.minimum(torch.maximum(values_BT, old_values_BT - clip), old_values_BT + clip)
    clipped_BT = (near_BT - returns_BT) ** 2
    loss = 0.5 * masked_sum(torch.maximum(plain_BT, clipped_BT), mask_BT) / count
    return ValueLoss(loss, ((clipped_BT > plain_BT) & mask_BT).sum().detach() / count)


def importance_weights(logprobs_BT: Tensor, sampled_logprobs_BT: Tensor, mask_BT: Tensor, *, cap: float) -> Tensor:
    """min(pi(token) / mu(token), cap) where mu is who sampled, 1 where masked; BT.

    Times the advantages they make samples of mu into an estimate under pi. Truncated, they are biased where mu is far
    off and bounded in variance (Ionides 2008); for rollouts of another engine: Yao et al. 2025, "Your efficient RL
    framework secretly brings you off-policy RL training".
    """
    log_ratio_BT = (logprobs_BT - sampled_logprobs_BT).masked_fill(~mask_BT, 0.0)
    return log_ratio_BT.clamp(max=MAX_LOG_RATIO).exp().clamp(max=cap)


def k1(logprobs_BT: Tensor, anchor_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """log pi - log anchor a token, 0 where masked: the unbiased estimator that goes into the reward."""
    return (logprobs_BT - anchor_logprobs_BT).masked_fill(~mask_BT, 0.0)


def kl_penalty(
    logprobs_BT: Tensor,
    anchor_logprobs_BT: Tensor,
    mask_BT: Tensor,
    *,
    form: Literal["k2", "k3"],
    token_count: int | Tensor | None = None,
) -> Tensor:
    """KL to the anchor as a loss; scalar, nats a response, summed and divided by token_count like the policy loss.

    With d_t = log pi - log anchor of a token: k2 = (sum_t d_t)^2 / 2 has, on policy, the gradient of KL(pi || anchor)
    over responses. Squared a token at a time it would not: an early token would not answer for the KL of those it
    leads to (0.044 nats from the optimum on the enumerable case, against 0.011; LOG.md). k3, the sum over tokens of
    exp(-d_t) - 1 + d_t as GRPO has it, is unbiased as a value, but as a loss it has the gradient of KL(anchor || pi)
    and ends elsewhere.
    """
    count = mask_BT.sum() if token_count is None else token_count
    log_ratio_BT = (logprobs_BT - anchor_logprobs_BT).masked_fill(~mask_BT, 0.0)
    if form == "k2":
        return 0.5 * (log_ratio_BT.sum(dim=1) ** 2).sum() / count
    if form == "k3":
        return masked_sum(torch.expm1(-log_ratio_BT) + log_ratio_BT, mask_BT) / count
    raise ValueError(f"KL form {form!r} is none of k2, k3")


def explained_variance(values_BT: Tensor, returns_BT: Tensor, mask_BT: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over counted positions: 1 a perfect critic, 0 a constant one."""
    counted = returns_BT[mask_BT]
    if counted.numel() == 0 or counted.max() == counted.min():  # rounding can leave a constant a variance above 0
        return 0.0
    variance = masked_var(returns_BT, mask_BT)
    return float(1 - masked_var(returns_BT - values_BT, mask_BT) / variance)
