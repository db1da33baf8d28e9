"""Log-probs of given responses by the path that is trained: under one model, and under SFT model and base together."""

from __future__ import annotations

from collections.abc import Iterator
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
from srppo.training import parallel
from srppo.training.batch import Generated, micro_batches

GAP_ROWS = 16  # responses that are scored in both precisions


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
    model: LanguageModel, batch: Generated, *, micro_tokens: int | None = None, temperature: float = 1.0
) -> Tensor:
    """Log-probs of the responses under one model; BT fp32, nats, 0 where masked.

    micro_tokens: of one pass at most, None: as the memory has it.
    """
    logprobs_BT = torch.zeros(batch.response_mask_BT.shape, device=batch.tokens_BS.device)
    for index, inputs in passes(batch, micro_tokens, model):
        logprobs_BT[index, : inputs[2]] = model.response_logprobs(*inputs, temperature=temperature)
    return parallel.add_up(logprobs_BT)


Inputs = tuple[Tensor, Tensor, int]
"""Tokens BS, attention mask BS and the response width of some rows."""


def passes(batch: Generated, micro_tokens: int | None, *models: LanguageModel) -> Iterator[tuple[Tensor, Inputs]]:
    """(indices of rows, what a model takes of them) by passes of at most so many tokens; None: as the memory has it.

    Of several processes each has rows of its own: what is made of them, 0 elsewhere, is to be added up."""
    tokens = micro_tokens or batch.tokens_BS.shape[1] * _rows_that_fit(batch, *models)
    for index in micro_batches(batch.attention_mask_BS.sum(dim=1), tokens, shared=True):
        rows = batch.rows(index.to(batch.tokens_BS.device))
        yield index, (rows.tokens_BS, rows.attention_mask_BS, rows.response_mask_BT.shape[1])


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
    rows: Inputs,
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
    sft_policy: LanguageModel, base_policy: LanguageModel, batch: Generated, *, micro_tokens: int | None = None
) -> Scores:
    """log pi_sft - log pi_base of the responses at temperature 1, and its two terms. micro_tokens as in
    `score_logprobs`."""
    scores_3BT = torch.zeros((3, *batch.response_mask_BT.shape), device=batch.tokens_BS.device)
    for index, inputs in passes(batch, micro_tokens, sft_policy, base_policy):
        scores_3BT[:, index, : inputs[2]] = torch.stack(response_log_ratio(sft_policy, base_policy, *inputs))
    return Scores(*parallel.add_up(scores_3BT).unbind())


def precision_gap(sft_policy: LanguageModel, base_policy: LanguageModel, batch: Generated, scores: Scores) -> float:
    """How far the log-ratios of responses are from those of fp32 bodies: root mean square over the first GAP_ROWS
    responses, nats a response. 0 where the bodies run in fp32."""
    models = [model for model in (sft_policy, base_policy) if model.precision != "fp32"]
    if not models:
        return 0.0
    part = batch.rows(slice(GAP_ROWS))
    before = [model.precision for model in models]
    try:
        for model in models:
            model.precision = "fp32"
        exact = score_log_ratio(sft_policy, base_policy, part).log_ratio_BT.sum(dim=1)
    finally:
        for model, precision in zip(models, before, strict=True):
            model.precision = precision
    return float((exact - scores.log_ratio_BT[:GAP_ROWS].sum(dim=1)).double().square().mean().sqrt())


@torch.no_grad()
def full_kl(
    policy: LanguageModel, anchor: LanguageModel, batch: Generated, *, micro_tokens: int | None = None
) -> Tensor:
    """KL(policy || anchor) of the whole next-token distributions at temperature 1, summed along each response; B, nats.

    Over responses that the policy sampled at temperature 1 the mean is the KL over responses, as that of
    log pi - log anchor is, with less noise: the choice of each token is averaged out (Rao-Blackwell; Amini et al. 2025,
    arXiv 2504.10637).
    """
    kl_B = torch.zeros(len(batch.tokens_BS), device=batch.tokens_BS.device)
    for index, inputs in passes(batch, micro_tokens, policy, anchor):
        found = response_reverse_kl(policy, anchor, anchor, inputs, lambda anchor_NV, _: anchor_NV)
        kl_B[index] = unflatten(found.teacher_N, inputs[1][:, -inputs[2] :]).sum(dim=1)
    return parallel.add_up(kl_B)


@torch.no_grad()
def next_token_entropy(
    policy: LanguageModel, batch: Generated, *, micro_tokens: int | None = None, temperature: float = 1.0
) -> Tensor:
    """Entropy of the distribution that each response token is drawn from; BT fp32, nats, 0 where masked."""
    entropy_BT = torch.zeros(batch.response_mask_BT.shape, device=batch.tokens_BS.device)
    for index, inputs in passes(batch, micro_tokens, policy):
        flat = response_reverse_kl(
            policy, policy, policy, inputs, lambda own_NV, _: own_NV.new_zeros(own_NV.shape), temperature=temperature
        )
        entropy_BT[index, : inputs[2]] = -unflatten(flat.teacher_N, inputs[1][:, -inputs[2] :])
    return parallel.add_up(entropy_BT)


def _rows_that_fit(batch: Generated, *models: LanguageModel) -> int:
    positions = batch.tokens_BS.shape[1]
    scored = 0 if all(model.head.linear for model in models) else len(models) * positions
    return rows_that_fit(models[0], positions, scored=scored, held=weight_bytes(*models))
