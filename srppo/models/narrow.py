"""Frozen weights in the checkpoint's own 16 bits, while everything is computed in fp32: half the memory, the same bits.

A 16-bit number is an fp32 number, so a layer that widens its weights as it multiplies gives what a model loaded in
fp32 gives. Only matrices and embeddings are kept narrow; all else, which is small, is widened when it is loaded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WORTH = 1 << 28
"""Bytes in fp32 below which a model is simply widened: widening costs time in each pass."""


class NarrowLinear(nn.Linear):
    """A linear layer whose frozen weight is widened to its input's precision within the product."""

    def forward(self, input: Tensor) -> Tensor:
        if input.dtype == self.weight.dtype or torch.is_autocast_enabled(input.device.type):
            return super().forward(input)
        out: Tensor = _Widened.apply(input, self.weight, self.bias)
        return out


class NarrowEmbedding(nn.Embedding):
    """An embedding whose rows are fp32, as the residual stream that they begin is."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).float()


_NARROW: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: NarrowLinear, nn.Embedding: NarrowEmbedding}


class _Widened(torch.autograd.Function):
    """x @ weight.T + bias of a frozen weight: what is saved for the gradient is the narrow one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight.to(x.dtype), bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return grad @ weight.to(grad.dtype), None, None


def keep_narrow(model: Any) -> None:
    """Freeze a model, and leave its 16-bit matrices and embeddings as they are where that saves enough; all else, and
    models below WORTH, become fp32."""
    model.requires_grad_(False)
    large = 4 * sum(weight.numel() for weight in model.parameters()) >= WORTH
    known: list[Any] = [module for module in model.modules() if type(module) in _NARROW] if large else []
    # A weight that is tied to another kind of layer's is read by that too, which would not widen it.
    theirs = {
        id(weight)
        for module in model.modules()
        if type(module) not in _NARROW
        for weight in module.parameters(recurse=False)
    }
    kept = {id(module.weight) for module in known if module.weight.dtype.itemsize == 2} - theirs
    for module in known:
        if id(module.weight) in kept:
            module.__class__ = _NARROW[type(module)]
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) not in kept and tensor.is_floating_point():
            tensor.data = tensor.data.float()
    if kept and model.device.type != "meta" and not _runs(model):  # without data nothing runs
        widen(model)
        model.requires_grad_(False)


@torch.no_grad()
def _runs(model: Any) -> bool:
    """Whether all weights are read by way of their layers: a product of two precisions raises."""
    try:
        model(input_ids=torch.zeros((1, 2), dtype=torch.int64, device=model.device), use_cache=False)
    except RuntimeError:
        return False
    return True


def widen(model: nn.Module) -> None:
    """Undo `keep_narrow`: plain layers with fp32 weights that can be trained."""
    plain = {narrow: layer for layer, narrow in _NARROW.items()}
    for module in model.modules():
        if type(module) in plain:
            module.__class__ = plain[type(module)]
    for weight in model.parameters():
        weight.data = weight.data.float()
    model.requires_grad_(True)
