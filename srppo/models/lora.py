"""A linear layer with a LoRA adapter as one operation, where PEFT has six: in fp32, on any device.

x W^T + bias + (scale x A^T) B^T (https://arxiv.org/abs/2106.09685). The scale is put on the few columns of the rank,
and both sums, of the result and of the gradient in x, are added onto what the frozen matrix gave: PEFT's own code
spends a tenth of a step on passes over whole activations (rank 16, 135M parameters, LOG.md).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srppo.kernels.body import PLAIN
from srppo.models.narrow import NarrowLinear


class _Lora(torch.autograd.Function):
    """x ...D fp32 to ...O: weight OD is frozen, and may have 16 bits; bias O or None; A RD, B OR, fp32; scale: alpha
    over the rank R. Gradients are in x, A and B, and cannot be differentiated again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float) -> Tensor:
        x_ND = x.reshape(-1, x.shape[-1])
        low_NR = (x_ND @ A.T).mul_(scale)
        out_NO = F.linear(x_ND, weight.to(x.dtype), bias).addmm_(low_NR, B.T)
        ctx.save_for_backward(x_ND, weight, A, B, low_NR)
        ctx.scale, ctx.shape = scale, x.shape
        return out_NO.view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, weight, A, B, low_NR = ctx.saved_tensors
        grad_NO = grad.reshape(-1, grad.shape[-1])
        d_low_NR = (grad_NO @ B).mul_(ctx.scale)
        d_x = (grad_NO @ weight.to(grad.dtype)).addmm_(d_low_NR, A).view(ctx.shape) if ctx.needs_input_grad[0] else None
        d_A = d_low_NR.T @ x_ND if ctx.needs_input_grad[3] else None
        d_B = grad_NO.T @ low_NR if ctx.needs_input_grad[4] else None
        return d_x, None, None, d_A, d_B, None


class _OneOperation(nn.Module):
    """PEFT's LoRA layer, whose own code does what `_fits` refuses."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer: Any = self
        if args or kwargs or not _fits(layer, x):
            out: Tensor = super().forward(x, *args, **kwargs)
            return out
        (name,) = layer.active_adapters
        base, A, B = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
        out = _Lora.apply(x, base.weight, base.bias, A, B, layer.scaling[name])
        return out


def _fits(layer: Any, x: Tensor) -> bool:
    """One plain adapter is active over a plain frozen layer, and all but the latter's matrix is fp32."""
    names = layer.active_adapters
    if layer.disable_adapters or layer.merged or len(names) != 1 or names[0] not in layer.lora_A:
        return False
    (name,), base = names, layer.base_layer
    A, B = layer.lora_A[name], layer.lora_B[name]
    return (
        type(base) in (nn.Linear, NarrowLinear)
        and not base.weight.requires_grad
        and name not in layer.lora_variant
        and isinstance(layer.lora_dropout[name], nn.Identity)
        and A.bias is None
        and B.bias is None
        and all(type(p) in PLAIN for p in (base.weight, A.weight, B.weight))
        and all(t.dtype is torch.float32 for t in (x, A.weight, B.weight))
        and (base.bias is None or (base.bias.dtype is torch.float32 and not base.bias.requires_grad))
        and not torch.is_autocast_enabled(x.device.type)
        and not torch._C._are_functorch_transforms_active()
    )


@cache
def one_operation(own: Any) -> type[nn.Module]:
    """The class `own` of PEFT's layers, whose results, ...D to ...O, are computed this way where that fits."""
    return type(own.__name__, (_OneOperation, own), {})
