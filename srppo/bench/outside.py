"""Loading rivals from other packages: each function imports one lazily and returns its one-model log-prob.

Their losses are negative log-probs; `reduction="none"` gives one a token. Options are the packages' own defaults.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

TRL_CHUNK = 32768  # vocabulary columns: trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE of trl 1.16


def torch_lce() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """torch.nn.functional.linear_cross_entropy (torch 2.13). Raises ImportError where torch has none."""
    return _torch_lce(chunked=False)


def torch_lce_chunked() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same with its own choice of token chunks."""
    return _torch_lce(chunked=True)


def _torch_lce(chunked: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise ImportError(f"torch {torch.__version__} has no linear_cross_entropy")
    options = torch.nn.LinearCrossEntropyOptions() if chunked else None

    def logprob(hidden_ND: Tensor, weight_VD: Tensor, tokens_N: Tensor) -> Tensor:
        return -F.linear_cross_entropy(hidden_ND, weight_VD, tokens_N, reduction="none", options=options)

    return logprob


def trl_softmax() -> Callable[[Tensor, Tensor], Tensor]:
    """TRL's selective_log_softmax, from logits."""
    from trl.trainer.utils import selective_log_softmax

    return selective_log_softmax


def trl_chunked() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """TRL's ChunkedLogProbFunction without its optional outputs."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def logprob(hidden_ND: Tensor, weight_VD: Tensor, tokens_N: Tensor) -> Tensor:
        return ChunkedLogProbFunction.apply(hidden_ND, weight_VD, None, tokens_N, 1.0, TRL_CHUNK, None, 1.0, ())[0]

    return logprob


def liger_linear() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """LigerFusedLinearCrossEntropyLoss."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(reduction="none")
    return lambda hidden_ND, weight_VD, tokens_N: -loss(weight_VD, hidden_ND, tokens_N)


def liger_logits() -> Callable[[Tensor, Tensor], Tensor]:
    """LigerCrossEntropyLoss."""
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss(reduction="none")
    return lambda logits_NV, tokens_N: -loss(logits_NV, tokens_N)


def cce() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Apple's linear_cross_entropy in Triton."""
    return _cce("cce")


def cce_compiled() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Its torch_compile implementation, which builds the logits and runs on a CPU too."""
    return _cce("torch_compile")


def _cce(impl: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    from cut_cross_entropy import linear_cross_entropy

    def logprob(hidden_ND: Tensor, weight_VD: Tensor, tokens_N: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden_ND, weight_VD, tokens_N, reduction="none", impl=impl)

    return logprob
