"""The log-prob kernels against fp64 of the same inputs, on hard inputs, bit by bit, and by what they allocate.

Expectations are plain torch.float64 written here. An error is allowed to be twice that of eager fp32 on the same
inputs, plus 1e-6 nats: never is anything compared with 16-bit arithmetic.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srppo.errors import ConfigError, DataError
from srppo.kernels import LogprobDiff, Logprobs, linear_logprob, linear_logprob_diff, logprob_diff, native

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
NAN, INF = math.nan, math.inf
OFFSET = 9984.0  # 39 * 256: about 1e4 and exact in bf16
ROWS = 70  # eager errors are taken over this many rows, so that the bar does not hang on one lucky row

# Interpreted, Triton takes the others' place: test_triton.py runs this file so, in a process of its own.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
impls = pytest.mark.parametrize("impl", ["triton"] if INTERPRETED else ["reference", "torch", "plain"], indirect=True)
fast = pytest.mark.parametrize("impl", ["triton"] if INTERPRETED else ["torch", "plain"], indirect=True)
compiled = pytest.mark.parametrize("impl", ["torch"], indirect=True)
dtypes = pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
dtype_pairs = pytest.mark.parametrize(  # of the hidden states and the weight
    "pair", [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32)], ids=["bf16", "fp16", "fp32", "mixed"]
)
TRANSFORMS = [
    {"temperature": temperature, "logit_scale": scale, "softcap": softcap}
    for temperature, scale, softcap in itertools.product((1.0, 0.7), (1.0, 0.25), (None, 4.0))
]
few = settings(
    deadline=None,
    derandomize=True,
    max_examples=30,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # impl is the same for every example
)


@pytest.fixture
def impl(request: pytest.FixtureRequest) -> Iterator[str]:
    """`plain` is impl="torch" as it runs where no C++ compiler is found."""
    if request.param != "plain":
        yield request.param
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(native.SWITCH, "0")
        native.load.cache_clear()
        yield "torch"
    native.load.cache_clear()


class Head(NamedTuple):
    """The first arguments of a linear operation."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None = None

    def raw(self, dtype: torch.dtype) -> Tensor:
        """Raw logits of the same inputs, all arithmetic in `dtype`."""
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        return F.linear(self.hidden_ND.to(dtype), self.weight_VD.to(dtype), bias_V)


class Logits(NamedTuple):
    """The same for logits that are given."""

    logits_NV: Tensor

    def raw(self, dtype: torch.dtype) -> Tensor:
        return self.logits_NV.to(dtype)


class Known(NamedTuple):
    """The same for raw logits that were computed before."""

    exact_NV: Tensor
    eager_NV: Tensor

    def raw(self, dtype: torch.dtype) -> Tensor:
        return self.exact_NV if dtype == FP64 else self.eager_NV


class Parts(NamedTuple):
    """Of one model: N each."""

    logprobs_N: Tensor
    lse_N: Tensor
    entropy_N: Tensor


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_head(
    rows: int, width: int, vocabulary: int, pair: tuple[torch.dtype, torch.dtype] = (FP32, FP32), *, seed: int = 0
) -> Head:
    """Raw logits of standard deviation 3, with a bias."""
    generator = rng(seed)
    hidden_ND = torch.randn(rows, width, generator=generator)
    weight_VD = torch.randn(vocabulary, width, generator=generator) * (3 / width**0.5)
    bias_V = torch.randn(vocabulary, generator=generator)
    return Head(hidden_ND.to(pair[0]), weight_VD.to(pair[1]), bias_V.to(pair[1]))


