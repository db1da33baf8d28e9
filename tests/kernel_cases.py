"""Problems for the log-prob kernels, their exact answers, and how far fp32 may be off.

Expectations are plain torch.float64 of the same inputs, written here, by no code of the package. What is allowed comes
from the format and the sizes alone (`summed`, `softmaxed`), so that it is the same on every machine: two orders of
magnitude below what logits in 16 bits, or in TF32, are off by.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from srppo.kernels import (
    LogprobDiff,
    linear_logprob,
    linear_logprob_diff,
    linear_logprob_diff_parts,
)

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
UNIT = {FP32: 2.0**-24, FP64: 2.0**-53}  # the relative error of one rounding
NAN, INF = math.nan, math.inf
OFFSET = 9984.0  # 39 * 256: about 1e4 and exact in bf16
ROWS = 70

# Interpreted, Triton takes the others' place: test_triton.py runs test_checks.py so, in a process of its own.
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


# Problems


class Head(NamedTuple):
    """The first arguments of a linear operation."""

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None = None

    def exact(self) -> Tensor:
        """Raw logits in fp64."""
        bias_V = None if self.bias_V is None else self.bias_V.double()
        return F.linear(self.hidden_ND.double(), self.weight_VD.double(), bias_V)

    def slack(self, unit: float) -> Tensor:
        """How far raw logits may be off."""
        return summed(self.hidden_ND, self.weight_VD.T, unit) + unit * self.exact().abs()


class Grid(Head):
    """A head whose logits fp32 holds exactly, in whatever order they are summed."""

    def slack(self, unit: float) -> Tensor:
        return torch.zeros(len(self.hidden_ND), len(self.weight_VD), dtype=FP64, device=self.hidden_ND.device)


class Logits(NamedTuple):
    """The same for logits that are given."""

    logits_NV: Tensor

    def exact(self) -> Tensor:
        return self.logits_NV.double()

    def slack(self, unit: float) -> Tensor:
        return torch.zeros_like(self.logits_NV, dtype=FP64)


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


def make_grid(rows: int, width: int, vocabulary: int, dtype: torch.dtype, seed: int) -> Grid:
    """Hidden states and a weight in steps of 1/16, where every logit, OFFSET added or not, is exact."""
    shapes = ((rows, width), (vocabulary, width))
    hidden_ND, weight_VD = (torch.randint(-12, 13, shape, generator=rng(seed + i)) for i, shape in enumerate(shapes))
    return Grid((hidden_ND / 16).to(dtype), (weight_VD / 16).to(dtype))


def make_tokens(rows: int, vocabulary: int) -> Tensor:
    """The last token, the first, the last but one, the last aligned one; then any."""
    tokens_N = torch.randint(vocabulary, (max(rows, 4),), generator=rng(rows * vocabulary))
    edges = [vocabulary - 1, 0, max(vocabulary - 2, 0), (vocabulary - 1) // 16 * 16]
    tokens_N[:4] = torch.tensor(edges)
    return tokens_N[:rows].clone()


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


# What fp32 may be off by


def summed(a_MK: Tensor, b_KN: Tensor, unit: float) -> Tensor:
    """How far each entry of a @ b may be off, in whatever order it is summed.

    Terms of random sign: a partial sum is of the size of the terms' norm, and each of K roundings errs by at most
    `unit` of it, 0.4 `unit` typically. Rounding errors of random sign make that 0.3 sqrt(K) units of the norm, the
    largest of a million some 5 times as much, with partial sums that are larger there: 8 sqrt(K) units.
    """
    norms_MN = (a_MK.double().square() @ b_KN.double().square()).sqrt()
    return 8 * unit * max(a_MK.shape[1], 1) ** 0.5 * norms_MN


def softmaxed(logp: Tensor, vocabulary: int, unit: float) -> Tensor:
    """How far log-probs may be off, logits being exact.

    Rounding each centred logit and its exp; a plain sum of `vocabulary` positive terms, 0.25 sqrt(V) units and 5 times
    that at worst; the logarithm, and the roundings of results as large as the log-prob.
    """
    return unit * (8 + 2 * vocabulary**0.5 + 2 * math.log(vocabulary) + 4 * logp.abs())


class Softmax(NamedTuple):
    """By definition in fp64, of raw logits that may be off. off_*: how far a result in fp32 may be off."""

    logits_NV: Tensor
    logp_NV: Tensor
    lse_N: Tensor
    off_logp_NV: Tensor
    off_lse_N: Tensor

    @classmethod
    def of(cls, model: Any, unit: float, **transform: Any) -> Softmax:
        scale, temperature = transform.get("logit_scale", 1.0), transform.get("temperature", 1.0)
        z_NV = transformed(model.exact(), **transform)
        logp_NV = z_NV.log_softmax(-1)
        lse_N = z_NV.logsumexp(-1).masked_fill(logp_NV.isnan().any(-1), NAN)  # also of a row of -inf only
        off_NV = model.slack(unit) * (scale / temperature)
        if transform:  # each of its operations rounds; tanh to two units in the last place
            off_NV = off_NV + 16 * unit * z_NV.abs()
        mean_N = (logp_NV.exp() * off_NV).nan_to_num(0.0).sum(-1)  # a logit of -inf has no share
        vocabulary = z_NV.shape[1]
        off_logp_NV = off_NV + mean_N[:, None] + softmaxed(logp_NV, vocabulary, unit)
        off_lse_N = mean_N + softmaxed(torch.zeros(()), vocabulary, unit) + 4 * unit * lse_N.abs()
        return cls(z_NV, logp_NV, lse_N, off_logp_NV, off_lse_N)

    def at(self, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
        """(log-prob, how far off it may be) of each token."""
        rows_N = torch.arange(len(tokens_N), device=tokens_N.device)
        return self.logp_NV[rows_N, tokens_N], self.off_logp_NV[rows_N, tokens_N]


def transformed(
    raw_NV: Tensor, temperature: float = 1.0, logit_scale: float = 1.0, softcap: float | None = None
) -> Tensor:
    """The logits of the softmax; differentiable."""
    z_NV = raw_NV * logit_scale
    if softcap is not None:
        z_NV = softcap * torch.tanh(z_NV / softcap)
    return z_NV / temperature


def check(what: str, actual: Tensor, exact: Tensor, allowed: Tensor | float) -> None:
    """Finite entries within what is allowed; NaN and infinities the same."""
    actual, exact = actual.detach().double(), exact.detach()
    finite = exact.isfinite()
    assert torch.equal(actual[~finite].nan_to_num(7.0), exact[~finite].nan_to_num(7.0)), f"{what}: {actual}, {exact}"
    error = (actual - exact).abs()[finite]
    allowed = torch.as_tensor(allowed, dtype=FP64, device=error.device).expand_as(exact)[finite]
    assert not (error > allowed).any() and not error.isnan().any(), (
        f"{what}: error {error[error > allowed].tolist()[:3]}, allowed {allowed[error > allowed].tolist()[:3]}"
    )


def check_diff(parts: LogprobDiff, sft: Any, base: Any, tokens_N: Tensor, what: str = "", **transform: Any) -> None:
    """Every part of a difference against fp64."""
    unit = UNIT[parts.diff_N.dtype]
    one, two = (Softmax.of(model, unit, **transform) for model in (sft, base))
    (sft_N, off_sft_N), (base_N, off_base_N) = (model.at(tokens_N) for model in (one, two))
    check(f"difference {what}", parts.diff_N, sft_N - base_N, off_sft_N + off_base_N)
    check(f"log-prob of the SFT model {what}", parts.sft_logprobs_N, sft_N, off_sft_N)
    check(f"log-prob of the base {what}", parts.base_logprobs_N, base_N, off_base_N)
    check(f"logsumexp of the SFT model {what}", parts.sft_lse_N, one.lse_N, one.off_lse_N)
    check(f"logsumexp of the base {what}", parts.base_lse_N, two.lse_N, two.off_lse_N)
    assert not (parts.sft_logprobs_N > 0).any() and not (parts.base_logprobs_N > 0).any(), f"{what}: positive"


def check_one(logprobs_N: Tensor, head: Any, tokens_N: Tensor, what: str = "", **transform: Any) -> None:
    """Log-probs of one model against fp64."""
    check(f"log-prob {what}", logprobs_N, *Softmax.of(head, UNIT[logprobs_N.dtype], **transform).at(tokens_N))
    assert not (logprobs_N > 0).any(), f"log-prob {what}: positive"


def check_grads(
    actual: Any,
    head: Head,
    tokens_N: Tensor,
    upstream_N: Tensor,
    kept_N: Tensor | None = None,
    coarse: float = 0.0,
    **transform: Any,
) -> None:
    """Gradients of sum(upstream * log-prob) in hidden, weight and bias against fp64, each rounded to its dtype once.

    Only rows of `kept_N` take part. Where actual is None, nothing is expected. coarse: a relative error of each logit's
    gradient, where an implementation rounds them to 16 bits.
    """
    kept_N = torch.ones_like(tokens_N, dtype=torch.bool) if kept_N is None else kept_N
    dense, tokens_N = head._replace(hidden_ND=head.hidden_ND.detach()[kept_N]), tokens_N[kept_N]
    upstream_N1, unit = upstream_N[kept_N].double()[:, None], UNIT[FP32]
    scale, softcap = transform.get("logit_scale", 1.0), transform.get("softcap")
    slope = scale / transform.get("temperature", 1.0)
    softmax = Softmax.of(dense, unit, **transform)
    p_NV = softmax.logp_NV.exp()
    apart_NV = F.one_hot(tokens_N, p_NV.shape[1]).double() - p_NV
    d_NV, off_slope = upstream_N1 * slope * apart_NV, torch.as_tensor(8 * unit + coarse)
    if softcap is not None:  # the slope of the cap, 1 - tanh^2, and how far that may be off
        bent_NV = torch.tanh(dense.exact() * (scale / softcap))
        d_NV = d_NV * (1 - bent_NV.square())
        off_slope = off_slope + 2 * (dense.slack(unit) * (scale / softcap) + 4 * unit)
    off_NV = (p_NV * softmax.off_logp_NV).nan_to_num(0.0) + apart_NV.abs() * off_slope
    off_NV = upstream_N1.abs() * slope * off_NV
    hidden_ND, weight_VD = (x.detach().double() for x in dense[:2])
    ones_N1 = torch.ones_like(upstream_N1)
    expected = (
        (d_NV @ weight_VD, off_NV @ weight_VD.abs() + summed(d_NV, weight_VD, unit)),
        (d_NV.T @ hidden_ND, off_NV.T @ hidden_ND.abs() + summed(d_NV.T, hidden_ND, unit)),
        (d_NV.sum(0), off_NV.sum(0) + summed(d_NV.T, ones_N1, unit)[:, 0]),
    )
    for name, x, got, (want, allowed) in zip(Head._fields, head, actual, expected, strict=True):
        if got is None:
            continue
        assert x is not None and got.dtype == x.dtype and got.shape == x.shape, name
        info = torch.finfo(x.dtype)
        rounding = want.abs() * info.eps / 2 + info.smallest_normal  # also where a gradient underflows
        got = got[kept_N] if name == "hidden_ND" else got
        check(name, got, want, allowed * (1 + info.eps) + rounding)


# The operations


def diff_of(sft: Head, base: Head, tokens_N: Tensor, impl: Any, **options: Any) -> LogprobDiff:
    """linear_logprob_diff with its parts; the plain result must be their first."""
    arguments = (sft.hidden_ND, sft.weight_VD, base.hidden_ND, base.weight_VD, tokens_N)
    options |= {"sft_bias_V": sft.bias_V, "base_bias_V": base.bias_V, "impl": impl}
    parts = linear_logprob_diff_parts(*arguments, **options)
    assert len(tokens_N) > 100 or same_bits(linear_logprob_diff(*arguments, **options), parts.diff_N)
    return parts


def one_of(head: Head, tokens_N: Tensor, impl: Any, **options: Any) -> Tensor:
    """linear_logprob."""
    hidden_ND, weight_VD, bias_V = head
    return linear_logprob(hidden_ND, weight_VD, tokens_N, bias_V=bias_V, impl=impl, **options)


def grads_of(head: Head, tokens_N: Tensor, upstream_N: Tensor, impl: Any, **options: Any) -> list[Tensor]:
    """Gradients of sum(upstream * log-prob) in hidden, weight and bias."""
    leaves = [x.detach().requires_grad_() for x in head if x is not None]
    return list(torch.autograd.grad(one_of(Head(*leaves), tokens_N, impl, **options), leaves, upstream_N))


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.nan_to_num(nan=12345.0), b.nan_to_num(nan=12345.0))


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
