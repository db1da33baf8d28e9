"""Norms, gates and rotations of a model of transformers in compiled code (`kernels.body`): fp32 on a CPU.

Each is put in by the class of its module, so that weights, names, hooks and copies stay what they are, and only after
the module's own code has given the same on random numbers. What `body.fits` refuses (a GPU, bf16, autocast) goes
through the module's own code, as does every module that is of another kind.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from srppo.kernels import body

ROTATION = "apply_rotary_pos_emb"  # as the code of each model calls it
TOLERANCE = 1e-5  # of a module and its compiled form on random numbers of size 1; another formula is off by 1e-2


class _Norm(nn.Module):
    """RMSNorm over the last dimension."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        module: Any = self
        if not (hidden_states.is_contiguous() and body.fits(hidden_states, module.weight)):
            out: Tensor = super().forward(hidden_states)
            return out
        return body.rms_norm(hidden_states, module.weight, _eps(self))


class _GatedMlp(nn.Module):
    """down(silu(gate(x)) * up(x)); its layers are called as modules, since adapters may lie over them."""

    def forward(self, x: Tensor) -> Tensor:
        module: Any = self
        if not body.fits(x):
            out: Tensor = super().forward(x)
            return out
        gate, up = module.gate_proj(x), module.up_proj(x)
        fused = body.fits(gate, up) and gate.is_contiguous() and up.is_contiguous()
        hidden = body.swiglu(gate, up) if fused else F.silu(gate) * up
        out = module.down_proj(hidden)
        return out


def fuse(model: nn.Module) -> None:
    """Give every module of a model that is known, and proved, its compiled form. Without a compiler nothing happens."""
    if not body.fits():
        return
    for module in model.modules():
        own: Any = type(module)
        if getattr(own, "is_fused", False):  # of another model that has these modules
            continue
        if _is_norm(module):
            module.__class__ = _with(_Norm, own)
        elif _is_gated(module):
            module.__class__ = _with(_GatedMlp, own)
        elif _rotates(own):
            module.__class__ = _rotating(own)


@cache
def _with(part: Any, own: Any) -> type[nn.Module]:
    return type(f"Fused{own.__name__}", (part, own), {"is_fused": True})


def _same(theirs: Any, ours: Tensor) -> bool:
    return (
        isinstance(theirs, Tensor)
        and theirs.shape == ours.shape
        and theirs.dtype == ours.dtype
        and torch.allclose(theirs, ours, rtol=TOLERANCE, atol=TOLERANCE)
    )


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32, device="cpu")


def _eps(norm: Any) -> float:
    eps: float = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
    return eps


@torch.no_grad()
def _is_norm(module: nn.Module) -> bool:
    """A weight, an epsilon, and for rows small enough to feel it and others what `body.rms_norm` gives."""
    named = type(module).__name__.endswith("RMSNorm") and [name for name, _ in module.named_parameters()] == ["weight"]
    weight: Any = getattr(module, "weight", None)
    if (
        not named
        or weight.dim() != 1
        or not isinstance(getattr(module, "variance_epsilon", getattr(module, "eps", None)), float)
    ):
        return False
    weight_D = _random(len(weight))
    x_ND = _random(3, len(weight)) * torch.tensor([[1.0], [1e-3], [30.0]])
    try:
        return _same(
            functional_call(module, {"weight": weight_D}, (x_ND,)), body.rms_norm(x_ND, weight_D, _eps(module))
        )
    except (TypeError, ValueError, RuntimeError):
        return False


class _Told(nn.Module):
    """In the place of a layer: remembers what it is asked, and answers what it was told to."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.answer, self.asked = answer, [Tensor()]

    def forward(self, x: Tensor) -> Tensor:
        self.asked.append(x)
        return self.answer


@torch.no_grad()
def _is_gated(module: nn.Module) -> bool:
    """Three linear layers and SiLU: the first two are given the input, the third what `body.swiglu` gives."""
    if {name for name, _ in module.named_children()} != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return False
    x, gate, up, down = (_random(3, width) for width in (5, 7, 7, 4))
    up = up.flip(0)
    probe, answers = copy.copy(module), {"gate_proj": gate, "up_proj": up, "down_proj": down}
    told = {name: _Told(answer) for name, answer in answers.items()}
    probe._modules = {**module._modules, **told}
    try:
        out = probe(x)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    asked = {name: layer.asked[-1] for name, layer in told.items()}
    return (
        out is down
        and asked["gate_proj"] is x
        and asked["up_proj"] is x
        and _same(asked["down_proj"], body.swiglu(gate, up))
    )


@cache
@torch.no_grad()
def _rotates(own: type[nn.Module]) -> bool:
    """Attention whose code calls a function of its file by the name ROTATION, which gives what `body.rotate` gives."""
    forward: Any = own.forward
    if not isinstance(forward, types.FunctionType) or ROTATION not in forward.__code__.co_names:
        return False
    theirs = forward.__globals__.get(ROTATION)
    if not isinstance(theirs, types.FunctionType):
        return False
    q_BHSD, k_BHSD, cos_BSD, sin_BSD = _random(2, 3, 5, 8), _random(2, 1, 5, 8), _random(2, 5, 8), _random(2, 5, 8) + 1
    try:
        q, k = theirs(q_BHSD, k_BHSD, cos_BSD, sin_BSD)
    except (TypeError, ValueError, RuntimeError):
        return False
    return _same(q, body.rotate(q_BHSD, cos_BSD, sin_BSD)) and _same(k, body.rotate(k_BHSD, cos_BSD, sin_BSD))


@cache
def _rotating(own: type[nn.Module]) -> type[nn.Module]:
    """The same attention, in whose code the name ROTATION means `body.rotate`; the module's file stays as it is."""
    forward: Any = own.forward
    names = forward.__globals__ | {ROTATION: _rotation(forward.__globals__[ROTATION])}
    code = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    code.__kwdefaults__, code.__annotations__, code.__doc__ = (
        forward.__kwdefaults__,
        forward.__annotations__,
        forward.__doc__,
    )
    return type(f"Fused{own.__name__}", (own,), {"forward": code, "is_fused": True})


def _rotation(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def rotation(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> Any:
        plain = not more and not named and q.dim() == 4 and cos.dim() == 3 and cos.shape == sin.shape
        if (
            plain
            and cos.shape[0] in (1, q.shape[0])
            and q.shape[-1] == k.shape[-1] == cos.shape[-1]
            and cos.shape[-1] % 2 == 0
            and cos.is_contiguous()
            and sin.is_contiguous()
            and not (cos.requires_grad or sin.requires_grad)
            and body.fits(q, k, cos, sin)
        ):
            return body.rotate(q, cos, sin), body.rotate(k, cos, sin)
        return theirs(q, k, cos, sin, *more, **named)

    return rotation
