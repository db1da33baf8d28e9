"""The coherent reward: the SFT model's gain over its base, and every part of it that can be varied.

    r(x, y) = log pi_sft(y|x) - log pi_base(y|x) = sum_t [log pi_sft(y_t|.) - log pi_base(y_t|.)]

(SRPPO, arXiv 2510.21090). Log-probs enter at temperature 1, whatever the sampling temperature.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from srppo.config import RewardConfig, derive_seed
from srppo.reward_kinds import COHERENT, REWARD_KINDS, called
from srppo.training.batch import Generated, RolloutBatch
from srppo.training.losses import k1
from srppo.training.masked import masked_sum
from srppo.training.scores import Scores


def coherent_reward(log_ratio_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The sum of the log-ratio over the counted tokens of each response; B, nats. 0 for an empty row."""
    return masked_sum(log_ratio_BT, mask_BT, dim=1)


def place_reward(log_ratio_BT: Tensor, mask_BT: Tensor, *, at: Literal["eos", "token"]) -> Tensor:
    """BT: each term at its own token, or their sum at the last counted token of the row; 0 where masked.

    The last counted token is found from the mask, never from a token id, so the reward cannot land on padding.
    """
    terms_BT = log_ratio_BT.masked_fill(~mask_BT, 0.0)
    if at == "token":
        return terms_BT
    if at != "eos":
        raise ValueError(f"placement {at!r} is none of eos, token")
    return torch.where(
        last_token(mask_BT), coherent_reward(log_ratio_BT, mask_BT).unsqueeze(1), torch.zeros_like(terms_BT)
    )


def last_token(mask_BT: Tensor) -> Tensor:
    """BT bool, True at the last counted token of each row that has one; mask_BT marks prefixes."""
    positions_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    return positions_T == (mask_BT.sum(dim=1, keepdim=True) - 1)


class Written(NamedTuple):
    """What a reward may know of responses beside the scores: their tokens (BT int64), which of them count (BT bool),
    and which is the stop token that ended its response (BT bool)."""

    tokens_BT: Tensor
    mask_BT: Tensor
    stop_BT: Tensor

    @classmethod
    def of(cls, batch: Generated) -> Written:
        """The responses of a batch."""
        mask_BT = batch.response_mask_BT
        return cls(batch.response_BT, mask_BT, last_token(mask_BT) & batch.ended_B.unsqueeze(1))


STD_FLOOR = 1e-6  # nats; below it there is only rounding, which must not be blown up to order 1


class RunningStd:
    """Standard deviation (divisor n) of every number seen, by Chan's update; part of the checkpoint.

    1.0 until two numbers that differ by more than rounding were seen. Cumulative rather than forgetting: at the optimum
    of the KL-regularised objective reward - beta KL is constant, and a forgetful deviation would blow the remaining
    noise up.
    """

    def __init__(self) -> None:
        self.count, self.mean, self.sum_sq = 0, 0.0, 0.0

    def update(self, x_B: Tensor) -> None:
        """Take in a batch of numbers; an empty one changes nothing."""
        n = x_B.numel()
        if n == 0:
            return
        x_B = x_B.detach().double()
        mean = float(x_B.mean())
        delta = mean - self.mean
        total = self.count + n
        self.sum_sq += float(((x_B - mean) ** 2).sum()) + delta * delta * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    @property
    def std(self) -> float:
        """The deviation so far."""
        std = math.sqrt(self.sum_sq / self.count) if self.count > 1 else 0.0
        return std if std > STD_FLOOR else 1.0

    def state_dict(self) -> dict[str, float]:
        """count, mean, sum_sq."""
        return {"count": self.count, "mean": self.mean, "sum_sq": self.sum_sq}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """The inverse of state_dict."""
        self.count, self.mean, self.sum_sq = int(state["count"]), float(state["mean"]), float(state["sum_sq"])


