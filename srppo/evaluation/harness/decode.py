"""Decoding for evaluation: greedy, or sampled by random numbers of each row's own seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
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

from srppo.models.language_model import LanguageModel
from srppo.training.batch import left_pad

DEFAULT_NEW_TOKENS = 256  # lm-eval's own, where a task names none


@dataclass(frozen=True)
class Decoding:
    """How to decode. temperature None: greedy. extra: further keys of GenerationConfig that a task asks for."""

    max_new_tokens: int
    until: tuple[str, ...] = ()
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)


def how_asked(asked: Mapping[str, Any], temperature: float | None, new_tokens: int | None) -> Decoding:
    """A task's generation_kwargs by lm-eval's rules; `temperature` samples and `new_tokens` limits whatever it says."""
    own: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), DEFAULT_NEW_TOKENS))
    until = tuple(str(text) for text in own.pop("until") or ())
    limit = int(own.pop("max_gen_toks"))
    warmth = float(own.pop("temperature", None) or 1.0)
    warm = warmth if own.pop("do_sample") else None
    top_k, top_p = int(own.pop("top_k", None) or 0), float(own.pop("top_p", None) or 1.0)
    if temperature is not None:
        return Decoding(new_tokens or limit, until, temperature, extra=own)
    return Decoding(new_tokens or limit, until, warm, top_k, top_p, extra=own)


class _InverseTransform(LogitsProcessor):
    """Leaves one token a row: where the cumulative probability passes the row's own uniform number of this step."""

    def __init__(self, uniforms_BT: Tensor, temperature: float) -> None:
        self.uniforms_BT, self.temperature, self.step = uniforms_BT, temperature, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        cumulative_BV = (scores.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        target_B1 = self.uniforms_BT[:, self.step, None] * cumulative_BV[:, -1:]
        self.step += 1
        token_B1 = torch.searchsorted(cumulative_BV, target_B1, right=True).clamp(max=scores.shape[-1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token_B1, 0.0)


class _StopTexts(StoppingCriteria):
    """Ends a row once one of the texts stands in its response; looks at as many last tokens as could hold one."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], prompt_width: int) -> None:
        self.tokenizer, self.texts, self.start = tokenizer, [text for text in texts if text], prompt_width
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


@torch.no_grad()
def decode(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    how: Decoding,
    *,
    stop_ids: Sequence[int],
    tick: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """Token ids of the response to each prompt, up to its first stop token (left out).

    The model's own generation_config is overridden, as in rollouts. A sampled row's random numbers come from its seed
    alone; the global random state neither enters nor changes. Its probabilities come from products over the whole
    batch, whose last bits hang on the batch's size and width: the same batch gives the same row, another one may, at a
    near tie, give another token (1 of 48 GSM8K responses of embedded:l, batches of 64 against 5).
    """
    pad = int(tokenizer.pad_token_id)
    tokens_BP, mask_BP = (x.to(model.device) for x in left_pad(prompts, pad))
    processors, criteria = LogitsProcessorList(), StoppingCriteriaList([_Tick(tick)])
    if how.temperature is not None:
        if how.top_k:
            processors.append(TopKLogitsWarper(how.top_k))
        if how.top_p < 1:
            processors.append(TopPLogitsWarper(how.top_p))
        rows = [torch.rand(how.max_new_tokens, generator=torch.Generator().manual_seed(s)) for s in seeds]
        processors.append(_InverseTransform(torch.stack(rows).double().to(model.device), how.temperature))
    if any(how.until):
        criteria.append(_StopTexts(tokenizer, how.until, tokens_BP.shape[1]))
    config = GenerationConfig(
        max_new_tokens=how.max_new_tokens,
        do_sample=False,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
        use_cache=True,
        **how.extra,
    )
    own = model.model.generation_config
    model.model.generation_config = GenerationConfig()  # generate() fills gaps of ours from the model's own
    try:
        with torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.precision == "bf16"):
            tokens_BS = model.model.generate(
                input_ids=tokens_BP,
                attention_mask=mask_BP.long(),
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=criteria,
            )
    finally:
        model.model.generation_config = own
    stops = set(stop_ids)
    responses = tokens_BS[:, tokens_BP.shape[1] :].tolist()
    return [row[: next((i for i, token in enumerate(row) if token in stops), len(row))] for row in responses]
