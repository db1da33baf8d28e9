"""Our language model as lm-eval asks for one: text in, text and log-likelihoods out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from hashlib import sha256
from inspect import signature
from time import perf_counter
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from srppo.config import derive_seed
from srppo.data.chat import render, stop_ids
from srppo.errors import ModelError, OutOfMemory
from srppo.evaluation.harness.decode import Decoding, decode, how_asked
from srppo.evaluation.meter import Meter
from srppo.models.language_model import LanguageModel, model_inputs
from srppo.models.memory import batch_size, by_length
from srppo.training.batch import left_pad

Pair = tuple[Any, list[int], list[int]]  # (texts, ids of the context, ids of the continuation)


class HarnessModel(TemplateLM):
    """One model under evaluation. The weights are loaded on the first request that needs them.

    templated: prompts come from the chat template and are encoded as they are. draw: which of several samples of every
    prompt is asked for. rows: batch size, None: by memory. temperature: samples every task at it; None: tasks
    decode as they say, nearly all greedily. new_tokens: overrides the limit of every task.
    """

    def __init__(
        self,
        load: Callable[[], LanguageModel],
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        *,
        seed: int = 0,
        temperature: float | None = None,
        new_tokens: int | None = None,
        rows: int | None = None,
    ) -> None:
        super().__init__()
        self.load, self.tokenizer, self.context = load, tokenizer, context
        self.seed, self.temperature, self.new_tokens, self.rows = seed, temperature, new_tokens, rows
        self.templated, self.draw = False, 0
        self.meter: Meter | None = None
        self.used_rows: int | None = None
        self.seconds = 0.0  # of decoding and scoring, the model's own time
        self._known: dict[tuple[str, bool], list[int]] = {}
        self._how: dict[str, Decoding] = {}

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

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; special tokens as the tokenizer adds them, none where the text has its BOS or is templated."""
        special = add_special_tokens
        if special is None:
            special = not (self.templated or has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id])))
        if (string, special) not in self._known:
            ids = self.tokenizer(string, add_special_tokens=special, verbose=False)["input_ids"]
            self._known[string, special] = list(ids)
        return self._known[string, special]

    def encode_all(self, texts: Sequence[str]) -> None:
        """Encode many at once, which is several times faster, for `tok_encode` to know them."""
        bos = self.tokenizer.decode([self.prefix_token_id])
        for special in (False, True):
            rows = [text for text in texts if special is not (self.templated or has_bos_prefix(text, bos))]
            if rows := [text for text in rows if (text, special) not in self._known]:
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
        known = repr(asked)  # lm-eval gives each request a copy of its own
        if known not in self._how:
            self._how[known] = how_asked(asked, self.temperature, self.new_tokens)
        return self._how[known]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The response to each request, cut before its first stop text. Repeated requests get samples of their own."""
        texts, how = [], []
        for request in requests:
            text, asked = request.args
            texts.append(text)
            how.append(self.decoding(asked))
        prompts = [
            self.tok_encode(text)[-(self.context - h.max_new_tokens) :] for text, h in zip(texts, how, strict=True)
        ]
        seen: dict[str, int] = defaultdict(int)
        seeds = []
        for text, h in zip(texts, how, strict=True):
            seeds.append(0 if h.temperature is None else row_seed(self.seed, text, self.draw, seen[text]))
            seen[text] += 1
        answers = [""] * len(requests)
        for members in _alike(how):
            self._answer(members, how[members[0]], prompts, seeds, answers)
        return answers

    def _answer(
        self, members: list[int], how: Decoding, prompts: list[list[int]], seeds: list[int], answers: list[str]
    ) -> None:
        stops = stop_ids(self.tokenizer, self.lm.model.generation_config)
        longest = max(len(prompts[i]) for i in members)
        size = self._size(longest + how.max_new_tokens)
        for batch in by_length(members, lambda i: len(prompts[i]), size):
            rows = [members[place] for place in batch]
            before = self.meter.whole if self.meter else 0
            part = len(rows) / how.max_new_tokens
            written = self._decode(
                [prompts[i] for i in rows], [seeds[i] for i in rows], how, stops, partial(self._advance, part)
            )
            if self.meter:
                self.meter.finish(before + len(rows))
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                answers[i] = postprocess_generated_text(text, list(how.until), None)

    def _decode(
        self,
        prompts: list[list[int]],
        seeds: list[int],
        how: Decoding,
        stops: list[int],
        tick: Callable[[], None],
    ) -> list[list[int]]:
        """decode(); a batch that does not fit after all is halved, which changes samples by rounding alone."""
        began = perf_counter()
        try:
            return decode(self.lm, self.tokenizer, prompts, seeds, how, stop_ids=stops, tick=tick)
        except OutOfMemory:
            if len(prompts) == 1:
                raise ModelError(
                    f"one prompt of {len(prompts[0])} tokens and {how.max_new_tokens} new ones do not fit the memory; "
                    "pass --max-new-tokens, or --device cpu"
                ) from None
        finally:
            self.seconds += perf_counter() - began
        torch.cuda.empty_cache()
        half = len(prompts) // 2
        return self._decode(prompts[:half], seeds[:half], how, stops, tick) + self._decode(
            prompts[half:], seeds[half:], how, stops, tick
        )

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
            if self.meter:
                self.meter.finish(self.meter.whole + len(batch))
        return found

    @torch.no_grad()
    def _score(self, rows: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        device, model = self.lm.device, self.lm.model
        began = perf_counter()
        pad = int(self.tokenizer.pad_token_id)
        tokens_BS, mask_BS = (x.to(device) for x in left_pad([ids for ids, _ in rows], pad))
        width = max(count for _, count in rows)
        inputs = model_inputs(tokens_BS[:, :-1], mask_BS[:, :-1], self.lm.takes_positions)
        keep = {"logits_to_keep": width} if "logits_to_keep" in signature(model.forward).parameters else {}
        logits_BSV: Tensor = model(**inputs, **keep, use_cache=False).logits
        logprobs_BTV = logits_BSV[:, -width:].float().log_softmax(dim=-1)
        target_BT = tokens_BS[:, -width:]
        logprobs_BT = logprobs_BTV.gather(-1, target_BT.unsqueeze(-1)).squeeze(-1)
        equal_BT = logprobs_BTV.argmax(dim=-1) == target_BT
        found = [
            (float(logprobs_BT[i, width - count :].sum()), bool(equal_BT[i, width - count :].all()))
            for i, (_, count) in enumerate(rows)
        ]
        self.seconds += perf_counter() - began
        return found

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """(log-prob in nats, whether greedy) of each (context, continuation)."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-prob of whole texts, nats; texts beyond the context are read in windows, as lm-eval defines them."""
        found = []
        for request in requests:
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.context, 1)
            pairs: list[Pair] = [(None, *make_disjoint_window(window)) for window in windows]
            size = self._size(self.context, scored=self.context)
            parts = [
                self._score([(a + b, len(b)) for _, a, b in pairs[i : i + size]]) for i in range(0, len(pairs), size)
            ]
            found.append(sum(logprob for part in parts for logprob, _ in part))
            self._advance(1)
        return found

    def _size(self, positions: int, scored: int = 1) -> int:
        size = self.rows or batch_size(self.lm, positions, scored=scored)
        self.used_rows = max(size, self.used_rows or 0)
        return size

    def _advance(self, rows: float) -> None:
        if self.meter:
            self.meter.advance(rows)


def row_seed(seed: int, prompt: str, draw: int, repeat: int) -> int:
    """The seed of one sample: of the prompt's text, not of its place, so that limits and batches change no seed."""
    place = int.from_bytes(sha256(f"{draw}/{repeat}/{prompt}".encode()).digest()[:6], "big")
    return derive_seed(seed, "harness", place)


def _alike(how: Sequence[Decoding]) -> list[list[int]]:
    """Indices of requests that are decoded alike."""
    names = {place: repr(each) for place, each in {id(each): each for each in how}.items()}
    groups: dict[str, list[int]] = {}
    for i, each in enumerate(how):
        groups.setdefault(names[id(each)], []).append(i)
    return list(groups.values())
