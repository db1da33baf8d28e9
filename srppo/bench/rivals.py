"""Everyone who computes the operations, ours and others', behind one interface, so that all meet the same inputs.

Preparing may import, compile and allocate. A call starts from the given inputs and returns the result itself, so its
casts, allocations and launches are in the measured time. Other packages are imported when they are prepared, and run
with their own default options; where they give losses, those are negative log-probs, one a token.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from srppo.bench.inputs import Inputs, free_bytes
from srppo.bench.options import BACKWARD, DIFF, LOGITS_DIFF, Case
from srppo.errors import ConfigError
from srppo.kernels import Impl, linear_logprob, linear_logprob_diff, logprob_diff

TRL_CHUNK = 32768  # vocabulary columns: trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE of trl 1.16


class Result(NamedTuple):
    """values_N: fp32 differences (log-probs under backward), nats; None from a bare product. d_hidden_ND: backward."""

    values_N: Tensor | None
    d_hidden_ND: Tensor | None = None


Call = Callable[[], Result]
Prepare = Callable[[Inputs], Call]
Logprob = Callable[..., Tensor]  # (hidden_ND, weight_VD, tokens_N) or (logits_NV, tokens_N) -> log-probs N, one model
Load = Callable[[], Logprob]  # imports and builds it


# From a one-model log-prob to the operations


def diff(load: Load) -> Prepare:
    """One-model function, run twice and subtracted in fp32."""

    def prepare(inputs: Inputs) -> Call:
        logprob, tokens_N = load(), inputs.tokens_N

        @torch.no_grad()
        def call() -> Result:
            return Result(logprob(*inputs.sft, tokens_N).float() - logprob(*inputs.base, tokens_N).float())

        return call

    return prepare


def backward(load: Load) -> Prepare:
    """Forward, then gradients of hidden states and head for a given upstream gradient of each token."""

    def prepare(inputs: Inputs) -> Call:
        logprob = load()
        hidden_ND, weight_VD = (x.detach().requires_grad_() for x in inputs.sft)

        def call() -> Result:
            logprobs_N = logprob(hidden_ND, weight_VD, inputs.tokens_N)
            grad_N = inputs.grad_N.to(logprobs_N.dtype)
            d_hidden_ND, _ = torch.autograd.grad(logprobs_N, (hidden_ND, weight_VD), grad_N)
            return Result(logprobs_N.detach().float(), d_hidden_ND)

        return call

    return prepare


def linear(load: Load) -> dict[str, Prepare]:
    """A function of hidden states and head: twice for the difference, once with gradients."""
    return {DIFF: diff(load), BACKWARD: backward(load)}


def from_logits(load: Load) -> dict[str, Prepare]:
    """A function of logits."""
    return {LOGITS_DIFF: diff(load)}


def both(load: Load) -> dict[str, Prepare]:
    """A function of logits, behind F.linear in the dtype of the inputs where hidden states are given."""

    def behind_linear() -> Logprob:
        logprob = load()
        return lambda hidden_ND, weight_VD, tokens_N: logprob(F.linear(hidden_ND, weight_VD), tokens_N)

    return {**linear(behind_linear), **from_logits(load)}


# Ours and plain torch


def ours(impl: Impl) -> dict[str, Prepare]:
    """The dispatch point of this package."""

    def linear_diff(inputs: Inputs) -> Call:
        (sft_hidden_ND, sft_weight_VD), (base_hidden_ND, base_weight_VD) = inputs.sft, inputs.base
        heads = (sft_hidden_ND, sft_weight_VD, base_hidden_ND, base_weight_VD)
        return lambda: Result(linear_logprob_diff(*heads, inputs.tokens_N, impl=impl))

    def logits_diff(inputs: Inputs) -> Call:
        (sft_NV,), (base_NV,) = inputs.sft, inputs.base
        return lambda: Result(logprob_diff(sft_NV, base_NV, inputs.tokens_N, impl=impl))

    return {DIFF: linear_diff, LOGITS_DIFF: logits_diff, BACKWARD: backward(lambda: partial(linear_logprob, impl=impl))}


def gather(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """log_softmax in the dtype of the logits, and the entry of each token."""
    return logits_NV.log_softmax(dim=-1).gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1)


def upcast(logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """log_softmax in fp32 of logits as they are."""
    return gather(logits_NV.float(), tokens_N)


def upcast_linear(hidden_ND: Tensor, weight_VD: Tensor, tokens_N: Tensor) -> Tensor:
    """Logits in the dtype of the inputs, log_softmax in fp32: what most trainers write."""
    return upcast(F.linear(hidden_ND, weight_VD), tokens_N)


def all_fp32(hidden_ND: Tensor, weight_VD: Tensor, tokens_N: Tensor) -> Tensor:
    """Inputs raised to fp32 first: the accurate way with plain torch."""
    return gather(F.linear(hidden_ND.float(), weight_VD.float()), tokens_N)


# Other packages


def torch_lce(*, chunked: bool) -> Logprob:
    """torch.nn.functional.linear_cross_entropy (torch 2.13); chunked: with its own choice of token chunks."""
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    loss = partial(F.linear_cross_entropy, reduction="none")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None
    return lambda hidden_ND, weight_VD, tokens_N: -loss(hidden_ND, weight_VD, tokens_N, options=options)


def trl_softmax() -> Logprob:
    """TRL's selective_log_softmax, from logits."""
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def trl_chunked() -> Logprob:
    """TRL's ChunkedLogProbFunction without its optional outputs."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    rest = (1.0, TRL_CHUNK, None, 1.0, ())
    return lambda hidden_ND, weight_VD, tokens_N: ChunkedLogProbFunction.apply(
        hidden_ND, weight_VD, None, tokens_N, *rest
    )[0]


def liger_linear() -> Logprob:
    """LigerFusedLinearCrossEntropyLoss."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda hidden_ND, weight_VD, tokens_N: -loss(weight_VD, hidden_ND, tokens_N)


