"""The Triton implementation of the log-prob kernels, as the dispatch point calls it."""

from srppo.kernels.triton_backward import backward
from srppo.kernels.triton_linear import forward, linear_logprob_diff
from srppo.kernels.triton_logits import logprob_diff

__all__ = ["backward", "forward", "linear_logprob_diff", "logprob_diff"]
