"""linear_reverse_kl against fp64 by the definition, what its gradients are, and that no matrix of logits is built."""

from __future__ import annotations

from typing import Any
from unittest.mock import Mock

import pytest
import torch
from kernel_cases import (
    BF16,
    FP32,
    FP64,
    ROWS,
    TRANSFORMS,
    UNIT,
    Allocations,
    Head,
    Softmax,
    check,
    make_head,
    same_bits,
    summed,
    transformed,
)
from torch import Tensor

from srppo.errors import ConfigError
from srppo.kernels import Head as KernelHead
from srppo.kernels import ReverseKl, divergence, linear_reverse_kl

impls = pytest.mark.parametrize("impl", ["reference", "torch"])
BETA = 0.5


def teacher(sft_NV: Tensor, base_NV: Tensor) -> Tensor:
    """pi_sft^(1 + 1/beta) pi_base^(-1/beta), normalised."""
    return (sft_NV + (sft_NV - base_NV) / BETA).log_softmax(-1)


def three(rows: int, width: int, vocabulary: int, pair: Any = (FP32, FP32)) -> list[Head]:
    return [make_head(rows, width, vocabulary, pair, seed=seed) for seed in range(3)]


def kl_of(heads: list[Head], impl: Any = "torch", **options: Any) -> ReverseKl:
    policy, sft, base = (KernelHead(*head) for head in heads)
    return linear_reverse_kl(policy, sft, base, teacher, impl=impl, **options)


def grads_of(heads: list[Head], impl: Any = "torch", **options: Any) -> tuple[ReverseKl, list[Tensor]]:
    leaves = [x.detach().requires_grad_() for x in heads[0] if x is not None]
    found = kl_of([Head(*leaves), *heads[1:]], impl, **options)
    return found, list(torch.autograd.grad(found.total, leaves))


def others(transform: dict[str, Any]) -> dict[str, Any]:
    """The transform of the frozen models: at temperature 1."""
    return {**transform, "temperature": 1.0} if transform else {}


def exact(heads: list[Head], **transform: Any) -> tuple[list[Tensor], list[Tensor]]:
    """KL to teacher, SFT model and base of each row, and the gradients of the first one's sum; fp64, by autograd."""
    leaves = [x.detach().double().requires_grad_() for x in heads[0] if x is not None]
    policy_NV = transformed(Head(*leaves).exact(), **transform).log_softmax(-1)
    sft_NV, base_NV = (transformed(head.exact(), **others(transform)).log_softmax(-1) for head in heads[1:])
    kl_3N = [
        (policy_NV.exp() * (policy_NV - other_NV)).sum(-1) for other_NV in (teacher(sft_NV, base_NV), sft_NV, base_NV)
    ]
    return kl_3N, list(torch.autograd.grad(kl_3N[0].sum(), leaves))