@dataclass(frozen=True)
class Rewards:
    """What the optimiser sees, and what a person reads.

    rewards_BT      scaled reward - beta KL (k1)
    score_B         the reward of each response before KL and scale, nats
    trained_B       bool, False for rollouts left out of the loss
    scale           the deviation everything was divided by
    """

    rewards_BT: Tensor
    score_B: Tensor
    trained_B: Tensor
    scale: float


def compute_rewards(
    config: RewardConfig, scores: Scores, batch: RolloutBatch, running: RunningStd, seed: int, *, per_prompt: int = 1
) -> Rewards:
    """The reward of each token of a batch of rollouts, by `config`; updates `running` with this batch first.

    KL is taken of the behaviour log-probs (at the sampling temperature: they are those of the distribution being
    optimised). `seed` orders the shuffled kind. Rows come in groups of `per_prompt` responses to one prompt.
    """
    rewards_BT = rewards_before_kl(config, scores, batch, seed)
    score_B, ended_B = rewards_BT.sum(dim=1), batch.ended_B
    trained_B = ended_B.clone() if config.at_limit == "drop" else torch.ones_like(ended_B)
    if config.at_limit == "zero" and config.center != "none":  # neutral: what the others are paid
        usual_B = mean_of_others(score_B, ended_B, per_prompt).masked_fill(ended_B, 0.0)
        rewards_BT = rewards_BT + spread(usual_B, batch.response_mask_BT, at=config.placement)
    if config.kl == "k1":
        kl_BT = k1(batch.old_logprobs_BT, scores.anchor_BT(config.anchor), batch.response_mask_BT)
        rewards_BT = rewards_BT - config.beta * kl_BT
    if config.scale:
        running.update(rewards_BT.sum(dim=1)[trained_B])
    scale = running.std if config.scale else 1.0
    return Rewards(rewards_BT / scale, score_B, trained_B, scale)


def centred(
    rewards_BT: Tensor, mask_BT: Tensor, counted_B: Tensor, *, per_prompt: int, at: Literal["eos", "token"]
) -> Tensor:
    """Rewards less the mean return of the others (`mean_of_others`), taken off where the reward is paid; BT.

    Every response ends once, so at gamma 1 this moves no optimum, wherever in the response it is taken off.
    """
    usual_B = mean_of_others(rewards_BT.sum(dim=1), counted_B, per_prompt)
    return rewards_BT - spread(usual_B, mask_BT, at=at)


def spread(x_B: Tensor, mask_BT: Tensor, *, at: Literal["eos", "token"]) -> Tensor:
    """A number of each rollout at its last counted token, or evenly over the counted ones; BT, 0 where masked."""
    places_BT = last_token(mask_BT) if at == "eos" else mask_BT
    return places_BT * (x_B / places_BT.sum(dim=1).clamp(min=1)).unsqueeze(1)


def mean_of_others(x_B: Tensor, counted_B: Tensor, per_prompt: int) -> Tensor:
    """For each rollout the mean of x over the other counted responses to its prompt; over those of the whole batch
    where the prompt has no other; 0 where the batch has none. B, in the unit of x.

    Leaving the rollout itself out keeps the baseline independent of it, and the policy gradient unbiased.
    """
    x_B = x_B.masked_fill(~counted_B, 0.0)
    mean_B = torch.zeros_like(x_B, dtype=torch.float64)
    for size in (len(x_B), per_prompt):
        x_PK, counted_PK = x_B.double().view(-1, size), counted_B.double().view(-1, size)
        sums_PK, counts_PK = (y_PK.sum(dim=1, keepdim=True) - y_PK for y_PK in (x_PK, counted_PK))
        mean_B = torch.where(counts_PK > 0, sums_PK / counts_PK, mean_B.view(-1, size)).view(-1)
    return mean_B.to(x_B.dtype)


def rewards_before_kl(config: RewardConfig, scores: Scores, batch: Generated, seed: int = 0) -> Tensor:
    """The reward where it is paid, BT, nats: the terms placed, by the rule for rollouts at the length limit."""
    mask_BT, at_limit_B1 = batch.response_mask_BT, ~batch.ended_B.unsqueeze(1)
    terms_BT = reward_terms(config, scores, Written.of(batch), seed)
    if config.at_limit == "zero":
        terms_BT = terms_BT.masked_fill(at_limit_B1, 0.0)
    penalised_BT = last_token(mask_BT) & at_limit_B1
    return place_reward(terms_BT, mask_BT, at=config.placement) - config.limit_penalty * penalised_BT