def make_tokens(rows: int, vocabulary: int) -> Tensor:
    """The last token, the first, the last but one, the last aligned one; then any."""
    tokens_N = torch.randint(vocabulary, (max(rows, 4),), generator=rng(rows * vocabulary))
    edges = [vocabulary - 1, 0, max(vocabulary - 2, 0), (vocabulary - 1) // 16 * 16]
    tokens_N[:4] = torch.tensor(edges)
    return tokens_N[:rows].clone()


def make_grid(rows: int, width: int, vocabulary: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states and a weight in steps of 1/16: every logit, OFFSET added or not, is exact in fp32 in any order."""
    shapes = ((rows, width), (vocabulary, width))
    hidden_ND, weight_VD = (torch.randint(-12, 13, shape, generator=rng(seed + i)) for i, shape in enumerate(shapes))
    return (hidden_ND / 16).to(dtype), (weight_VD / 16).to(dtype)


def softmax_parts(
    raw_NV: Tensor, tokens_N: Tensor, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Parts:
    """By definition, in the dtype of the raw logits; differentiable."""
    z_NV = raw_NV * logit_scale
    if softcap is not None:
        z_NV = softcap * torch.tanh(z_NV / softcap)
    z_NV = z_NV / temperature
    logp_NV = z_NV.log_softmax(-1)
    entropy_N = -(logp_NV.exp() * logp_NV.masked_fill(logp_NV == -INF, 0.0)).sum(-1)
    return Parts(logp_NV[torch.arange(len(tokens_N)), tokens_N], z_NV.logsumexp(-1), entropy_N)


def gap(actual: Tensor, exact: Tensor) -> float:
    """The largest difference of finite entries; NaN and infinities must be the same."""
    actual, exact = actual.detach().double(), exact.detach().double()
    finite = exact.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(), exact[~finite].nan_to_num()), (actual[~finite], exact[~finite])
    assert torch.equal(actual.isnan(), exact.isnan()), (actual, exact)
    difference = (actual - exact)[finite].abs()
    return float(difference.max()) if len(difference) else 0.0


def check(what: str, actual_N: Tensor, exact_N: Tensor, eager_N: Tensor, slack: float = 1e-6) -> None:
    """The bar. exact and eager may have more rows than the call had."""
    assert actual_N.dtype == FP32
    assert not actual_N.isnan().any() or exact_N.isnan().any(), what
    allowed, error = 2 * gap(eager_N, exact_N) + slack, gap(actual_N, exact_N[: len(actual_N)])
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"


def diff_parts(sft: Any, base: Any, tokens_N: Tensor, dtype: torch.dtype, **transform: Any) -> LogprobDiff:
    """Of anything with raw logits, in that dtype."""
    one, two = (softmax_parts(model.raw(dtype), tokens_N, **transform) for model in (sft, base))
    return LogprobDiff(one.logprobs_N - two.logprobs_N, one.logprobs_N, two.logprobs_N, one.lse_N, two.lse_N)


def check_diff(parts: LogprobDiff, sft: Any, base: Any, tokens_N: Tensor, what: str = "", **transform: Any) -> None:
    """Every part of a difference against fp64."""
    exact, eager = (diff_parts(sft, base, tokens_N, dtype, **transform) for dtype in (FP64, FP32))
    for name, got_N, want_N, fp32_N in zip(LogprobDiff._fields, parts, exact, eager, strict=True):
        slack = 1e-6
        if name.endswith("lse_N"):  # as large as the logits: two eps of that are its own
            slack += 2**-22 * max(want_N[want_N.isfinite()].abs().tolist(), default=0.0)
        check(f"{name} {what}", got_N, want_N, fp32_N, slack)
        assert "logprobs" not in name or not (got_N > 0).any(), f"{name} {what}: positive"


def check_one(result: Logprobs, head: Head, tokens_N: Tensor, what: str = "", **transform: Any) -> None:
    exact, eager = (softmax_parts(head.raw(dtype), tokens_N, **transform) for dtype in (FP64, FP32))
    check(f"log-prob {what}", result.logprobs_N, exact.logprobs_N, eager.logprobs_N)
    assert not (result.logprobs_N > 0).any(), f"log-prob {what}: positive"
    if result.entropy_N is not None:
        check(f"entropy {what}", result.entropy_N, exact.entropy_N, eager.entropy_N)


def diff_of(sft: Head, base: Head, tokens_N: Tensor, impl: Any, **options: Any) -> LogprobDiff:
    """linear_logprob_diff with all its parts; the plain result must be their first."""
    arguments = (sft.hidden_ND, sft.weight_VD, base.hidden_ND, base.weight_VD, tokens_N)
    options |= {"sft_bias_V": sft.bias_V, "base_bias_V": base.bias_V, "impl": impl}
    parts = linear_logprob_diff(*arguments, **options, with_parts=True)
    assert len(tokens_N) > 100 or same_bits(linear_logprob_diff(*arguments, **options), parts.diff_N)
    return parts


def one_of(head: Head, tokens_N: Tensor, impl: Any, **options: Any) -> Logprobs:
    """linear_logprob with the entropy."""
    hidden_ND, weight_VD, bias_V = head
    return linear_logprob(hidden_ND, weight_VD, tokens_N, bias_V=bias_V, with_entropy=True, impl=impl, **options)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


# Accuracy


@impls
@dtype_pairs
@pytest.mark.parametrize("vocabulary", [1, 17, 1000, 4099])
def test_linear_operations_are_as_accurate_as_fp32(
    impl: Any, pair: tuple[torch.dtype, torch.dtype], vocabulary: int
) -> None:
    tokens_N = make_tokens(ROWS, vocabulary)
    for width, counts in ((1, (5,)), (3, (ROWS,)), (64, (1, ROWS)), (257, (1, 5, ROWS))):
        sft, base = (make_head(ROWS, width, vocabulary, pair, seed=seed) for seed in (1, 2))
        base = base._replace(bias_V=None)
        for rows in counts:
            what = f"at N = {rows}, D = {width}, V = {vocabulary}"
            first, second = (head._replace(hidden_ND=head.hidden_ND[:rows]) for head in (sft, base))
            check_diff(diff_of(first, second, tokens_N[:rows], impl), sft, base, tokens_N, what)
            check_one(one_of(first, tokens_N[:rows], impl), sft, tokens_N, what)


@impls
@pytest.mark.parametrize(
    "pair", [(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32)], ids=["bf16", "fp16", "fp32", "mixed"]
)
@pytest.mark.parametrize("vocabulary", [1, 17, 1000, 4099])
def test_logprob_diff_is_as_accurate_as_fp32(impl: Any, pair: tuple[torch.dtype, torch.dtype], vocabulary: int) -> None:
    tokens_N = make_tokens(ROWS, vocabulary)
    logits = [3 * torch.randn(ROWS, vocabulary, generator=rng(seed)) for seed in (1, 2)]
    sft, base = (Logits(x_NV.to(dtype)) for x_NV, dtype in zip(logits, pair, strict=True))
    for rows in (1, 5, ROWS):
        arguments = (sft.logits_NV[:rows], base.logits_NV[:rows], tokens_N[:rows])
        parts = logprob_diff(*arguments, impl=impl, with_parts=True)
        check_diff(parts, sft, base, tokens_N, f"at N = {rows}, V = {vocabulary}")
        assert same_bits(logprob_diff(*arguments, impl=impl), parts.diff_N)


@functools.lru_cache(maxsize=1)
def real_heads(dtype: torch.dtype) -> tuple[Head, Head, Known, Known]:
    """Two models with one head, and their raw logits."""
    sft = make_head(32, 1024, 32000, (dtype, dtype))._replace(bias_V=None)
    base = sft._replace(hidden_ND=make_head(32, 1024, 1, (dtype, dtype), seed=9).hidden_ND * 0.1 + sft.hidden_ND)
    known = [Known(head.raw(FP64), head.raw(FP32)) for head in (sft, base)]
    return sft, base, *known


@impls
@dtypes
def test_a_head_of_real_size_has_fp32_accuracy(impl: Any, dtype: torch.dtype) -> None:
    """By the root mean square over rows, the measure of the bar of 2e-5; 16-bit logits would be off by 2e-2."""
    sft, base, *known = real_heads(dtype)
    tokens_N = make_tokens(32, 32000)
    actual = diff_of(sft, base, tokens_N, impl)
    exact, eager = (diff_parts(*known, tokens_N, dtype) for dtype in (FP64, FP32))
    for name, got_N, want_N, fp32_N in zip(LogprobDiff._fields, actual, exact, eager, strict=True):
        error, bar = (float((x_N.double() - want_N).square().mean().sqrt()) for x_N in (got_N, fp32_N))
        assert error <= min(2 * bar + 1e-6, 2e-5), f"{name}: {error:.2e}, eager fp32 {bar:.2e}"


@impls
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: "-".join(map(str, t.values())))
def test_transforms_in_all_combinations(impl: Any, transform: dict[str, Any]) -> None:
    tokens_N = make_tokens(ROWS, 300)
    for pair in ((BF16, BF16), (FP32, FP32)):
        sft, base = (make_head(ROWS, 24, 300, pair, seed=seed) for seed in (3, 4))
        check_diff(diff_of(sft, base, tokens_N, impl, **transform), sft, base, tokens_N, **transform)
        check_one(one_of(sft, tokens_N, impl, **transform), sft, tokens_N, **transform)
        logits = [Logits(head.raw(FP32).to(pair[0])) for head in (sft, base)]
        parts = logprob_diff(*(x.logits_NV for x in logits), tokens_N, impl=impl, with_parts=True, **transform)
        check_diff(parts, *logits, tokens_N, **transform)


@impls
def test_fp64_stays_fp64(impl: Any) -> None:
    sft, base = (make_head(ROWS, 24, 300, (FP64, FP64), seed=seed) for seed in (3, 4))
    tokens_N, transform = make_tokens(ROWS, 300), {"temperature": 0.7, "softcap": 4.0}
    exact = [softmax_parts(head.raw(FP64), tokens_N, **transform) for head in (sft, base)]
    parts, one = diff_of(sft, base, tokens_N, impl, **transform), one_of(sft, tokens_N, impl, **transform)
    logits = [head.raw(FP64) for head in (sft, base)]
    for actual_N, exact_N in (
        (parts.diff_N, exact[0].logprobs_N - exact[1].logprobs_N),
        (parts.base_lse_N, exact[1].lse_N),
        (one.logprobs_N, exact[0].logprobs_N),
        (one.entropy_N, exact[0].entropy_N),
        (logprob_diff(*logits, tokens_N, impl=impl, **transform), exact[0].logprobs_N - exact[1].logprobs_N),
    ):
        assert actual_N.dtype == FP64
        assert gap(actual_N, exact_N) <= 1e-13


@impls
def test_two_widths(impl: Any) -> None:
    sft, base = make_head(ROWS, 24, 1000, (BF16, BF16), seed=1), make_head(ROWS, 65, 1000, (FP32, FP32), seed=2)
    tokens_N = make_tokens(ROWS, 1000)
    check_diff(diff_of(sft, base, tokens_N, impl), sft, base, tokens_N)


@impls
@dtype_pairs
def test_a_shared_head_equals_two_copies(impl: Any, pair: tuple[torch.dtype, torch.dtype]) -> None:
    sft = make_head(ROWS, 64, 1000, pair)
    base = sft._replace(hidden_ND=make_head(ROWS, 64, 1, pair, seed=5).hidden_ND)
    copy = Head(base.hidden_ND, sft.weight_VD.clone(), sft.bias_V.clone())
    tokens_N = make_tokens(ROWS, 1000)
    for options in ({}, {"vocabulary": 900, "temperature": 0.7}):
        tokens_N = tokens_N.clamp(max=options.get("vocabulary", 1000) - 1)
        shared, two = (diff_of(sft, other, tokens_N, impl, **options) for other in (base, copy))
        assert all(same_bits(*each) for each in zip(shared, two, strict=True))
    other = copy._replace(
        bias_V=copy.bias_V + torch.randn(1000, generator=rng(6)).to(pair[1])
    )  # one weight, two biases
    for second in (other._replace(weight_VD=sft.weight_VD), other):
        check_diff(diff_of(sft, second, tokens_N, impl), sft, second, tokens_N)


# Hard inputs


@impls
@dtypes
def test_offsets_of_1e4_in_one_model(impl: Any, dtype: torch.dtype) -> None:
    """Logits are exact in fp32, so only the softmax errs: target - logsumexp would lose 4e-4, half an ulp at 1e4."""
    rows, vocabulary = ROWS, 1000
    hidden_ND, weight_VD = make_grid(rows, 8, vocabulary, dtype, seed=1)
    offsets_N1 = torch.tensor([OFFSET, -OFFSET, 0.0])[torch.arange(rows) % 3][:, None]
    sft = Head(torch.cat([hidden_ND, offsets_N1.to(dtype)], 1), F.pad(weight_VD, (0, 1), value=1.0))
    base = Head(*make_grid(rows, 8, vocabulary, dtype, seed=3))
    tokens_N = make_tokens(rows, vocabulary)
    exact = [softmax_parts(head.raw(FP64), tokens_N) for head in (sft, base)]
    both = [head.raw(FP32) for head in (sft, base)]
    assert torch.equal(both[0].double(), sft.raw(FP64))
    for parts in (diff_of(sft, base, tokens_N, impl), logprob_diff(*both, tokens_N, with_parts=True, impl=impl)):
        assert gap(parts.diff_N, exact[0].logprobs_N - exact[1].logprobs_N) <= 2e-6
        assert gap(parts.sft_logprobs_N, exact[0].logprobs_N) <= 2e-6
        assert gap(parts.sft_lse_N, exact[0].lse_N) <= 6e-4  # one rounding at 1e4
    one = one_of(sft, tokens_N, impl)
    assert gap(one.logprobs_N, exact[0].logprobs_N) <= 2e-6
    assert gap(one.entropy_N, exact[0].entropy_N) <= 4e-6


@impls
@dtypes
def test_one_logit_1e4_above(impl: Any, dtype: torch.dtype) -> None:
    """Every token but the peak has a log-prob of about -1e4, the peak 0, and the entropy is 0."""
    vocabulary = 1000
    hidden_ND, weight_VD = make_grid(ROWS, 8, vocabulary, dtype, seed=1)
    peaks = [(0, OFFSET), (517, OFFSET), (vocabulary - 1, OFFSET), (3, -OFFSET)]
    base = Head(*make_grid(ROWS, 8, vocabulary, dtype, seed=3))
    for peak, height in peaks:
        bias_V = torch.zeros(vocabulary, dtype=dtype)
        bias_V[peak] = height
        sft = Head(hidden_ND, weight_VD, bias_V)
        tokens_N = make_tokens(ROWS, vocabulary)
        tokens_N[::2] = peak
        check_diff(diff_of(sft, base, tokens_N, impl), sft, base, tokens_N, f"peak at {peak}")
        one = one_of(sft, tokens_N, impl)
        check_one(one, sft, tokens_N, f"peak at {peak}")
        logits = [Logits(head.raw(FP32)) for head in (sft, base)]
        parts = logprob_diff(*(x.logits_NV for x in logits), tokens_N, with_parts=True, impl=impl)
        check_diff(parts, *logits, tokens_N, f"logits, peak at {peak}")
        if height > 0:
            assert torch.equal(one.logprobs_N[::2], torch.zeros(ROWS // 2))
            assert not one.entropy_N.any()


@impls
@dtypes
@pytest.mark.parametrize("block", [1, 15, 16, 600, 4098], ids=lambda b: f"block{b}")
def test_leading_blocks_of_minus_infinity(impl: Any, dtype: torch.dtype, block: int) -> None:
    """Whole vocabulary blocks of probability 0 before the first finite logit, and the same at the end."""
    vocabulary = 4099
    sft, base = (make_head(ROWS, 16, vocabulary, (dtype, dtype), seed=seed) for seed in (1, 2))
    for blocked in (slice(0, block), slice(vocabulary - block, vocabulary)):
        bias_V = sft.bias_V.clone()
        bias_V[blocked] = -INF
        masked = sft._replace(bias_V=bias_V)
        tokens_N = bias_V.isfinite().nonzero().squeeze(1)[make_tokens(ROWS, vocabulary - block)]
        tokens_N[3::7] = blocked.start  # a target of probability 0: log-prob -inf, difference -inf
        parts = diff_of(masked, base, tokens_N, impl)
        check_diff(parts, masked, base, tokens_N)
        assert (parts.diff_N[3::7] == -INF).all()
        assert (diff_of(base, masked, tokens_N, impl).diff_N[3::7] == INF).all()
        assert diff_of(masked, masked, tokens_N, impl).diff_N[3::7].isnan().all()  # -inf - -inf
        check_one(one_of(masked, tokens_N, impl), masked, tokens_N)
        logits = [Logits(head.raw(FP32).to(dtype)) for head in (masked, base)]
        check_diff(
            logprob_diff(*(x.logits_NV for x in logits), tokens_N, with_parts=True, impl=impl), *logits, tokens_N
        )


@impls
@dtypes
@pytest.mark.parametrize("poison", [-INF, INF, NAN], ids=["all -inf", "all inf", "nan"])
def test_rows_without_a_softmax_are_nan_and_alone(impl: Any, dtype: torch.dtype, poison: float) -> None:
    """As log_softmax in fp64 gives, whatever a maximum makes of NaN; the rows around them are as without them."""
    bad, rows, vocabulary = [0, 6, 7, 40], 41, 1000
    good = [row for row in range(rows) if row not in bad]
    tokens_N = make_tokens(rows, vocabulary)
    logits = [(3 * torch.randn(rows, vocabulary, generator=rng(seed))).to(dtype) for seed in (1, 2)]
    poisoned_NV = logits[0].clone()
    poisoned_NV[bad] = poison
    generator = rng(3)
    hidden_ND = torch.randn(rows, 1, generator=generator).to(dtype)
    weight_VD = torch.rand(vocabulary, 1, generator=generator).to(dtype) + 1  # positive: the row's logits are all +-inf
    poisoned_ND = hidden_ND.clone()
    poisoned_ND[bad] = poison
    for sft_NV in (poisoned_NV, poisoned_NV.clone().index_fill(1, torch.tensor([5, 999]), 0.0)):
        if sft_NV is not poisoned_NV:
            if poison == -INF:
                continue  # two finite logits make a softmax
            sft_NV[bad, 998] = poison
        parts = logprob_diff(sft_NV, logits[1], tokens_N, with_parts=True, impl=impl)
        assert parts.diff_N[bad].isnan().all()
        assert parts.sft_logprobs_N[bad].isnan().all()
        assert parts.base_logprobs_N.isfinite().all()
        clean = LogprobDiff(*(part_N[good] for part_N in parts))
        check_diff(clean, Logits(sft_NV[good]), Logits(logits[1][good]), tokens_N[good])
    for poisoned, other in ((0, 1), (1, 0)):
        heads = [Head(poisoned_ND, weight_VD), Head(hidden_ND, weight_VD.flip(0))]
        parts = diff_of(heads[poisoned], heads[other], tokens_N, impl)
        assert parts.diff_N[bad].isnan().all()
        clean = LogprobDiff(*(part_N[good] for part_N in parts))
        whole = [head._replace(hidden_ND=hidden_ND[good]) for head in (heads[poisoned], heads[other])]
        check_diff(clean, *whole, tokens_N[good])
    one = one_of(heads[0], tokens_N, impl)
    assert one.logprobs_N[bad].isnan().all()
    assert one.entropy_N[bad].isnan().all()
    check_one(Logprobs(*(x_N[good] for x_N in one)), Head(hidden_ND[good], weight_VD), tokens_N[good])


# What may be given


class Calls(NamedTuple):
    """One small problem, and each operation on it with any argument replaced."""

    impl: Any

    def logits(self, **changes: Any) -> Any:
        return self.call(logprob_diff, changes, sft=torch.zeros(3, 5), base=torch.zeros(3, 5))

    def pair(self, **changes: Any) -> Any:
        heads = {"hidden": torch.zeros(3, 2), "weight": torch.zeros(5, 2)}
        heads |= {"base_hidden": torch.zeros(3, 4), "base_weight": torch.zeros(5, 4)}
        return self.call(linear_logprob_diff, changes, **heads)

    def one(self, **changes: Any) -> Any:
        return self.call(linear_logprob, changes, hidden=torch.zeros(3, 2), weight=torch.zeros(5, 2))

    def call(self, operation: Callable[..., Any], changes: dict[str, Any], **tensors: Tensor) -> Any:
        tensors["tokens"] = torch.tensor([0, 4, 2])
        options = {"impl": self.impl} | {name: value for name, value in changes.items() if name not in tensors}
        return operation(*(changes.get(name, x) for name, x in tensors.items()), **options)


OPERATIONS = ("logits", "pair", "one")


@impls
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("bad", [-1, -99, -101, 5, 6, 2**31, 2**40])
def test_tokens_out_of_range_are_named(impl: Any, operation: str, bad: int) -> None:
    call = getattr(Calls(impl), operation)
    for tokens_N in (torch.tensor([0, bad, 2]), torch.tensor([-100, bad, bad])):
        with pytest.raises(DataError) as error:
            call(tokens=tokens_N)
        message = str(error.value)
        assert str(bad) in message and "0..4" in message and "-100" in message and "\n" not in message
    with pytest.raises(DataError, match=r"3.*0\.\.2"):
        call(tokens=torch.tensor([0, 3, 2]), vocabulary=3)
    with pytest.raises(DataError, match="-100"):  # not the ignore_index of this call
        call(tokens=torch.tensor([0, -100, 2]), ignore_index=-1)
    call(tokens=torch.tensor([0, -1, 2]), ignore_index=-1)


@impls
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    "changes",
    [
        {"impl": "cuda"},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"temperature": NAN},
        {"temperature": INF},
        {"logit_scale": 0.0},
        {"softcap": -30.0},
        {"softcap": 0.0},
        {"vocabulary": 0},
        {"vocabulary": 6},
        {"tokens": torch.tensor([0, 4])},
        {"tokens": torch.tensor([[0], [4], [2]])},
        {"tokens": torch.tensor([0, 4, 2], dtype=torch.int32)},
        {"tokens": torch.tensor([0.0, 4.0, 2.0])},
    ],
    ids=lambda c: "-".join(f"{k}={v.tolist() if isinstance(v, Tensor) else v}" for k, v in c.items()),
)
def test_impossible_arguments(impl: Any, operation: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        getattr(Calls(impl), operation)(**changes)
    assert "\n" not in str(error.value)
    assert next(iter(changes)) in str(error.value)


@impls
@pytest.mark.parametrize(
    ("operation", "changes"),
    [
        ("logits", {"sft": torch.zeros(3, 6)}),
        ("logits", {"base": torch.zeros(4, 5)}),
        ("logits", {"sft": torch.zeros(1, 3, 5), "base": torch.zeros(1, 3, 5)}),
        ("logits", {"sft": torch.zeros(3, 5, dtype=torch.int64)}),
        ("logits", {"base": torch.zeros(3, 5).to(torch.float8_e4m3fn)}),
        ("logits", {"base": torch.zeros(3, 5, device="meta")}),
        ("pair", {"weight": torch.zeros(6, 2)}),
        ("pair", {"base_hidden": torch.zeros(2, 4)}),
        ("pair", {"base_hidden": torch.zeros(3, 5)}),
        ("pair", {"hidden": torch.zeros(3, 2, 1)}),
        ("pair", {"sft_bias_V": torch.zeros(4)}),
        ("pair", {"base_bias_V": torch.zeros(5, 1)}),
        ("pair", {"base_weight": torch.zeros(5, 4, dtype=torch.int8)}),
        ("pair", {"base_weight": torch.zeros(5, 4, device="meta")}),
        ("one", {"hidden": torch.zeros(3, 3)}),
        ("one", {"hidden": torch.zeros(2)}),
        ("one", {"weight": torch.zeros(10)}),
        ("one", {"bias_V": torch.zeros(6)}),
        ("one", {"hidden": torch.zeros(3, 2).to(torch.float8_e4m3fn)}),
        ("one", {"weight": torch.zeros(5, 2, dtype=torch.int64)}),
        ("one", {"bias_V": torch.zeros(5, dtype=torch.int64)}),
        ("one", {"hidden": torch.zeros(3, 2, dtype=torch.complex64)}),
        ("one", {"bias_V": torch.zeros(5, device="meta")}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(f"{k}{[*v.shape]}{v.dtype}" for k, v in x.items()),
)
def test_tensors_that_do_not_fit(impl: Any, operation: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as error:
        getattr(Calls(impl), operation)(**changes)
    assert "\n" not in str(error.value)


def test_triton_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for operation in OPERATIONS:
        with pytest.raises(ConfigError, match="triton"):
            getattr(Calls("triton"), operation)()


def test_auto_is_torch_on_a_cpu() -> None:
    sft, base = (make_head(ROWS, 24, 1000, (BF16, BF16), seed=seed) for seed in (1, 2))
    tokens_N = make_tokens(ROWS, 1000)
    logits = [head.raw(BF16) for head in (sft, base)]
    for results in (
        [diff_of(sft, base, tokens_N, impl) for impl in ("auto", "torch")],
        [one_of(sft, tokens_N, impl) for impl in ("auto", "torch")],
        [logprob_diff(*logits, tokens_N, impl=impl, with_parts=True) for impl in ("auto", "torch")],
    ):
        assert all(same_bits(*each) for each in zip(*results, strict=True))


@impls
@pytest.mark.parametrize("junk", [NAN, INF, -INF, 1e4])
@pytest.mark.parametrize("vocabulary", [1, 1000, 1015, 1024])
def test_padding_has_no_share(impl: Any, junk: float, vocabulary: int) -> None:
    """Columns or rows from `vocabulary` on, whatever they hold; with softcap too, which would lift -inf."""
    columns = 1030
    transform = {"softcap": 5.0, "temperature": 0.7}
    tokens_N = make_tokens(ROWS, vocabulary)
    clean = [make_head(ROWS, 24, vocabulary, (BF16, BF16), seed=seed) for seed in (1, 2)]
    padded = []
    for head in clean:
        weight_VD, bias_V = torch.full((columns, 24), junk, dtype=BF16), torch.full((columns,), junk, dtype=BF16)
        weight_VD[:vocabulary], bias_V[:vocabulary] = head.weight_VD, head.bias_V
        padded.append(Head(head.hidden_ND, weight_VD, bias_V))
    options = {"vocabulary": vocabulary, "impl": impl, **transform}
    check_diff(diff_of(*padded, tokens_N, **options), *clean, tokens_N, **transform)
    leaf = padded[0]._replace(weight_VD=padded[0].weight_VD.requires_grad_(), bias_V=padded[0].bias_V.requires_grad_())
    one = one_of(leaf, tokens_N, **options)
    check_one(one, clean[0], tokens_N, **transform)
    one.logprobs_N.sum().backward()
    for grad in (leaf.weight_VD.grad, leaf.bias_V.grad):
        assert len(grad) == columns and not grad[vocabulary:].any()
        assert vocabulary == 1 or (grad[:vocabulary].isfinite().all() and grad[:vocabulary].any())
    logits = [Logits(head.raw(FP32)) for head in clean]
    full = [F.pad(x.logits_NV, (0, columns - vocabulary), value=junk) for x in logits]
    check_diff(logprob_diff(*full, tokens_N, with_parts=True, **options), *logits, tokens_N, **transform)


@impls
@dtypes
def test_strided_inputs(impl: Any, dtype: torch.dtype) -> None:
    """Slices of wider matrices, transposes, every other row and expanded rows, in values and in gradients."""
    generator = rng(1)
    rows, width, vocabulary = 40, 24, 301
    wide = torch.randn(2 * rows, 2 * width + 3, generator=generator).to(dtype)
    tall = (torch.randn(2 * vocabulary, width + 5, generator=generator) / 2).to(dtype)
    hiddens = {
        "slice": wide[:rows, 3 : 3 + width],
        "other rows": wide[::2, :width],
        "other columns": wide[:rows, : 2 * width : 2],
        "transposed": wide[:, :rows][:width].t(),
        "expanded": wide[:1, :width].expand(rows, width),
    }
    weights = {
        "slice": tall[7 : 7 + vocabulary, 5:],
        "other rows": tall[::2, :width][:vocabulary],
        "transposed": (torch.randn(width, vocabulary, generator=generator) / 2).to(dtype).t(),
    }
    bias_V = torch.randn(3 * vocabulary, generator=generator).to(dtype)[::3]
    tokens_N = make_tokens(2 * rows, vocabulary)[::2]
    upstreams = [torch.randn(2 * rows, generator=generator)[::2], torch.randn(1, generator=generator).expand(rows)]
    for (name, hidden_ND), (kind, weight_VD) in itertools.product(hiddens.items(), weights.items()):
        assert (hidden_ND.shape, weight_VD.shape) == ((rows, width), (vocabulary, width))
        what, head, base = f"{name}, {kind}", Head(hidden_ND, weight_VD, bias_V), Head(wide[rows:, :width], weight_VD)
        check_diff(diff_of(head, base, tokens_N, impl), head, base, tokens_N, what)
        check_one(one_of(head, tokens_N, impl), head, tokens_N, what)
        for upstream_N in upstreams:
            check_grads(grads_of(head, tokens_N, upstream_N, impl), head, tokens_N, upstream_N)
    logits = torch.randn(2 * vocabulary, 2 * rows, generator=generator).to(dtype)
    shapes = {
        "transposed": logits[:vocabulary, :rows].t(),
        "slice": logits.t()[:rows, vocabulary:].contiguous().t().contiguous().t(),
        "wide": logits.reshape(2 * rows, -1)[rows:, 5 : 5 + vocabulary],
        "other columns": logits.reshape(2 * rows, -1)[:rows, ::2],
        "expanded": logits.reshape(2 * rows, -1)[:1, :vocabulary].expand(rows, vocabulary),
    }
    for (name, sft_NV), (kind, base_NV) in itertools.product(shapes.items(), repeat=2):
        parts = logprob_diff(sft_NV, base_NV, tokens_N, with_parts=True, impl=impl)
        check_diff(parts, Logits(sft_NV), Logits(base_NV), tokens_N, f"{name}, {kind}")


@impls
@dtypes
@pytest.mark.parametrize("ignored", [False, True], ids=["no rows", "all ignored"])
def test_no_rows(impl: Any, dtype: torch.dtype, ignored: bool) -> None:
    rows = 3 if ignored else 0
    tokens_N = torch.full((rows,), -100)
    head = Head(*(x.requires_grad_() for x in make_head(rows, 4, 33, (dtype, dtype))))
    logits_NV = torch.randn(rows, 33).to(dtype)
    one = one_of(head, tokens_N, impl)
    for results in (
        diff_of(head, head, tokens_N, impl),
        one,
        logprob_diff(logits_NV, logits_NV, tokens_N, with_parts=True, impl=impl),
    ):
        assert all(same_bits(part_N, torch.zeros(rows)) for part_N in results)
    one.logprobs_N.sum().backward()
    for x in head:
        assert x.grad is None or same_bits(x.grad, torch.zeros_like(x))
    assert head.weight_VD.grad is not None


@impls
@dtypes
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7])
def test_ignored_rows_give_0(impl: Any, dtype: torch.dtype, ignore_index: int) -> None:
    """Any id may stand for "ignored", one of the vocabulary too; what such a row holds reaches nothing."""
    rows, vocabulary = 41, 301
    sft, base = (make_head(rows, 24, vocabulary, (dtype, dtype), seed=seed) for seed in (1, 2))
    tokens_N = make_tokens(rows, vocabulary)
    tokens_N[tokens_N == ignore_index] += 1
    out_N = torch.zeros(rows, dtype=torch.bool)
    out_N[[0, 5, 6, 7, 30, 40]] = True
    tokens_N[out_N] = ignore_index
    logits = [head.raw(FP32).to(dtype) for head in (sft, base)]
    for x, bad in ((sft.hidden_ND, NAN), (base.hidden_ND, INF), (logits[0], NAN), (logits[1], -INF)):
        x[out_N] = bad
    options = {"ignore_index": ignore_index, "impl": impl}
    leaves = Head(*(x.requires_grad_() for x in sft))
    one = one_of(leaves, tokens_N, **options)
    parts, given = diff_of(sft, base, tokens_N, **options), logprob_diff(*logits, tokens_N, with_parts=True, **options)
    for part_N in (*parts, *given, *one):
        assert torch.equal(part_N[out_N], torch.zeros(6))
    one.logprobs_N.sum().backward()
    kept = [head._replace(hidden_ND=head.hidden_ND.detach()[~out_N]) for head in (sft, base)]
    check_diff(LogprobDiff(*(x_N[~out_N] for x_N in parts)), *kept, tokens_N[~out_N])
    check_diff(
        LogprobDiff(*(x_N[~out_N] for x_N in given)), *(Logits(x_NV[~out_N]) for x_NV in logits), tokens_N[~out_N]
    )
    check_one(Logprobs(*(x_N[~out_N] for x_N in one)), kept[0], tokens_N[~out_N])
    assert not leaves.hidden_ND.grad[out_N].any()
    check_grads([x.grad for x in leaves], sft, tokens_N, torch.ones(rows), ~out_N)


@fast
def test_more_than_2_to_the_31_elements_by_stride(impl: Any) -> None:
    """Two rows 2^31 elements apart: 4 GB of addresses, of which only the two rows are ever touched."""
    vocabulary, stride = 1000, 2**31
    logits_NV = torch.empty(stride + vocabulary, dtype=BF16).as_strided((2, vocabulary), (stride, 1))
    logits_NV[:] = torch.randn(2, vocabulary, generator=rng(1))
    base_NV, tokens_N = torch.randn(2, vocabulary, generator=rng(2)), torch.tensor([0, 999])
    parts = logprob_diff(logits_NV, base_NV, tokens_N, with_parts=True, impl=impl)
    check_diff(parts, Logits(logits_NV), Logits(base_NV), tokens_N)
    head = Head(logits_NV[:, :64], make_head(1, 64, 301, (BF16, BF16)).weight_VD)
    tokens_N = torch.tensor([0, 300])
    check_one(one_of(head, tokens_N, impl), head, tokens_N)


@compiled
def test_more_than_2_to_the_31_logits(impl: Any) -> None:
    rows, vocabulary = 33000, 70000
    assert rows * vocabulary > 2**31
    head = make_head(rows, 2, vocabulary)
    tokens_N = torch.randint(vocabulary, (rows,), generator=rng(1))
    result = linear_logprob(head.hidden_ND, head.weight_VD, tokens_N, bias_V=head.bias_V, impl=impl)
    some = torch.tensor([0, 1, 30677, 30678, 30679, 32768, rows - 1])  # 2^31 lies in row 30678
    check_one(Logprobs(result.logprobs_N[some], None), head._replace(hidden_ND=head.hidden_ND[some]), tokens_N[some])
    assert (result.logprobs_N < 0).all()


# Bits


def bits_of(sft: Head, base: Head, logits: list[Tensor], tokens_N: Tensor, impl: Any) -> list[Tensor]:
    """Every N-sized result of the three operations."""
    options = {"impl": impl, "temperature": 0.9}
    return [
        *diff_of(sft, base, tokens_N, **options),
        *diff_of(sft, sft._replace(hidden_ND=base.hidden_ND), tokens_N, **options),  # one head
        *one_of(sft, tokens_N, **options),
        *logprob_diff(*logits, tokens_N, with_parts=True, **options),
    ]


@fast
@dtype_pairs
@pytest.mark.parametrize(("width", "vocabulary"), [(64, 1000), (1, 33), (3, 17), (257, 4099), (1024, 515)])
def test_a_row_has_the_same_bits_in_every_batch(
    impl: Any, pair: tuple[torch.dtype, torch.dtype], width: int, vocabulary: int
) -> None:
    sft, base = (make_head(512, width, vocabulary, pair, seed=seed) for seed in (1, 2))
    logits, tokens_N = [head.raw(FP32).to(pair[0]) for head in (sft, base)], make_tokens(512, vocabulary)
    before = [x.clone() for x in (*sft, *base, *logits, tokens_N)]
    whole = bits_of(sft, base, logits, tokens_N, impl)
    assert all(map(torch.equal, (*sft, *base, *logits, tokens_N), before))  # no input is written to
    order = torch.randperm(512, generator=rng(3))
    batches = [torch.arange(512), order, *(order[:rows] for rows in (1, 2, 7, 15, 16, 17)), torch.arange(495, 512)]
    for picked in batches:
        heads = [head._replace(hidden_ND=head.hidden_ND[picked]) for head in (sft, base)]
        again = bits_of(*heads, [x_NV[picked] for x_NV in logits], tokens_N[picked], impl)
        for i, (row_bits, all_bits) in enumerate(zip(again, whole, strict=True)):
            assert same_bits(row_bits, all_bits[picked]), f"result {i} at N = {len(picked)}"


@fast
@dtype_pairs
def test_bits_do_not_depend_on_threads(impl: Any, pair: tuple[torch.dtype, torch.dtype]) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            bits = []
            for rows, width, vocabulary in ((1, 64, 4099), (70, 257, 4099), (300, 1024, 515)):
                sft, base = (make_head(rows, width, vocabulary, pair, seed=seed) for seed in (1, 2))
                logits = [x_NV.to(pair[0]) for x_NV in torch.randn(2, rows, vocabulary, generator=rng(3))]
                bits += bits_of(sft, base, logits, make_tokens(rows, vocabulary), impl)
            results.append(bits)
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(*each) for each in zip(results[0], results[1], strict=True)), "two threads"
    assert all(same_bits(*each) for each in zip(results[0], results[2], strict=True)), "the same call again"


@fast
@dtype_pairs
def test_gradients_are_repeatable(impl: Any, pair: tuple[torch.dtype, torch.dtype]) -> None:
    head, tokens_N = make_head(300, 65, 1030, pair), make_tokens(300, 1030)
    upstream_N = torch.randn(300, generator=rng(1))
    first, second = (grads_of(head, tokens_N, upstream_N, impl) for _ in range(2))
    assert all(map(same_bits, first, second))


@impls
@dtype_pairs
def test_autocast_and_global_precision_are_left_alone(impl: Any, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Nothing is rounded under autocast; oneDNN's mode for fp32 matrices is as before, also after an error."""

    def modes() -> tuple[str, ...]:
        return torch.get_float32_matmul_precision(), torch.backends.mkldnn.matmul.fp32_precision

    before = modes()
    sft, base = (make_head(ROWS, 64, 1000, pair, seed=seed) for seed in (1, 2))
    tokens_N, upstream_N = make_tokens(ROWS, 1000), torch.randn(ROWS, generator=rng(3))
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=BF16, enabled=enabled):
            results.append([*diff_of(sft, base, tokens_N, impl), *one_of(sft, tokens_N, impl)])
            if impl != "reference":  # whose backward pass is autograd's own
                results[-1] += grads_of(sft, tokens_N, upstream_N, impl)
        assert modes() == before
    assert all(map(same_bits, *results))


# Properties


class Problem(NamedTuple):
    sft: Head
    base: Head
    tokens_N: Tensor


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rows, seed = draw(st.integers(1, 20)), draw(st.integers(0, 2**32 - 1))
    width, vocabulary = draw(st.sampled_from([1, 2, 5, 16, 33])), draw(st.sampled_from([1, 2, 5, 16, 33, 300]))
    pair = draw(st.sampled_from([(BF16, BF16), (FP16, FP16), (FP32, FP32), (BF16, FP32)]))
    sft, base = (make_head(rows, width, vocabulary, pair, seed=seed + i) for i in range(2))
    if draw(st.booleans()):
        base = base._replace(bias_V=None)
    return Problem(sft, base, torch.randint(vocabulary, (rows,), generator=rng(seed)))


@impls
@few
@given(problem=problems())
def test_a_model_differs_from_itself_by_0(impl: Any, problem: Problem) -> None:
    sft, _, tokens_N = problem
    for other in (sft, Head(*(x.clone() for x in sft))):
        assert torch.equal(diff_of(sft, other, tokens_N, impl).diff_N, torch.zeros(len(tokens_N)))
    logits_NV = sft.raw(FP32).to(sft.hidden_ND.dtype)
    assert not logprob_diff(logits_NV, logits_NV.clone(), tokens_N, impl=impl).any()


@impls
@few
@given(problem=problems(), offset=st.sampled_from([0.0, 37.5, -OFFSET]))
def test_differences_are_antisymmetric(impl: Any, problem: Problem, offset: float) -> None:
    sft, base, tokens_N = problem
    sft = sft._replace(bias_V=sft.bias_V + offset)
    forth, back = diff_of(sft, base, tokens_N, impl), diff_of(base, sft, tokens_N, impl)
    swapped = (-back.diff_N, back.base_logprobs_N, back.sft_logprobs_N, back.base_lse_N, back.sft_lse_N)
    assert all(map(torch.equal, forth, swapped))
    logits = [head.raw(FP32) for head in (sft, base)]
    assert torch.equal(
        logprob_diff(*logits, tokens_N, impl=impl), -logprob_diff(*reversed(logits), tokens_N, impl=impl)
    )


@fast
@few
@given(problem=problems(), junk=st.sampled_from([NAN, INF, -INF, 0.0, OFFSET]), data=st.data())
def test_rows_do_not_see_each_other(impl: Any, problem: Problem, junk: float, data: st.DataObject) -> None:
    sft, base, tokens_N = problem
    own = data.draw(st.integers(0, len(tokens_N) - 1))
    others_N = torch.arange(len(tokens_N)) != own
    logits = [head.raw(FP32) for head in (sft, base)]
    alone = bits_of(sft, base, logits, tokens_N, impl)
    sft, base = (head._replace(hidden_ND=head.hidden_ND.masked_fill(others_N[:, None], junk)) for head in (sft, base))
    logits = [x_NV.masked_fill(others_N[:, None], junk) for x_NV in logits]
    among = bits_of(sft, base, logits, torch.where(others_N, 0, tokens_N), impl)
    assert all(same_bits(a_N[own], b_N[own]) for a_N, b_N in zip(alone, among, strict=True))


@impls
@few
@given(
    st.integers(0, 2**32 - 2),
    st.sampled_from([1, 5, 300]),
    st.sampled_from([BF16, FP16, FP32]),
    st.sampled_from([OFFSET, -OFFSET, 40.0, -3.0]),
)
def test_shifts_are_not_seen(impl: Any, seed: int, vocabulary: int, dtype: torch.dtype, shift: float) -> None:
    """A constant in the bias of one model, on logits that are exact in fp32."""
    sft, base = (Head(*make_grid(9, 8, vocabulary, dtype, seed + i)) for i in range(2))
    tokens_N = torch.randint(vocabulary, (9,), generator=rng(seed))
    shifted = sft._replace(bias_V=torch.full((vocabulary,), shift, dtype=dtype))
    assert gap(diff_of(shifted, base, tokens_N, impl).diff_N, diff_of(sft, base, tokens_N, impl).diff_N) <= 2e-6
    one, moved = (one_of(head, tokens_N, impl) for head in (sft, shifted))
    assert gap(moved.logprobs_N, one.logprobs_N) <= 2e-6
    assert gap(moved.entropy_N, one.entropy_N) <= 4e-6


# Gradients


def grads_of(
    head: Head,
    tokens_N: Tensor,
    upstream_N: Tensor,
    impl: Any = None,
    dtype: torch.dtype | None = None,
    **transform: Any,
) -> list[Tensor]:
    """Gradients of sum(upstream * log-prob) in hidden, weight and bias; without an impl autograd's own in `dtype`."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in head]
    if impl is None:
        logprobs_N = softmax_parts(F.linear(*leaves), tokens_N, **transform).logprobs_N
    else:
        logprobs_N = one_of(Head(*leaves), tokens_N, impl, **transform).logprobs_N
    return list(torch.autograd.grad(logprobs_N, leaves, upstream_N.to(logprobs_N.dtype)))


def check_grads(
    actual: list[Tensor | None],
    head: Head,
    tokens_N: Tensor,
    upstream_N: Tensor,
    kept_N: Tensor | None = None,
    **transform: Any,
) -> None:
    """Against fp64 autograd: twice the error of eager fp32, 1e-6 of the largest, and one rounding to the dtype.

    Only rows of `kept_N` take part. Where actual is None, nothing is expected.
    """
    kept_N = torch.ones(len(tokens_N), dtype=torch.bool) if kept_N is None else kept_N
    dense = Head(head.hidden_ND[kept_N], head.weight_VD, head.bias_V)
    exact, eager = (
        grads_of(dense, tokens_N[kept_N], upstream_N[kept_N], dtype=dtype, **transform) for dtype in (FP64, FP32)
    )
    for name, x, got, want, fp32 in zip(Head._fields, head, actual, exact, eager, strict=True):
        if got is None:
            continue
        assert got.dtype == x.dtype and got.shape == x.shape, name
        got = got[kept_N] if name == "hidden_ND" else got
        allowed = 2 * gap(fp32, want) + 1e-6 * float(want.abs().max())
        if x.dtype != FP32:
            info = torch.finfo(x.dtype)
            allowed = allowed * (1 + info.eps) + want.abs() * info.eps / 2 + info.smallest_normal * info.eps
        error = (got.double() - want).abs()
        worst = int((error - allowed).argmax())
        assert (error <= allowed).all(), f"{name}: error {error.flatten()[worst]:.2e} of {want.flatten()[worst]:.2e}"


@impls
@dtype_pairs
@pytest.mark.parametrize(
    ("rows", "width", "vocabulary"),
    [(1, 1, 1), (1, 64, 17), (5, 3, 17), (70, 64, 1000), (17, 257, 4099), (2100, 8, 50)],
    ids=lambda n: str(n),
)
def test_gradients_are_as_accurate_as_fp32(
    impl: Any, pair: tuple[torch.dtype, torch.dtype], rows: int, width: int, vocabulary: int
) -> None:
    head, tokens_N = make_head(rows, width, vocabulary, pair), make_tokens(rows, vocabulary)
    upstream_N = torch.randn(rows, generator=rng(1))
    upstream_N[3::4] = 0.0
    check_grads(grads_of(head, tokens_N, upstream_N, impl), head, tokens_N, upstream_N)


@impls
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: "-".join(map(str, t.values())))
def test_gradients_pass_gradcheck_and_transforms(impl: Any, transform: dict[str, Any]) -> None:
    head, tokens_N = make_head(4, 3, 7, (FP64, FP64)), torch.tensor([6, 0, -100, 3])

    def logprobs(*leaves: Tensor) -> Tensor:
        return one_of(Head(*leaves), tokens_N, impl, **transform).logprobs_N

    assert torch.autograd.gradcheck(logprobs, tuple(x.requires_grad_() for x in head), eps=1e-6, atol=1e-8, rtol=1e-6)
    for pair in ((BF16, BF16), (FP32, FP32)):
        head, tokens = make_head(ROWS, 24, 300, pair), make_tokens(ROWS, 300)
        upstream_N = torch.randn(ROWS, generator=rng(1))
        check_grads(grads_of(head, tokens, upstream_N, impl, **transform), head, tokens, upstream_N, **transform)


@impls
@dtypes
def test_gradients_on_hard_inputs(impl: Any, dtype: torch.dtype) -> None:
    """Columns of probability 0 (no gradient, no NaN), a shared offset of 1e4, a peak."""
    vocabulary = 1000
    hidden_ND, weight_VD = make_grid(ROWS, 8, vocabulary, dtype, seed=1)
    tokens_N, upstream_N = make_tokens(ROWS, vocabulary).clamp(min=600), torch.randn(ROWS, generator=rng(2))
    flat_V = torch.zeros(vocabulary, dtype=dtype)
    blocked_V, peaked_V = flat_V.clone(), flat_V.clone()
    blocked_V[:600], peaked_V[700] = -INF, OFFSET
    for bias_V in (blocked_V, flat_V + OFFSET, flat_V - OFFSET, peaked_V):
        head = Head(hidden_ND, weight_VD, bias_V)
        grads = grads_of(head, tokens_N, upstream_N, impl)
        check_grads(grads, head, tokens_N, upstream_N)
        if bias_V is blocked_V:
            assert not grads[1][:600].any() and not grads[2][:600].any()


@fast
@dtypes
@pytest.mark.parametrize("junk", [NAN, INF])
def test_rows_without_upstream_gradient_take_no_part_in_backward(impl: Any, dtype: torch.dtype, junk: float) -> None:
    rows, vocabulary = 41, 301
    head, tokens_N = make_head(rows, 24, vocabulary, (dtype, dtype)), make_tokens(rows, vocabulary)
    upstream_N = torch.randn(rows, generator=rng(1))
    upstream_N[[0, 5, 6, 7, 30, 40]] = 0.0
    head.hidden_ND[upstream_N == 0] = junk
    grads = grads_of(head, tokens_N, upstream_N, impl)
    assert torch.equal(grads[0][upstream_N == 0], torch.zeros(6, 24, dtype=dtype))
    check_grads(grads, head, tokens_N, upstream_N, upstream_N != 0)
    for x, grad in zip(head, grads_of(head, tokens_N, torch.zeros(rows), impl), strict=True):
        assert same_bits(grad, torch.zeros_like(x))


@impls
@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
def test_only_what_is_asked_for_gets_a_gradient(impl: Any, needs: tuple[bool, ...]) -> None:
    head, tokens_N = make_head(16, 256, 4096), make_tokens(16, 4096)
    leaves = Head(*(x.clone().requires_grad_(need) for x, need in zip(head, needs, strict=True)))
    result = one_of(leaves, tokens_N, impl)
    assert result.logprobs_N.requires_grad == any(needs)
    assert not result.entropy_N.requires_grad and result.entropy_N.grad_fn is None
    assert one_of(leaves, tokens_N, impl)._replace(entropy_N=None).entropy_N is None
    if not any(needs):
        return
    upstream_N = torch.randn(16, generator=rng(1))
    with Allocations(*leaves, *result, upstream_N) as allocations:
        result.logprobs_N.backward(upstream_N)
    assert tuple(x.grad is not None for x in leaves) == needs
    check_grads([x.grad for x in leaves], head, tokens_N, upstream_N)
    # N x V is 1/16 of the weight here: only a weight gradient is as large as that.
    assert (allocations.largest >= head.weight_VD.numel()) == needs[1]


@impls
def test_the_difference_is_a_constant(impl: Any) -> None:
    head = Head(*(x.requires_grad_() for x in make_head(5, 4, 33)))
    logits_NV, tokens_N = torch.randn(5, 33, requires_grad=True), make_tokens(5, 33)
    for parts in (
        diff_of(head, head, tokens_N, impl),
        logprob_diff(logits_NV, logits_NV, tokens_N, with_parts=True, impl=impl),
    ):
        assert not any(part_N.requires_grad for part_N in parts)
    assert linear_logprob(head.hidden_ND, head.weight_VD, tokens_N, impl=impl).entropy_N is None
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not one_of(head, tokens_N, impl).logprobs_N.requires_grad


# Memory


class Allocations(TorchDispatchMode):
    """Elements of every storage that an operator returned, but for the inputs'."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in inputs}
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out


@fast
@dtype_pairs
@pytest.mark.parametrize("shared", [False, True], ids=["two heads", "one head"])
def test_no_logits_matrix_is_allocated(impl: Any, pair: tuple[torch.dtype, torch.dtype], shared: bool) -> None:
    rows, vocabulary, width = 512, 8192, 32
    sft, base = (make_head(rows, width, vocabulary, pair, seed=seed) for seed in (1, 2))
    base = base._replace(weight_VD=sft.weight_VD, bias_V=sft.bias_V) if shared else base
    tokens_N = make_tokens(rows, vocabulary)
    leaves = Head(*(x.requires_grad_() for x in sft))

    def train() -> None:
        one_of(leaves, tokens_N, impl, softcap=30.0).logprobs_N.sum().backward()

    calls: list[Callable[[], Any]] = [lambda: diff_of(sft, base, tokens_N, impl), train]
    tokens_N = tokens_N.clone()
    for call in calls:
        for ignored in (0, 1):
            tokens_N[:ignored] = -100
            with Allocations(*sft, *base) as allocations:
                call()
            assert 0 < allocations.largest <= rows * vocabulary // 2


@fast
@dtype_pairs
def test_nothing_of_the_vocabulary_is_kept_for_backward(impl: Any, pair: tuple[torch.dtype, torch.dtype]) -> None:
    head, tokens_N = make_head(64, 16, 5000, pair), make_tokens(64, 5000)
    leaves, saved = Head(*(x.requires_grad_() for x in head)), {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = one_of(leaves, tokens_N, impl, softcap=30.0)
    inputs = {x.untyped_storage().data_ptr() for x in (*leaves, tokens_N)}
    assert sum(size for pointer, size in saved.items() if pointer not in inputs) <= 8 * 64
    assert result.logprobs_N.requires_grad


PEAK = """
import sys, torch
from srppo.kernels import linear_logprob, linear_logprob_diff

torch.set_num_threads(int(sys.argv[2]))

def mib(name):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(name)).split()[1]) / 1024

N, D, V = 1024, 1024, 128256
weight_VD = (torch.randn(V // 128, D) / 32).bfloat16().repeat(128, 1)
other_VD = weight_VD.flip(1)
hidden_ND, other_ND = torch.randn(2, N, D).bfloat16()
tokens_N = torch.randint(V, (N,))
def operation(h, v, g, w, t):
    if sys.argv[1] == "diff":
        return linear_logprob_diff(h, v, g, w, t)
    return linear_logprob(h, v, t, with_entropy=True).entropy_N

operation(hidden_ND[:16], weight_VD[:4096], other_ND[:16], other_VD[:4096], tokens_N[:16] % 4096)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = mib("VmRSS")
out_N = operation(hidden_ND, weight_VD, other_ND, other_VD, tokens_N)
growth = mib("VmHWM") - before
assert out_N.isfinite().all() and out_N.any()
print(growth)
"""


@fast
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(("operation", "threads"), [("diff", 2), ("diff", 16), ("one", 2)])
def test_extra_memory_at_a_vocabulary_of_128k_is_at_most_32_mb(impl: Any, operation: str, threads: int) -> None:
    """Peak resident memory of a fresh process beyond its inputs: N x V in bf16 alone would be 263 MB a model."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, operation, str(threads)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 32e6 / 2**20


# What reviews found


@fast
@pytest.mark.parametrize("offset", [88.9, 100.0, 1e4])
@pytest.mark.parametrize("rows", [1, 5, 1025])
def test_large_biases_leave_gradients_finite(impl: Any, rows: int, offset: float) -> None:
    """Rows added to fill a wave have logits equal to the bias, and exp of it overflows."""
    head = Head(*(x.requires_grad_() for x in make_head(rows, 4, 50)))
    shifted = head._replace(bias_V=(head.bias_V.detach() + offset).requires_grad_())
    one_of(shifted, make_tokens(rows, 50), impl).logprobs_N.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in shifted)


@fast
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_every_nan_stays_one(impl: Any, bits: int) -> None:
    logits_NV, tokens_N = torch.randn(4, 1000, generator=rng(0)), torch.tensor([0, 5, 1, 2])
    poisoned_NV = logits_NV.clone()
    poisoned_NV.view(torch.int32)[1, 7] = bits
    parts = logprob_diff(poisoned_NV, logits_NV, tokens_N, with_parts=True, impl=impl)
    assert parts.sft_logprobs_N.isnan().tolist() == parts.diff_N.isnan().tolist() == [False, True, False, False]
    weight_VD = torch.ones(1000, 3)
    weight_VD.view(torch.int32)[7, 1] = bits
    assert linear_logprob(torch.ones(2, 3), weight_VD, tokens_N[:2], impl=impl, softcap=5.0).logprobs_N.isnan().all()


@fast
def test_a_rows_hidden_gradient_has_the_same_bits_alone(impl: Any) -> None:
    head = make_head(1025, 16, 301)
    tokens_N = make_tokens(1025, 301)

    def gradient(rows: slice) -> Tensor:
        hidden_ND = head.hidden_ND[rows].clone().requires_grad_()
        one_of(head._replace(hidden_ND=hidden_ND), tokens_N[rows], impl).logprobs_N.sum().backward()
        return hidden_ND.grad

    whole_ND = gradient(slice(None))
    for rows in (slice(0, 1), slice(0, 17), slice(1024, 1025)):
        assert torch.equal(gradient(rows), whole_ND[rows])


@impls
def test_user_settings_do_not_reach_the_results(impl: Any) -> None:
    """fp32 products stay fp32 where the user has allowed coarser ones."""
    head, tokens_N = make_head(64, 256, 999), make_tokens(64, 999)
    leaf_ND = head.hidden_ND.clone().requires_grad_()
    before = torch.get_float32_matmul_precision()
    answers = []
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            answers.append(one_of(head._replace(hidden_ND=leaf_ND), tokens_N, impl).logprobs_N)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(*answers)
