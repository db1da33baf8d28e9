"""Log-probs from logits: golden values, and what must hold for any input."""

from __future__ import annotations

from typing import Any

import torch
from golden_cases import (
    assert_golden,
    cases,
    kept_dtypes,
    load,
)
from hypothesis import given
from hypothesis import strategies as st
from ragged_batches import assert_close, seeds
from torch import Tensor

from srppo.kernels import logprob_diff, token_logprobs


def summed(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results: fp32, for fp64 logits fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@kept_dtypes
@cases("kernels", "token_logprobs")
def test_token_logprobs(case: dict[str, Any], dtype: torch.dtype) -> None:
    logits_NV = torch.tensor(case["logits"], dtype=dtype, requires_grad=True)
    logits_BTV = logits_NV[None]
    logprobs_BT = token_logprobs(logits_BTV, torch.tensor([case["tokens"]]), temperature=case["temperature"])
    assert_golden(logprobs_BT, [case["expected"]], summed(dtype))
    (grad_NV,) = torch.autograd.grad((logprobs_BT * torch.tensor(case["upstream"])).sum(), logits_NV)
    assert grad_NV.dtype == dtype
    assert_golden(grad_NV.float(), case["expected_grad"], torch.float32)


@cases("kernels", "token_logprobs")
def test_token_logprobs_over_batch_and_time(case: dict[str, Any]) -> None:
    """(N, 1) and (1, N) are the same numbers, at the default temperature where the case has it."""
    temperature = {} if case["temperature"] == 1.0 else {"temperature": case["temperature"]}
    logits_BTV = torch.tensor(case["logits"])[:, None]
    logprobs_BT = token_logprobs(logits_BTV, torch.tensor(case["tokens"])[:, None], **temperature)
    assert_golden(logprobs_BT, [[x] for x in case["expected"]], torch.float32)


@kept_dtypes
@cases("kernels", "logprob_diff")
def test_logprob_diff(case: dict[str, Any], dtype: torch.dtype) -> None:
    sft_logits_NV = torch.tensor(case["sft_logits"], dtype=dtype)
    base_logits_NV = torch.tensor(case["base_logits"], dtype=dtype)
    diff_N = logprob_diff(sft_logits_NV, base_logits_NV, torch.tensor(case["tokens"]))
    assert_golden(diff_N, case["expected"], summed(dtype))


def test_bf16_logits_are_not_rounded_again() -> None:
    """Logits that bf16 holds exactly give fp32 results of full accuracy."""
    functions = load("kernels.json")
    for function in ("token_logprobs", "logprob_diff"):
        (case,) = [c for c in functions[function]["cases"] if c["name"].startswith("bf16")]
        if function == "logprob_diff":
            sft, base = (torch.tensor(case[key], dtype=torch.bfloat16) for key in ("sft_logits", "base_logits"))
            actual = logprob_diff(sft, base, torch.tensor(case["tokens"]))
        else:
            logits_BTV = torch.tensor(case["logits"], dtype=torch.bfloat16)[None]
            actual = token_logprobs(logits_BTV, torch.tensor([case["tokens"]]))[0]
        assert_golden(actual, case["expected"], torch.float32)


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
