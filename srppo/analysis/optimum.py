"""The closed-form optimum of the KL-regularised objective, estimated from samples of pi_sft. Numbers only, no torch.

    objective    J(pi) = E_pi[r'] - beta KL(pi || pi_anchor)
    optimum      pi* = pi_anchor exp(r'/beta) / Z = pi_sft w / Z          (docs/method.md)
    log w        = r'/beta                  anchor sft
                 = r'/beta - r              anchor base, r = log pi_sft - log pi_base; with r' = r: r (1/beta - 1)
    J(pi*)       = beta log Z,  Z = E_sft[w]
    KL           = E*[r'/beta] - log Z  to the anchor;   E*[log w] - log Z  to pi_sft

r' is the reward as the recipe has it (clips and limits included). E* is self-normalised, sum w f / sum w, and log Z is
log mean w. Both are biased by O(1/K) for K samples: the jackknife over a prompt's samples takes that term out. The
plug-in KL, sum W log(K W) with W = w / sum w, equals E*[log w] - log Z without the jackknife, and is low where ESS is.

Arrays are QK: Q prompts, K samples each. Prompts are the unit of all intervals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from srppo.statistics.intervals import Estimate, item_interval, ratio_interval

MIN_ESS = 10.0
"""The rule: an answer needs an effective sample size of 10, as the harmonic mean over prompts, since errors of a mean
over prompts go with the mean of 1/ESS. With normal log-weights and a KL of up to 3 nats the jackknife then leaves a
bias of at most 9% of the KL, 5% of the reward and 2% of the objective (the plug-in: 18%, 11%, 6%), all low; heavier
tails leave more."""
SHARE, GAP = (0.0, 1.0), (-1.0, 1.0)  # what an accuracy and a difference of two cannot leave
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Draws:
    """Samples of one policy. reward: r', nats; log_ratio: r, nats; length: tokens, EOS included; right: 0 or 1, None
    where no answers are known; log_policy_sft: log pi - log pi_sft, nats, 0 for pi_sft itself."""

    reward_QK: Floats
    log_ratio_QK: Floats
    length_QK: Floats
    right_QK: Floats | None
    log_policy_sft_QK: Floats


class PerPrompt(NamedTuple):
    """What a policy gives on each prompt: nats, tokens, shares; ess_Q: effective samples (K where unweighted)."""

    reward_Q: Floats
    kl_sft_Q: Floats
    kl_anchor_Q: Floats
    objective_Q: Floats
    length_Q: Floats
    right_Q: Floats | None
    ess_Q: Floats


def log_weights(draws: Draws, anchor: str, beta: float) -> Floats:
    """log (pi*/pi_sft) up to a constant a prompt; QK, nats."""
    return draws.reward_QK / beta - (draws.log_ratio_QK if anchor == "base" else 0.0)


def optimum(draws: Draws, anchor: str, beta: float, *, jackknife: bool = True) -> PerPrompt:
    """The optimum of the objective with this anchor and beta > 0, a prompt at a time. K >= 2."""
    log_w_QK = log_weights(draws, anchor, beta)
    peak_Q1 = log_w_QK.max(axis=1, keepdims=True)
    w_QK = np.exp(log_w_QK - peak_Q1)
    total_Q1 = w_QK.sum(axis=1, keepdims=True)
    k = w_QK.shape[1]
    rest_QK = np.maximum(total_Q1 - w_QK, 1e-12 * total_Q1)  # sums without each sample; one may hold all the weight

    def corrected(whole_Q: Floats, without_QK: Floats) -> Floats:
        return k * whole_Q - (k - 1) * without_QK.mean(axis=1) if jackknife else whole_Q

    def expected(f_QK: Floats) -> Floats:
        sum_Q1 = (w_QK * f_QK).sum(axis=1, keepdims=True)
        return corrected((sum_Q1 / total_Q1)[:, 0], (sum_Q1 - w_QK * f_QK) / rest_QK)

    log_z_Q = corrected(np.log(total_Q1 / k)[:, 0], np.log(rest_QK / (k - 1))) + peak_Q1[:, 0]
    reward_Q = expected(draws.reward_QK)
    return PerPrompt(
        reward_Q,
        expected(log_w_QK) - log_z_Q,
        reward_Q / beta - log_z_Q,
        beta * log_z_Q,
        expected(draws.length_QK),
        None if draws.right_QK is None else expected(draws.right_QK),
        total_Q1[:, 0] ** 2 / (w_QK**2).sum(axis=1),
    )


def measured(draws: Draws, anchor: str, beta: float) -> PerPrompt:
    """The policy that the samples are from, as it is: means over a prompt's samples."""
    kl_sft_Q = draws.log_policy_sft_QK.mean(axis=1)
    kl_anchor_Q = kl_sft_Q + (draws.log_ratio_QK.mean(axis=1) if anchor == "base" else 0.0)
    reward_Q = draws.reward_QK.mean(axis=1)
    right_Q = None if draws.right_QK is None else draws.right_QK.mean(axis=1)
    ess_Q = np.full(len(reward_Q), float(draws.reward_QK.shape[1]))
    objective_Q = reward_Q - beta * kl_anchor_Q
    return PerPrompt(reward_Q, kl_sft_Q, kl_anchor_Q, objective_Q, draws.length_QK.mean(axis=1), right_Q, ess_Q)


