"""From prompts to a RolloutBatch: the one sampler, then log-probs and values by the path that is trained.

Everything that is written is written by `generate`: rollouts, answers to items, lm-eval's requests, and what two models
write together (`stages.extrapolation`, by a logits processor).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from srppo.config import derive_seed
from srppo.models.language_model import LanguageModel, ValueModel
from srppo.models.memory import advising, rows_that_fit
from srppo.training.batch import Generated, RolloutBatch, left_pad, micro_slices
from srppo.training.scores import score_logprobs


@dataclass(frozen=True)
class Until:
    """Texts that end a response beside its stop tokens."""

    tokenizer: PreTrainedTokenizerBase
    texts: tuple[str, ...]


@advising(
    "generating", "lower rollout.max_new_tokens or data.max_prompt_tokens; the batch is as small as it needs to be"
)
@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    *,
    stop_ids: Sequence[int],
    pad_id: int,
    max_new_tokens: int,
    seed: int | Sequence[int],
    temperature: float | None = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    until: Until | None = None,
    processor: Callable[[Tensor], LogitsProcessor] | None = None,
    settings: Mapping[str, Any] | None = None,
    tick: Callable[[], None] | None = None,
    rows: int | None = None,
    held: int | None = None,
) -> Generated:
    """Responses to prompts (token ids), sampled at `temperature` from the whole distribution, or greedy at None.

    The model's own generation_config is overridden: no top-k, top-p or penalties but those asked for, or the sampled
    distribution would not be the one whose log-probs are trained. Ids that no tokenizer makes are left out. A response
    ends with its first stop token, which counts. The global random state neither enters nor changes.

    seed: of all random numbers of the batch, or one a row, whose numbers are then its own. A row's probabilities come
    from products over the whole batch, whose last bits hang on the batch's size and width: the same batch gives the
    same row, another one may, at a near tie, give another token (1 of 48 GSM8K responses of embedded:l, batches of 64
    against 5).

    processor: makes the logits processor of one batch from its prompts' mask (BP); it sees logits before temperature,
    and then the body runs in fp32, since what it computes may blow their rounding up. settings: further keys of
    GenerationConfig. tick: called at each token. rows: at most so many at a time, None: as many as fit the memory
    beside what it holds already (`held`, bytes; `memory.rows_that_fit`). Of several batches each has a seed of its own.
    """
    tokens_BP, mask_BP = (x.to(model.device) for x in left_pad(prompts, pad_id))
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,  # the processors leave one token a row
        eos_token_id=list(stop_ids),
        pad_token_id=pad_id,
        use_cache=True,
        **(settings or {}),
    )
    parts = []
    for part in micro_slices(
        len(prompts), rows or rows_that_fit(model, tokens_BP.shape[1] + max_new_tokens, held=held)
    ):
        processors = LogitsProcessorList([_Vocabulary(model.vocab_size)])
        if processor is not None:
            processors.append(processor(mask_BP[part]))
        if temperature is not None:
            processors += [TopKLogitsWarper(top_k)] if top_k else []
            processors += [TopPLogitsWarper(top_p)] if top_p < 1 else []
            if isinstance(seed, int):
                own = derive_seed(seed, "part", part.start) if part.start else seed
                processors.append(_SeedOfTheBatch(own, temperature, model.device))
            else:
                processors.append(_SeedOfEachRow(seed[part], temperature, max_new_tokens, model.device))
        criteria = StoppingCriteriaList([_Tick(tick)] if tick else [])
        if until is not None and any(until.texts):
            criteria.append(_StopTexts(until, tokens_BP.shape[1]))
        parts.append(_written(model, tokens_BP[part], mask_BP[part], config, processors, criteria, processor is None))
    width = max(part_BS.shape[1] for part_BS in parts)
    tokens_BS = torch.cat([pad(part_BS, (0, width - part_BS.shape[1]), value=pad_id) for part_BS in parts])
    return _up_to_stop(tokens_BS, mask_BP, stop_ids)


def _written(
    model: LanguageModel,
    tokens_BP: Tensor,
    mask_BP: Tensor,
    config: GenerationConfig,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    may_round: bool,
) -> Tensor:
    own = model.model.generation_config
    model.model.generation_config = GenerationConfig()  # generate() fills gaps of ours from the model's own
    try:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.precision == "bf16" and may_round):
            tokens_BS: Tensor = model.model.generate(
                input_ids=tokens_BP,
                attention_mask=mask_BP.long(),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=criteria,
            )
            return tokens_BS
    finally:
        model.model.generation_config = own


def _up_to_stop(tokens_BS: Tensor, mask_BP: Tensor, stop_ids: Sequence[int]) -> Generated:
    """Prompts with what was sampled after them: a response ends with its first stop token, whatever follows."""
    response_BT = tokens_BS[:, mask_BP.shape[1] :]
    stopped_BT = torch.isin(response_BT, torch.tensor(list(stop_ids), device=tokens_BS.device))
    ended_B = stopped_BT.any(dim=1)
    first_B = torch.where(ended_B, stopped_BT.int().argmax(dim=1), response_BT.shape[1] - 1)
    response_mask_BT = torch.arange(response_BT.shape[1], device=tokens_BS.device) <= first_B.unsqueeze(1)
    return Generated(tokens_BS, torch.cat([mask_BP, response_mask_BT], dim=1), response_mask_BT, ended_B)


# ---- what stands between logits and a token


class _Vocabulary(LogitsProcessor):
    """Leaves the ids that the tokenizer can make."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores[:, : self.vocab_size]


