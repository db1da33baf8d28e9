"""Log-prob kernels in plain torch: the definition that every faster kernel is tested against.

Logits are raised to fp32 before anything else: rounding them to 16 bits costs 2e-2 to 6e-2 nats a token, as much as
the reward itself when the two models are near.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_ELEMENTS = 1 << 25  # logits held at once by linear_logprob: 128 MiB in fp32


class Logprobs(NamedTuple):
    """logprobs_N of the given tokens and, when asked, entropy_N of the distribution; nats, fp32."""

    logprobs_N: Tensor
    entropy_N: Tensor | None


def token_logprobs(logits_BTV: Tensor, tokens_BT: Tensor, *, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token], BT fp32, nats. Differentiable in the logits; any leading shape."""
    # log_softmax centres on the maximum; target - logsumexp would lose 4e-4 nats where logits share an offset of 1e4.
    logp_BTV = (logits_BTV.float() / temperature).log_softmax(dim=-1)
    return logp_BTV.gather(-1, tokens_BT.unsqueeze(-1)).squeeze(-1)


def entropy(logits_BTV: Tensor, *, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature), BT fp32, nats."""
    logp_BTV = (logits_BTV.float() / temperature).log_softmax(dim=-1)
    return -(logp_BTV.exp() * logp_BTV.masked_fill(logp_BTV == -torch.inf, 0.0)).sum(dim=-1)


def logprob_diff(sft_logits_NV: Tensor, base_logits_NV: Tensor, tokens_N: Tensor) -> Tensor:
    """log pi_sft(token) - log pi_base(token), N fp32, nats (design section 1, the terms of the reward).

    Combined as ((za_t - ma) - (zb_t - mb)) - (log sa - log sb): exactly antisymmetric, and exact to 4e-7 also when one
    model's logits are offset by 1e4.
    """
    sft_N, log_sum_sft_N = _centred(sft_logits_NV, tokens_N)
    base_N, log_sum_base_N = _centred(base_logits_NV, tokens_N)
    return (sft_N - base_N) - (log_sum_sft_N - log_sum_base_N)


def _centred(logits_NV: Tensor, tokens_N: Tensor) -> tuple[Tensor, Tensor]:
    """(target logit - row maximum, log of the sum of exp(logit - maximum))."""
    logits_NV = logits_NV.float()
    max_N1 = logits_NV.amax(dim=-1, keepdim=True)
    centred_NV = logits_NV - max_N1
    return centred_NV.gather(-1, tokens_N.unsqueeze(-1)).squeeze(-1), centred_NV.exp().sum(dim=-1).log()


def linear_logprob(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    tokens_N: Tensor,
    *,
    bias_V: Tensor | None = None,
    temperature: float = 1.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    with_entropy: bool = False,
) -> Logprobs:
    """Log-probs of tokens under softmax(softcap(hidden @ weight.T + bias) * scale / temperature), in fp32.

    Tokens are taken in chunks that are recomputed in the backward pass, so that at most CHUNK_ELEMENTS logits exist.
    """
    chunk = max(CHUNK_ELEMENTS // weight_VD.shape[0], 1)
    parts = []
    for start in range(0, max(len(tokens_N), 1), chunk):
        rows = slice(start, start + chunk)
        arguments = (
            hidden_ND[rows],
            weight_VD,
            bias_V,
            tokens_N[rows],
            temperature,
            logit_scale,
            softcap,
            with_entropy,
        )
        recompute = len(tokens_N) > chunk and torch.is_grad_enabled()
        parts.append(
            checkpoint(_linear_chunk, *arguments, use_reentrant=False) if recompute else _linear_chunk(*arguments)
        )
    logprobs_N = torch.cat([part[0] for part in parts])
    entropies = [part[1] for part in parts if part[1] is not None]
    return Logprobs(logprobs_N, torch.cat(entropies) if with_entropy else None)


def _linear_chunk(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    tokens_N: Tensor,
    temperature: float,
    logit_scale: float,
    softcap: float | None,
    with_entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    with torch.autocast(hidden_ND.device.type, enabled=False):
        bias_V = None if bias_V is None else bias_V.float()
        logits_NV = F.linear(hidden_ND.float(), weight_VD.float(), bias_V) * logit_scale
        if softcap is not None:
            logits_NV = softcap * torch.tanh(logits_NV / softcap)
        logprobs_N = token_logprobs(logits_NV, tokens_N, temperature=temperature)
        # The entropy is watched, never trained on: no graph is kept for it.
        return logprobs_N, entropy(logits_NV.detach(), temperature=temperature) if with_entropy else None
