"""Rewards: golden values, what must hold for any input, and by hand their terms, KL, scale and rule for the limit."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from golden_cases import (
    assert_golden,
    assert_zero_padded,
    cases,
    garbage,
    kept_dtypes,
    mask_of,
    pad,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ragged_batches import Batch, assert_close, batches, seeds
from tiny import ENDED_B, LENGTHS, ragged_batch, ragged_logprobs

from srppo.config import RewardConfig
from srppo.training.advantage import gae
from srppo.training.reward import Rewards, RunningStd, coherent_reward, compute_rewards, place_reward, reward_warnings
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


@kept_dtypes
@garbage
@cases("reward", "coherent_reward")
def test_coherent_reward(case: dict[str, Any], junk: list[float], dtype: torch.dtype) -> None:
    log_ratio_BT = pad(case["log_ratio"], case["width"], dtype, junk)
    reward_B = coherent_reward(log_ratio_BT, mask_of(case["log_ratio"], case["width"]))
    assert_golden(reward_B, case["expected"], dtype)


@kept_dtypes
@garbage
@cases("reward", "place_reward")
def test_place_reward(case: dict[str, Any], junk: list[float], dtype: torch.dtype) -> None:
    width = case["width"]
    log_ratio_BT = pad(case["log_ratio"], width, dtype, junk)
    reward_BT = place_reward(log_ratio_BT, mask_of(case["log_ratio"], width), at=case["at"])
    assert_zero_padded(reward_BT, case["expected"], width, dtype)


@kept_dtypes
@cases("reward", "running_std")
def test_running_std(case: dict[str, Any], dtype: torch.dtype) -> None:
    running = RunningStd()
    assert float(running.std) == case["expected"][0]
    for batch, expected in zip(case["batches"], case["expected"][1:], strict=True):
        running.update(torch.tensor(batch, dtype=dtype))
        assert float(running.std) == pytest.approx(expected, rel=1e-9)


@given(batches())
def test_both_placements_give_the_same_total(batch: Batch) -> None:
    mask_BT, log_ratio_BT = batch.mask_BT, batch.normal(5.0)
    reward_B = coherent_reward(log_ratio_BT, mask_BT)
    for at in ("eos", "token"):
        assert_close(place_reward(log_ratio_BT, mask_BT, at=at).sum(1), reward_B)


@given(batches())
def test_both_placements_have_the_same_return_at_the_first_token(batch: Batch) -> None:
    mask_BT, log_ratio_BT, values_BT = batch.mask_BT, batch.normal(5.0), batch.normal()
    first = [
        gae(place_reward(log_ratio_BT, mask_BT, at=at), values_BT, mask_BT, gamma=1.0, lam=1.0)[:, 0]
        for at in ("eos", "token")
    ]
    assert_close(first[0], first[1])


@given(batches())
def test_the_eos_reward_lies_on_the_last_counted_token(batch: Batch) -> None:
    mask_BT, log_ratio_BT = batch.mask_BT, batch.normal(5.0)
    reward_BT = place_reward(log_ratio_BT, mask_BT, at="eos")
    for row, mask, ratio in zip(reward_BT, mask_BT, log_ratio_BT, strict=True):
        length = int(mask.sum())
        if length:
            assert_close(row[length - 1], ratio[:length].sum())
        assert torch.equal(row[: max(length - 1, 0)], torch.zeros(max(length - 1, 0), dtype=row.dtype))
        assert torch.equal(row[length:], torch.zeros(len(row) - length, dtype=row.dtype))


@given(seeds)
@settings(max_examples=15)
def test_the_expected_coherent_reward_under_sft_is_the_kl(seed: int) -> None:
    """All sequences of a table model with V = 4 (token 0 is EOS) and at most T = 3 tokens."""
    vocabulary, limit, eos = 4, 3, 0
    generator = torch.Generator().manual_seed(seed)
    prefixes = [p for n in range(limit) for p in itertools.product(range(1, vocabulary), repeat=n)]
    sft, base = (
        {p: torch.randn(vocabulary, generator=generator, dtype=torch.float64).log_softmax(-1) for p in prefixes}
        for _ in range(2)
    )
    responses = [(*p, token) for p in prefixes for token in range(vocabulary) if token == eos or len(p) == limit - 1]
    log_ratio_BT = torch.full((len(responses), limit), math.nan, dtype=torch.float64)
    mask_BT = torch.zeros(len(responses), limit, dtype=torch.bool)
    log_sft_B = torch.zeros(len(responses), dtype=torch.float64)
    for b, response in enumerate(responses):
        for t, token in enumerate(response):
            log_ratio_BT[b, t] = sft[response[:t]][token] - base[response[:t]][token]
            mask_BT[b, t] = True
            log_sft_B[b] += sft[response[:t]][token]
    assert not mask_BT.all()
    assert_close(log_sft_B.exp().sum(), 1.0)

    # The chain rule, a sum over prefixes: no response's reward enters it.
    kl = 0.0
    for p in prefixes:
        reach = math.exp(sum(float(sft[p[:t]][token]) for t, token in enumerate(p)))
        kl += reach * float((sft[p].exp() * (sft[p] - base[p])).sum())
    expected = float((log_sft_B.exp() * coherent_reward(log_ratio_BT, mask_BT)).sum())
    assert expected == pytest.approx(kl, abs=1e-10)
    assert expected >= 0
    for at in ("eos", "token"):
        placed_B = place_reward(log_ratio_BT, mask_BT, at=at).sum(1)
        assert float((log_sft_B.exp() * placed_B).sum()) == pytest.approx(kl, abs=1e-10)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8), seeds, st.sampled_from([0.0, -50.0, 1e5]), st.integers(0, 8)
)
def test_running_std_is_numpys_in_any_split(sizes: list[int], seed: int, offset: float, restart: int) -> None:
    """Batches of any size, an empty one too; saved and loaded on the way."""
    rng = np.random.default_rng(seed)
    values = offset + 3.0 * rng.standard_normal(sum(sizes))
    running = RunningStd()
    seen = 0
    for k, size in enumerate(sizes):
        if k == restart:
            state, running = running.state_dict(), RunningStd()
            running.load_state_dict(state)
        running.update(torch.from_numpy(values[seen : seen + size]))
        seen += size
        expected = float(np.std(values[:seen])) if seen >= 2 else 1.0
        assert float(running.std) == pytest.approx(expected, rel=1e-8)


def test_running_std_state_is_a_copy() -> None:
    """What was saved does not move with later updates, and loading it twice gives the same."""
    running = RunningStd()
    running.update(torch.tensor([1.0, 5.0]))
    state = running.state_dict()
    running.update(torch.tensor([100.0]))
    for _ in range(2):
        restored = RunningStd()
        restored.load_state_dict(state)
        assert float(restored.std) == 2.0
        restored.update(torch.tensor([-30.0]))


HEALTHY = {"off_support": 0.0, "reward_top1pct": 0.2, "length_correlation": 0.3}


@pytest.mark.parametrize(
    ("sign", "words"),
    [
        ({"off_support": 0.02}, "reward.token_clip (5 is a start)"),
        ({"off_support": 0.3}, "use a base that does"),
        ({"reward_top1pct": 0.6}, "the top 1% of tokens"),
        ({"length_correlation": 0.9}, "reward.length_norm=true"),
        ({"length_correlation": -0.9}, "reward.length_norm=true"),
    ],
    ids=str,
)
def test_each_sign_of_a_failing_reward_has_its_own_line(sign: dict[str, float], words: str) -> None:
    assert reward_warnings(HEALTHY) == []
    (line,) = reward_warnings({**HEALTHY, **sign})
    assert words in line and "\n" not in line


def test_a_reward_for_length_is_not_warned_of_going_with_length() -> None:
    row = {**HEALTHY, "length_correlation": -1.0}
    assert [bool(reward_warnings(row, kind)) for kind in ("brevity", "verbosity", "ratio")] == [False, False, True]