class _SeedOfTheBatch(LogitsProcessor):
    """Leaves one token a row, drawn with the random numbers of one seed for the whole batch."""

    def __init__(self, seed: int, temperature: float, device: torch.device) -> None:
        self.generator, self.temperature = torch.Generator(device).manual_seed(seed), temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return _alone(scores, torch.multinomial((scores / self.temperature).softmax(-1), 1, generator=self.generator))


class _SeedOfEachRow(LogitsProcessor):
    """Leaves one token a row: where the cumulative probability passes the row's own uniform number of this step."""

    def __init__(self, seeds: Sequence[int], temperature: float, steps: int, device: torch.device) -> None:
        rows = [torch.rand(steps, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        self.uniforms_BT, self.temperature, self.step = torch.stack(rows).double().to(device), temperature, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative_BV = (scores.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        target_B1 = self.uniforms_BT[:, self.step, None] * cumulative_BV[:, -1:]
        self.step += 1
        token_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True).clamp(max=scores.shape[-1] - 1)
        return _alone(scores, token_B1)


def _alone(scores: Tensor, token_B1: Tensor) -> Tensor:
    return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)


class _StopTexts(StoppingCriteria):
    """Ends a row once one of the texts stands in its response; looks at as many last tokens as could hold one."""

    def __init__(self, until: Until, prompt_width: int) -> None:
        self.tokenizer, self.texts, self.start = until.tokenizer, [text for text in until.texts if text], prompt_width
        self.window = max(len(text.encode()) for text in self.texts) + 1
        self.done: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.done = self.done or [False] * len(input_ids)
        tails = input_ids[:, max(self.start, input_ids.shape[1] - self.window) :].tolist()
        for i, tail in enumerate(tails):
            if not self.done[i]:
                written = str(self.tokenizer.decode(tail, skip_special_tokens=True))
                self.done[i] = any(text in written for text in self.texts)
        return torch.tensor(self.done, device=input_ids.device)


class _Tick(StoppingCriteria):
    """Tells of each step; stops nothing."""

    def __init__(self, tick: Callable[[], None]) -> None:
        self.tick = tick

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.tick()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


# ---- scored


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
    logprobs_BT = score_logprobs(policy, generated, micro_batch=micro_batch, temperature=temperature)
    return RolloutBatch(**vars(generated), old_logprobs_BT=logprobs_BT, old_values_BT=values_BT)
