"""Our language model as lm-eval asks for one: text in, text and log-likelihoods out, decoded as each task asks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from inspect import signature
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from srppo.config import derive_seed
from srppo.data.chat import render, stop_ids
from srppo.errors import ModelError, OutOfMemory
from srppo.evaluation.meter import Meter, RowsWritten
from srppo.models.language_model import LanguageModel, model_inputs
from srppo.models.memory import batch_size, by_length
from srppo.training.batch import left_pad
from srppo.training.rollout import generate

DEFAULT_NEW_TOKENS = 256  # lm-eval's own, where a task names none
Pair = tuple[Any, list[int], list[int]]  # (texts, ids of the context, ids of the continuation)


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


class HarnessModel(TemplateLM):
    """One model under evaluation. The weights are loaded on the first request that needs them.

    templated: prompts come from the chat template and are encoded as they are. draw: which of several samples of every
    prompt is asked for. rows: batch size, None: by memory. temperature: samples every task at it; None: tasks
    decode as they say, nearly all greedily. new_tokens: overrides the limit of every task.
    """

    meter: Meter

    def __init__(
        self,
        load: Callable[[], LanguageModel],
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        *,
        seed: int,
        temperature: float | None,
        new_tokens: int | None,
        rows: int | None,
    ) -> None:
        super().__init__()
        self.load, self.tokenizer, self.context = load, tokenizer, context
        self.seed, self.temperature, self.new_tokens, self.rows = seed, temperature, new_tokens, rows
        self.templated, self.draw = False, 0
        self.used_rows: int | None = None
        self._known: dict[tuple[str, bool], list[int]] = {}

    @cached_property
    def lm(self) -> LanguageModel:
        """The model itself."""
        return self.load()

    def release(self) -> None:
        """Let go of the weights: a run has many models, and one at a time is in memory."""
        self.__dict__.pop("lm", None)

    @property
    def eot_token_id(self) -> int:
        """The tokenizer's EOS."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, else EOS."""
        bos = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if bos is None else bos)

    @property
    def tokenizer_name(self) -> str:
        """Only for lm-eval's request cache, which is never used."""
        return "srppo"

    def _special(self, text: str) -> bool:
        """Whether the tokenizer adds special tokens: not to a text that has its BOS or is templated."""
        return not (self.templated or has_bos_prefix(text, self.tokenizer.decode([self.prefix_token_id])))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, none where the text has its BOS or is templated."""
        special = self._special(string) if add_special_tokens is None else add_special_tokens
        if (string, special) not in self._known:
            ids = self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"]
            self._known[string, special] = list(ids)
        return self._known[string, special]

    def encode_all(self, texts: Sequence[str]) -> None:
        """Encode many at once, which is several times faster, for `tok_encode` to know them."""
        keys = dict.fromkeys((text, self._special(text)) for text in texts)
        for special in (False, True):
            if rows := [key[0] for key in keys if key[1] is special and key not in self._known]:
                encoded = self.tokenizer(rows, add_special_tokens=special, verbose=False)["input_ids"]
                self._known |= {(text, special): list(ids) for text, ids in zip(rows, encoded, strict=True)}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The prompt text of a conversation. Raises ModelError where the template refuses it."""
        from jinja2.exceptions import TemplateError

        try:
            unfinished = not add_generation_prompt
            return render(self.tokenizer, chat_history, generation=add_generation_prompt, unfinished=unfinished)
        except (TemplateError, ValueError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"the chat template refuses a prompt ({reason}); pass --no-chat-template") from None

    def decoding(self, asked: Mapping[str, Any]) -> Decoding:
        """A task's generation_kwargs with what the command overrides."""
        return how_asked(asked, self.temperature, self.new_tokens)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The response to each request, cut before its first stop text. Repeated requests get samples of their own."""
        prompts = [self.tok_encode(request.args[0]) for request in requests]  # they fit: see `checks`
        seeds: list[int] = []
        seen = Counter[str]()
        alike: dict[str, list[int]] = defaultdict(list)  # places of the requests that are decoded alike
        for i, request in enumerate(requests):
            text, asked = request.args
            alike[repr(asked)].append(i)  # lm-eval gives each request a copy of its own
            seeds.append(row_seed(self.seed, text, self.draw, seen[text]))
            seen[text] += 1
        answers = [""] * len(requests)
        for places in alike.values():
            how = self.decoding(requests[places[0]].args[1])
            size = self._size(max(len(prompts[i]) for i in places) + how.max_new_tokens)
            written = self._decode([prompts[i] for i in places], [seeds[i] for i in places], how, size)
            self.meter.finish(len(places))
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
            for i, text in zip(places, texts, strict=True):
                answers[i] = postprocess_generated_text(text, list(how.until), None)
        return answers

    def _decode(self, prompts: list[list[int]], seeds: list[int], how: Decoding, rows: int) -> list[list[int]]:
        """decode(); where so many rows do not fit after all it begins again with half as many, which changes samples by
        rounding alone."""
        stops = stop_ids(self.tokenizer, self.lm.generation_config)
        rows = min(rows, len(prompts))
        limits: dict[str, Any] = {"stop_ids": stops, "rows": rows, "reach": self.meter.reach}
        try:
            return decode(self.lm, self.tokenizer, prompts, seeds, how, **limits)
        except OutOfMemory:
            if rows == 1:
                longest = max(map(len, prompts))
                raise ModelError(
                    f"one prompt of {longest} tokens and {how.max_new_tokens} new ones do not fit the memory; "
                    "pass --max-new-tokens, or --device cpu"
                ) from None
        torch.cuda.empty_cache()
        return self._decode(prompts, seeds, how, rows // 2)

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-prob in nats, whether greedy decoding would write it) of each continuation; contexts are cut left."""
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        rows = [
            ((context + continuation)[-self.context - 1 :], len(continuation)) for _, context, continuation in requests
        ]
        size = self._size(max(len(ids) for ids, _ in rows), scored=max(count for _, count in rows))
        for batch in by_length(rows, lambda row: len(row[0]), size):
            for i, result in zip(batch, self._score([rows[i] for i in batch]), strict=True):
                found[i] = result
            self.meter.finish(len(batch))
        return found

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

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-prob of whole texts, nats; texts beyond the context are read in windows, as lm-eval defines them."""
        found = []
        size = self._size(self.context, scored=self.context)
        for request in requests:
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.context, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            rows = [(context + continuation, len(continuation)) for context, continuation in pairs]
            parts = [self._score(rows[i : i + size]) for i in range(0, len(rows), size)]
            found.append(sum(logprob for part in parts for logprob, _ in part))
            self.meter.advance(1)
        return found

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


def row_seed(seed: int, prompt: str, draw: int, repeat: int) -> int:
    """The seed of one sample: of the prompt's text, not of its place, so that limits and batches change no seed."""
    place = int.from_bytes(sha256(f"{draw}/{repeat}/{prompt}".encode()).digest()[:6], "big")
    return derive_seed(seed, "harness", place)