def reward_terms(config: RewardConfig, scores: Scores, written: Written, seed: int = 0) -> Tensor:
    """The per-token terms of the reward after its clips and length normalisation; BT, 0 where masked."""
    kind, mask_BT = REWARD_KINDS[config.kind], written.mask_BT
    terms_BT: Tensor = called(kind.terms)(scores, written).masked_fill(~mask_BT, 0.0)
    if config.token_clip is not None:
        terms_BT = terms_BT.clamp(-config.token_clip, config.token_clip)
    if config.length_norm:
        terms_BT = terms_BT / mask_BT.sum(dim=1, keepdim=True).clamp(min=1)
    if kind.among is not None:
        terms_BT = called(kind.among)(terms_BT, mask_BT, seed)
    if config.clip is not None:
        total_B1 = coherent_reward(terms_BT, mask_BT).unsqueeze(1)
        terms_BT = terms_BT * (config.clip / total_B1.abs().clamp(min=1e-12)).clamp(max=1.0)
    return terms_BT


def tokenwise_optimum(
    config: RewardConfig, sft_logprobs_NV: Tensor, base_logprobs_NV: Tensor, *, stop_ids: Sequence[int]
) -> Tensor:
    """log of pi_anchor exp(r / beta), normalised over the vocabulary; NV, nats. r is the reward's term of each token;
    `stop_ids` would end the response.

    The closed form of the objective (docs/method.md) where each response is one token; of longer ones an approximation,
    since a token's weight knows nothing of the reward that is still to come.
    """
    scores = Scores(sft_logprobs_NV - base_logprobs_NV, sft_logprobs_NV, base_logprobs_NV)
    tokens_NV = torch.arange(sft_logprobs_NV.shape[1], device=sft_logprobs_NV.device).expand_as(sft_logprobs_NV)
    stop_NV = torch.isin(tokens_NV, torch.tensor(list(stop_ids), device=sft_logprobs_NV.device))
    terms_NV = reward_terms(config, scores, Written(tokens_NV, torch.ones_like(stop_NV), stop_NV))
    return (scores.anchor_BT(config.anchor) + terms_NV / config.beta).log_softmax(-1)


def random_terms(scores: Scores, written: Written) -> Tensor:
    """A standard normal number a response at its last token, BT: a hash of its token ids, so that a response has one
    reward wherever it is met, and there is something to learn that neither model knows."""
    lengths = written.mask_BT.sum(dim=1).tolist()
    rows = [row[:n] for row, n in zip(written.tokens_BT.tolist(), lengths, strict=True)]
    shares = [((derive_seed(0, f"random reward of {row}") >> 11) + 0.5) / 2**52 for row in rows]  # within (0, 1)
    reward_B = scores.log_ratio_BT.new_tensor([NormalDist().inv_cdf(share) for share in shares])
    return reward_B.unsqueeze(1) * last_token(written.mask_BT)


def shuffled(terms_BT: Tensor, mask_BT: Tensor, seed: int) -> Tensor:
    """Another rollout's sum, spread evenly: the same rewards over the batch, with no relation to the response."""
    other_B = coherent_reward(terms_BT, mask_BT)[derangement(len(mask_BT), seed).to(mask_BT.device)]
    return spread(other_B, mask_BT, at="token")


def by_length(terms_BT: Tensor, mask_BT: Tensor, seed: int) -> Tensor:
    """What length alone tells of the terms' sum, spread evenly; BT, nats. The control for what longer or shorter
    answers give by themselves: it pays for a token as much as the ratio does in this batch, and knows nothing else.
    """
    return spread(length_line(coherent_reward(terms_BT, mask_BT), mask_BT), mask_BT, at="token")


