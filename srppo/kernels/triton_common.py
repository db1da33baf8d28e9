"""What the Triton kernels share: tile sizes by architecture, the launch, and the logit transform.

Kernels launch with floating-point fusion off: a product and a sum that the compiler fuses in one place and not in
another would give a logit two values, and then a log-prob could be positive, diff(a, a) not 0, and a row's bits would
hang on the code around it. Matrix instructions are not concerned.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srppo.kernels.types import Transform

LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def exp(x):
    """exp in fp32, and never above 1 for x <= 0; tl.exp spends three more instructions on results below 2**-126.

    The product stays one of its own: fused with the centring of x it would round to above 0 for the maximum itself.
    """
    return tl.exp2(x * LOG2E)


@triton.jit
def tanh(x):
    """tanh in fp32 within 2 ulp: a series near 0, where 1 - exp(-2|x|) would cancel; no libdevice, so any backend."""
    square = x * x
    series = x * (1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decay = tl.exp(-2.0 * tl.abs(x))
    ratio = (1.0 - decay) / (1.0 + decay)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -ratio, ratio))


@triton.jit
def transformed(raw, inner, outer, CAPPED: tl.constexpr):
    """The logits of the softmax: outer * tanh(inner * raw), or outer * raw."""
    if CAPPED:
        return outer * tanh(inner * raw)
    return outer * raw


INTERPRETED = not isinstance(transformed, triton.JITFunction)  # TRITON_INTERPRET=1 when this module was imported
INTERPRETED_PROGRAMS = 2


def scalars(transform: Transform) -> dict[str, Any]:
    """The arguments of `transformed`, each constant rounded to fp32 once."""
    capped = transform.softcap is not None
    inner = transform.logit_scale / transform.softcap if transform.softcap is not None else 1.0
    outer = (transform.softcap if transform.softcap is not None else transform.logit_scale) / transform.temperature
    return {"inner": inner, "outer": outer, "CAPPED": capped}


@dataclass(frozen=True)
class Tiles:
    """How a GEMM kernel cuts its work: one program computes rows x columns logits in steps of depth.

    group row blocks pass over the vocabulary together: with 16 of 128 rows, 132 programs hold about as many rows as
    vocabulary columns at a time, the least traffic from L2. descriptors: TMA loads and one persistent program an SM.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    precision: str = "ieee"
    descriptors: bool = False
    group: int = 16


# By architecture and bytes of an operand. Each fits the shared memory of its smallest chip (227, 227, 163, 99, 64 KiB).
# fp32 operands: three TF32 products keep fp32's digits at several times the speed of FMA; CDNA multiplies fp32 itself.
TILES = {
    ("blackwell", 2): Tiles(128, 128, 64, 8, 5, descriptors=True),
    ("blackwell", 4): Tiles(128, 128, 32, 8, 3, "tf32x3", descriptors=True),
    ("hopper", 2): Tiles(128, 256, 64, 8, 4, descriptors=True),
    ("hopper", 4): Tiles(128, 128, 32, 8, 3, "tf32x3", descriptors=True),
    ("ampere", 2): Tiles(128, 256, 64, 8, 4),
    ("ampere", 4): Tiles(128, 64, 32, 8, 4, "tf32x3"),
    ("small", 2): Tiles(128, 128, 64, 8, 3),
    ("small", 4): Tiles(128, 64, 32, 8, 3, "tf32x3"),
    ("amd", 2): Tiles(128, 256, 64, 8, 2),
    ("amd", 4): Tiles(128, 128, 32, 8, 2),
    ("interpreter", 4): Tiles(16, 64, 64, 1, 1, group=2),
}
_FAMILIES = {"sm_80": "ampere", "sm_90": "hopper", "sm_100": "blackwell", "sm_103": "blackwell"}


def tiles(x: Tensor, aligned: bool) -> Tiles:
    """The tile sizes for operands of one device and dtype; aligned: every row of both begins on 16 bytes."""
    name = architecture(x)
    family = _FAMILIES.get(name, "small" if name.startswith("sm_") else "amd" if name.startswith("gfx") else name)
    cut = TILES[family, x.element_size()]
    # No TMA for rows off 16 bytes, and pointers for narrow loads take registers.
    return cut if aligned else replace(cut, columns=cut.columns // 2, descriptors=False)


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded instead of run."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


_recording: tuple[str, list[Launch]] | None = None


@contextlib.contextmanager
def recording(target: str) -> Iterator[list[Launch]]:
    """Inside, nothing runs on a GPU: every launch for `target` (sm_90, gfx942, ...) is appended to the list."""
    global _recording
    previous, _recording = _recording, (target, [])
    try:
        yield _recording[1]
    finally:
        _recording = previous


def architecture(x: Tensor) -> str:
    """sm_90, gfx942, ...; `interpreter` under TRITON_INTERPRET=1."""
    if _recording is not None:
        return _recording[0]
    if INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(x.device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(x.device)
    return f"sm_{major}{minor}"


def programs(x: Tensor) -> int:
    """How many persistent programs fill the device."""
    if INTERPRETED or _recording is not None:
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(x.device).multi_processor_count


def launch(kernel: Any, grid: int, arguments: dict[str, Any], *, warps: int, stages: int = 1) -> None:
    """Run a kernel over `grid` programs on the device of its first tensor."""
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": False}
    if _recording is not None:
        _recording[1].append(Launch(kernel, arguments, options))
        return
    device = next(x.device for x in arguments.values() if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[(grid,)](**arguments, **options)


def unit_stride(x: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous, as kernels need it; else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def blocks(count: int, size: int) -> int:
    """How many blocks of `size` cover `count`."""
    return math.ceil(count / size)
