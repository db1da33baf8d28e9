"""What stands between the matrix products of a Llama-like body, compiled (body.cpp): RMSNorm, the gate of a SwiGLU,
rotary position embedding. fp32 on a CPU, forward and backward.

Each is one pass over its inputs and saves what the gradient needs alone: of RMSNorm the input and 1 / rms of each row,
of a SwiGLU its two inputs, of the rotation the angles. Ask `fits` before calling any. A gradient that is to be
differentiated again is taken from the definition in plain torch.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from srppo.kernels import native

PLAIN = (Tensor, nn.Parameter, FakeTensor)  # no parts of weights, no tensors of other makers
ONE_THREAD = 1 << 15  # numbers up to which waking a second thread costs more than it saves


def fits(*tensors: Tensor) -> bool:
    """Whether the compiled operations take these: fp32 on a CPU, and neither autocast nor torch.func at work."""
    return (
        all(type(x) in PLAIN and x.dtype is torch.float32 and x.device.type == "cpu" for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and native.load().library is not None
    )


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (https://arxiv.org/abs/1910.07467); x contiguous."""
    if torch.is_grad_enabled() and (x.requires_grad or weight_D.requires_grad):
        out: Tensor = _RmsNorm.apply(x, weight_D, eps)
        return out
    return _rms_norm(x, weight_D, eps)[0]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (https://arxiv.org/abs/2002.05202); both contiguous and of one shape."""
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        out: Tensor = _SwiGlu.apply(gate, up)
        return out
    return _swiglu(gate, up)


def rotate(x_BHSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """x * cos + rotate_half(x) * sin (https://arxiv.org/abs/2104.09864), in memory as BSHD.

    D even and without gaps in memory; one set of angles, contiguous, may stand for all of B.
    """
    if torch.is_grad_enabled() and x_BHSD.requires_grad:
        out: Tensor = _Rotate.apply(x_BHSD, cos_BSD, sin_BSD)
        return out
    return _rotate(x_BHSD, cos_BSD, sin_BSD)


def rotated(x_BHSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """The definition of `rotate`."""
    first, second = x_BHSD.chunk(2, dim=-1)
    return x_BHSD * cos_BSD[:, None] + torch.cat((-second, first), dim=-1) * sin_BSD[:, None]


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        out, inverse = _rms_norm(x, weight_D, eps)
        ctx.save_for_backward(x, weight_D, inverse)
        ctx.eps = eps
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, inverse = ctx.saved_tensors
        if torch.is_grad_enabled():
            plain = lambda x, w: w * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + ctx.eps))  # noqa: E731
            return *_differentiable(plain, grad, x, weight_D), None
        grad, d_x = grad.contiguous(), torch.empty_like(x)
        d_weight_D = torch.empty_like(weight_D) if ctx.needs_input_grad[1] else None
        sizes = (inverse.numel(), len(weight_D))
        _run("srppo_rms_norm_gradient", (grad, x, weight_D, inverse, d_x, d_weight_D), *sizes, threads=_threads(x))
        return d_x, d_weight_D, None


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(lambda gate, up: F.silu(gate) * up, grad, gate, up)
        grad, d_gate, d_up = grad.contiguous(), torch.empty_like(gate), torch.empty_like(up)
        _run("srppo_swiglu_gradient", (grad, gate, up, d_gate, d_up), gate.numel(), threads=_threads(gate))
        return d_gate, d_up


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BSD, sin_BSD)
        return _rotate(x_BHSD, cos_BSD, sin_BSD)

    @staticmethod
    def backward(ctx: Any, grad_BHSD: Tensor) -> tuple[Tensor, None, None]:
        cos_BSD, sin_BSD = ctx.saved_tensors
        if torch.is_grad_enabled():  # it is linear: the gradient is the opposite rotation
            first, second = (grad_BHSD * sin_BSD[:, None]).chunk(2, dim=-1)
            return grad_BHSD * cos_BSD[:, None] + torch.cat((second, -first), dim=-1), None, None
        return _rotate(grad_BHSD, cos_BSD, sin_BSD, transposed=True), None, None


def _differentiable(definition: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients with a graph of their own, for those inputs that have any."""
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(definition(*inputs), wanted, grad, create_graph=True))
    return tuple(next(found) if x.requires_grad else None for x in inputs)


def _rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1])
    _run("srppo_rms_norm", (x, weight_D, out, inverse), inverse.numel(), len(weight_D), eps, threads=_threads(x))
    return out, inverse


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    out = torch.empty_like(gate)
    _run("srppo_swiglu", (gate, up, out), gate.numel(), threads=_threads(gate))
    return out


def _rotate(x_BHSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor, *, transposed: bool = False) -> Tensor:
    x_BHSD = x_BHSD if x_BHSD.stride(-1) == 1 else x_BHSD.contiguous()
    (B, H, S, D), angles = x_BHSD.shape, cos_BSD.shape[0] * cos_BSD.shape[1]
    out_BSHD = x_BHSD.new_empty((B, S, H, D))
    if not isinstance(out_BSHD, FakeTensor):
        strides = (ctypes.c_int64 * 3)(*x_BHSD.stride()[:3])
        pointers = (cos_BSD.data_ptr(), sin_BSD.data_ptr(), angles, out_BSHD.data_ptr())
        library: Any = native.load().library
        library.srppo_rotate(x_BHSD.data_ptr(), strides, *pointers, B, H, S, D, int(transposed), _threads(out_BSHD))
    return out_BSHD.transpose(1, 2)


def _run(name: str, tensors: tuple[Tensor | None, ...], *numbers: float, threads: int) -> None:
    """Call the library; with fake tensors, whose memory is only counted, nothing is computed."""
    if not isinstance(tensors[0], FakeTensor):
        pointers = [None if x is None else x.data_ptr() for x in tensors]
        if getattr(native.load().library, name)(*pointers, *numbers, threads):
            raise MemoryError("not enough memory for the gradient of a norm's weight")


def _threads(x: Tensor) -> int:
    return torch.get_num_threads() if x.numel() > ONE_THREAD else 1
