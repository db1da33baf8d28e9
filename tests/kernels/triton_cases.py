"""Cases of the Triton kernels, run by test_triton.py: interpreted on any machine, compiled where there is a GPU.

What is expected, and how far fp32 may be off, is computed by kernel_cases.py.
"""

import dataclasses
import itertools

import kernel_cases
import numpy as np
import pytest
import torch
from kernel_cases import INF, UNIT, Allocations, Logits, Softmax, check, check_diff, check_grads

from srppo import kernels
from srppo.bench.compile import compile_report
from srppo.errors import ConfigError
from srppo.kernels import triton_backward, triton_common, triton_linear
from srppo.kernels.types import IGNORED, Head, LogprobDiff, Transform

INTERPRETED = triton_common.INTERPRETED
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PLAIN, BENT = Transform(), Transform(temperature=0.7, logit_scale=1.3, softcap=5.0)


@pytest.fixture(autouse=True)
def poisoned():
    """Fresh memory holds NaN, so that what a kernel should have written and did not shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def ordered_products(monkeypatch):
    """Interpreted, a tile's product is numpy's, whose BLAS on some CPUs (OpenBLAS on Haswell and Zen 3) rounds a row by
    its place among the others. A GPU does not, and what the kernel itself does with a row's bits is asked here: so a
    tile's sums are taken in order, in long doubles, which no BLAS multiplies."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    def dot(self, a, b, d, *_):
        a_MK, b_KN = (x.data.astype(np.longdouble) for x in (a, b))
        return interpreter.TensorHandle((a_MK @ b_KN).astype(d.data.dtype) + d.data, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def random(*shape, dtype=torch.float32, scale=1.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def some_tokens(rows, columns, seed=1):
    tokens_N = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(seed))
    tokens_N[0] = columns - 1  # in the ragged tail
    return tokens_N.to(DEVICE)


def make_head(rows, columns, depth, dtype=torch.float32, bias=True, seed=0):
    bias_V = random(columns, dtype=dtype, seed=seed + 2) if bias else None
    weight_VD = random(columns, depth, dtype=dtype, scale=3 / depth**0.5, seed=seed + 1)
    return Head(random(rows, depth, dtype=dtype, seed=seed), weight_VD, bias_V)


def plain_head(head):
    """The same for kernel_cases."""
    return kernel_cases.Head(*head)


def check_stats(stats, head, tokens_N, transform):
    """Log-probs and logsumexps of one model."""
    softmax = Softmax.of(plain_head(head), UNIT[torch.float32], **vars(transform))
    check("log-prob", stats.logprobs_N, *softmax.at(tokens_N))
    check("logsumexp", stats.lse_N, softmax.lse_N, softmax.off_lse_N)


def check_backward(grads, head, tokens_N, transform, grad_N, **options):
    """Gradients; compiled, those of bf16 logits are rounded to bf16 on their way to the products."""
    coarse = 2.0**-8 if head.hidden_ND.dtype == torch.bfloat16 and not INTERPRETED else 0.0
    check_grads(grads, plain_head(head), tokens_N, grad_N, coarse=coarse, **vars(transform), **options)


def check_logits(sft_NV, base_NV, tokens_N, transform):
    got = triton_linear.logprob_diff(sft_NV, base_NV, tokens_N, transform)
    kept = tokens_N != IGNORED
    parts, logits = LogprobDiff(*(x[kept] for x in got)), [Logits(x[kept]) for x in (sft_NV, base_NV)]
    check_diff(parts, *logits, tokens_N[kept], **vars(transform))
    assert all((x[~kept] == 0).all() for x in got)
    return got


def check_linear(sft, base, tokens_N, transform):
    got = triton_linear.linear_logprob_diff(sft, base, tokens_N, transform)
    check_diff(got, plain_head(sft), plain_head(base), tokens_N, **vars(transform))
    return got


def same_bits(a, b):
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("columns", [1, 300])
@pytest.mark.parametrize("dtypes", [(x, x) for x in DTYPES] + [(torch.bfloat16, torch.float32)], ids=str)
def test_logits(dtypes, columns):
    for transform in (PLAIN, BENT):
        sft_NV, base_NV = (random(4, columns, dtype=d, scale=4, seed=i) for i, d in enumerate(dtypes))
        tokens_N = some_tokens(4, columns)
        tokens_N[2] = IGNORED
        check_logits(sft_NV, base_NV, tokens_N, transform)


def adversarial_rows(columns):
    rows_NV = random(6, columns, scale=3)
    rows_NV[0, : columns - 3] = -INF  # leading blocks of nothing but -inf
    rows_NV[1] = -INF  # nothing else at all
    rows_NV[2, 7] = 60.0  # peaked at the target
    rows_NV[3, 8] = 60.0  # peaked elsewhere
    rows_NV[4, 7] = -INF  # the target itself
    rows_NV[5, :-1] = -INF  # one column left
    return rows_NV


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_adversarial(dtype):
    columns = 520
    tokens_N = torch.tensor([columns - 1, 7, 7, 7, 7, columns - 1], device=DEVICE)
    sft_NV = adversarial_rows(columns).to(dtype)
    got = check_logits(sft_NV, random(6, columns, dtype=dtype, scale=3, seed=9), tokens_N, PLAIN)
    assert got.diff_N[1].isnan() and got.diff_N[4] == -INF and got.sft_logprobs_N[5] == 0
    check_logits(sft_NV, sft_NV.flip(0), tokens_N, PLAIN)
    # A cap makes -inf finite; columns past the vocabulary must not be.
    check_logits(sft_NV, sft_NV.flip(0), tokens_N, BENT)


def test_logits_offset():
    sft_NV, base_NV = random(5, 300, scale=3), random(5, 300, scale=3, seed=1) + 1e4
    tokens_N = some_tokens(5, 300)
    check_logits(sft_NV, base_NV, tokens_N, PLAIN)


def test_logits_antisymmetric():
    a_NV, b_NV, tokens_N = random(5, 300, scale=3), random(5, 300, scale=3, seed=1) + 1e3, some_tokens(5, 300)
    for transform in (PLAIN, BENT):
        there, back, none = (
            triton_linear.logprob_diff(x, y, tokens_N, transform).diff_N
            for x, y in ((a_NV, b_NV), (b_NV, a_NV), (a_NV, a_NV.clone()))
        )
        assert same_bits(there, -back) and (none == 0).all()


@pytest.mark.parametrize("columns", [300, 304])
def test_logits_strided_rows(columns):
    wide_NV = random(4, 2 * columns + 24, dtype=torch.bfloat16, scale=3)
    sft_NV, base_NV = wide_NV[:, :columns], wide_NV[:, columns : 2 * columns]
    check_logits(sft_NV, base_NV, some_tokens(4, columns), PLAIN)
    check_logits(sft_NV.T.contiguous().T, base_NV, some_tokens(4, columns), PLAIN)


def test_logits_row_bits():
    for columns, counts in ((301, (1, 2, 7, 15, 16, 17)), (304, (1, 7))):
        sft_NV, base_NV, tokens_N = random(33, columns), random(33, columns, seed=1), some_tokens(33, columns)
        whole = triton_linear.logprob_diff(sft_NV, base_NV, tokens_N, BENT)
        for rows in [slice(n) for n in counts] + [slice(5, 8)]:
            part = triton_linear.logprob_diff(sft_NV[rows].clone(), base_NV[rows].clone(), tokens_N[rows], BENT)
            assert all(same_bits(x[rows], y) for x, y in zip(whole, part, strict=True)), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns,depth", [(150, 40), (3, 7)])
def test_linear(dtype, columns, depth):
    for transform, bias in ((PLAIN, False), (BENT, True)):
        sft, base = (make_head(18, columns, depth + 8 * i, dtype, bias, seed=5 * i) for i in range(2))
        check_linear(sft, base, some_tokens(18, columns), transform)


@pytest.mark.parametrize("hidden,weight", list(itertools.permutations(DTYPES, 2)), ids=str)
def test_linear_mixed_dtypes(hidden, weight):
    head = make_head(5, 70, 24)
    sft = Head(head.hidden_ND.to(hidden), head.weight_VD.to(weight), head.bias_V)
    check_linear(sft, make_head(5, 70, 24, weight, seed=7), some_tokens(5, 70), PLAIN)


def test_linear_tma(monkeypatch):
    if INTERPRETED:
        cut = triton_common.TILES["interpreter", 4]
        monkeypatch.setitem(triton_common.TILES, ("interpreter", 4), dataclasses.replace(cut, descriptors=True))
    one = Head(random(18, 4)[:, ::4], random(150, 4, seed=1)[:, ::4])  # a single column, of stride 4
    check_linear(one, Head(*(x.flip(0) for x in one[:2])), some_tokens(18, 150), PLAIN)
    for depth in (40, 41):  # rows on 16 bytes, and not
        check_linear(make_head(18, 150, depth), make_head(18, 150, depth, seed=5), some_tokens(18, 150), BENT)
    head, tokens_N = make_head(18, 150, 40), some_tokens(18, 150)
    check_backward(run_backward(head, tokens_N, BENT, random(18)), head, tokens_N, BENT, random(18))


def test_linear_shared_head(ordered_products):
    for dtype, transform in ((torch.bfloat16, PLAIN), (torch.float32, BENT)):
        sft = make_head(9, 150, 40, dtype)
        base = sft._replace(hidden_ND=random(9, 40, dtype=dtype, seed=8))
        tokens_N = some_tokens(9, 150)
        shared = check_linear(sft, base, tokens_N, transform)
        apart = triton_linear.linear_logprob_diff(
            sft, base._replace(weight_VD=base.weight_VD.clone()), tokens_N, transform
        )
        assert all(same_bits(x, y) for x, y in zip(shared, apart, strict=True))
        back = triton_linear.linear_logprob_diff(base, sft, tokens_N, transform)
        assert same_bits(shared.diff_N, -back.diff_N)
        assert (triton_linear.linear_logprob_diff(sft, sft, tokens_N, transform).diff_N == 0).all()


@pytest.mark.parametrize("depth,width", [(41, 44), (40, 43), (41, 41)])
def test_linear_shared_head_keeps_its_tiles(depth, width, ordered_products):
    # Rows padded to 16 bytes, off them, and of an odd width: the stacked rows are to be as the model's own were.
    weight_VD = random(150, 48, scale=0.3)[:, :depth]
    hidden = [random(33, width, seed=i)[:, :depth] for i in range(2)]
    sft, base = (Head(x, weight_VD) for x in hidden)
    shared = check_linear(sft, base, some_tokens(33, 150), PLAIN)
    apart = triton_linear.linear_logprob_diff(
        sft, base._replace(weight_VD=random(150, 48, scale=0.3)[:, :depth]), some_tokens(33, 150), PLAIN
    )
    assert all(same_bits(x, y) for x, y in zip(shared, apart, strict=True))


def test_linear_adversarial():
    # Column 0 of the hidden states scales column 0 of the weight: logits of -inf without a NaN from 0 * inf.
    head = make_head(6, 150, 16, bias=False)
    bias_V = torch.zeros(150, device=DEVICE)
    bias_V[:130] = -INF  # two leading tiles of nothing else
    tokens_N = torch.tensor([149, 140, 135, 131, 7, 149], device=DEVICE)
    got = check_linear(head._replace(bias_V=bias_V), head, tokens_N, PLAIN)
    assert got.sft_logprobs_N[4] == -INF
    nothing = triton_linear.forward(head._replace(bias_V=bias_V.fill_(-INF)), tokens_N, PLAIN)
    assert nothing.logprobs_N.isnan().all() and nothing.lse_N.isnan().all()
    # One row so peaked that its log-prob is 0, in an order of sums that puts the target above the tile's maximum.
    peaked = Head(head.hidden_ND * 40, head.weight_VD * 5, None)
    best_N = plain_head(peaked).exact().argmax(1)
    assert (triton_linear.linear_logprob_diff(peaked, head, best_N, PLAIN).sft_logprobs_N <= 0).all()


def offset_head(rows, columns, depth):
    """Logits near 1e4 that fp32 holds exactly: eighths times eighths, where neighbours lie 1/1024 apart."""
    hidden_ND, weight_VD, _ = ((x * 8).round() / 8 for x in make_head(rows, columns, depth))
    return kernel_cases.Grid(hidden_ND, weight_VD, torch.full((columns,), 1e4, device=DEVICE))


def test_linear_offset():
    head, tokens_N = offset_head(6, 150, 16), some_tokens(6, 150)
    base = head._replace(hidden_ND=head.hidden_ND.flip(0), bias_V=None)
    got = triton_linear.linear_logprob_diff(Head(*head), Head(*base), tokens_N, PLAIN)
    check_diff(got, head, base, tokens_N)


def test_linear_strided_rows():
    hidden_ND, weight_VD = random(9, 60)[:, 4:44], random(150, 60, scale=0.3)[:, 8:48]
    sft = Head(hidden_ND, weight_VD)
    check_linear(sft, Head(hidden_ND.T.contiguous().T, weight_VD.T.contiguous().T), some_tokens(9, 150), PLAIN)


def test_linear_row_bits(monkeypatch, ordered_products):
    sft, base, tokens_N = make_head(33, 150, 40), make_head(33, 150, 48, seed=5), some_tokens(33, 150)
    whole = triton_linear.linear_logprob_diff(sft, base, tokens_N, BENT)
    again = triton_linear.linear_logprob_diff(sft, base, tokens_N, BENT)
    assert all(same_bits(x, y) for x, y in zip(whole, again, strict=True))
    for rows in [slice(n) for n in (1, 2, 7, 15, 16, 17)] + [slice(5, 8)]:
        heads = [head._replace(hidden_ND=head.hidden_ND[rows].clone()) for head in (sft, base)]
        part = triton_linear.linear_logprob_diff(*heads, tokens_N[rows], BENT)
        assert all(same_bits(x[rows], y) for x, y in zip(whole, part, strict=True)), rows
    monkeypatch.setattr(triton_linear, "SLAB", 16)
    monkeypatch.setattr(triton_linear, "PARTIAL_BYTES", 1)
    slabs = triton_linear.linear_logprob_diff(sft, base, tokens_N, BENT)
    assert all(same_bits(x, y) for x, y in zip(whole, slabs, strict=True))


def test_linear_builds_no_logits():
    sft, base, tokens_N = make_head(20, 2048, 8), make_head(20, 2048, 8, seed=5), some_tokens(20, 2048)
    with Allocations(*sft, *base) as allocations:
        triton_linear.linear_logprob_diff(sft, base, tokens_N, PLAIN)
    assert 0 < allocations.largest <= 20 * 2048 // 2


def test_empty():
    head, none_N = make_head(0, 50, 24), torch.zeros(0, dtype=torch.int64, device=DEVICE)
    parts = [triton_linear.linear_logprob_diff(head, head, none_N, PLAIN)]
    parts += [triton_linear.logprob_diff(random(0, 50), random(0, 50), none_N, PLAIN)]
    parts += [triton_linear.forward(head, none_N, PLAIN)]
    assert all(x.shape == (0,) for part in parts for x in part)
    d_hidden_ND, d_weight_VD, d_bias_V = run_backward(head, none_N, PLAIN, random(0))
    assert d_hidden_ND.shape == (0, 24) and (d_weight_VD == 0).all() and (d_bias_V == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward(dtype):
    for transform, bias in ((PLAIN, False), (BENT, True)):
        head, tokens_N = make_head(17, 150, 40, dtype, bias), some_tokens(17, 150)
        check_stats(triton_linear.forward(head, tokens_N, transform), head, tokens_N, transform)


def run_backward(head, tokens_N, transform, grad_N, needs=(True, True, True)):
    stats = triton_linear.forward(head, tokens_N, transform)
    return triton_linear.backward(head, tokens_N, transform, stats, grad_N, needs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("waves", [False, True])
def test_backward(dtype, waves, monkeypatch):
    if waves:  # several waves of rows and chunks of columns, the last of each ragged
        monkeypatch.setattr(triton_backward, "WAVE", 16)
        monkeypatch.setattr(triton_backward, "CHUNK", 64)
    for transform, bias in ((PLAIN, False), (BENT, True)):
        head, tokens_N, grad_N = make_head(35, 150, 40, dtype, bias), some_tokens(35, 150), random(35, seed=6)
        check_backward(run_backward(head, tokens_N, transform, grad_N), head, tokens_N, transform, grad_N)


def test_backward_offset():
    # log-sum-exp in one number would lose the digits of every probability here.
    head, tokens_N, grad_N = offset_head(6, 70, 16), some_tokens(6, 70), random(6)
    check_grads(run_backward(Head(*head), tokens_N, PLAIN, grad_N), head, tokens_N, grad_N)


def test_backward_skips_what_is_not_needed():
    head, tokens_N, grad_N = make_head(9, 70, 24), some_tokens(9, 70), random(9)
    whole = run_backward(head, tokens_N, PLAIN, grad_N)
    for needs in itertools.product((False, True), repeat=3):
        got = run_backward(head, tokens_N, PLAIN, grad_N, needs)
        for x, y, needed in zip(got, whole, needs, strict=True):
            assert x is None if not needed else torch.equal(x, y)


def test_backward_multiplies_in_full_precision(monkeypatch):
    out, ones = torch.ones(16, 16, device=DEVICE), torch.ones(16, 16, dtype=torch.bfloat16, device=DEVICE)
    triton_backward._add_product(out, ones, ones)
    assert (out == 17).all()
    cublas, seen = torch.backends.cuda.matmul, set()

    def look(*_):
        seen.add((cublas.fp32_precision, cublas.allow_bf16_reduced_precision_reduction))

    monkeypatch.setattr(triton_backward, "_add_product", look)
    before = cublas.fp32_precision, cublas.allow_bf16_reduced_precision_reduction
    run_backward(make_head(9, 70, 24), some_tokens(9, 70), PLAIN, random(9))
    assert seen == {("ieee", False)}
    assert before == (cublas.fp32_precision, cublas.allow_bf16_reduced_precision_reduction)


def test_backward_through_the_dispatch_point():
    head, tokens_N, grad_N = make_head(9, 70, 24), some_tokens(9, 70), random(9)
    grad_N[3] = 0.0
    tokens_N[5] = -100
    leaves = [x.detach().requires_grad_(x is not head.weight_VD) for x in head]
    logprobs_N = kernels.linear_logprob(
        leaves[0], leaves[1], tokens_N, bias_V=leaves[2], temperature=0.7, impl="triton"
    )
    logprobs_N.backward(grad_N)
    kept_N, grads = tokens_N != -100, [x.grad for x in leaves]
    check_backward(grads, head, tokens_N, Transform(temperature=0.7), grad_N, kept_N=kept_N)
    assert (grads[0][[3, 5]] == 0).all() and logprobs_N[5] == 0 and grads[1] is None


def norms(x):
    return x.double().norm(dim=-1)


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [512, 2305])
@pytest.mark.parametrize("depth", [320, 1000])
def test_at_size(dtype, rows, depth):
    """Many tiles, programs with several each, chunks of the backward pass; the vocabulary ragged in all of them."""
    at_size(dtype, rows, depth, columns=50257, repeats=20, most=512)


def at_size(dtype, rows, depth, columns, repeats, most):
    sft, base = (make_head(rows, columns, depth, dtype, seed=5 * i) for i in range(2))
    tokens_N, grad_N = some_tokens(rows, columns), random(rows, seed=6, scale=1e3)  # no fp16 gradient underflows

    def results():
        diff = triton_linear.linear_logprob_diff(sft, base, tokens_N, BENT)
        stats = triton_linear.forward(sft, tokens_N, PLAIN)
        grads = triton_linear.backward(sft, tokens_N, PLAIN, stats, grad_N, (True, True, True))
        return [*diff, stats.logprobs_N, stats.lse_N], grads

    forward, grads = results()
    d_weight_VD, d_bias_V = (torch.zeros_like(x, dtype=torch.float64) for x in sft[1:])
    d_hidden = []
    for start in range(0, rows, 256):
        part = slice(start, min(start + 256, rows))
        tokens, pair = tokens_N[part], [head._replace(hidden_ND=head.hidden_ND[part]) for head in (sft, base)]
        one, two, plain = (
            Softmax.of(plain_head(head), UNIT[torch.float32], **vars(transform))
            for head, transform in zip((*pair, pair[0]), (BENT, BENT, PLAIN), strict=True)
        )
        first, second = one.at(tokens)[0], two.at(tokens)[0]
        truth = [first - second, first, second, one.lse_N, two.lse_N, plain.at(tokens)[0], plain.lse_N]
        # Matrix units cut digits off their sums where plain fp32 rounds: an error that grows as depth, not as its root,
        # of 2 units of logits up to 20 for each 16 terms; twice in a log-prob, four times in a difference.
        for x, right in zip(forward, truth, strict=True):
            check(f"rows {part}", x[part], right, 4 * 20 * 2.0**-22 * (depth / 16 + 16))
        d_NV = (torch.nn.functional.one_hot(tokens, columns) - plain.logp_NV.exp()) * grad_N[part, None].double()
        hidden_ND, weight_VD = (x.double() for x in pair[0][:2])
        d_hidden.append(d_NV @ weight_VD)
        d_weight_VD += d_NV.T @ hidden_ND
        d_bias_V += d_NV.sum(0)
    near = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-3}[dtype]  # of the norm of each row
    tails = [(x[-(columns % 256) :], y[-(columns % 256) :]) for x, y in ((grads[2], d_bias_V),)]
    for got, want in [(grads[0], torch.cat(d_hidden)), (grads[1], d_weight_VD), (grads[2], d_bias_V), *tails]:
        assert (norms(got.double() - want) <= near * norms(want)).all()
    for _ in range(repeats - 1):
        again = results()
        assert all(torch.equal(x, y) for x, y in zip([*forward, *grads], [*again[0], *again[1]], strict=True))
    for size in range(1, most + 1):
        for cut in (slice(size), slice(rows - size, rows)):
            heads = [head._replace(hidden_ND=head.hidden_ND[cut]) for head in (sft, base)]
            part = [*triton_linear.linear_logprob_diff(*heads, tokens_N[cut], BENT)]
            stats = triton_linear.forward(heads[0], tokens_N[cut], PLAIN)
            part += [stats.logprobs_N, stats.lse_N]
            assert all(same_bits(x[cut].contiguous(), y) for x, y in zip(forward, part, strict=True)), cut


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU and 9 GB of its memory")
def test_logits_beyond_32_bits():
    rows, columns = 17000, 128256
    logits_NV = torch.zeros(rows, columns, dtype=torch.bfloat16, device=DEVICE)
    logits_NV[-1, 5] = 3.0
    tokens_N = torch.full((rows,), 5, device=DEVICE)
    got = triton_linear.logprob_diff(logits_NV, torch.zeros_like(logits_NV), tokens_N, PLAIN)
    assert (got.diff_N[:-1] == 0).all() and abs(got.diff_N[-1].item() - 3.0) < 1e-3


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
def test_logits_compile_report_says_why_not():
    with pytest.raises(ConfigError, match="TRITON_INTERPRET"):
        compile_report()
