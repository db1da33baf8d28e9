"""Gradients of linear_logprob: against fp64, on hard inputs, only what is asked for, and what is kept for them."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from kernel_cases import (
    BF16,
    FP32,
    FP64,
    INF,
    NAN,
    OFFSET,
    ROWS,
    TRANSFORMS,
    Allocations,
    Head,
    check_grads,
    diff_of,
    dtype_pairs,
    dtypes,
    fast,
    grads_of,
    impls,
    make_grid,
    make_head,
    make_tokens,
    one_of,
    rng,
    same_bits,
)
from torch import Tensor

from srppo.kernels import (
    logprob_diff_parts,
)


@fast
@dtype_pairs
def test_gradients_are_repeatable(impl: Any, pair: tuple[torch.dtype, torch.dtype]) -> None:
    head, tokens_N = make_head(300, 65, 1030, pair), make_tokens(300, 1030)
    upstream_N = torch.randn(300, generator=rng(1))
    first, second = (grads_of(head, tokens_N, upstream_N, impl) for _ in range(2))
    assert all(map(same_bits, first, second))


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
        return one_of(Head(*leaves), tokens_N, impl, **transform)

    assert torch.autograd.gradcheck(logprobs, tuple(x.requires_grad_() for x in head), eps=1e-6, atol=1e-8, rtol=1e-6)
    for pair in ((BF16, BF16), (FP32, FP32)):
        head, tokens = make_head(ROWS, 24, 1300, pair), make_tokens(ROWS, 1300)  # more than a chunk
        upstream_N = torch.randn(ROWS, generator=rng(1))
        check_grads(grads_of(head, tokens, upstream_N, impl, **transform), head, tokens, upstream_N, **transform)


@impls
@dtypes
def test_gradients_on_hard_inputs(impl: Any, dtype: torch.dtype) -> None:
    """Columns of probability 0 (no gradient, no NaN), a shared offset of 1e4, a peak."""
    vocabulary = 1000
    grid = make_grid(ROWS, 8, vocabulary, dtype, seed=1)
    tokens_N, upstream_N = make_tokens(ROWS, vocabulary).clamp(min=600), torch.randn(ROWS, generator=rng(2))
    flat_V = torch.zeros(vocabulary, dtype=dtype)
    blocked_V, peaked_V = flat_V.clone(), flat_V.clone()
    blocked_V[:600], peaked_V[700] = -INF, OFFSET
    for bias_V in (blocked_V, flat_V + OFFSET, flat_V - OFFSET, peaked_V):
        head = grid._replace(bias_V=bias_V)
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
    logprobs_N = one_of(leaves, tokens_N, impl)
    assert logprobs_N.requires_grad == any(needs)
    if not any(needs):
        return
    upstream_N = torch.randn(16, generator=rng(1))
    with Allocations(*leaves, logprobs_N, upstream_N) as allocations:
        logprobs_N.backward(upstream_N)
    assert tuple(x.grad is not None for x in leaves) == needs
    check_grads([x.grad for x in leaves], head, tokens_N, upstream_N)
    # N x V is 1/16 of the weight here: only a weight gradient is as large as that.
    assert (allocations.largest >= head.weight_VD.numel()) == needs[1]


@impls
def test_the_difference_is_a_constant(impl: Any) -> None:
    head = Head(*(x.requires_grad_() for x in make_head(5, 4, 33)))
    logits_NV, tokens_N = torch.randn(5, 33, requires_grad=True), make_tokens(5, 33)
    parts = logprob_diff_parts(logits_NV, logits_NV, tokens_N, impl=impl)
    assert not any(part_N.requires_grad for part_N in (*diff_of(head, head, tokens_N, impl), *parts))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not one_of(head, tokens_N, impl).requires_grad


@fast
@dtype_pairs
def test_nothing_of_the_vocabulary_is_kept_for_backward(impl: Any, pair: tuple[torch.dtype, torch.dtype]) -> None:
    head, tokens_N = make_head(64, 16, 5000, pair), make_tokens(64, 5000)
    leaves, saved = Head(*(x.requires_grad_() for x in head)), {}

    def pack(x: Tensor) -> Tensor:
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logprobs_N = one_of(leaves, tokens_N, impl, softcap=30.0)
    inputs = {x.untyped_storage().data_ptr() for x in (*leaves, tokens_N)}
    assert sum(size for pointer, size in saved.items() if pointer not in inputs) <= 8 * 64
    assert logprobs_N.requires_grad


@fast
@pytest.mark.parametrize("offset", [88.9, 100.0, 1e4])
@pytest.mark.parametrize("rows", [1, 5, 1025])
def test_large_biases_leave_gradients_finite(impl: Any, rows: int, offset: float) -> None:
    """Rows added to fill a wave have logits equal to the bias, and exp of it overflows."""
    head = Head(*(x.requires_grad_() for x in make_head(rows, 4, 50)))
    shifted = head._replace(bias_V=(head.bias_V.detach() + offset).requires_grad_())
    one_of(shifted, make_tokens(rows, 50), impl).sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in shifted)
