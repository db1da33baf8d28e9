"""Reverse KL of a policy's next-token distribution to that of a teacher, which two frozen models make together.

    KL(policy || teacher) = sum_v policy(v) [log policy(v) - log teacher(v)]
    its gradient          = policy(v) [log policy(v) - log teacher(v) - KL]        in logit v of the policy

Teacher and KL need whole rows of the vocabulary, so it is the rows that are taken in chunks: three head products give
the distributions of a chunk, its KL and the gradient, two more what the gradient does to hidden states and weight, and
nothing as wide as the vocabulary outlives the chunk but the weight's gradient. All five are done at once, since later
the logits would have to be computed again (so does Liger Kernel, arXiv 2410.10989, with the cross entropy). Plain torch
on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from srppo.kernels.cpu import STEP, padded
from srppo.kernels.precision import fp32_products
from srppo.kernels.types import Head, Transform, accumulator

CHUNK_ELEMENTS = 1 << 22  # logits of one model held at once: 16 MiB in fp32, which caches may hold
Teacher = Callable[[Tensor, Tensor], Tensor]
"""(log pi_sft NV, log pi_base NV) -> log of the teacher's distribution, NV; works on each row alone."""


class ReverseKl(NamedTuple):
    """total: the sum of teacher_N, differentiable in the policy. teacher_N, sft_N, base_N: KL(policy || each) of every
    row, constants; fp32, nats."""

    total: Tensor
    teacher_N: Tensor
    sft_N: Tensor
    base_N: Tensor


def reverse_kl(policy_NV: Tensor, sft_NV: Tensor, base_NV: Tensor, teacher: Teacher) -> ReverseKl:
    """The definition, from whole rows of log-probs."""
    others = (teacher(sft_NV, base_NV), sft_NV, base_NV)
    kl_3N = [(policy_NV.exp() * (policy_NV - other_NV)).sum(dim=-1) for other_NV in others]
    return ReverseKl(kl_3N[0].sum(), *(kl_N.detach() for kl_N in kl_3N))


def dense(policy: Head, sft: Head, base: Head, teacher: Teacher, transforms: tuple[Transform, Transform]) -> ReverseKl:
    """From hidden states by whole matrices of logits; transforms: the policy's and that of both others."""
    with fp32_products():
        policy_NV = _logits(policy, transforms[0]).log_softmax(dim=-1)
        with torch.no_grad():
            sft_NV, base_NV = (_logits(head, transforms[1]).log_softmax(dim=-1) for head in (sft, base))
        return reverse_kl(policy_NV, sft_NV, base_NV, teacher)


def chunked(
    policy: Head, sft: Head, base: Head, teacher: Teacher, transforms: tuple[Transform, Transform]
) -> ReverseKl:
    """The same by chunks of rows. Without gradients enabled none is worked out."""
    if not torch.is_grad_enabled():
        bias_V = None if policy.bias_V is None else policy.bias_V.detach()
        policy = Head(policy.hidden_ND.detach(), policy.weight_VD.detach(), bias_V)
    return ReverseKl(*_Chunked.apply(*policy, (sft, base), teacher, transforms))


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        frozen: tuple[Head, Head],
        teacher: Teacher,
        transforms: tuple[Transform, Transform],
    ) -> tuple[Tensor, ...]:
        (rows, depth), columns = hidden_ND.shape, len(weight_VD)
        dtype = accumulator(hidden_ND, weight_VD, bias_V)
        # In rows and columns of padding every product is 0; see cpu.padded for what it is good for.
        policy, *others = (
            Head(padded(head.hidden_ND.to(dtype)), padded(head.weight_VD.to(dtype)), head.bias_V)
            for head in (Head(hidden_ND, weight_VD, bias_V), *frozen)
        )
        d_hidden_ND, d_weight_VD, d_bias_V = (
            torch.zeros_like(x, dtype=dtype) if x is not None and need else None
            for need, x in zip(ctx.needs_input_grad, policy, strict=False)
        )
        parts = []
        size = max(CHUNK_ELEMENTS // columns // STEP, 1) * STEP
        with fp32_products():
            for first in range(0, rows, size):
                wave, count = slice(first, first + size), min(rows - first, size)

                def logits(head: Head, transform: Transform, wave: slice = wave) -> Tensor:
                    return _logits(head._replace(hidden_ND=head.hidden_ND[wave]), transform, columns)

                z_NV = logits(policy, transforms[0])
                sft_NV, base_NV = (logits(head, transforms[1]).log_softmax(dim=-1) for head in others)
                kl_3N, d_NV = _with_gradient(z_NV, sft_NV, base_NV, teacher, transforms[0])
                parts.append(kl_3N[:, :count])
                d_NV[count:] = 0.0
                d_NV = padded(d_NV)
                if d_hidden_ND is not None:
                    torch.mm(d_NV, policy.weight_VD, out=d_hidden_ND[wave])
                if d_weight_VD is not None:
                    d_weight_VD.addmm_(d_NV.T, policy.hidden_ND[wave])
                if d_bias_V is not None:
                    d_bias_V += d_NV[:, :columns].sum(dim=0)
        ctx.save_for_backward(
            None if d_hidden_ND is None else d_hidden_ND[:rows, :depth].to(hidden_ND.dtype),
            None if d_weight_VD is None else d_weight_VD[:columns, :depth].to(weight_VD.dtype),
            None if d_bias_V is None or bias_V is None else d_bias_V.to(bias_V.dtype),
        )
        kl_3N = torch.cat(parts, dim=1) if parts else hidden_ND.new_zeros((3, 0), dtype=dtype)
        result = (kl_3N[0].sum(), *kl_3N.unbind())
        ctx.mark_non_differentiable(*result[1:])
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        return *(None if x is None else grad * x for x in ctx.saved_tensors), None, None, None


def _logits(head: Head, transform: Transform, columns: int | None = None) -> Tensor:
    dtype = accumulator(*head)
    raw_NV = F.linear(head.hidden_ND.to(dtype), head.weight_VD.to(dtype))[:, :columns]
    if head.bias_V is not None:
        raw_NV = raw_NV + head.bias_V.to(dtype)
    return raw_NV if transform == Transform() else transform(raw_NV)


def _with_gradient(
    z_NV: Tensor, sft_NV: Tensor, base_NV: Tensor, teacher: Teacher, transform: Transform
) -> tuple[Tensor, Tensor]:
    """(KL to teacher, SFT model and base, 3N; gradient of the first in the policy's raw logits, NV). z: its logits."""
    policy_NV = z_NV.log_softmax(dim=-1)
    p_NV = policy_NV.exp()
    d_NV = policy_NV - teacher(sft_NV, base_NV)
    kl_N = (p_NV * d_NV).sum(dim=-1)
    others = [(p_NV * (policy_NV - other_NV)).sum(dim=-1) for other_NV in (sft_NV, base_NV)]
    d_NV.sub_(kl_N[:, None]).mul_(p_NV).mul_(transform.logit_scale / transform.temperature)
    if transform.softcap is not None:  # z is softcap tanh(.) / temperature
        d_NV *= 1.0 - (z_NV * (transform.temperature / transform.softcap)).square()
    return torch.stack([kl_N, *others]), d_NV
