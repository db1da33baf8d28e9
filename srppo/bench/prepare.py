"""From functions to benchmark calls: each operation by a one-model log-prob, by ours, and as its bare products.

Preparing may import, compile and allocate. A call starts from the given inputs and returns the result itself, so its
casts, allocations and launches are in the measured time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from srppo.bench.inputs import Inputs
from srppo.bench.options import BACKWARD, DIFF, LOGITS_DIFF
from srppo.kernels import Impl, linear_logprob, linear_logprob_diff, logprob_diff


class Result(NamedTuple):
    """values_N: fp32 differences (log-probs under backward), nats; None from a bare product. d_hidden_ND: backward."""

    values_N: Tensor | None
    d_hidden_ND: Tensor | None = None


Call = Callable[[], Result]
Prepare = Callable[[Inputs], Call]
Logprob = Callable[..., Tensor]  # (hidden_ND, weight_VD, tokens_N) or (logits_NV, tokens_N) -> log-probs N, one model
Load = Callable[[], Logprob]  # imports and builds it


def linear(load: Load) -> dict[str, Prepare]:
    """A function of hidden states and head: twice for the difference, once with gradients."""
    return {DIFF: _diff(load), BACKWARD: _backward(load)}


def diff(load: Load) -> dict[str, Prepare]:
    """The same, the difference alone."""
    return {DIFF: _diff(load)}


def from_logits(load: Load) -> dict[str, Prepare]:
    """A function of logits."""
    return {LOGITS_DIFF: _diff(load)}


def both(load: Load) -> dict[str, Prepare]:
    """A function of logits, behind F.linear in the dtype of the inputs where hidden states are given."""

    def behind_linear() -> Logprob:
        logprob = load()
        return lambda hidden_ND, weight_VD, tokens_N: logprob(F.linear(hidden_ND, weight_VD), tokens_N)

    return {**linear(behind_linear), **from_logits(load)}


def ours(impl: Impl) -> dict[str, Prepare]:
    """The dispatch point of this package."""

    def linear_diff(inputs: Inputs) -> Call:
        (sft_hidden_ND, sft_weight_VD), (base_hidden_ND, base_weight_VD) = inputs.sft, inputs.base
        heads = (sft_hidden_ND, sft_weight_VD, base_hidden_ND, base_weight_VD)
        return lambda: Result(linear_logprob_diff(*heads, inputs.tokens_N, impl=impl))

    def logits_diff(inputs: Inputs) -> Call:
        (sft_NV,), (base_NV,) = inputs.sft, inputs.base
        return lambda: Result(logprob_diff(sft_NV, base_NV, inputs.tokens_N, impl=impl))

    return {DIFF: linear_diff, LOGITS_DIFF: logits_diff, BACKWARD: _backward(lambda: our_logprob(impl))}


def our_logprob(impl: Impl) -> Logprob:
    """linear_logprob of this package, one model."""

    def logprob(hidden_ND: Tensor, weight_VD: Tensor, tokens_N: Tensor) -> Tensor:
        return linear_logprob(hidden_ND, weight_VD, tokens_N, impl=impl)

    return logprob


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


def products_into(inputs: Inputs) -> Call:
    """torch.mm of both models into one buffer allocated beforehand: the products and nothing else."""
    out_NV = inputs.sft[0].new_empty(inputs.case.n, inputs.case.v)

    @torch.no_grad()
    def call() -> Result:
        for hidden_ND, weight_VD in (inputs.sft, inputs.base):
            torch.mm(hidden_ND, weight_VD.T, out=out_NV)
        return Result(None)

    return call


def products_linear(inputs: Inputs) -> Call:
    """F.linear of both models, its output allocated in the call."""

    @torch.no_grad()
    def call() -> Result:
        for hidden_ND, weight_VD in (inputs.sft, inputs.base):
            F.linear(hidden_ND, weight_VD)
        return Result(None)

    return call


def backward_products(logits: int) -> Prepare:
    """The products of forward and backward into buffers: logits (again when they are not kept), both gradients."""

    def prepare(inputs: Inputs) -> Call:
        hidden_ND, weight_VD = inputs.sft
        out_NV, d_ND, d_VD = hidden_ND.new_empty(inputs.case.n, inputs.case.v), *map(torch.empty_like, inputs.sft)

        @torch.no_grad()
        def call() -> Result:
            for _ in range(logits):
                torch.mm(hidden_ND, weight_VD.T, out=out_NV)
            torch.mm(out_NV, weight_VD, out=d_ND)
            torch.mm(out_NV.T, hidden_ND, out=d_VD)
            return Result(None)

        return call

    return prepare


def read(reduce: Callable[[Tensor], Tensor]) -> dict[str, Prepare]:
    """One reduction over each logits matrix: no operation from logits can do with less."""

    def prepare(inputs: Inputs) -> Call:
        def call() -> Result:
            for (logits_NV,) in (inputs.sft, inputs.base):
                reduce(logits_NV)
            return Result(None)

        return call

    return {LOGITS_DIFF: prepare}


def _diff(load: Load) -> Prepare:
    """One-model function, run twice and subtracted in fp32."""

    def prepare(inputs: Inputs) -> Call:
        logprob, tokens_N = load(), inputs.tokens_N

        @torch.no_grad()
        def call() -> Result:
            return Result(logprob(*inputs.sft, tokens_N).float() - logprob(*inputs.base, tokens_N).float())

        return call

    return prepare


def _backward(load: Load) -> Prepare:
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
