"""What a model under evaluation is asked in token ids: responses, and log-probs of continuations.

Of several processes (`training.parallel`) the first asks, and each answers its share of the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import wraps
from inspect import signature
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from srppo.config import ModelConfig
from srppo.data.chat import stop_ids as stops_of
from srppo.errors import ModelError, OutOfMemory
from srppo.evaluation.meter import RowsWritten
from srppo.models.language_model import LanguageModel, model_inputs
from srppo.models.loading import load_model, load_tokenizer
from srppo.models.memory import batch_size, by_length
from srppo.training import parallel
from srppo.training.batch import left_pad
from srppo.training.rollout import generate

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Decoding:
    """How to decode. temperature None: greedy. extra: further keys of GenerationConfig that a task asks for."""

    max_new_tokens: int
    until: tuple[str, ...] = ()
    temperature: float | None = None
    top_k: int = 0
    top_p: float = 1.0
    extra: dict[str, Any] = field(default_factory=dict)


def _in_all(method: Callable[Concatenate[Answering, P], T]) -> Callable[Concatenate[Answering, P], T]:
    """A method that the first process calls, and all do, each with its arguments (which are pickled)."""

    @wraps(method)
    def call(self: Answering, *args: P.args, **named: P.kwargs) -> T:
        self.asking = True
        parallel.from_first(lambda: (method.__name__, args, named))
        found = method(self, *args, **named)
        self.asking = False  # it stays where something was raised: others may wait in the middle of it
        return found

    return call


class Answering:
    """The model under evaluation, one at a time, in this process.

    rows: batch size, None: by memory. told: hears, while it answers, the share of the rows that is done. used_rows: the
    largest batch since it was set to None.
    """

    lm: LanguageModel
    tokenizer: PreTrainedTokenizerBase

    def __init__(self, device: str, rows: int | None = None) -> None:
        self.device, self.rows = device, rows
        self.loaded: tuple[str, ModelConfig] | None = None
        self.told: Callable[[float], object] = lambda share: None
        self.used_rows: int | None = None
        self.asking = False

    def follow(self) -> None:
        """What a process but the first does: what the first asks of all, until it is done."""
        while asked := parallel.from_first(lambda: None):
            name, args, named = asked
            getattr(type(self), name).__wrapped__(self, *args, **named)

    def dismiss(self) -> None:
        """Let the others go. Where something was raised in the midst of a call they cannot hear it."""
        if not self.asking:
            parallel.from_first(lambda: None)

    @_in_all
    def load(self, spec: str, config: ModelConfig) -> None:
        """Take another model in place of the one before, all of its weights in each process. Raises ModelError in one
        line."""
        self.__dict__.pop("lm", None)
        self.tokenizer = load_tokenizer(spec, config)
        whole = config.model_copy(update={"sharding": "none"})
        self.lm = load_model(spec, whole, device=self.device, vocab_size=len(self.tokenizer))
        self.loaded = spec, config

    @_in_all
    def decode(self, prompts: list[list[int]], seeds: list[int], how: Decoding) -> list[list[int]]:
        """Token ids of the response to each prompt, as `decode` below. Where the rows do not fit after all it begins
        again with half as many, which changes samples by rounding alone; of several processes none can, since the
        others are in the midst of it, and OutOfMemory is raised. Raises ModelError where not even one row fits."""
        rows = min(self._size(max(map(len, prompts)) + how.max_new_tokens), len(prompts))
        while True:
            try:
                return decode(
                    self.lm,
                    self.tokenizer,
                    prompts,
                    seeds,
                    how,
                    stop_ids=stops_of(self.tokenizer, self.lm.generation_config),
                    rows=rows,
                    reach=lambda done: self.told(min(done * parallel.size() / len(prompts), 1.0)),
                )
            except OutOfMemory:
                if parallel.size() > 1:
                    raise
                if rows == 1:
                    longest = max(map(len, prompts))
                    raise ModelError(
                        f"one prompt of {longest} tokens and {how.max_new_tokens} new ones do not fit the memory; "
                        "pass --max-new-tokens, or --device cpu"
                    ) from None
            torch.cuda.empty_cache()
            rows //= 2

    @_in_all
    def score(self, rows: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """(log-prob in nats, whether greedy decoding would write it) of the last so many tokens of each row."""
        size = self._size(max(len(ids) for ids, _ in rows), scored=max(count for _, count in rows))
        places = parallel.share(sorted(range(len(rows)), key=lambda i: -len(rows[i][0])))
        found: dict[int, tuple[float, bool]] = {}
        for batch in by_length(places, lambda i: len(rows[i][0]), size):
            chosen = [places[i] for i in batch]
            found |= zip(chosen, self._score([rows[i] for i in chosen]), strict=True)
            self.told(len(found) / len(places))
        everywhere = {place: score for each in parallel.gather(found) for place, score in each.items()}
        return [everywhere[i] for i in range(len(rows))]

    @torch.no_grad()
    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        device, model = self.lm.device, self.lm.model
        pad = int(self.tokenizer.pad_token_id)
        tokens_BS, mask_BS = (x.to(device) for x in left_pad([ids for ids, _ in rows], pad))
        width = max(count for _, count in rows)
        inputs = model_inputs(tokens_BS[:, :-1], mask_BS[:, :-1], self.lm.takes_positions)
        keep = {"logits_to_keep": width} if "logits_to_keep" in signature(model.forward).parameters else {}
        self.lm.activate()
        logits_BSV: Tensor = model(**inputs, **keep, use_cache=False).logits
        logprobs_BTV = logits_BSV[:, -width:].float().log_softmax(dim=-1)
        target_BT = tokens_BS[:, -width:]
        logprobs_BT = logprobs_BTV.gather(-1, target_BT.unsqueeze(-1)).squeeze(-1)
        equal_BT = logprobs_BTV.argmax(dim=-1) == target_BT
        return [
            (float(logprobs_BT[i, width - count :].sum()), bool(equal_BT[i, width - count :].all()))
            for i, (_, count) in enumerate(rows)
        ]

    def _size(self, positions: int, scored: int = 1) -> int:
        size = self.rows or batch_size(self.lm, positions, scored=scored)
        self.used_rows = max(size, self.used_rows or 0)
        return size


class _StopTexts:
    """Which rows have one of the texts in their response; looks at as many last tokens as could hold one. `told` sees
    all."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], told: RowsWritten) -> None:
        self.tokenizer, self.texts, self.told = tokenizer, [text for text in texts if text], told
        self.window = max((len(text.encode()) + 1 for text in self.texts), default=0)

    def __call__(self, responses: list[list[int]]) -> list[bool]:
        none = self.told(responses)
        if not self.texts:
            return none
        tails = [row[-self.window :] for row in responses]
        written = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        return [any(text in each for text in self.texts) for each in written]


def decode(
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    how: Decoding,
    *,
    stop_ids: Sequence[int],
    rows: int | None = None,
    reach: Callable[[float], object] = lambda rows: None,
) -> list[list[int]]:
    """Token ids of the response to each prompt, up to its first stop token (left out), by `generate`, so many rows at
    a time. `reach` hears how many are written.

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
        until=_StopTexts(tokenizer, how.until, RowsWritten(how.max_new_tokens, reach)),
        settings=how.extra,
        rows=rows,
    )
    ended = generated.ended_B.tolist()
    return [row[:-1] if stopped else row for row, stopped in zip(generated.responses(), ended, strict=True)]
