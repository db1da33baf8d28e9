"""What every implementation of the log-prob kernels takes and returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # of hidden_ND, weight_VD, bias_V
IGNORED = -1  # how the dispatch point hands an ignored row to an implementation of logprob_diff


@dataclass(frozen=True)
class Transform:
    """From raw logits to those of the softmax: softcap * tanh(raw * logit_scale / softcap) / temperature."""

    temperature: float = 1.0
    logit_scale: float = 1.0
    softcap: float | None = None

    def __call__(self, raw_NV: Tensor) -> Tensor:
        """The same shape and dtype; differentiable."""
        z_NV = raw_NV * self.logit_scale
        if self.softcap is not None:
            z_NV = self.softcap * torch.tanh(z_NV / self.softcap)
        return z_NV / self.temperature


class Head(NamedTuple):
    """Hidden states and the linear head that turns them into raw logits hidden @ weight.T + bias.

    hidden_ND, weight_VD and bias_V share a device and are bf16, fp16 or fp32 (fp64 for checks), not all the same dtype.
    """

    hidden_ND: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None = None


def one_head(sft: Head, base: Head) -> bool:
    """Whether two models share the memory of one head and hidden states of one dtype: it is then read once for both."""

    def place(x: Tensor | None) -> object:
        return None if x is None else (x.data_ptr(), x.shape, x.stride(), x.dtype)

    same = place(sft.weight_VD) == place(base.weight_VD) and place(sft.bias_V) == place(base.bias_V)
    return same and sft.hidden_ND.dtype == base.hidden_ND.dtype


class LogprobDiff(NamedTuple):
    """log pi_sft - log pi_base of the given tokens with both terms and both logsumexps; each N, fp32, nats.

    diff_N is combined as ((za_t - ma) - (zb_t - mb)) - (log sa - log sb), which is exactly antisymmetric and keeps its
    digits where the log-probs themselves are large; it is not sft_logprobs_N - base_logprobs_N rounded once more.
    """

    diff_N: Tensor
    sft_logprobs_N: Tensor
    base_logprobs_N: Tensor
    sft_lse_N: Tensor
    base_lse_N: Tensor


class RowStats(NamedTuple):
    """What a pass over the vocabulary leaves of each row; N each, fp32.

    centred_N   target logit - row maximum
    max_N       row maximum m
    log_sum_N   log sum exp(z - m)
    """

    centred_N: Tensor
    max_N: Tensor
    log_sum_N: Tensor

    @property
    def logprobs_N(self) -> Tensor:
        """log softmax at the target, centred on the maximum: target - logsumexp loses 4e-4 at an offset of 1e4."""
        return self.centred_N - self.log_sum_N

    @property
    def lse_N(self) -> Tensor:
        """log sum exp(z)."""
        return self.max_N + self.log_sum_N


def difference(sft: RowStats, base: RowStats) -> LogprobDiff:
    """Combine two passes in the antisymmetric order."""
    return LogprobDiff(
        (sft.centred_N - base.centred_N) - (sft.log_sum_N - base.log_sum_N),
        sft.logprobs_N,
        base.logprobs_N,
        sft.lse_N,
        base.lse_N,
    )


def accumulator(*tensors: Tensor | None) -> torch.dtype:
    """fp32, the dtype of every sum; fp64 where an input is fp64 (gradcheck)."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32
