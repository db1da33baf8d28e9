"""Log-probs of given responses by the path that is trained: under one model, and under SFT model and base together."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srppo.kernels import (
    Head,
    ReverseKl,
    Teacher,
    linear_logprob_diff_parts,
    linear_reverse_kl,
    logprob_diff_parts,
    reverse_kl,
)
from srppo.models.language_model import LanguageModel, unflatten
from srppo.models.memory import rows_that_fit, weight_bytes
from srppo.training.batch import Generated, micro_slices


class Scores(NamedTuple):
    """log pi_sft - log pi_base of responses, not rounded again, and its two terms; BT fp32, nats, 0 where masked."""

    log_ratio_BT: Tensor
    sft_logprobs_BT: Tensor
    base_logprobs_BT: Tensor

    def anchor_BT(self, anchor: str) -> Tensor:
        """Log-probs under the model that the KL penalty pulls towards: `sft` or `base` (`reward.anchor`)."""
        return {"sft": self.sft_logprobs_BT, "base": self.base_logprobs_BT}[anchor]


@torch.no_grad()
def score_logprobs(
    model: LanguageModel, batch: Generated, *, micro_batch: int | None = None, temperature: float = 1.0
) -> Tensor:
    """Log-probs of the responses under one model; BT fp32, nats, 0 where masked. micro_batch None: as the memory has
    it."""
    width = batch.response_mask_BT.shape[1]
    parts = [
        model.response_logprobs(batch.tokens_BS[rows], batch.attention_mask_BS[rows], width, temperature=temperature)
        for rows in micro_slices(len(batch.tokens_BS), micro_batch or _rows_that_fit(batch, model))
    ]
    return torch.cat(parts)


@torch.no_grad()
def response_log_ratio(
    sft: LanguageModel, base: LanguageModel, tokens_BS: Tensor, attention_mask_BS: Tensor, response_width: int
) -> Scores:
    """log pi_sft - log pi_base of the last `response_width` columns at temperature 1, and its two terms."""
    mask_BT = attention_mask_BS[:, -response_width:]
    rows = (tokens_BS, attention_mask_BS, response_width)
    tokens_N = tokens_BS[:, -response_width:][mask_BT]
    if sft.head.linear and sft.head == base.head:
        (sft_weight_VD, sft_bias_V), (base_weight_VD, base_bias_V) = sft.frozen_head(), base.frozen_head()
        parts = linear_logprob_diff_parts(
            sft.hidden_rows(*rows),
            sft_weight_VD,
            base.hidden_rows(*rows),
            base_weight_VD,
            tokens_N,
            sft_bias_V=sft_bias_V,
            base_bias_V=base_bias_V,
            logit_scale=sft.head.logit_scale,
            softcap=sft.head.softcap,
            ignore_index=None,
            impl=sft.kernels,
        )
    elif not sft.head.linear and not base.head.linear:
        sft_NV, base_NV = (model.logit_rows(*rows) for model in (sft, base))
        parts = logprob_diff_parts(sft_NV, base_NV, tokens_N, impl=sft.kernels)
    else:  # two heads of different kinds
        sft_BT, base_BT = (model.response_logprobs(*rows) for model in (sft, base))
        return Scores(sft_BT - base_BT, sft_BT, base_BT)
    return Scores(*(unflatten(part_N, mask_BT) for part_N in parts[:3]))


def response_reverse_kl(
    policy: LanguageModel,
    sft: LanguageModel,
    base: LanguageModel,
    rows: tuple[Tensor, Tensor, int],
    teacher: Teacher,
    *,
    temperature: float = 1.0,
) -> ReverseKl:
    """KL(policy || teacher(sft, base)) of the next token before each counted response token, N of them.

    rows: tokens BS, attention mask BS and the response width. Differentiable in the policy; its temperature alone. One
    model given twice is run once.
    """
    if policy.head.linear and policy.head == sft.head == base.head:
        own = Head(policy.hidden_rows(*rows), *policy.head_rows())
        with torch.no_grad():
            sft_head = Head(sft.hidden_rows(*rows), *sft.head_rows())
            base_head = sft_head if base is sft else Head(base.hidden_rows(*rows), *base.head_rows())
        return linear_reverse_kl(
            own,
            sft_head,
            base_head,
            teacher,
            temperature=temperature,
            logit_scale=policy.head.logit_scale,
            softcap=policy.head.softcap,
            impl=policy.kernels,
        )
    own_NV = (policy.logit_rows(*rows).float() / temperature).log_softmax(-1)
    with torch.no_grad():
        sft_NV = sft.logit_rows(*rows).float().log_softmax(-1)
        base_NV = sft_NV if base is sft else base.logit_rows(*rows).float().log_softmax(-1)
    return reverse_kl(own_NV, sft_NV, base_NV, teacher)


def score_log_ratio(
    sft_policy: LanguageModel, base_policy: LanguageModel, batch: Generated, *, micro_batch: int | None = None
) -> Scores:
    """log pi_sft - log pi_base of the responses at temperature 1, and its two terms. micro_batch as in
    `score_logprobs`."""
    width = batch.response_mask_BT.shape[1]
    parts = [
        response_log_ratio(sft_policy, base_policy, batch.tokens_BS[rows], batch.attention_mask_BS[rows], width)
        for rows in micro_slices(len(batch.tokens_BS), micro_batch or _rows_that_fit(batch, sft_policy, base_policy))
    ]
    return Scores(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def full_kl(
    policy: LanguageModel, anchor: LanguageModel, batch: Generated, *, micro_batch: int | None = None
) -> Tensor:
    """KL(policy || anchor) of the whole next-token distributions at temperature 1, summed along each response; B, nats.

    Over responses that the policy sampled at temperature 1 the mean is the KL over responses, as that of
    log pi - log anchor is, with less noise: the choice of each token is averaged out (Rao-Blackwell; Amini et al. 2025,
    arXiv 2504.10637).
    """
    width, parts = batch.response_mask_BT.shape[1], []
    for rows in micro_slices(len(batch.tokens_BS), micro_batch or _rows_that_fit(batch, policy, anchor)):
        inputs = batch.tokens_BS[rows], batch.attention_mask_BS[rows], width
        found = response_reverse_kl(policy, anchor, anchor, inputs, lambda anchor_NV, _: anchor_NV)
        parts.append(unflatten(found.teacher_N, batch.response_mask_BT[rows]).sum(dim=1))
    return torch.cat(parts)


def _rows_that_fit(batch: Generated, *models: LanguageModel) -> int:
    positions = batch.tokens_BS.shape[1]
    scored = 0 if all(model.head.linear for model in models) else len(models) * positions
    return rows_that_fit(models[0], positions, scored=scored, held=weight_bytes(*models))