@impls
@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda t: "-".join(map(str, t.values())))
def test_values_and_gradients_are_those_of_the_definition(impl: Any, transform: dict[str, Any]) -> None:
    heads = three(23, 9, 37, (FP64, FP64))
    (total, *kl_3N), grads = grads_of(heads, impl, **transform)
    want_3N, want_grads = exact(heads, **transform)
    torch.testing.assert_close(total, want_3N[0].sum(), rtol=1e-12, atol=1e-12)
    for got, want in zip([*kl_3N, *grads], [*want_3N, *want_grads], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    assert all(bool((kl_N >= 0).all()) for kl_N in kl_3N)


@impls
@pytest.mark.parametrize("pair", [(FP32, FP32), (BF16, FP32), (BF16, BF16)], ids=["fp32", "mixed", "bf16"])
@pytest.mark.parametrize(("rows", "width", "vocabulary"), [(1, 1, 1), (5, 3, 17), (70, 64, 1000), (300, 65, 257)])
def test_values_and_gradients_are_as_accurate_as_fp32(
    impl: Any, pair: Any, rows: int, width: int, vocabulary: int
) -> None:
    """What each log-prob may be off by (kernel_cases), carried through the KL and its gradient."""
    heads, unit = three(rows, width, vocabulary, pair), UNIT[FP32]
    policy, sft, base = (Softmax.of(head, unit) for head in heads)
    p_NV = policy.logp_NV.exp()
    off_teacher_NV = (1 + 1 / BETA) * sft.off_logp_NV + base.off_logp_NV / BETA
    off_teacher_NV = 2 * (off_teacher_NV + (p_NV * off_teacher_NV).sum(-1, keepdim=True).clamp(min=8 * unit))
    (_, *kl_3N), grads = grads_of(heads, impl)
    want_3N, want_grads = exact(heads)
    apart_NV, off_NV = [], []
    for got_N, want_N, logp_NV, off_other_NV in zip(
        kl_3N,
        want_3N,
        (teacher(sft.logp_NV, base.logp_NV), sft.logp_NV, base.logp_NV),
        (off_teacher_NV, sft.off_logp_NV, base.off_logp_NV),
        strict=True,
    ):
        apart_NV.append(policy.logp_NV - logp_NV)
        off_apart_NV = policy.off_logp_NV + off_other_NV + 4 * unit * (policy.logp_NV.abs() + logp_NV.abs())
        off_NV.append(off_apart_NV)
        allowed_N = (p_NV * (off_apart_NV + apart_NV[-1].abs() * (policy.off_logp_NV + 4 * unit))).sum(-1)
        check("KL", got_N, want_N, allowed_N + vocabulary * unit * (p_NV * apart_NV[-1].abs()).sum(-1))
    d_NV = p_NV * (apart_NV[0] - want_3N[0][:, None])
    size_NV = apart_NV[0].abs() + want_3N[0][:, None].abs()
    off_d_NV = p_NV * (size_NV * (policy.off_logp_NV + (8 + vocabulary) * unit) + off_NV[0])
    off_d_NV += p_NV * (p_NV * off_NV[0]).sum(-1, keepdim=True)
    hidden_ND, weight_VD = (x.double() for x in heads[0][:2])
    ones_N1 = torch.ones(rows, 1, dtype=FP64)
    for x, got, want, allowed in zip(
        heads[0],
        grads,
        want_grads,
        (
            off_d_NV @ weight_VD.abs() + summed(d_NV, weight_VD, unit),
            off_d_NV.T @ hidden_ND.abs() + summed(d_NV.T, hidden_ND, unit),
            off_d_NV.sum(0) + summed(d_NV.T, ones_N1, unit)[:, 0],
        ),
        strict=True,
    ):
        assert x is not None and got.dtype == x.dtype
        info = torch.finfo(x.dtype)
        check("gradient", got, want, allowed * 2 + want.abs() * info.eps + info.smallest_normal)


def test_at_its_teacher_a_policy_stands_still() -> None:
    """pi_sft = pi_base = policy: the teacher is the policy too, but for the rounding of its normaliser."""
    head = make_head(ROWS, 24, 100)
    found, grads = grads_of([head, head, head])
    assert found.teacher_N.abs().max() < 100 * UNIT[FP32] and not found.sft_N.any() and not found.base_N.any()
    far = grads_of([head, *three(ROWS, 24, 100)[1:]])[1]
    assert all(grad.abs().max() < 1e-4 * other.abs().max() for grad, other in zip(grads, far, strict=True))


@pytest.mark.parametrize("vocabulary", [37, 64])
def test_chunks_change_no_row_and_no_sum_by_more_than_rounding(
    vocabulary: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = three(ROWS, 24, vocabulary)
    whole, grads = grads_of(heads)
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 16 * vocabulary)
    parts, other_grads = grads_of(heads)
    assert all(map(same_bits, whole[1:], parts[1:])) and same_bits(grads[0], other_grads[0])
    for one, other in zip(grads, other_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    few = kl_of([head._replace(hidden_ND=head.hidden_ND[3:9]) for head in heads])
    assert all(same_bits(few_N, all_N[3:9]) for few_N, all_N in zip(few[1:], whole[1:], strict=True))
    again, same_grads = grads_of(heads)
    assert all(map(same_bits, [*parts, *other_grads], [*again, *same_grads]))


def test_no_matrix_of_logits_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, vocabulary = 640, 1024
    heads = [head._replace(bias_V=None) for head in three(rows, 16, vocabulary)]
    monkeypatch.setattr(divergence, "CHUNK_ELEMENTS", 16 * vocabulary)
    with Allocations(*(x for head in heads for x in head[:2])) as allocations:
        grads_of(heads)
    assert allocations.largest == 16 * vocabulary < rows * vocabulary


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, True), (True, True, False)], ids=str)
def test_only_what_is_asked_for_gets_a_gradient_and_upstream_scales_it(needs: tuple[bool, ...]) -> None:
    heads = three(21, 8, 40)
    _, grads = grads_of(heads)
    leaves = Head(*(x.clone().requires_grad_(need) for x, need in zip(heads[0], needs, strict=True)))
    (kl_of([leaves, *heads[1:]]).total / 4).backward()
    assert tuple(x.grad is not None for x in leaves) == needs
    for x, grad in zip(leaves, grads, strict=True):
        if x.grad is not None:
            torch.testing.assert_close(x.grad, grad / 4)
    for head in heads:
        assert all(x is None or x.grad is None for x in head), "the frozen models are constants"


@impls
def test_frozen_models_get_no_gradient(impl: Any) -> None:
    heads = [Head(*(x.requires_grad_() for x in head)) for head in three(6, 8, 20)]
    kl_of(heads, impl).total.backward()
    assert all(x.grad is not None for x in heads[0]) and all(x.grad is None for head in heads[1:] for x in head)


def test_where_no_gradient_is_wanted_none_is_worked_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are trained elsewhere: the values are the same, and no product for a gradient is made."""
    heads = three(40, 8, 33)
    leaves = Head(*(x.detach().requires_grad_() if x is not None else None for x in heads[0]))
    wanted = kl_of([leaves, *heads[1:]])
    products = Mock(side_effect=torch.mm)
    monkeypatch.setattr(torch, "mm", products)
    with torch.no_grad():
        found = kl_of([leaves, *heads[1:]])
    assert not products.called and not found.total.requires_grad
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.detach())


def test_nothing_sampled_is_nothing_lost() -> None:
    found, grads = grads_of(three(0, 8, 20))
    assert found.total == 0 and found.teacher_N.shape == (0,) and not any(grad.any() for grad in grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda heads: heads[1].hidden_ND.resize_(4, 2), r"\(3, 5\) of the policy, \(4, 5\) of the SFT model"),
        (lambda heads: heads[2].weight_VD.resize_(6, 2), r"the weight \(6, 2\); the bias must be \(V,\)"),
        (lambda heads: heads[0].hidden_ND.resize_(3, 3), r"hidden states are \(3, 3\) and the weight is \(5, 2\)"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(change: Any, message: str) -> None:
    heads = three(3, 2, 5)
    change(heads)
    with pytest.raises(ConfigError, match=message):
        kl_of(heads)
    with pytest.raises(ConfigError, match="impl is 'fast'; allowed"):
        kl_of(three(3, 2, 5), "fast")
