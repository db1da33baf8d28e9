"""What must hold for any input: identities of GAE, the losses, the reward and the log-prob kernels."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from srppo.kernels import logprob_diff, token_logprobs
from srppo.training.advantage import gae, whiten
from srppo.training.losses import clipped_policy_loss, clipped_value_loss, explained_variance, k1, kl_penalty
from srppo.training.reward import RunningStd, coherent_reward, place_reward

settings.register_profile("maths", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("maths")

seeds = st.integers(0, 2**32 - 1)
discounts = st.floats(0.0, 1.0)


class Batch(NamedTuple):
    """A ragged batch: mask, and a generator for what goes into it."""

    mask_BT: Tensor
    generator: torch.Generator

    def normal(self, scale: float = 1.0) -> Tensor:
        """fp64 normals, NaN where masked."""
        x_BT = scale * torch.randn(self.mask_BT.shape, generator=self.generator, dtype=torch.float64)
        return x_BT.masked_fill(~self.mask_BT, math.nan)

    def logprobs(self) -> Tensor:
        return -self.normal(2.0).abs()


@st.composite
def batches(draw: st.DrawFn, min_tokens: int = 1) -> Batch:
    """Rows of length 0..T, with at least `min_tokens` counted tokens in all."""
    width = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(0, width), min_size=1, max_size=6).filter(lambda ns: sum(ns) >= min_tokens))
    mask_BT = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Batch(mask_BT, torch.Generator().manual_seed(draw(seeds)))


def assert_close(actual: Tensor | float, expected: Tensor | float, tolerance: float = 1e-11) -> None:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def zeroed(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, x_BT, torch.zeros_like(x_BT))


def reward_to_go(rewards_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return zeroed(zeroed(rewards_BT, mask_BT).flip(1).cumsum(1).flip(1), mask_BT)


# Advantages


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


# Padding


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


# Losses


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


# Kernels


@st.composite
def logit_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """Two models' fp32 logits in steps of 1/256 (exact even when 1e4 is added) and the tokens."""
    generator = torch.Generator().manual_seed(draw(seeds))
    shape = (draw(st.integers(1, 20)), draw(st.sampled_from([1, 2, 5, 33, 300])))
    sft_NV, base_NV = (torch.randint(-2048, 2049, shape, generator=generator) / 256 for _ in range(2))
    return sft_NV, base_NV, torch.randint(0, shape[1], shape[:1], generator=generator)


@given(logit_pairs())
def test_logprob_diff_of_a_model_with_itself_is_0(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    logits_NV, _, tokens_N = pair
    for offset in (0.0, 1e4):
        diff_N = logprob_diff(logits_NV + offset, (logits_NV + offset).clone(), tokens_N)
        assert torch.equal(diff_N, torch.zeros(len(tokens_N)))


@given(logit_pairs(), st.sampled_from([0.0, 1e4, -1e4]))
def test_logprob_diff_is_antisymmetric(pair: tuple[Tensor, Tensor, Tensor], offset: float) -> None:
    sft_NV, base_NV, tokens_N = pair
    sft_NV = sft_NV + offset
    assert torch.equal(logprob_diff(sft_NV, base_NV, tokens_N), -logprob_diff(base_NV, sft_NV, tokens_N))


@given(logit_pairs(), st.sampled_from([-1e4, -37.5, 3.0, 1e4]), st.sampled_from([-1e4, 0.0, 1e4]))
def test_logprob_diff_does_not_see_shifts(
    pair: tuple[Tensor, Tensor, Tensor], sft_shift: float, base_shift: float
) -> None:
    sft_NV, base_NV, tokens_N = pair
    even_N1 = (torch.arange(len(tokens_N)) % 2)[:, None]  # every other row: a shift is a row's own
    shifted_N = logprob_diff(sft_NV + sft_shift * even_N1, base_NV + base_shift * (1 - even_N1), tokens_N)
    assert_close(shifted_N, logprob_diff(sft_NV, base_NV, tokens_N), 3e-6)


@given(logit_pairs())
def test_logprob_diff_is_the_difference_of_log_probs(pair: tuple[Tensor, Tensor, Tensor]) -> None:
    sft_NV, base_NV, tokens_N = pair
    exact_N = [x_NV.double().log_softmax(-1).gather(-1, tokens_N[:, None])[:, 0] for x_NV in (sft_NV, base_NV)]
    assert_close(logprob_diff(sft_NV, base_NV, tokens_N), exact_N[0] - exact_N[1], 3e-6)
    two_N = [token_logprobs(x_NV[None], tokens_N[None])[0] for x_NV in (sft_NV, base_NV)]
    assert_close(logprob_diff(sft_NV, base_NV, tokens_N), two_N[0] - two_N[1], 1e-5)


@given(logit_pairs(), st.floats(0.2, 3.0))
def test_token_logprobs_are_a_distribution(pair: tuple[Tensor, Tensor, Tensor], temperature: float) -> None:
    logits_NV = pair[0]
    rows, vocabulary = logits_NV.shape
    every_BT = torch.arange(vocabulary).repeat(rows, 1)
    logits_BTV = logits_NV[:, None].expand(rows, vocabulary, vocabulary)
    logprobs_NV = token_logprobs(logits_BTV, every_BT, temperature=temperature).double()
    assert (logprobs_NV <= 0).all()
    assert_close(logprobs_NV.exp().sum(-1), torch.ones(rows), 1e-5)


# Reward


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
