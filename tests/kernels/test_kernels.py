"""The values of the log-prob kernels: against fp64 of the same inputs, on hard inputs, and by their properties."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    BF16,
    FP16,
    FP32,
    FP64,
    INF,
    NAN,
    OFFSET,
    ROWS,
    TRANSFORMS,
    UNIT,
    Grid,
    Head,
    Logits,
    Problem,
    Softmax,
    check_diff,
    check_grads,
    check_one,
    compiled,
    diff_of,
    dtype_pairs,
    dtypes,
    fast,
    few,
    grads_of,
    impls,
    make_grid,
    make_head,
    make_tokens,
    one_of,
    problems,
    rng,
    same_bits,
)
from torch import Tensor

from srppo.kernels import LogprobDiff, linear_logprob, logprob_diff, logprob_diff_parts

# Accuracy


@impls
@dtype_pairs
@pytest.mark.parametrize("vocabulary", [1, 17, 1000, 4099])
def test_linear_operations_are_as_accurate_as_fp32(
    impl: Any, pair: tuple[torch.dtype, torch.dtype], vocabulary: int
) -> None:
    for width, counts in ((1, (5,)), (3, (ROWS,)), (64, (1, ROWS)), (257, (1, 5, ROWS))):
        for rows in counts:
            sft, base = (make_head(rows, width, vocabulary, pair, seed=seed) for seed in (1, 2))
            base, tokens_N = base._replace(bias_V=None), make_tokens(rows, vocabulary)
            what = f"at N = {rows}, D = {width}, V = {vocabulary}"
            check_diff(diff_of(sft, base, tokens_N, impl), sft, base, tokens_N, what)
            check_one(one_of(sft, tokens_N, impl), sft, tokens_N, what)


@impls
@dtype_pairs
@pytest.mark.parametrize("vocabulary", [1, 17, 1000, 4099])
def test_logprob_diff_is_as_accurate_as_fp32(impl: Any, pair: tuple[torch.dtype, torch.dtype], vocabulary: int) -> None:
    for rows in (1, 5, ROWS):
        logits = [3 * torch.randn(rows, vocabulary, generator=rng(seed)) for seed in (1, 2)]
        sft_NV, base_NV = (x_NV.to(dtype) for x_NV, dtype in zip(logits, pair, strict=True))
        tokens_N = make_tokens(rows, vocabulary)
        parts = logprob_diff_parts(sft_NV, base_NV, tokens_N, impl=impl)
        check_diff(parts, Logits(sft_NV), Logits(base_NV), tokens_N, f"at N = {rows}, V = {vocabulary}")
        assert same_bits(logprob_diff(sft_NV, base_NV, tokens_N, impl=impl), parts.diff_N)


@functools.lru_cache(maxsize=1)
def real_heads(dtype: torch.dtype) -> tuple[Head, Head, list[Tensor]]:
    """Two models with one head, and their log-softmax in fp64."""
    sft = make_head(32, 1024, 32000, (dtype, dtype))._replace(bias_V=None)
    base = sft._replace(hidden_ND=make_head(32, 1024, 1, (dtype, dtype), seed=9).hidden_ND * 0.1 + sft.hidden_ND)
    return sft, base, [head.exact().log_softmax(-1) for head in (sft, base)]


@impls
@dtypes
def test_a_head_of_real_size_has_fp32_accuracy(impl: Any, dtype: torch.dtype) -> None:
    """By the root mean square over rows; 16-bit logits would be off by 2e-2.

    A logit is a sum of D terms whose norm is 3. Its typical error, over partial sums that grow as sqrt(k), is 0.3
    sqrt(D) units of that; with target and logsumexp of both models, none of them worse, 0.6 sqrt(D).
    """
    sft, base, logp = real_heads(dtype)
    tokens_N = make_tokens(32, 32000)
    off_N = diff_of(sft, base, tokens_N, impl).diff_N - (logp[0] - logp[1]).gather(1, tokens_N[:, None])[:, 0]
    assert float(off_N.square().mean().sqrt()) <= 0.6 * UNIT[FP32] * 1024**0.5 * 3 * 2


@impls
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: "-".join(map(str, t.values())))
def test_transforms_in_all_combinations(impl: Any, transform: dict[str, Any]) -> None:
    tokens_N = make_tokens(ROWS, 300)
    for pair in ((BF16, BF16), (FP32, FP32)):
        sft, base = (make_head(ROWS, 24, 300, pair, seed=seed) for seed in (3, 4))
        check_diff(diff_of(sft, base, tokens_N, impl, **transform), sft, base, tokens_N, **transform)
        check_one(one_of(sft, tokens_N, impl, **transform), sft, tokens_N, **transform)
        logits = [Logits(head.exact().to(pair[0])) for head in (sft, base)]
        parts = logprob_diff_parts(*(x.logits_NV for x in logits), tokens_N, impl=impl, **transform)
        check_diff(parts, *logits, tokens_N, **transform)


@impls
def test_fp64_stays_fp64(impl: Any) -> None:
    sft, base = (make_head(ROWS, 24, 300, (FP64, FP64), seed=seed) for seed in (3, 4))
    tokens_N, transform = make_tokens(ROWS, 300), {"temperature": 0.7, "softcap": 4.0}
    logits = [Logits(head.exact()) for head in (sft, base)]
    parts = logprob_diff_parts(*(x.logits_NV for x in logits), tokens_N, impl=impl, **transform)
    assert parts.diff_N.dtype == FP64
    check_diff(parts, *logits, tokens_N, **transform)
    check_diff(diff_of(sft, base, tokens_N, impl, **transform), sft, base, tokens_N, **transform)
    check_one(one_of(sft, tokens_N, impl, **transform), sft, tokens_N, **transform)


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
    vocabulary = 1000
    hidden_ND, weight_VD, _ = make_grid(ROWS, 8, vocabulary, dtype, seed=1)
    offsets_N1 = torch.tensor([OFFSET, -OFFSET, 0.0])[torch.arange(ROWS) % 3][:, None]
    sft = Grid(torch.cat([hidden_ND, offsets_N1.to(dtype)], 1), F.pad(weight_VD, (0, 1), value=1.0))
    base = make_grid(ROWS, 8, vocabulary, dtype, seed=3)
    tokens_N = make_tokens(ROWS, vocabulary)
    logits = [Logits(head.exact().float()) for head in (sft, base)]
    assert torch.equal(logits[0].exact(), sft.exact())
    assert float(Softmax.of(sft, UNIT[FP32]).at(tokens_N)[1].max()) < 1e-5
    check_diff(diff_of(sft, base, tokens_N, impl), sft, base, tokens_N)
    check_diff(logprob_diff_parts(*(x.logits_NV for x in logits), tokens_N, impl=impl), *logits, tokens_N)
    check_one(one_of(sft, tokens_N, impl), sft, tokens_N)


@impls
@dtypes
def test_one_logit_1e4_above(impl: Any, dtype: torch.dtype) -> None:
    """Every token but the peak has a log-prob of about -1e4, the peak 0."""
    vocabulary = 1000
    plain, base = (make_grid(ROWS, 8, vocabulary, dtype, seed=seed) for seed in (1, 3))
    for peak, height in [(0, OFFSET), (517, OFFSET), (vocabulary - 1, OFFSET), (3, -OFFSET)]:
        bias_V = torch.zeros(vocabulary, dtype=dtype)
        bias_V[peak] = height
        sft = plain._replace(bias_V=bias_V)
        tokens_N = make_tokens(ROWS, vocabulary)
        tokens_N[::2] = peak
        check_diff(diff_of(sft, base, tokens_N, impl), sft, base, tokens_N, f"peak at {peak}")
        one_N = one_of(sft, tokens_N, impl)
        check_one(one_N, sft, tokens_N, f"peak at {peak}")
        logits = [Logits(head.exact().float()) for head in (sft, base)]
        parts = logprob_diff_parts(*(x.logits_NV for x in logits), tokens_N, impl=impl)
        check_diff(parts, *logits, tokens_N, f"logits, peak at {peak}")
        assert height < 0 or torch.equal(one_N[::2], torch.zeros(ROWS // 2))


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
        logits = [Logits(head.exact().to(dtype)) for head in (masked, base)]
        check_diff(logprob_diff_parts(*(x.logits_NV for x in logits), tokens_N, impl=impl), *logits, tokens_N)


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
        parts = logprob_diff_parts(sft_NV, logits[1], tokens_N, impl=impl)
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
    one_N = one_of(heads[0], tokens_N, impl)
    assert one_N[bad].isnan().all()
    check_one(one_N[good], Head(hidden_ND[good], weight_VD), tokens_N[good])


@fast
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, -1, 0x7F800001])
def test_every_nan_stays_one(impl: Any, bits: int) -> None:
    logits_NV, tokens_N = torch.randn(4, 1000, generator=rng(0)), torch.tensor([0, 5, 1, 2])
    poisoned_NV = logits_NV.clone()
    poisoned_NV.view(torch.int32)[1, 7] = bits
    parts = logprob_diff_parts(poisoned_NV, logits_NV, tokens_N, impl=impl)
    assert parts.sft_logprobs_N.isnan().tolist() == parts.diff_N.isnan().tolist() == [False, True, False, False]
    weight_VD = torch.ones(1000, 3)
    weight_VD.view(torch.int32)[7, 1] = bits
    assert linear_logprob(torch.ones(2, 3), weight_VD, tokens_N[:2], impl=impl, softcap=5.0).isnan().all()


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
        parts = logprob_diff_parts(sft_NV, base_NV, tokens_N, impl=impl)
        check_diff(parts, Logits(sft_NV), Logits(base_NV), tokens_N, f"{name}, {kind}")


@fast
def test_more_than_2_to_the_31_elements_by_stride(impl: Any) -> None:
    """Two rows 2^31 elements apart: 4 GB of addresses, of which only the two rows are ever touched."""
    vocabulary, stride = 1000, 2**31
    logits_NV = torch.empty(stride + vocabulary, dtype=BF16).as_strided((2, vocabulary), (stride, 1))
    logits_NV[:] = torch.randn(2, vocabulary, generator=rng(1))
    base_NV, tokens_N = torch.randn(2, vocabulary, generator=rng(2)), torch.tensor([0, 999])
    parts = logprob_diff_parts(logits_NV, base_NV, tokens_N, impl=impl)
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
    logprobs_N = one_of(head, tokens_N, impl)
    some = torch.tensor([0, 1, 30677, 30678, 30679, 32768, rows - 1])  # 2^31 lies in row 30678
    check_one(logprobs_N[some], head._replace(hidden_ND=head.hidden_ND[some]), tokens_N[some])
    assert (logprobs_N < 0).all()


# Properties


@impls
@few
@given(problem=problems())
def test_a_model_differs_from_itself_by_0(impl: Any, problem: Problem) -> None:
    sft, _, tokens_N = problem
    for other in (sft, Head(*(x.clone() for x in sft))):
        assert torch.equal(diff_of(sft, other, tokens_N, impl).diff_N, torch.zeros(len(tokens_N)))
    logits_NV = sft.exact().to(sft.hidden_ND.dtype)
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
    logits = [head.exact().float() for head in (sft, base)]
    back_N = logprob_diff(*reversed(logits), tokens_N, impl=impl)
    assert torch.equal(logprob_diff(*logits, tokens_N, impl=impl), -back_N)


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
    sft, base = (make_grid(9, 8, vocabulary, dtype, seed + i) for i in range(2))
    tokens_N = torch.randint(vocabulary, (9,), generator=rng(seed))
    shifted = sft._replace(bias_V=torch.full((vocabulary,), shift, dtype=dtype))
    for head in (sft, shifted):  # one answer for both
        check_one(one_of(head, tokens_N, impl), sft, tokens_N)
        parts = diff_of(head, base, tokens_N, impl)
        check_diff(parts._replace(sft_lse_N=sft.exact().logsumexp(-1)), sft, base, tokens_N)