def effective(ess_Q: Floats) -> float:
    """The harmonic mean over prompts, which the rule is about: a prompt with few effective samples weighs most."""
    return float(1 / (1 / ess_Q).mean())


def enough(ess_Q: Floats) -> bool:
    """Whether the rule admits an answer (see MIN_ESS)."""
    return effective(ess_Q) >= MIN_ESS


def samples_needed(ess_Q: Floats, samples: int) -> int:
    """About how many samples a prompt would satisfy the rule, since ESS grows with their number; rounded up to tens.

    0: cannot be said, since nearly single samples hold all the weight, and more would only show that others hold more.
    """
    if effective(ess_Q) < 2:
        return 0
    return int(np.ceil(samples * MIN_ESS / effective(ess_Q) / 10) * 10)


def share_reached(policy_Q: Floats, start_Q: Floats, best_Q: Floats, *, draws: int = 4000) -> Estimate | None:
    """mean(policy - start) / mean(best - start) of the objective, prompts being the units of both.

    None where the 95% interval of the denominator reaches 0: the objective allows no gain that could be told from none.
    """
    gain_Q = best_Q - start_Q
    if not item_interval(gain_Q, limits=None, draws=draws).low > 0:
        return None
    return ratio_interval(policy_Q - start_Q, gain_Q, draws=draws)


def beta_grid(own: float | None) -> list[float]:
    """Betas from weak to strong, with the recipe's own among them."""
    return sorted({2.0, 1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, *([own] if own else [])}, reverse=True)


@dataclass(frozen=True)
class Point:
    """One policy: an optimum (anchor, beta) or a measured one. Means over prompts with 95% intervals; nats, tokens.

    ess: effective sample sizes over prompts, median and harmonic mean. answered False: the rule (MIN_ESS) does not
    admit the figures; about `needed` samples a prompt would. arm, step: of a PPO checkpoint. accuracy None: no answers
    known. by_group: accuracy.
    """

    name: str
    reward: Estimate
    kl_sft: Estimate
    kl_anchor: Estimate
    objective: Estimate
    length: Estimate
    accuracy: Estimate | None
    by_group: Mapping[str, Estimate]
    ess: tuple[float, float]
    answered: bool = True
    needed: int = 0
    anchor: str = ""
    beta: float = 0.0
    arm: str = ""
    step: int | None = None


@dataclass(frozen=True)
class Reached:
    """A checkpoint against the optimum of its own objective (anchor, beta): share of the objective's gain over SFT
    (None: no gain to speak of), and paired differences of accuracy (empty without answers)."""

    name: str
    anchor: str
    beta: float
    share: Estimate | None
    differences: Mapping[str, Estimate]


def point_of(
    values: PerPrompt, groups: NDArray[np.str_], ours_Q: NDArray[np.bool_], name: str, *, k: int = 0, **which: Any
) -> Point:
    """Means over the prompts of `ours_Q`; k > 0: an optimum estimated from k samples a prompt, held to the rule."""
    ess_Q, right_Q = values.ess_Q[ours_Q], values.right_Q
    reward, kl_sft, kl_anchor, objective, length = (item_interval(q[ours_Q], limits=None) for q in values[:5])
    accuracy, by_group = None, {}
    if right_Q is not None:
        accuracy = item_interval(right_Q[ours_Q], limits=SHARE)
        by_group = {group: item_interval(right_Q[groups == group], limits=SHARE) for group in dict.fromkeys(groups)}
    return Point(
        name,
        reward,
        kl_sft,
        kl_anchor,
        objective,
        length,
        accuracy,
        by_group,
        ess=(float(np.median(ess_Q)), effective(ess_Q)),
        answered=enough(ess_Q) if k else True,
        needed=samples_needed(ess_Q, k) if k else 0,
        **which,
    )


def reached_of(
    name: str,
    objective: tuple[str, float],
    arm: PerPrompt,
    sft: PerPrompt,
    best: PerPrompt,
    ours_Q: NDArray[np.bool_],
) -> Reached:
    """objective: the (anchor, beta) that `best` is the optimum of."""
    parts = (values.objective_Q[ours_Q] for values in (arm, sft, best))
    share = share_reached(*parts) if enough(best.ess_Q[ours_Q]) else None
    differences: dict[str, Estimate] = {}
    if arm.right_Q is not None and sft.right_Q is not None and best.right_Q is not None:
        pairs = {
            "optimum - SFT": best.right_Q - sft.right_Q,
            "PPO - SFT": arm.right_Q - sft.right_Q,
            "optimum - PPO": best.right_Q - arm.right_Q,
        }
        differences = {words: item_interval(values[ours_Q], limits=GAP) for words, values in pairs.items()}
    return Reached(name, *objective, share, differences)
