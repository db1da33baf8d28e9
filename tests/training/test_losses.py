"""Losses and KL estimators: golden values, and what must hold for any input; padding changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_cases import (
    TOLERANCE,
    assert_golden,
    assert_zero_padded,
    cases,
    garbage,
    kept_dtypes,
    mask_of,
    pad,
)
from hypothesis import given
from hypothesis import strategies as st
from ragged_batches import Batch, assert_close, batches, zeroed
from torch import Tensor

from srppo.training.advantage import gae, whiten
from srppo.training.losses import clipped_policy_loss, clipped_value_loss, explained_variance, k1, kl_penalty
from srppo.training.reward import coherent_reward, place_reward


@kept_dtypes
@garbage
@cases("losses", "clipped_policy_loss")
def test_clipped_policy_loss(case: dict[str, Any], junk: list[float], dtype: torch.dtype) -> None:
    width, expected = case["width"], case["expected"]
    keys = ("logprobs", "old_logprobs", "advantages")
    logprobs_BT, old_logprobs_BT, advantages_BT = (pad(case[key], width, dtype, junk) for key in keys)
    logprobs_BT.requires_grad_()
    token_count = {} if case["token_count"] is None else {"token_count": case["token_count"]}
    mask_BT = mask_of(case["logprobs"], width)
    result = clipped_policy_loss(logprobs_BT, old_logprobs_BT, advantages_BT, mask_BT, clip=case["clip"], **token_count)
    assert_golden(result.loss, expected["loss"], dtype)
    assert float(result.clip_share) == pytest.approx(expected["clip_share"], abs=1e-6)
    rtol, atol = TOLERANCE[torch.float32]
    assert float(result.approx_kl) == pytest.approx(expected["approx_kl"], rel=rtol, abs=atol)
    (grad_BT,) = torch.autograd.grad(result.loss, logprobs_BT)
    assert_zero_padded(grad_BT, expected["grad"], width, dtype)


@kept_dtypes
@garbage
@cases("losses", "clipped_value_loss")
def test_clipped_value_loss(case: dict[str, Any], junk: list[float], dtype: torch.dtype) -> None:
    width, expected = case["width"], case["expected"]
    values_BT, old_values_BT, returns_BT = (
        pad(case[key], width, dtype, junk) for key in ("values", "old_values", "returns")
    )
    values_BT.requires_grad_()
    token_count = {} if case["token_count"] is None else {"token_count": case["token_count"]}
    mask_BT = mask_of(case["values"], width)
    result = clipped_value_loss(values_BT, old_values_BT, returns_BT, mask_BT, clip=case["clip"], **token_count)
    assert_golden(result.loss, expected["loss"], dtype)
    assert float(result.clip_share) == pytest.approx(expected["clip_share"], abs=1e-6)
    (grad_BT,) = torch.autograd.grad(result.loss, values_BT)
    assert_zero_padded(grad_BT, expected["grad"], width, dtype)


@kept_dtypes
@garbage
@cases("losses", "kl_penalty")
def test_kl_penalty(case: dict[str, Any], junk: list[float], dtype: torch.dtype) -> None:
    width, expected = case["width"], case["expected"]
    logprobs_BT, anchor_logprobs_BT = (pad(case[key], width, dtype, junk) for key in ("logprobs", "anchor_logprobs"))
    logprobs_BT.requires_grad_()
    token_count = {} if case["token_count"] is None else {"token_count": case["token_count"]}
    mask_BT = mask_of(case["logprobs"], width)
    loss = kl_penalty(logprobs_BT, anchor_logprobs_BT, mask_BT, form=case["form"], **token_count)
    assert_golden(loss, expected["loss"], dtype)
    (grad_BT,) = torch.autograd.grad(loss, logprobs_BT)
    assert_zero_padded(grad_BT, expected["grad"], width, dtype)


@kept_dtypes
@garbage
@cases("losses", "k1")
def test_k1(case: dict[str, Any], junk: list[float], dtype: torch.dtype) -> None:
    width = case["width"]
    logprobs_BT, anchor_logprobs_BT = (pad(case[key], width, dtype, junk) for key in ("logprobs", "anchor_logprobs"))
    mask_BT = mask_of(case["logprobs"], width)
    assert_zero_padded(k1(logprobs_BT, anchor_logprobs_BT, mask_BT), case["expected"], width, dtype)


@kept_dtypes
@garbage
@cases("losses", "explained_variance")
def test_explained_variance(case: dict[str, Any], junk: list[float], dtype: torch.dtype) -> None:
    values_BT, returns_BT = (pad(case[key], case["width"], dtype, junk) for key in ("values", "returns"))
    actual = explained_variance(values_BT, returns_BT, mask_of(case["values"], case["width"]))
    assert isinstance(actual, float)
    rtol, atol = TOLERANCE[dtype]
    assert actual == pytest.approx(case["expected"], rel=rtol, abs=atol)


@given(batches(), st.integers(1, 4))
def test_micro_batches_sum_to_the_whole_batch(batch: Batch, rows: int) -> None:
    """With the global token count, losses, metrics and gradients of the parts add up; empty parts add nothing."""
    mask_BT, count = batch.mask_BT, int(batch.mask_BT.sum())
    leaf_BT = batch.logprobs().requires_grad_()
    other_BT, weight_BT = batch.logprobs(), batch.normal()
    losses = {
        "policy": lambda s, n: clipped_policy_loss(leaf_BT[s], other_BT[s], weight_BT[s], mask_BT[s], clip=0.2, **n),
        "value": lambda s, n: clipped_value_loss(leaf_BT[s], other_BT[s], weight_BT[s], mask_BT[s], clip=0.2, **n),
        "plain value": lambda s, n: clipped_value_loss(
            leaf_BT[s], other_BT[s], weight_BT[s], mask_BT[s], clip=None, **n
        ),
        "k2": lambda s, n: (kl_penalty(leaf_BT[s], other_BT[s], mask_BT[s], form="k2", **n),),
        "k3": lambda s, n: (kl_penalty(leaf_BT[s], other_BT[s], mask_BT[s], form="k3", **n),),
    }
    for loss in losses.values():
        whole = loss(slice(None), {})
        parts = [loss(slice(b, b + rows), {"token_count": count}) for b in range(0, len(mask_BT), rows)]
        for k, figure in enumerate(whole):
            tolerance = 1e-6 if k else 1e-11  # metrics may be fp32
            assert_close(sum(torch.as_tensor(part[k]).detach().double() for part in parts), figure, tolerance)
        (whole_grad_BT,) = torch.autograd.grad(whole[0], leaf_BT)
        (sum_grad_BT,) = torch.autograd.grad(sum(part[0] for part in parts), leaf_BT)
        assert_close(sum_grad_BT, whole_grad_BT)


@given(batches(), st.floats(0.05, 0.5))
def test_ratio_1_is_the_policy_gradient(batch: Batch, clip: float) -> None:
    mask_BT, count = batch.mask_BT, int(batch.mask_BT.sum())
    logprobs_BT = batch.logprobs()
    advantages_BT = batch.normal()
    leaf_BT = logprobs_BT.clone().requires_grad_()
    result = clipped_policy_loss(leaf_BT, logprobs_BT, advantages_BT, mask_BT, clip=clip)
    assert float(result.clip_share) == 0
    assert float(result.approx_kl) == 0
    assert_close(result.loss, -zeroed(advantages_BT, mask_BT).sum() / count)
    (grad_BT,) = torch.autograd.grad(result.loss, leaf_BT)
    assert_close(grad_BT, -zeroed(advantages_BT, mask_BT) / count)


@given(batches())
def test_clipping_is_pessimistic_and_a_wide_clip_does_nothing(batch: Batch) -> None:
    mask_BT = batch.mask_BT
    new_BT, old_BT, advantages_BT = batch.logprobs(), batch.logprobs(), batch.normal()
    narrow = clipped_policy_loss(new_BT, old_BT, advantages_BT, mask_BT, clip=0.1)
    wide = clipped_policy_loss(new_BT, old_BT, advantages_BT, mask_BT, clip=1e9)
    ratio_BT = zeroed((new_BT - old_BT).exp(), mask_BT)
    assert_close(wide.loss, -(ratio_BT * zeroed(advantages_BT, mask_BT)).sum() / mask_BT.sum())
    assert float(wide.clip_share) == 0
    assert float(narrow.loss) >= float(wide.loss) - 1e-12
    assert float(narrow.approx_kl) >= 0

    value = clipped_value_loss(new_BT, old_BT, advantages_BT, mask_BT, clip=0.1)
    plain = clipped_value_loss(new_BT, old_BT, advantages_BT, mask_BT, clip=None)
    assert float(value.loss) >= float(plain.loss) - 1e-12
    assert float(plain.clip_share) == 0
    assert_close(plain.loss, 0.5 * zeroed((new_BT - advantages_BT) ** 2, mask_BT).sum() / mask_BT.sum())


@given(batches())
def test_gradients_of_the_kl_penalties(batch: Batch) -> None:
    mask_BT, count = batch.mask_BT, int(batch.mask_BT.sum())
    logprobs_BT = batch.logprobs().requires_grad_()
    anchor_logprobs_BT = batch.logprobs()
    gap_BT = zeroed(logprobs_BT.detach() - anchor_logprobs_BT, mask_BT)
    k2 = kl_penalty(logprobs_BT, anchor_logprobs_BT, mask_BT, form="k2")
    (k2_grad_BT,) = torch.autograd.grad(k2, logprobs_BT)
    assert_close(k2_grad_BT, zeroed(gap_BT.sum(dim=1, keepdim=True).expand_as(gap_BT), mask_BT) / count)
    k3 = kl_penalty(logprobs_BT, anchor_logprobs_BT, mask_BT, form="k3")
    (k3_grad_BT,) = torch.autograd.grad(k3, logprobs_BT)
    assert_close(k3_grad_BT, (1 - (-gap_BT).exp()) / count)
    assert float(k2.detach()) >= 0
    assert float(k3.detach()) >= -1e-15
    assert_close(k1(logprobs_BT, anchor_logprobs_BT, mask_BT), gap_BT)


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
def test_a_micro_batch_in_which_nothing_counts_adds_nothing(junk: float) -> None:
    leaf_BT = torch.full((2, 3), junk, requires_grad=True)
    junk_BT, mask_BT = torch.full((2, 3), junk), torch.zeros(2, 3, dtype=torch.bool)
    figures = [
        *clipped_policy_loss(leaf_BT, junk_BT, junk_BT, mask_BT, clip=0.2, token_count=5),
        *clipped_value_loss(leaf_BT, junk_BT, junk_BT, mask_BT, clip=0.2, token_count=5),
        kl_penalty(leaf_BT, junk_BT, mask_BT, form="k2", token_count=5),
        kl_penalty(leaf_BT, junk_BT, mask_BT, form="k3", token_count=5),
    ]
    assert [float(torch.as_tensor(x).detach()) for x in figures] == [0.0] * 7
    sum(x for x in figures if isinstance(x, Tensor) and x.requires_grad).backward()
    assert torch.equal(leaf_BT.grad, torch.zeros(2, 3))


@given(batches(min_tokens=3), st.floats(-5, 5))
def test_explained_variance_at_known_points(batch: Batch, shift: float) -> None:
    mask_BT, returns_BT = batch.mask_BT, batch.normal()
    assert_close(explained_variance(returns_BT + shift, returns_BT, mask_BT), 1.0, 1e-9)
    assert_close(explained_variance(torch.full_like(returns_BT, shift), returns_BT, mask_BT), 0.0, 1e-9)
    assert_close(explained_variance(-returns_BT, returns_BT, mask_BT), -3.0, 1e-9)
    assert explained_variance(returns_BT, torch.full_like(returns_BT, 0.5), mask_BT) == 0.0


@given(batches(), st.sampled_from([0.1, 1 / 3, -7.3, 1e4 / 7]), st.sampled_from([torch.float32, torch.float64]))
def test_explained_variance_of_constant_returns_is_0(batch: Batch, constant: float, dtype: torch.dtype) -> None:
    """Also where the constant is no binary fraction and the mean rounds: returns without variance explain nothing."""
    values_BT = batch.normal().to(dtype)
    assert explained_variance(values_BT, torch.full_like(values_BT, constant), batch.mask_BT) == 0.0


@given(batches(min_tokens=2), st.integers(1, 4), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, 1e30]))
def test_padding_changes_no_loss_and_no_metric(batch: Batch, columns: int, junk: float) -> None:
    mask_BT = batch.mask_BT

    def wide(x_BT: Tensor, fill: float | bool) -> Tensor:
        return torch.cat([x_BT, torch.full((len(x_BT), columns), fill, dtype=x_BT.dtype)], dim=1)

    wide_mask_BT = wide(mask_BT, False)
    a_BT, b_BT, c_BT = batch.logprobs(), batch.logprobs(), batch.normal()
    wide_a_BT, wide_b_BT, wide_c_BT = (wide(x_BT, junk) for x_BT in (a_BT, b_BT, c_BT))

    policy = clipped_policy_loss(a_BT, b_BT, c_BT, mask_BT, clip=0.2)
    wide_policy = clipped_policy_loss(wide_a_BT, wide_b_BT, wide_c_BT, wide_mask_BT, clip=0.2)
    assert policy._fields == ("loss", "clip_share", "approx_kl")
    for one, other in zip(policy, wide_policy, strict=True):
        assert_close(other, one)
    for clip in (0.2, None):
        value = clipped_value_loss(a_BT, b_BT, c_BT, mask_BT, clip=clip)
        wide_value = clipped_value_loss(wide_a_BT, wide_b_BT, wide_c_BT, wide_mask_BT, clip=clip)
        assert value._fields == ("loss", "clip_share")
        for one, other in zip(value, wide_value, strict=True):
            assert_close(other, one)
    for form in ("k2", "k3"):
        penalty = kl_penalty(a_BT, b_BT, mask_BT, form=form)
        assert_close(kl_penalty(wide_a_BT, wide_b_BT, wide_mask_BT, form=form), penalty)
    assert_close(explained_variance(wide_a_BT, wide_c_BT, wide_mask_BT), explained_variance(a_BT, c_BT, mask_BT))
    assert_close(coherent_reward(wide_c_BT, wide_mask_BT), coherent_reward(c_BT, mask_BT))
    assert_close(k1(wide_a_BT, wide_b_BT, wide_mask_BT), wide(k1(a_BT, b_BT, mask_BT), 0.0))
    assert_close(whiten(wide_c_BT, wide_mask_BT), wide(whiten(c_BT, mask_BT), 0.0))
    for at in ("eos", "token"):
        assert_close(place_reward(wide_c_BT, wide_mask_BT, at=at), wide(place_reward(c_BT, mask_BT, at=at), 0.0))
    advantages_BT = gae(c_BT, b_BT, mask_BT, gamma=0.9, lam=0.8)
    assert_close(gae(wide_c_BT, wide_b_BT, wide_mask_BT, gamma=0.9, lam=0.8), wide(advantages_BT, 0.0))
