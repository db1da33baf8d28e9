"""Our language model as lm-eval asks for one: text in, text and log-likelihoods out, decoded as each task asks."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from srppo.config import ModelConfig, derive_seed
from srppo.data.chat import render
from srppo.errors import ModelError
from srppo.evaluation.harness.answering import Answering, Decoding
from srppo.evaluation.meter import Meter

DEFAULT_NEW_TOKENS = 256  # lm-eval's own, where a task names none
Pair = tuple[Any, list[int], list[int]]  # (texts, ids of the context, ids of the continuation)


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
    """One model under evaluation. Its weights (whose, and how) are loaded on the first request that needs them.

    templated: prompts come from the chat template and are encoded as they are. draw: which of several samples of every
    prompt is asked for. temperature: samples every task at it; None: tasks decode as they say, nearly all greedily.
    new_tokens: overrides the limit of every task.
    """

    meter: Meter

    def __init__(
        self,
        answering: Answering,
        weights: tuple[str, ModelConfig],
        tokenizer: PreTrainedTokenizerBase,
        context: int,
        *,
        seed: int,
        temperature: float | None,
        new_tokens: int | None,
    ) -> None:
        super().__init__()
        self.answering, self.weights, self.tokenizer, self.context = answering, weights, tokenizer, context
        self.seed, self.temperature, self.new_tokens = seed, temperature, new_tokens
        self.templated, self.draw = False, 0
        self._known: dict[tuple[str, bool], list[int]] = {}

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
            with self._answers(len(places)) as model:
                written = model.decode([prompts[i] for i in places], [seeds[i] for i in places], how)
            texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
            for i, text in zip(places, texts, strict=True):
                answers[i] = postprocess_generated_text(text, list(how.until), None)
        return answers

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list[tuple[float, bool]]:
        """(log-prob in nats, whether greedy decoding would write it) of each continuation; contexts are cut left."""
        with self._answers(len(requests)) as model:
            return model.score(
                [
                    ((context + continuation)[-self.context - 1 :], len(continuation))
                    for _, context, continuation in requests
                ]
            )

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-prob of whole texts, nats; texts beyond the context are read in windows, as lm-eval defines them."""
        rows, whose = [], []
        for place, request in enumerate(requests):
            windows = get_rolling_token_windows(self.tok_encode(request.args[0]), self.prefix_token_id, self.context, 1)
            pairs = [make_disjoint_window(window) for window in windows]
            rows += [(context + continuation, len(continuation)) for context, continuation in pairs]
            whose += [place] * len(pairs)
        found = [0.0] * len(requests)
        with self._answers(len(requests)) as model:
            for place, (logprob, _) in zip(whose, model.score(rows), strict=True):
                found[place] += logprob
        return found

    @contextmanager
    def _answers(self, requests: int) -> Iterator[Answering]:
        """The model, whose answers to so many requests the meter counts."""
        if self.answering.loaded != self.weights:
            self.answering.load(*self.weights)
        self.answering.told = lambda share: self.meter.reach(share * requests)
        yield self.answering
        self.meter.finish(requests)


def row_seed(seed: int, prompt: str, draw: int, repeat: int) -> int:
    """The seed of one sample: of the prompt's text, not of its place, so that limits and batches change no seed."""
    place = int.from_bytes(sha256(f"{draw}/{repeat}/{prompt}".encode()).digest()[:6], "big")
    return derive_seed(seed, "harness", place)
