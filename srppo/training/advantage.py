"""Advantages: generalised advantage estimation, leave-one-out and whitening. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from srppo.training.masked import masked_mean, masked_var

WHITEN_EPS = 1e-8


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, *, gamma: float, lam: float | Tensor) -> Tensor:
    """Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, eq. 16); never whitens.

        delta_t = r_t + gamma V_{t+1} - V_t,    A_t = delta_t + gamma lam A_{t+1}

    `values_BT[t]` is the value of the state before response token t. An episode ends after the last counted token:
    the value beyond it is 0, also for rollouts stopped by the length limit, because the limit is part of the task
    (no token can follow, so no reward can). mask_BT marks a prefix of each row; A is 0 where masked. lam: a number, or
    one a row (B).

    With lam < 1 a terminal reward reaches a token by lam to the number of tokens that follow, unless the values know of
    it: a reward of positive mean over values of 0 pays for ending (docs/length.md).
    """
    rewards_BT = rewards_BT.masked_fill(~mask_BT, 0.0)
    values_BT = values_BT.masked_fill(~mask_BT, 0.0)
    advantages_BT = torch.zeros_like(values_BT)
    next_value_B = torch.zeros_like(values_BT[:, 0])
    next_advantage_B = torch.zeros_like(next_value_B)
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * next_value_B - values_BT[:, t]
        next_advantage_B = (delta_B + gamma * lam * next_advantage_B).masked_fill(~mask_BT[:, t], 0.0)
        advantages_BT[:, t] = next_advantage_B
        next_value_B = values_BT[:, t]
    return advantages_BT


def length_lambda(mask_BT: Tensor, alpha: float) -> Tensor:
    """Lambda of each response, 1 - 1/(alpha x tokens), at least 0; B (VAPO, arXiv 2504.05118)."""
    return (1 - 1 / (alpha * mask_BT.sum(dim=1).clamp(min=1))).clamp(min=0.0)


def rloo(rewards_BT: Tensor, mask_BT: Tensor, *, per_prompt: int) -> Tensor:
    """REINFORCE leave-one-out (Ahmadian et al. 2024, arXiv 2402.14740, section 3.2); never whitens.

        A_i = R_i - mean of R_j over the other responses j to the same prompt,    R = sum_t r_t

    The response is one action: its advantage stands at each of its counted tokens, 0 where masked. The baseline does
    not depend on the response itself, so the gradient is unbiased without a critic. Rows come in groups of `per_prompt`
    (2 or more) responses to one prompt; where r_t lies within a response makes no difference.
    """
    returns_B = rewards_BT.masked_fill(~mask_BT, 0.0).sum(dim=1)
    returns_PK = returns_B.view(-1, per_prompt)
    others_PK = (returns_PK.sum(dim=1, keepdim=True) - returns_PK) / (per_prompt - 1)
    return (returns_PK - others_PK).view(-1, 1).expand_as(rewards_BT).masked_fill(~mask_BT, 0.0)


def whiten(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(x - mean) / deviation over the counted positions of the whole batch; 0 where masked."""
    deviation = whitening_std(x_BT, mask_BT)
    return ((x_BT - masked_mean(x_BT, mask_BT)) / deviation).masked_fill(~mask_BT, 0.0)


def whitening_std(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The deviation `whiten` divides by; a KL in the loss must be divided by it too, or beta changes its meaning."""
    return (masked_var(x_BT, mask_BT) + WHITEN_EPS).sqrt()
