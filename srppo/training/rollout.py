"""From prompts to a RolloutBatch: sampling from the policy itself, then log-probs and values by the training path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from srppo.config import derive_seed
from srppo.kernels import linear_logprob_diff_parts, logprob_diff_parts
from srppo.models.language_model import LanguageModel, ValueModel, unflatten
from srppo.training.batch import RolloutBatch, left_pad


@dataclass(frozen=True)
class Generated:
    """Sampled responses; fields as in RolloutBatch, without log-probs."""

    tokens_BS: Tensor
    attention_mask_BS: Tensor
    response_mask_BT: Tensor
    ended_B: Tensor

    def responses(self) -> list[list[int]]:
        """Token ids of each response, EOS included."""
        width = self.response_mask_BT.shape[1]
        lengths = self.response_mask_BT.sum(dim=1).tolist()
        return [row[:n] for row, n in zip(self.tokens_BS[:, -width:].tolist(), lengths, strict=True)]


class LogRatio(NamedTuple):
    """log pi_sft - log pi_base of responses and its two terms; BT fp32, nats, 0 where masked."""

    log_ratio_BT: Tensor
    sft_logprobs_BT: Tensor
    base_logprobs_BT: Tensor


def prompt_schedule(count: int, batch: int, step: int, seed: int, *, per_prompt: int = 1) -> list[int]:
    """Indices of the prompts of one step: passes over all prompts, each in its own seeded order.

    A function of the step alone, so a resumed run needs no cursor. A batch may span two passes; within a pass no prompt
    comes twice. With `per_prompt`, which divides the batch, each index stands that many times in a row.
    """
    orders: dict[int, list[int]] = {}
    indices = []
    distinct = batch // per_prompt
    for position in range(step * distinct, (step + 1) * distinct):
        epoch, offset = divmod(position, count)
        if epoch not in orders:
            generator = torch.Generator().manual_seed(derive_seed(seed, "prompt-order", epoch))
            orders[epoch] = torch.randperm(count, generator=generator).tolist()
        indices += [orders[epoch][offset]] * per_prompt
    return indices


@torch.no_grad()
def generate(
    policy: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    seed: int,
    temperature: float = 1.0,
    greedy: bool = False,
) -> Generated:
    """Responses to prompts (token ids), sampled at `temperature` from the whole distribution, or greedy.

    The model's own generation_config is overridden: no top-k, top-p or penalties, or the sampled distribution would
    not be the one whose log-probs are trained. A response ends with its first stop token, which counts. The global
    random state is left as it was.
    """
    tokens_BP, mask_BP = (x.to(policy.device) for x in left_pad(prompts, pad_id))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=not greedy,
        temperature=None if greedy else temperature,
        top_k=None if greedy else 0,
        top_p=None if greedy else 1.0,
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
        use_cache=True,
    )
    own = policy.model.generation_config
    policy.model.generation_config = GenerationConfig()  # generate() fills gaps of ours from the model's own
    devices = [policy.device] if policy.device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices=devices),
            torch.autocast(policy.device.type, dtype=torch.bfloat16, enabled=policy.precision == "bf16"),
        ):
            torch.manual_seed(seed)
            tokens_BS = policy.model.generate(
                input_ids=tokens_BP, attention_mask=mask_BP.long(), generation_config=config
            )
    finally:
        policy.model.generation_config = own
    return up_to_stop(tokens_BS, mask_BP, stop_ids)


def up_to_stop(tokens_BS: Tensor, mask_BP: Tensor, stop_ids: Sequence[int]) -> Generated:
    """Prompts with what was sampled after them: a response ends with its first stop token, whatever follows."""
    response_BT = tokens_BS[:, mask_BP.shape[1] :]
    stopped_BT = torch.isin(response_BT, torch.tensor(list(stop_ids), device=tokens_BS.device))
    ended_B = stopped_BT.any(dim=1)
    first_B = torch.where(ended_B, stopped_BT.int().argmax(dim=1), response_BT.shape[1] - 1)
    response_mask_BT = torch.arange(response_BT.shape[1], device=tokens_BS.device) <= first_B.unsqueeze(1)
    return Generated(tokens_BS, torch.cat([mask_BP, response_mask_BT], dim=1), response_mask_BT, ended_B)


def micro_slices(count: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows that cover `count` rows."""
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


@torch.no_grad()
def score_logprobs(
    model: LanguageModel, generated: Generated | RolloutBatch, *, micro_batch: int, temperature: float = 1.0
) -> Tensor:
    """Log-probs of the responses under one model; BT fp32, nats, 0 where masked."""
    width = generated.response_mask_BT.shape[1]
    return torch.cat(
        [
            model.response_logprobs(
                generated.tokens_BS[rows], generated.attention_mask_BS[rows], width, temperature=temperature
            )
            for rows in micro_slices(len(generated.tokens_BS), micro_batch)
        ]
    )


@torch.no_grad()
def response_log_ratio(
    sft: LanguageModel, base: LanguageModel, tokens_BS: Tensor, attention_mask_BS: Tensor, response_width: int
) -> LogRatio:
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
        return LogRatio(sft_BT - base_BT, sft_BT, base_BT)
    return LogRatio(*(unflatten(part_N, mask_BT) for part_N in parts[:3]))


def score_log_ratio(
    sft_policy: LanguageModel, base_policy: LanguageModel, batch: Generated | RolloutBatch, *, micro_batch: int
) -> LogRatio:
    """log pi_sft - log pi_base of the responses at temperature 1, and its two terms."""
    width = batch.response_mask_BT.shape[1]
    parts = [
        response_log_ratio(sft_policy, base_policy, batch.tokens_BS[rows], batch.attention_mask_BS[rows], width)
        for rows in micro_slices(len(batch.tokens_BS), micro_batch)
    ]
    return LogRatio(*(torch.cat(part) for part in zip(*parts, strict=True)))


@torch.no_grad()
def to_batch(
    generated: Generated, policy: LanguageModel, value: ValueModel | None, *, micro_batch: int, temperature: float
) -> RolloutBatch:
    """Add behaviour log-probs (at the sampling temperature, by the same path as training) and values, 0 without a
    critic."""
    width = generated.response_mask_BT.shape[1]
    values_BT = torch.zeros(generated.response_mask_BT.shape, device=generated.tokens_BS.device)
    if value is not None:
        values = [
            value.response_values(generated.tokens_BS[rows], generated.attention_mask_BS[rows], width)
            for rows in micro_slices(len(generated.tokens_BS), micro_batch)
        ]
        values_BT = torch.cat(values)
    return RolloutBatch(
        tokens_BS=generated.tokens_BS,
        attention_mask_BS=generated.attention_mask_BS,
        response_mask_BT=generated.response_mask_BT,
        old_logprobs_BT=score_logprobs(policy, generated, micro_batch=micro_batch, temperature=temperature),
        old_values_BT=values_BT,
        ended_B=generated.ended_B,
    )
