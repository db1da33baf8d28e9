"""Rollouts by a server with the OpenAI completions API that takes and returns token ids, as vLLM documents it.

    GET  /v1/models                                             which model it serves
    POST /v1/completions            prompt: token ids           the response: token ids and their log-probs
    POST /v1/load_lora_adapter      lora_name, lora_path        an adapter, before each step
    POST /v1/unload_lora_adapter    lora_name                   the one before it
    POST /collective_rpc            reload_weights, a folder    or whole weights; then POST /reset_prefix_cache

The policy's weights go through a folder that the server can read. What the server computes is not quite what is
trained: other kernels, another precision. The first batch is checked (the same model, the whole distribution), and what
remains is corrected (`rollout.importance_cap`).
"""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import ReadTimeoutError, ResponseError
from urllib3.util import Retry

from srppo.errors import RunError
from srppo.models.adapters import AdaptedModel
from srppo.models.generation import Written
from srppo.models.language_model import LanguageModel
from srppo.record.files import storing
from srppo.training import parallel
from srppo.training.batch import Sampled
from srppo.training.rollout import sampled, together
from srppo.training.scores import next_token_entropy, score_logprobs

AT_ONCE = 64  # requests; the server puts them into batches
CONNECT_S = 10.0
RETRIES = Retry(total=3, read=0, backoff_factor=0.5, status_forcelist=(429, 502, 503, 504), allowed_methods=None)
FAR = 0.25  # nats a token between the server's log-probs and the policy's: not rounding, but another model
NEAR = 0.05  # that they may always be apart, and GROWN times what they were at first
GROWN = 4.0
UNLIKELY = 5.0  # standard errors between the surprisal of what was sampled and the entropy it was sampled from,
TELLING = 0.02  # and nats a token: an honest server in 16 bits may be a little off