def beyond_length(terms_BT: Tensor, mask_BT: Tensor, seed: int) -> Tensor:
    """The terms without that; BT, nats. Over the batch their sum does not go with length, and has the same mean."""
    line_B = length_line(coherent_reward(terms_BT, mask_BT), mask_BT)
    return terms_BT - spread(line_B - line_B.mean(), mask_BT, at="token")


def length_line(reward_B: Tensor, mask_BT: Tensor) -> Tensor:
    """The least-squares line of the rewards over the responses' lengths, at each of these; their mean where all have
    one length. B, nats."""
    reward_64B, length_B = reward_B.double(), mask_BT.sum(dim=1).double()
    away_B = length_B - length_B.mean()
    slope = (away_B * reward_64B).sum() / away_B.square().sum().clamp(min=0.5)  # lengths that differ give at least 0.5
    return (reward_64B.mean() + slope * away_B).to(reward_B.dtype)


def derangement(n: int, seed: int) -> Tensor:
    """A seeded permutation of n >= 2 without fixed points: one random cycle through all."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    result = torch.empty_like(order)
    result[order] = order.roll(1)
    return result


OFF_SUPPORT_NATS = -16.0  # a token the base gives less than 1e-7 is off its support


def reward_diagnostics(
    log_ratio_BT: Tensor, base_logprobs_BT: Tensor, score_B: Tensor, mask_BT: Tensor
) -> dict[str, float]:
    """Signs that the reward is read off the base's support, or prefers length.

    reward_top1pct: share of sum |log ratio| carried by the top 1% tokens. base_logprob_p01, _p50: quantiles of the
    base's log-prob of sampled tokens, nats. off_support: share of tokens below OFF_SUPPORT_NATS. length_correlation:
    Pearson, of reward with length over the batch, 0 where either is constant.
    """
    terms_N, base_N = log_ratio_BT[mask_BT].abs(), base_logprobs_BT[mask_BT]
    top = max(len(terms_N) // 100, 1)
    total = float(terms_N.sum())
    lengths_B = mask_BT.sum(dim=1).float()
    return {
        "reward_top1pct": float(terms_N.topk(top).values.sum()) / total if total > 0 else 0.0,
        "base_logprob_p01": float(base_N.quantile(0.01)),
        "base_logprob_p50": float(base_N.quantile(0.5)),
        "off_support": float((base_N < OFF_SUPPORT_NATS).float().mean()),
        "length_correlation": _correlation(score_B.float(), lengths_B),
    }


def _correlation(x_B: Tensor, y_B: Tensor) -> float:
    x_B, y_B = x_B - x_B.mean(), y_B - y_B.mean()
    norm = float(x_B.norm() * y_B.norm())
    return float(x_B @ y_B) / norm if norm > 0 else 0.0


def reward_warnings(row: dict[str, Any], kind: str = COHERENT) -> list[str]:
    """What a person should do about a batch's diagnostics; the texts do not vary, so each is shown once a run.

    kind: what PPO is paid by. Of one that pays for length alone it is no news that reward and length go together.
    """
    warnings = []
    if row["off_support"] > 0.25:
        warnings.append(
            "more than a quarter of the sampled tokens are off the base's support (it gives them less than 1e-7): this "
            "base does not know such text at all, and the reward pays for every token: use a base that does"
        )
    elif row["off_support"] > 0.01:
        warnings.append(
            "more than 1% of the sampled tokens are off the base's support (it gives them less than 1e-7), where the "
            "ratio explodes: set reward.token_clip (5 is a start), or use a base that knows the template and its EOS"
        )
    if row["reward_top1pct"] > 0.5:
        warnings.append(
            "the top 1% of tokens carry more than half of the reward: read them in rollouts.jsonl, and set "
            "reward.token_clip"
        )
    if abs(row["length_correlation"]) > 0.8 and not REWARD_KINDS[kind].of_length:
        warnings.append(
            "reward and length correlate beyond 0.8: the reward may be paying for length; watch the length, and "
            "try reward.length_norm=true"
        )
    return warnings
