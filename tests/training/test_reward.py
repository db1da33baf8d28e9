"""Rewards by hand: their terms, KL, the scale, and the rule for rollouts at the length limit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import ENDED_B, LENGTHS, ragged_batch, ragged_logprobs

from srppo.config import RewardConfig
from srppo.training.reward import Rewards, RunningStd, compute_rewards
from srppo.training.scores import Scores


def rewards_of(running: RunningStd, **config: Any) -> Rewards:
    scores = Scores(ragged_logprobs(1) - ragged_logprobs(2), ragged_logprobs(1), ragged_logprobs(2))
    return compute_rewards(RewardConfig(**config), scores, ragged_batch(), running, seed=0)


@pytest.mark.parametrize("anchor", ["sft", "base"])
@pytest.mark.parametrize("placement", ["eos", "token"])
def test_rewards_by_hand(anchor: str, placement: str) -> None:
    """Reward minus beta KL of each token, in nats; then the same numbers over one deviation, KL and all."""
    sft, base, policy = (ragged_logprobs(seed).tolist() for seed in (1, 2, 3))
    reference = sft if anchor == "sft" else base
    beta, expected, scores = 0.5, torch.zeros(4, 4), []
    for b, length in enumerate(LENGTHS):
        terms = [sft[b][t] - base[b][t] for t in range(length)]
        scores.append(sum(terms))
        for t in range(length):
            expected[b, t] = terms[t] if placement == "token" else sum(terms) if t == length - 1 else 0.0
            expected[b, t] -= beta * (policy[b][t] - reference[b][t])
    plain = rewards_of(RunningStd(), anchor=anchor, placement=placement, beta=beta, scale=False)
    assert plain.scale == 1.0 and plain.trained_B.all()
    torch.testing.assert_close(plain.rewards_BT, expected)
    torch.testing.assert_close(plain.score_B, torch.tensor(scores))
    running = RunningStd()
    scaled = rewards_of(running, anchor=anchor, placement=placement, beta=beta)
    deviation = float(expected.double().sum(1).std(correction=0))
    assert scaled.scale == pytest.approx(deviation, rel=1e-6) and scaled.scale != pytest.approx(1.0, rel=0.01)
    torch.testing.assert_close(scaled.rewards_BT, expected / deviation)
    assert torch.equal(scaled.score_B, plain.score_B) and running.count == 4


def test_a_kl_in_the_loss_is_not_in_the_reward() -> None:
    plain = rewards_of(RunningStd(), kl="k2", beta=0.5, scale=False)
    torch.testing.assert_close(plain.rewards_BT.sum(1), plain.score_B)


def test_the_rule_for_rollouts_at_the_limit() -> None:
    kept = rewards_of(RunningStd(), scale=False, beta=0.0)
    zero = rewards_of(RunningStd(), scale=False, beta=0.0, at_limit="zero")
    assert zero.score_B[0] == 0 and torch.equal(zero.score_B[1:], kept.score_B[1:])
    fined = rewards_of(RunningStd(), scale=False, beta=0.0, limit_penalty=2.0)
    torch.testing.assert_close(kept.score_B - fined.score_B, torch.tensor([2.0, 0.0, 0.0, 0.0]))
    assert fined.rewards_BT[0, 3] == kept.rewards_BT[0, 3] - 2  # at its last token
    running = RunningStd()
    dropped = rewards_of(running, beta=0.0, at_limit="drop")
    assert dropped.trained_B.tolist() == ENDED_B.tolist() and running.count == 3
