"""The maths against golden values of an independent plain-Python fp64 loop (tests/goldens/make.py)."""

from __future__ import annotations

import functools
import json
import math
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from srppo.kernels import logprob_diff, token_logprobs
from srppo.training.advantage import gae, whiten
from srppo.training.losses import clipped_policy_loss, clipped_value_loss, explained_variance, k1, kl_penalty
from srppo.training.reward import RunningStd, coherent_reward, place_reward

GOLDENS = Path(__file__).parents[1] / "goldens"
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-12, 1e-12)}  # rtol, atol a unit of the case's scale
DTYPES = [torch.float32, torch.float64]
GARBAGE = {  # what masked positions hold, cycled along each row
    "zeros": [0.0],
    "nan": [math.nan],
    "mixed": [math.inf, 3e38, -math.inf, math.nan, -7.0],
}
kept_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp64"])
garbage = pytest.mark.parametrize("junk", GARBAGE.values(), ids=GARBAGE.keys())


def decode(x: Any) -> Any:
    if isinstance(x, list):
        return [decode(y) for y in x]
    if isinstance(x, dict):
        return {key: decode(y) if key != "name" else y for key, y in x.items()}
    return -math.inf if x == "-inf" else x


@functools.cache
def load(file: str) -> dict[str, Any]:
    return json.loads((GOLDENS / file).read_text())


def cases(file: str, function: str) -> Any:
    """Parametrize over the golden cases of one function."""
    found = [decode(case) for case in load(f"{file}.json")[function]["cases"]]
    assert found
    return pytest.mark.parametrize("case", found, ids=[case["name"] for case in found])


def pad(rows: list[list[float]], width: int, dtype: torch.dtype, junk: list[float]) -> Tensor:
    """Ragged rows side by side, garbage on their right."""
    return torch.tensor([row + [junk[t % len(junk)] for t in range(len(row), width)] for row in rows], dtype=dtype)


def mask_of(rows: list[list[float]], width: int) -> Tensor:
    return torch.tensor([[t < len(row) for t in range(width)] for row in rows])


def assert_close(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """Close in shape, dtype and value; the absolute tolerance grows with the largest expected value."""
    assert isinstance(actual, Tensor)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    rtol, atol = TOLERANCE[dtype]
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.detach().double(), expected, rtol=rtol, atol=atol * scale)


def assert_zero_padded(actual: Tensor, expected: list[list[float]], width: int, dtype: torch.dtype) -> None:
    """Close at counted positions, exactly 0 at masked ones."""
    assert_close(actual, pad(expected, width, torch.float64, [0.0]), dtype)
    assert (actual[~mask_of(expected, width)] == 0).all()


# The files themselves


def same(a: Any, b: Any) -> bool:
    """Equal but for the last digits of floats, which may differ between maths libraries."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-14)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def test_files_are_what_make_writes() -> None:
    made = runpy.run_path(str(GOLDENS / "make.py"))["build"]()
    assert {path.name for path in GOLDENS.glob("*.json")} == made.keys()
    for file, content in made.items():
        assert same(load(file), json.loads(json.dumps(content))), f"{file} is stale: python tests/goldens/make.py"


def test_files_state_their_provenance() -> None:
    for path in GOLDENS.glob("*.json"):
        for function, body in load(path.name).items():
            provenance = body["provenance"]
            assert provenance.keys() == {"what", "formula", "source", "made_by", "seed"}, (path.name, function)
            assert all(provenance.values())


# Kernels


def summed(dtype: torch.dtype) -> torch.dtype:
    """The dtype of results: fp32, for fp64 logits fp64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@kept_dtypes
@cases("kernels", "token_logprobs")
def test_token_logprobs(case: dict[str, Any], dtype: torch.dtype) -> None:
    logits_NV = torch.tensor(case["logits"], dtype=dtype, requires_grad=True)
    logits_BTV = logits_NV[None]
    logprobs_BT = token_logprobs(logits_BTV, torch.tensor([case["tokens"]]), temperature=case["temperature"])
    assert_close(logprobs_BT, [case["expected"]], summed(dtype))
    (grad_NV,) = torch.autograd.grad((logprobs_BT * torch.tensor(case["upstream"])).sum(), logits_NV)
    assert grad_NV.dtype == dtype
    assert_close(grad_NV.float(), case["expected_grad"], torch.float32)


@cases("kernels", "token_logprobs")
def test_token_logprobs_over_batch_and_time(case: dict[str, Any]) -> None:
    """(N, 1) and (1, N) are the same numbers, at the default temperature where the case has it."""
    temperature = {} if case["temperature"] == 1.0 else {"temperature": case["temperature"]}
    logits_BTV = torch.tensor(case["logits"])[:, None]
    logprobs_BT = token_logprobs(logits_BTV, torch.tensor(case["tokens"])[:, None], **temperature)
    assert_close(logprobs_BT, [[x] for x in case["expected"]], torch.float32)


@kept_dtypes
@cases("kernels", "logprob_diff")
def test_logprob_diff(case: dict[str, Any], dtype: torch.dtype) -> None:
    sft_logits_NV = torch.tensor(case["sft_logits"], dtype=dtype)
    base_logits_NV = torch.tensor(case["base_logits"], dtype=dtype)
    diff_N = logprob_diff(sft_logits_NV, base_logits_NV, torch.tensor(case["tokens"]))
    assert_close(diff_N, case["expected"], summed(dtype))


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
        assert_close(actual, case["expected"], torch.float32)


# Advantages


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


# Losses


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
    assert_close(result.loss, expected["loss"], dtype)
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
    assert_close(result.loss, expected["loss"], dtype)
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
    assert_close(loss, expected["loss"], dtype)
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


# Reward


@kept_dtypes
@garbage
@cases("reward", "coherent_reward")
def test_coherent_reward(case: dict[str, Any], junk: list[float], dtype: torch.dtype) -> None:
    log_ratio_BT = pad(case["log_ratio"], case["width"], dtype, junk)
    reward_B = coherent_reward(log_ratio_BT, mask_of(case["log_ratio"], case["width"]))
    assert_close(reward_B, case["expected"], dtype)


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
