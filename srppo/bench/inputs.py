"""Inputs of a benchmark case, seeded, and the exact answer in fp64 for a few of their rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from srppo.bench.options import BACKWARD, LOGITS_DIFF, Case
from srppo.errors import ConfigError

LOGIT_SPREAD = 3.0  # standard deviation of a row of logits, nats: what trained heads show is of this order
WEIGHT_CHANGE, HIDDEN_CHANGE = 0.02, 0.05  # relative: fine-tuning moves a model little, and the difference is small
EXACT_ROWS = 64
CHUNK_ELEMENTS = 1 << 24  # of fp64 values held at once


@dataclass(frozen=True)
class Inputs:
    """sft and base are (hidden_ND, weight_VD), or (logits_NV,) from logits; backward has sft alone, and grad_N."""

    case: Case
    sft: tuple[Tensor, ...]
    base: tuple[Tensor, ...]
    tokens_N: Tensor
    grad_N: Tensor


def make_inputs(case: Case, device: str, seed: int) -> Inputs:
    """The same for every rival. Raises ConfigError where memory does not hold them."""
    dtype = getattr(torch, case.dtype)
    largest = max(case.n, case.v if case.d else 0) * (case.d or case.v) * 4  # drawn in fp32, then cast
    check_memory(case.input_bytes + 2 * largest, device, f"the inputs of {case}")
    random = torch.Generator(device).manual_seed(seed)

    def draw(rows: int, columns: int, scale: float) -> Tensor:
        return torch.randn(rows, columns, generator=random, device=device).mul_(scale)

    def changed(x: Tensor, relative: float, scale: float) -> Tensor:
        return draw(x.shape[0], x.shape[1], relative * scale).add_(x).to(dtype)

    tokens_N = torch.randint(case.v, (case.n,), generator=random, device=device)
    grad_N = torch.randn(case.n, generator=random, device=device)
    if case.op == LOGITS_DIFF:
        logits_NV = draw(case.n, case.v, LOGIT_SPREAD).to(dtype)
        return Inputs(case, (logits_NV,), (changed(logits_NV, HIDDEN_CHANGE, LOGIT_SPREAD),), tokens_N, grad_N)
    scale = LOGIT_SPREAD / math.sqrt(case.d)
    sft = (draw(case.n, case.d, 1.0).to(dtype), draw(case.v, case.d, scale).to(dtype))
    if case.op == BACKWARD:
        return Inputs(case, sft, (), tokens_N, grad_N)
    base = (changed(sft[0], HIDDEN_CHANGE, 1.0), changed(sft[1], WEIGHT_CHANGE, scale))
    return Inputs(case, sft, base, tokens_N, grad_N)


def check_memory(needed: int, device: str, what: str) -> None:
    """Raises ConfigError when the machine has not that many bytes free; a process killed for memory says nothing."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise ConfigError(f"{what} need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; choose smaller n or shape")


def free_bytes(device: str) -> int | None:
    """Memory that can still be had on the device; None where the system does not say."""
    if device == "cuda":
        held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()  # by torch, for its next tensors
        return torch.cuda.mem_get_info()[0] + held
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


@dataclass(frozen=True)
class Exact:
    """fp64 results of some rows, from the inputs as they were given (after rounding to their dtype)."""

    rows_K: Tensor
    values_K: Tensor
    d_hidden_KD: Tensor | None


@dataclass(frozen=True)
class Errors:
    """rms and max of the values, nats; grad_rms relative to the RMS of the exact gradient of the hidden states."""

    rms: float
    max: float
    grad_rms: float | None


def exact(inputs: Inputs, seed: int) -> Exact:
    """fp64 on a seeded subset of at most EXACT_ROWS rows."""
    random = torch.Generator().manual_seed(seed)
    rows_K = torch.randperm(inputs.case.n, generator=random)[:EXACT_ROWS].sort().values.to(inputs.tokens_N.device)
    sft_K = _exact_logprobs(inputs.sft, inputs.tokens_N, rows_K)
    if inputs.case.op == BACKWARD:
        return Exact(rows_K, sft_K[0], _exact_gradient(inputs, rows_K, sft_K[1]))
    return Exact(rows_K, sft_K[0] - _exact_logprobs(inputs.base, inputs.tokens_N, rows_K)[0], None)


def errors(values_N: Tensor, d_hidden_ND: Tensor | None, truth: Exact) -> Errors:
    """Of a rival's own output, raised to fp64 as it came."""
    off_K = values_N[truth.rows_K].double() - truth.values_K
    grad_rms = None
    if d_hidden_ND is not None and truth.d_hidden_KD is not None:
        off_KD = d_hidden_ND[truth.rows_K].double() - truth.d_hidden_KD
        grad_rms = float(off_KD.square().mean().sqrt() / truth.d_hidden_KD.square().mean().sqrt())
    return Errors(float(off_K.square().mean().sqrt()), float(off_K.abs().max()), grad_rms)


def _exact_logprobs(model: tuple[Tensor, ...], tokens_N: Tensor, rows_K: Tensor) -> tuple[Tensor, Tensor]:
    """(log-probs, logsumexps), K each, fp64."""
    hidden_KD = model[0][rows_K].double()
    if len(model) == 1:
        lse_K = hidden_KD.logsumexp(dim=-1)
        target_K = hidden_KD.gather(-1, tokens_N[rows_K, None]).squeeze(-1)
        return target_K - lse_K, lse_K
    weight_VD = model[1]
    parts = [(hidden_KD @ w_CD.double().T).logsumexp(dim=-1) for w_CD in _chunks(weight_VD, len(rows_K))]
    lse_K = torch.stack(parts).logsumexp(dim=0)
    target_K = (hidden_KD * weight_VD[tokens_N[rows_K]].double()).sum(dim=-1)
    return target_K - lse_K, lse_K


def _exact_gradient(inputs: Inputs, rows_K: Tensor, lse_K: Tensor) -> Tensor:
    """d/d hidden of sum(grad * logprob) = grad * (weight[token] - sum_v p_v weight_v), K x D, fp64."""
    hidden_ND, weight_VD = inputs.sft
    hidden_KD = hidden_ND[rows_K].double()
    d_KD = weight_VD[inputs.tokens_N[rows_K]].double()
    for w_CD in _chunks(weight_VD, len(rows_K)):
        w64_CD = w_CD.double()
        d_KD -= (hidden_KD @ w64_CD.T - lse_K[:, None]).exp() @ w64_CD
    return d_KD * inputs.grad_N[rows_K, None].double()


def _chunks(weight_VD: Tensor, rows: int) -> tuple[Tensor, ...]:
    return weight_VD.split(max(CHUNK_ELEMENTS // max(weight_VD.shape[1], rows), 1))