class ServerSampler:
    """A `training.rollout.Sampler` over HTTP.

    url: with its /v1. folder: where the policy's weights are written, which the server reads. timeout_s: for one
    response. Raises RunError in one line; the run goes on from its last checkpoint.
    """

    def __init__(
        self, url: str, folder: Path, stop_ids: Sequence[int], pad_id: int, *, timeout_s: float = 600.0
    ) -> None:
        self.url, self.root = url, url.rstrip("/").removesuffix("/v1")
        self.folder, self.timeout_s = folder.absolute(), timeout_s
        self.stop_ids, self.pad_id = stop_ids, pad_id
        self.session = requests.Session()
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it tells of every try
        for scheme in ("http://", "https://"):
            self.session.mount(scheme, HTTPAdapter(max_retries=RETRIES, pool_maxsize=AT_ONCE))
        self.served: str | None = None  # the name or folder of what is served
        self.first_gap: float | None = None

    def sample(
        self,
        policy: LanguageModel,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        temperature: float | None,
        held: int = 0,
    ) -> Sampled:
        """As `Sampler.sample`; a temperature of None is greedy. The server sees to its own memory."""
        with policy.gathered_to_save():
            model = parallel.from_first(lambda: self._serve(policy))
        asked = {
            "model": model,
            "max_tokens": max_new_tokens,
            "temperature": temperature or 0.0,
            "logprobs": 1,
            "return_token_ids": True,
            "stop_token_ids": list(self.stop_ids),
            "skip_special_tokens": False,
            # said although they are defaults: a server fills gaps from the model's own generation config
            **{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
            **{"presence_penalty": 0.0, "frequency_penalty": 0.0},
        }
        places = parallel.share(range(len(prompts)))
        ask = partial(self._complete, asked, policy.vocab_size)
        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            said = list(pool.map(ask, [prompts[i] for i in places], [seeds[i] for i in places]))
        finally:  # without waiting for those that were asked, where one has failed or the user stops
            pool.shutdown(wait=False, cancel_futures=True)
        written = together(dict(zip(places, said, strict=True)))
        if temperature is None:
            written = [(ids, [0.0] * len(ids)) for ids, _ in written]
        generated = sampled(prompts, written, self.stop_ids, self.pad_id, policy.device)
        if temperature is not None:
            gap = check_model(policy, generated, temperature, self.first_gap)
            if self.first_gap is None:
                check_whole(policy, generated, temperature)
                self.first_gap = gap
        return generated

    def _serve(self, policy: LanguageModel) -> str:
        """Have the server load the policy as it is now; the name to ask for it by."""
        before = self.served
        if before is None:
            shutil.rmtree(self.folder, ignore_errors=True)  # of an attempt before
        if isinstance(policy, AdaptedModel):
            # A name of its own for each: a server that remembers prefixes remembers them by name.
            self.served = f"policy-{_digest(policy)}"
            if self.served == before:
                return self.served
            path = self._write(policy, self.served)
            if before is not None:  # first, since there may be room for one; one that is gone already is no harm
                self._post("v1/unload_lora_adapter", {"lora_name": before}, done="")
                shutil.rmtree(self.folder / before)
            self._post("v1/load_lora_adapter", {"lora_name": self.served, "lora_path": str(path)}, done="already")
            return self.served
        self.served = "weights-b" if before == "weights-a" else "weights-a"  # a server may take a known path for known
        path = self._write(policy, self.served)
        command = {"method": "reload_weights", "kwargs": {"weights_path": str(path)}}
        self._post("collective_rpc", command)
        if self._post("reset_prefix_cache", {}).get("success") is False:
            raise self._wrong("does not forget the prefixes that other weights have read (/reset_prefix_cache)")
        if before is not None:
            shutil.rmtree(self.folder / before)
        models = self._ask("GET", "v1/models").get("data") or [{}]
        return str(models[0].get("id", ""))

    def _write(self, policy: LanguageModel, name: str) -> Path:
        path = self.folder / name
        with storing(path):
            path.mkdir(parents=True)
            policy.save(path)
        return path

    def _complete(self, asked: dict[str, Any], vocab_size: int, prompt: Sequence[int], seed: int) -> Written:
        """One response, its stop token included, and the log-prob of each token."""
        answer = self._post("v1/completions", {**asked, "prompt": list(prompt), "seed": seed})
        try:
            (choice,) = answer["choices"]
            ids, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"]
            shown, reason = choice["prompt_token_ids"], choice["finish_reason"]
        except (KeyError, TypeError, ValueError):
            raise self._wrong(
                "answers without token ids or log-probs; one that knows return_token_ids is needed (vLLM 0.10.2 or "
                "newer)"
            ) from None
        if answer.get("model") != asked["model"]:
            raise self._wrong(f"answers as model {answer.get('model')!r}, and {asked['model']!r} was asked")
        if shown != list(prompt):
            raise self._wrong("read other token ids than the prompt's")
        ended = bool(ids) and ids[-1] in self.stop_ids  # at the length limit some say "length" all the same
        if any(token in self.stop_ids for token in ids[:-1]) or (reason == "stop" and not ended):
            raise self._wrong("does not end a response by the stop token that it returns; stop tokens must be returned")
        if not ids or len(ids) != len(logprobs):
            raise self._wrong(f"returned {len(ids or ())} tokens with {len(logprobs or ())} log-probs")
        if not all(isinstance(x, int | float) and math.isfinite(x) and x < 1e-3 for x in logprobs):
            raise self._wrong("returned log-probs that are none")
        if not all(isinstance(x, int) and 0 <= x < vocab_size for x in ids):
            raise self._wrong(f"returned token ids beyond the tokenizer's {vocab_size}")
        if not ended and len(ids) != asked["max_tokens"]:
            raise self._wrong(
                f"ended a response after {len(ids)} of {asked['max_tokens']} tokens ({reason}); raise its length limit "
                "(--max-model-len)"
            )
        return ids, logprobs

    def _post(self, path: str, body: dict[str, Any], done: str | None = None) -> dict[str, Any]:
        return self._ask("POST", path, body, done)

    def _ask(self, method: str, path: str, body: Any = None, done: str | None = None) -> dict[str, Any]:
        """The answer, an object; a refusal with the text `done` in it is one too."""
        try:
            answer = self.session.request(method, f"{self.root}/{path}", json=body, timeout=(CONNECT_S, self.timeout_s))
        except requests.exceptions.RequestException as error:
            # After retries the reason is wrapped: RequestException(MaxRetryError(reason=...)).
            reason = getattr(error.args[0] if error.args else error, "reason", error)
            if isinstance(reason, ReadTimeoutError | requests.exceptions.ReadTimeout):
                raise self._wrong(
                    f"did not answer {path} within {self.timeout_s:g} s; raise rollout.server_timeout_s, or look at it"
                ) from None
            if isinstance(reason, ResponseError):
                raise self._wrong(f"refuses {path} again and again ({reason}); look at it") from None
            what = type(reason).__name__
            raise self._wrong(f"cannot be reached ({what} at {path}); start it and run the same command") from None
        text = " ".join(answer.text.split())
        if not answer.ok and (done is None or done not in text):
            raise self._wrong(
                f"refused {path} with {answer.status_code}: {text[:200]}{_hint(path, answer.status_code)}"
            )
        try:
            found = answer.json()
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    def _wrong(self, what: str) -> RunError:
        return RunError(f"the server {self.url} {what}")


def _hint(path: str, status: int) -> str:
    if status not in (403, 404, 405):
        return ""
    if "lora" in path:
        return "; start it with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
    dev = not path.startswith("v1/")
    return "; start it with VLLM_SERVER_DEV_MODE=1, or train adapters (model.adapters = lora)" if dev else ""


def _digest(policy: AdaptedModel) -> str:
    found = hashlib.sha256()
    for name, weight in sorted(policy.weights().items()):
        found.update(name.encode())
        found.update(weight.detach().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def check_model(policy: LanguageModel, generated: Sampled, temperature: float, first: float | None) -> float:
    """Mean distance of the sampler's log-probs from the policy's own, nats a token; `first`: what it was at first.

    Raises RunError where it is too large for rounding: another model, weights of before, or log-probs before the
    temperature.
    """
    mask_BT, theirs_BT = generated.response_mask_BT, generated.sampled_logprobs_BT

    def distance(at: float) -> float:
        return float((score_logprobs(policy, generated, temperature=at) - theirs_BT)[mask_BT].abs().double().mean())

    gap = distance(temperature)
    if temperature != 1 and gap > NEAR and distance(1.0) < gap:
        raise RunError(
            "the server gives log-probs before the temperature; start it with --logprobs-mode processed_logprobs, or "
            "set rollout.temperature=1"
        )
    if first is None and gap > FAR:
        raise RunError(
            f"the server's log-probs are {gap:.2g} nats a token from the policy's: it serves other weights, or another "
            "model"
        )
    if first is not None and gap > max(NEAR, GROWN * first):
        raise RunError(
            f"the server's log-probs are {gap:.2g} nats a token from the policy's, and were {first:.2g} at first: it "
            "does not load the weights that it is given, or another run gives it others"
        )
    return gap


def check_whole(policy: LanguageModel, generated: Sampled, temperature: float) -> None:
    """Raises RunError where a batch does not look like samples of the whole distribution.

    The surprisal of a token, -log pi, has the entropy of its distribution for a mean, whatever came before; what is cut
    off by top-k or top-p is missing from the first and not from the second. Their differences are uncorrelated, so that
    their sum over the root of the sum of their squares is near a standard normal.
    """
    own_BT = score_logprobs(policy, generated, temperature=temperature)
    entropy_BT = next_token_entropy(policy, generated, temperature=temperature)
    excess_N = (-own_BT - entropy_BT)[generated.response_mask_BT].double()
    z = float(excess_N.sum() / excess_N.square().sum().sqrt().clamp(min=1e-12))
    if abs(z) > UNLIKELY and abs(float(excess_N.mean())) > TELLING:
        raise RunError(
            f"the server does not sample from the whole distribution: what it says is {z:+.1f} standard errors from "
            "the entropy; it must not use top-k, top-p, penalties or a draft model that is not exact"
        )
