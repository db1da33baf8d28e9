"""Log-prob kernels in plain torch: the definition that every faster kernel is tested against.

Logits are raised to fp32 before anything else: rounding them to 16 bits costs 2e-2 to 6e-2 nats a token, as much as
the reward itself when the two models are near. Gradients are autograd's own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from srppo.kernels.precision import fp32_products
from srppo.kernels.types import IGNORED, Head, LogprobDiff, RowStats, Transform, accumulator, difference

CHUNK_ELEMENTS = 1 << 25  # logits held at once by the linear operations: 128 MiB in fp32


def token_logprobs(logits_BTV: Tensor, tokens_BT: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token], BT fp32 (fp64 for fp64), nats.

    Differentiable in the logits; any leading shape.
    """
    # log_softmax centres on the maximum; target - logsumexp would lose 4e-4 nats at a shared offset of 1e4.
    logp_BTV = (logits_BTV.to(accumulator(logits_BTV)) / temperature).log_softmax(dim=-1)
    return logp_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1)


def logprob_diff(sft_logits_NV: Tensor, base_logits_NV: Tensor, tokens_N: Tensor, transform: Transform) -> LogprobDiff:
    """See srppo.kernels.logprob_diff; rows whose token is IGNORED give 0 throughout."""
    targets_N, ignored_N = tokens_N.clamp(min=0), tokens_N == IGNORED
    with torch.no_grad():
        raw = [logits_NV.to(accumulator(logits_NV)) for logits_NV in (sft_logits_NV, base_logits_NV)]
        parts = difference(*(_row_stats(transform(raw_NV), targets_N) for raw_NV in raw))
        return LogprobDiff(*(part_N.masked_fill(ignored_N, 0.0) for part_N in parts))


def linear_logprob_diff(sft: Head, base: Head, tokens_N: Tensor, transform: Transform) -> LogprobDiff:
    """See srppo.kernels.linear_logprob_diff."""
    with torch.no_grad():
        return difference(*(_linear_stats(head, tokens_N, transform) for head in (sft, base)))


def _linear_stats(head: Head, tokens_N: Tensor, transform: Transform) -> RowStats:
    parts = []
    for rows in _chunks(len(tokens_N), len(head.weight_VD)):
        parts.append(_row_stats(_logits(head.hidden_ND[rows], head.weight_VD, head.bias_V, transform), tokens_N[rows]))
    return RowStats(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _row_stats(logits_NV: Tensor, tokens_N: Tensor) -> RowStats:
    max_N1 = logits_NV.amax(dim=-1, keepdim=True)
    centred_NV = logits_NV - max_N1
    centred_N = centred_NV.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1)
    return RowStats(centred_N, max_N1.squeeze(-1), centred_NV.exp().sum(dim=-1).log())


def linear_logprob(head: Head, tokens_N: Tensor, transform: Transform) -> Tensor:
    """See srppo.kernels.linear_logprob.

    Tokens are taken in chunks that are recomputed in the backward pass, so that at most CHUNK_ELEMENTS logits exist.
    """
    parts = []
    for rows in _chunks(len(tokens_N), len(head.weight_VD)):
        arguments = (head.hidden_ND[rows], head.weight_VD, head.bias_V, tokens_N[rows], transform)
        recompute = rows.stop - rows.start < len(tokens_N) and torch.is_grad_enabled()
        parts.append(
            checkpoint(_linear_chunk, *arguments, use_reentrant=False) if recompute else _linear_chunk(*arguments)
        )
    return torch.cat(parts)


def _chunks(count: int, vocabulary: int) -> list[slice]:
    size = max(CHUNK_ELEMENTS // vocabulary, 1)
    return [slice(start, min(start + size, count)) for start in range(0, max(count, 1), size)]


def _linear_chunk(
    hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, tokens_N: Tensor, transform: Transform
) -> Tensor:
    return token_logprobs(_logits(hidden_ND, weight_VD, bias_V, transform), tokens_N)


def _logits(hidden_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None, transform: Transform) -> Tensor:
    dtype = accumulator(hidden_ND, weight_VD, bias_V)
    with fp32_products():
        bias_V = None if bias_V is None else bias_V.to(dtype)
        return transform(F.linear(hidden_ND.to(dtype), weight_VD.to(dtype), bias_V))
