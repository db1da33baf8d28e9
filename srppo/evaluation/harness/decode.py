"""Decoding as lm-eval's tasks ask for it: greedy, or sampled by random numbers of each row's own seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lm_eval.models.utils import normalize_gen_kwargs
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria

from srppo.models.language_model import LanguageModel
from srppo.training.rollout import generate

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


class _StopTexts(StoppingCriteria):
    """Ends a row once one of the texts stands in its response; looks at as many last tokens as could hold one. For one
    batch; `tick` is called at each step."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], tick: Callable[[], None]) -> None:
        self.tokenizer, self.texts, self.tick = tokenizer, [text for text in texts if text], tick
        self.window, self.steps = max((len(text.encode()) + 1 for text in self.texts), default=0), 0
        self.done: list[bool] = []

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.tick()
        self.steps += 1
        self.done = self.done or [False] * len(input_ids)
        for i, tail in enumerate(input_ids[:, -min(self.steps, self.window) :].tolist() if self.texts else []):
            if not self.done[i]:
                written = str(self.tokenizer.decode(tail, skip_special_tokens=True))
                self.done[i] = any(text in written for text in self.texts)
        return torch.tensor(self.done, device=input_ids.device)


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
    """Token ids of the response to each prompt, up to its first stop token (left out), as one batch of `generate`.

    A sampled row's random numbers come from its seed alone.
    """
    generated = generate(
        model,
        prompts,
        stop_ids=stop_ids,
        pad_id=int(tokenizer.pad_token_id),
        max_new_tokens=how.max_new_tokens,
        seed=seeds,
        temperature=how.temperature,
        top_k=how.top_k,
        top_p=how.top_p,
        criteria=[_StopTexts(tokenizer, how.until, tick)],
        settings=how.extra,
        rows=len(prompts),
    )
    ended = generated.ended_B.tolist()
    return [row[:-1] if stopped else row for row, stopped in zip(generated.responses(), ended, strict=True)]