def liger_logits() -> Logprob:
    """LigerCrossEntropyLoss."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss(reduction="none")
    return lambda logits_NV, tokens_N: -loss(logits_NV, tokens_N)


def cut_cross_entropy(impl: str) -> Logprob:
    """Apple's linear_cross_entropy: `cce` in Triton, or `torch_compile`, which builds the logits and needs no GPU."""
    from cut_cross_entropy import linear_cross_entropy

    loss = partial(linear_cross_entropy, reduction="none", impl=impl)
    return lambda hidden_ND, weight_VD, tokens_N: -loss(hidden_ND, weight_VD, tokens_N)


# The denominators


def bare(steps: Callable[[Inputs], Callable[[], object]]) -> Prepare:
    """Products or reads that lead to no result."""

    def prepare(inputs: Inputs) -> Call:
        step = steps(inputs)

        @torch.no_grad()
        def call() -> Result:
            step()
            return Result(None)

        return call

    return prepare


def products_into(inputs: Inputs) -> Callable[[], object]:
    """torch.mm of both models into one buffer allocated beforehand: the products and nothing else."""
    out_NV = inputs.sft[0].new_empty(inputs.case.n, inputs.case.v)
    return lambda: [torch.mm(hidden_ND, w_VD.T, out=out_NV) for hidden_ND, w_VD in (inputs.sft, inputs.base)]


def products_linear(inputs: Inputs) -> Callable[[], object]:
    """F.linear of both models, its output allocated in the call and given back before the next."""

    def step() -> None:
        for hidden_ND, weight_VD in (inputs.sft, inputs.base):
            F.linear(hidden_ND, weight_VD)

    return step


def backward_products(inputs: Inputs, *, logits: int) -> Callable[[], object]:
    """The products of forward and backward into buffers: logits (again when they are not kept), both gradients."""
    hidden_ND, weight_VD = inputs.sft
    out_NV, d_ND, d_VD = hidden_ND.new_empty(inputs.case.n, inputs.case.v), *map(torch.empty_like, inputs.sft)

    def step() -> None:
        for _ in range(logits):
            torch.mm(hidden_ND, weight_VD.T, out=out_NV)
        torch.mm(out_NV, weight_VD, out=d_ND)
        torch.mm(out_NV.T, hidden_ND, out=d_VD)

    return step


def reads(inputs: Inputs, *, reduce: Callable[..., Tensor]) -> Callable[[], object]:
    """One reduction over each logits matrix: no operation from logits can do with less."""
    return lambda: [reduce(logits_NV, dim=-1) for (logits_NV,) in (inputs.sft, inputs.base)]


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
FP32 = {**linear(lambda: all_fp32), **from_logits(lambda: upcast)}
COMPILED = {
    **linear(lambda: torch.compile(upcast_linear, dynamic=False)),
    **from_logits(lambda: torch.compile(upcast, dynamic=False)),
}
LCE, LCE_CHUNKED = (linear(partial(torch_lce, chunked=chunked)) for chunked in (False, True))
LIGER_BOTH = {**linear(liger_linear), **from_logits(liger_logits)}
CCE_TRITON, CCE_COMPILED = (linear(partial(cut_cross_entropy, impl)) for impl in ("cce", "torch_compile"))
MM = {DIFF: bare(products_into), BACKWARD: bare(partial(backward_products, logits=2))}
KEPT = {BACKWARD: bare(partial(backward_products, logits=1))}
READ_MAX, READ_SUM = ({LOGITS_DIFF: bare(partial(reads, reduce=reduce))} for reduce in (torch.amax, torch.sum))
RIVALS = (
    Rival("ours", "ours", "ours", ours("auto")),
    Rival("ours-reference", "ours, reference", "ours, plain", ours("reference")),
    Rival("ours-twice", "ours, one model twice", "ours, plain", {DIFF: diff(lambda: linear_logprob)}),
    Rival("eager-fp32", "torch eager fp32", "outside", FP32, bytes_a_logit=8),
    Rival("eager-16bit", "torch eager 16-bit", "outside", both(lambda: gather), sixteen_bit=True, bytes_a_logit=4),
    Rival("compile", "torch.compile", "outside", COMPILED, compiler=True, bytes_a_logit=4),
    Rival("torch-lce", "F.linear_cross_entropy", "outside", LCE, bytes_a_logit=8),
    Rival("torch-lce-chunked", "F.linear_cross_e. chunked", "outside", LCE_CHUNKED),
    Rival("trl-softmax", "TRL selective_log_softmax", "outside", both(trl_softmax), *TRL, bytes_a_logit=4),
    Rival("trl-chunked", "TRL ChunkedLogProb", "outside", linear(trl_chunked), *TRL),
    Rival("liger", "Liger-Kernel", "outside", LIGER_BOTH, *LIGER, gpu=True),
    Rival("cce", "cut-cross-entropy", "outside", CCE_TRITON, *CCE, gpu=True),
    Rival("cce-compile", "cut-cross-entropy compile", "outside", CCE_COMPILED, *CCE, compiler=True, bytes_a_logit=8),
    Rival("gemm-mm", "GEMMs, torch.mm", "floor", MM, bytes_a_logit=4),
    Rival("gemm-linear", "GEMMs, F.linear", "floor", {DIFF: bare(products_linear)}, bytes_a_logit=4),
    Rival("gemm-kept", "three GEMMs, logits kept", "bound", KEPT, bytes_a_logit=4),
    Rival("read-max", "bare read, amax", "floor", READ_MAX),
    Rival("read-sum", "bare read, sum", "floor", READ_SUM),
)
