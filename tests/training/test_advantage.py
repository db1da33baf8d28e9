"""Advantages: golden values, and what must hold for any input."""

from __future__ import annotations

from typing import Any

import torch
from golden_cases import (
    assert_zero_padded,
    cases,
    garbage,
    kept_dtypes,
    mask_of,
    pad,
)
from hypothesis import given
from hypothesis import strategies as st
from ragged_batches import Batch, assert_close, batches, discounts, reward_to_go, zeroed

from srppo.training.advantage import gae, whiten


@kept_dtypes
@garbage
@cases("advantage", "gae")
def test_gae(case: dict[str, Any], junk: list[float], dtype: torch.dtype) -> None:
    width = case["width"]
    rewards_BT, values_BT = (pad(case[key], width, dtype, junk) for key in ("rewards", "values"))
    mask_BT = mask_of(case["rewards"], width)
    advantages_BT = gae(rewards_BT, values_BT, mask_BT, gamma=case["gamma"], lam=case["lam"])
    assert_zero_padded(advantages_BT, case["expected"], width, dtype)


@kept_dtypes
@garbage
@cases("advantage", "whiten")
def test_whiten(case: dict[str, Any], junk: list[float], dtype: torch.dtype) -> None:
    width = case["width"]
    whitened_BT = whiten(pad(case["x"], width, dtype, junk), mask_of(case["x"], width))
    assert_zero_padded(whitened_BT, case["expected"], width, dtype)


@given(batches(), discounts)
def test_gae_at_lambda_0_is_the_td_error(batch: Batch, gamma: float) -> None:
    mask_BT = batch.mask_BT
    rewards_BT, values_BT = batch.normal(), batch.normal()
    known_BT = zeroed(values_BT, mask_BT)
    after_BT = torch.cat([known_BT[:, 1:], torch.zeros(len(mask_BT), 1, dtype=torch.float64)], dim=1)
    td_BT = zeroed(rewards_BT + gamma * after_BT - values_BT, mask_BT)
    assert_close(gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=0.0), td_BT)


@given(batches())
def test_gae_at_lambda_1_gives_returns_that_ignore_values(batch: Batch) -> None:
    mask_BT, rewards_BT = batch.mask_BT, batch.normal()
    for values_BT in (batch.normal(), batch.normal(10.0)):
        advantages_BT = gae(rewards_BT, values_BT, mask_BT, gamma=1.0, lam=1.0)
        assert_close(advantages_BT + zeroed(values_BT, mask_BT), reward_to_go(rewards_BT, mask_BT))


@given(batches(), discounts, discounts)
def test_gae_is_linear_and_treats_rows_alone(batch: Batch, gamma: float, lam: float) -> None:
    mask_BT, rewards_BT, values_BT = batch.mask_BT, batch.normal(), batch.normal()
    whole_BT = gae(rewards_BT, values_BT, mask_BT, gamma=gamma, lam=lam)
    assert_close(gae(-3 * rewards_BT, -3 * values_BT, mask_BT, gamma=gamma, lam=lam), -3 * whole_BT)
    for b in range(len(mask_BT)):
        row = slice(b, b + 1)
        assert_close(gae(rewards_BT[row], values_BT[row], mask_BT[row], gamma=gamma, lam=lam), whole_BT[row])


@given(batches(min_tokens=2), st.floats(1e-2, 1e3), st.floats(-10, 10))
def test_whiten_gives_mean_0_and_variance_1(batch: Batch, scale: float, shift: float) -> None:
    mask_BT = batch.mask_BT
    x_BT = batch.normal(scale) + shift
    var = x_BT[mask_BT].var(correction=0)
    kept = whiten(x_BT, mask_BT)[mask_BT]
    assert_close(kept.mean(), 0.0, 1e-8)
    assert_close(kept.var(correction=0), var / (var + 1e-8), 1e-8)
