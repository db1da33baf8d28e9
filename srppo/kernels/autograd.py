"""The gradient of linear_logprob for every implementation that computes it by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from srppo.kernels.types import Head, RowStats, Transform


class LinearLogprob(torch.autograd.Function):
    """Log-probs of an implementation's `forward`, N; gradients by its `backward`.

    Between the two only the inputs and N-sized row statistics are kept: the logits are computed a second time. The row
    maximum and log sum are kept apart, since their sum would cost 4e-4 where logits share an offset of 1e4.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        tokens_N: Tensor,
        transform: Transform,
        kernels: Any,
    ) -> Tensor:
        stats = kernels.forward(Head(hidden_ND, weight_VD, bias_V), tokens_N, transform)
        ctx.save_for_backward(hidden_ND, weight_VD, bias_V, tokens_N, stats.max_N, stats.log_sum_N)
        ctx.transform, ctx.kernels = transform, kernels
        return stats.logprobs_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, bias_V, tokens_N, max_N, log_sum_N = ctx.saved_tensors
        needs = tuple(ctx.needs_input_grad[:3])
        kept = grad_N.nonzero().squeeze(-1)  # rows without upstream gradient take no part
        whole = len(kept) == len(grad_N)
        rows = (hidden_ND, tokens_N, max_N, log_sum_N, grad_N)
        hidden_KD, tokens_K, max_K, log_sum_K, grad_K = rows if whole else (x[kept] for x in rows)
        head, stats = Head(hidden_KD, weight_VD, bias_V), RowStats(torch.empty(0), max_K, log_sum_K)
        d_hidden_KD, d_weight_VD, d_bias_V = ctx.kernels.backward(head, tokens_K, ctx.transform, stats, grad_K, needs)
        if d_hidden_KD is not None and not whole:
            d_hidden_KD = torch.zeros_like(hidden_ND).index_copy_(0, kept, d_hidden_KD)
        return d_hidden_KD, d_weight_VD, d_bias_V, None, None, None
