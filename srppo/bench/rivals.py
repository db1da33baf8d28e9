"""Everyone who computes the operations, ours and others', behind one interface, so that all meet the same inputs."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from srppo.bench import outside
from srppo.bench.inputs import free_bytes
from srppo.bench.options import BACKWARD, DIFF, Case
from srppo.bench.prepare import (
    Prepare,
    all_fp32,
    backward_products,
    both,
    diff,
    from_logits,
    gather,
    linear,
    our_logprob,
    ours,
    products_into,
    products_linear,
    read,
    upcast,
    upcast_linear,
)
from srppo.errors import ConfigError

Kind = Literal["ours", "ours, plain", "outside", "floor", "bound"]


@dataclass(frozen=True)
class Rival:
    """Someone who computes an operation.

    id, words       for --rivals and rows; for the table
    kind            ours; "ours, plain" (what ours must beat in this package); outside; floor (the denominator: the
                    fastest floor of a case); bound (products that no operation with little memory can match)
    prepare         how, for each operation that the rival computes
    package         distribution it comes from ("" for torch and this package); module: what is imported of it
    gpu, compiler   whether it needs a GPU, or a C++ compiler when on a CPU
    sixteen_bit     only with 16-bit inputs: with fp32 it would be another rival's twin
    bytes_a_logit   what it holds for each logit of one model at its peak; 0 where logits are never built
    """

    id: str
    words: str
    kind: Kind
    prepare: Mapping[str, Prepare] = field(repr=False)
    package: str = ""
    module: str = ""
    gpu: bool = False
    compiler: bool = False
    sixteen_bit: bool = False
    bytes_a_logit: int = 0


def missing_reason(rival: Rival, case: Case, device: str) -> str | None:
    """Why a rival cannot run this case here, or None. What only shows in a first call is caught there."""
    if rival.package and not _installed(rival.module):
        return f"not installed (pip install {rival.package})"
    if rival.gpu and device != "cuda":
        return "needs a GPU"
    if rival.compiler and device == "cpu" and not shutil.which(os.environ.get("CXX") or "g++"):
        return "needs a C++ compiler (g++)"
    if rival.sixteen_bit and case.dtype == "float32":
        return "for 16-bit inputs; with fp32 it is torch eager fp32"
    needed, free = case.n * case.v * rival.bytes_a_logit, free_bytes(device)
    if free is not None and needed > free:
        return f"needs about {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
    return None


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # sys.modules holds something without a spec under that name
        return False


def selected(ids: tuple[str, ...]) -> list[Rival]:
    """The rivals named, in the order of RIVALS; floors always run. Raises ConfigError for an unknown one."""
    known = {rival.id for rival in RIVALS}
    for name in ids:
        if name not in known:
            raise ConfigError(f"rival is {name!r}; allowed: {', '.join(rival.id for rival in RIVALS)}")
    return [rival for rival in RIVALS if not ids or rival.id in ids or rival.kind == "floor"]


TRL, LIGER, CCE = ("trl", "trl"), ("liger-kernel", "liger_kernel"), ("cut-cross-entropy", "cut_cross_entropy")
_COMPILED = {
    **linear(lambda: torch.compile(upcast_linear, dynamic=False)),
    **from_logits(lambda: torch.compile(upcast, dynamic=False)),
}
_LIGER = {**linear(outside.liger_linear), **from_logits(outside.liger_logits)}
_MM = {DIFF: products_into, BACKWARD: backward_products(logits=2)}
RIVALS = (
    Rival("ours", "ours", "ours", ours("auto")),
    Rival("ours-reference", "ours, reference", "ours, plain", ours("reference")),
    Rival("ours-twice", "ours, one model twice", "ours, plain", diff(lambda: our_logprob("auto"))),
    Rival(
        "eager-fp32",
        "torch eager fp32",
        "outside",
        {**linear(lambda: all_fp32), **from_logits(lambda: upcast)},
        bytes_a_logit=8,
    ),
    Rival("eager-16bit", "torch eager 16-bit", "outside", both(lambda: gather), sixteen_bit=True, bytes_a_logit=4),
    Rival("compile", "torch.compile", "outside", _COMPILED, compiler=True, bytes_a_logit=4),
    Rival("torch-lce", "F.linear_cross_entropy", "outside", linear(outside.torch_lce), bytes_a_logit=8),
    Rival("torch-lce-chunked", "F.linear_cross_e. chunked", "outside", linear(outside.torch_lce_chunked)),
    Rival("trl-softmax", "TRL selective_log_softmax", "outside", both(outside.trl_softmax), *TRL, bytes_a_logit=4),
    Rival("trl-chunked", "TRL ChunkedLogProb", "outside", linear(outside.trl_chunked), *TRL),
    Rival("liger", "Liger-Kernel", "outside", _LIGER, *LIGER, gpu=True),
    Rival("cce", "cut-cross-entropy", "outside", linear(outside.cce), *CCE, gpu=True),
    Rival(
        "cce-compile",
        "cut-cross-entropy compile",
        "outside",
        linear(outside.cce_compiled),
        *CCE,
        compiler=True,
        bytes_a_logit=8,
    ),
    Rival("gemm-mm", "GEMMs, torch.mm", "floor", _MM, bytes_a_logit=4),
    Rival("gemm-linear", "GEMMs, F.linear", "floor", {DIFF: products_linear}, bytes_a_logit=4),
    Rival("gemm-kept", "three GEMMs, logits kept", "bound", {BACKWARD: backward_products(logits=1)}, bytes_a_logit=4),
    Rival("read-max", "bare read, amax", "floor", read(lambda x_NV: x_NV.amax(dim=-1))),
    Rival("read-sum", "bare read, sum", "floor", read(lambda x_NV: x_NV.sum(dim=-1))),
)
