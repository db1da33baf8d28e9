"""The one dispatch point of the log-prob kernels: callers import from here and never name an implementation."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from srppo.errors import ConfigError
from srppo.kernels import reference
from srppo.kernels.reference import Logprobs, entropy, linear_logprob, token_logprobs

Impl = Literal["auto", "reference"]

__all__ = ["Impl", "Logprobs", "entropy", "linear_logprob", "logprob_diff", "token_logprobs"]


def logprob_diff(sft_logits_NV: Tensor, base_logits_NV: Tensor, tokens_N: Tensor, *, impl: Impl = "auto") -> Tensor:
    """log pi_sft(token) - log pi_base(token) from two logits matrices; N fp32, nats.

    Raises ConfigError for an unknown `impl` and for vocabularies of different size.
    """
    if impl not in get_args(Impl):
        raise ConfigError(f"impl is {impl!r}; allowed: {', '.join(get_args(Impl))}")
    if sft_logits_NV.shape != base_logits_NV.shape:
        raise ConfigError(
            f"logits of the SFT model are {tuple(sft_logits_NV.shape)}, of the base {tuple(base_logits_NV.shape)}; "
            "both must score the same tokens over one vocabulary"
        )
    return reference.logprob_diff(sft_logits_NV, base_logits_NV, tokens_N)
