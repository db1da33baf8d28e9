"""Decoding as lm-eval's tasks ask for it: greedy, or sampled by random numbers of each row's own seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs
from transformers import PreTrainedTokenizerBase

from srppo.models.language_model import LanguageModel
from srppo.training.rollout import Until, generate

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


def decode(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    how: Decoding,
    *,
    stop_ids: Sequence[int],
    tick: Callable[[], None] | None = None,
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
        until=Until(tokenizer, how.until),
        settings=how.extra,
        tick=tick,
        rows=len(prompts),
    )
    ended = generated.ended_B.tolist()
    return [row[:-1] if stopped else row for row, stopped in zip(generated.responses(), ended, strict=True)]
