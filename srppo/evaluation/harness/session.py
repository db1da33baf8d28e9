"""One command's work: requests by tokenizer and results by key, so that arms share what is equal."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedTokenizerBase

from srppo.config import canonical_json
from srppo.console import Console, duration
from srppo.data.chat import ensure_chat_template
from srppo.environment import environment
from srppo.errors import ConfigError, UserError
from srppo.evaluation.harness.call import evaluate
from srppo.evaluation.harness.ifeval import checkers_importable
from srppo.evaluation.harness.model import HarnessModel
from srppo.evaluation.harness.preflight import MULTITURN, Prepared, prepare
from srppo.evaluation.harness.problems import Problems, together
from srppo.evaluation.harness.scores import Row, figures, metric_names, not_scored_rows, rows_of
from srppo.evaluation.harness.targets import Target
from srppo.evaluation.harness.tasks import Loaded
from srppo.evaluation.meter import Meter
from srppo.evaluation.results import SUMMARY, read_result, write_result
from srppo.models.loading import fingerprint, load_model, load_tokenizer, resolve

EPOCH = 2  # raised when the same request would get another response or score


@dataclass(frozen=True)
class Options:
    """What changes a result, beside model and task. samples None: as the task says, which is nearly always greedy.
    system None: the model's own, with which a run trained it. cluster None: as the task's metadata says.
    """

    samples: int | None = None
    temperature: float = 1.0
    num_fewshot: int | None = None
    chat_template: bool | None = None
    max_new_tokens: int | None = None
    limit: int | None = None
    seed: int = 0
    score_rest: bool = False
    system: str | None = None
    cluster: str | None = None


class Session:
    """One command: requests by tokenizer, results by key, so that arms with one tokenizer or weights share the work."""

    def __init__(self, options: Options, rows: int | None, device: str, console: Console) -> None:
        self.options, self.rows, self.device, self.console = options, rows, device, console
        self.prepared: dict[tuple[str, int, str], Prepared] = {}
        self.weights: dict[str, str] = {}
        self.written: dict[str, tuple[dict[str, Any], list[Row]]] = {}

    def prepare(
        self, target: Target, tasks: Sequence[Loaded], problems: Problems | None = None
    ) -> tuple[HarnessModel, list[Prepared]]:
        """The model, not loaded yet, and its requests for every task, checked. Raises UserError, in one line, for all
        that is wrong with the tasks, or adds it to `problems`."""
        options = self.options
        tokenizer = load_tokenizer(target.spec, target.config)
        own = tokenizer.chat_template is not None
        if options.chat_template and not own and not target.ours:
            raise ConfigError(
                f"the tokenizer of {target.spec} has no chat template: pass --no-chat-template, or set one in its "
                "tokenizer_config.json"
            )
        ensure_chat_template(tokenizer)
        lm = HarnessModel(
            self._loader(target, len(tokenizer)),
            tokenizer,
            _context(target, tokenizer),
            seed=options.seed,
            temperature=options.temperature if options.samples else None,
            new_tokens=options.max_new_tokens,
            rows=self.rows,
        )
        found: list[Prepared] = []
        with together(problems) as met:
            for task in tasks:
                templated = options.chat_template
                if templated is None:
                    templated = own or target.ours or task.embedded
                with met.gathered():
                    found.append(self._prepared(target, lm, task, templated))
        return lm, found

    def _prepared(self, target: Target, lm: HarnessModel, task: Loaded, templated: bool) -> Prepared:
        """A task's requests, shared with arms whose tokenizer, context and system message are the same."""
        options = self.options
        system = (target.system if options.system is None else options.system) or None
        system, dropped = (system, None) if templated else (None, system)
        place = (f"{_tokenizer_key(lm.tokenizer)}/{templated}/{system}", lm.context, task.name)
        if place not in self.prepared:
            if dropped:
                self.console.warn(f"task {task.name}: without the chat template there is no system message either")
            self.prepared[place] = prepare(
                task,
                lm,
                templated=templated,
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                seed=options.seed,
                score_rest=options.score_rest,
                warn=self.console.warn,
                system=system,
                cluster=options.cluster,
            )
        return self.prepared[place]

    def _loader(self, target: Target, vocab_size: int) -> Callable[[], Any]:
        return lambda: load_model(target.spec, target.config, device=self.device, vocab_size=vocab_size)

    def evaluate(self, target: Target, lm: HarnessModel, prepared: Prepared) -> Path:
        """The folder with the result of one task: found, shared with an arm of the same weights, or made."""
        name, options = prepared.task.name, self.options
        if target.spec not in self.weights:
            self.weights[target.spec] = fingerprint(target.spec, target.config)
        weights = self.weights[target.spec]
        sampled = prepared.sampled or bool(options.samples and prepared.generates)
        key = _key(weights, prepared, options if sampled else None, target.config.precision, options.max_new_tokens)
        for known in (path.parent for path in target.parent.glob(f"*@{key}/{SUMMARY}")):
            try:
                read_result(known)
            except UserError as error:
                self.console.warn(f"{name}, {target.title}: {error}; it is evaluated again")
            else:
                self.console.say(f"{name}, {target.title}: known, {known}")
                return known
        if key not in self.written:
            draws = (options.samples or 1) if sampled else 1
            self.written[key] = self._generate(target, lm, prepared, draws)
        summary, rows = self.written[key]
        summary = summary | {
            "model": target.label,
            "spec": target.spec,
            "seed": target.seed,
            "key": key,
            "weights": weights,
            "decoding": "sampled" if sampled else "greedy",
        }
        return write_result(target.parent, summary, rows)

    def _generate(
        self, target: Target, lm: HarnessModel, prepared: Prepared, draws: int
    ) -> tuple[dict[str, Any], list[Row]]:
        task, options, began = prepared.task, self.options, self.console.clock()
        results, rows = [], []
        lm.templated, lm.used_rows, lm.seconds = prepared.templated, None, 0.0
        total = sum(max(instance.repeats or 1, 1) for instance in prepared.instances) * draws
        with Meter(self.console, f"{task.name}, {target.title}", total) as meter, checkers_importable():
            lm.meter = meter
            for draw in range(draws):
                lm.draw = draw
                result = evaluate(lm, prepared, options.seed)
                results.append(result["results"][task.task.task_name])
                rows += rows_of(result["samples"][task.task.task_name], draw, prepared.cluster)
        scores = figures(rows, results)
        numeric = [name for name in metric_names(rows) if name in scores and rows[0][name] == rows[0][name]]
        if not numeric:
            raise ConfigError(
                f"task {task.name} has no metric with a value for each item; such tasks are not supported"
            )
        rows += not_scored_rows(task.task, prepared.skipped, prepared.cluster)
        seconds = self.console.clock() - began
        self.console.say(f"{task.name}, {target.title}: {total} requests in {duration(seconds)}")
        better = task.task.higher_is_better().get(numeric[0].partition(",")[0], True)
        summary = {
            "task": task.name,
            "group": task.group,
            "metric": numeric[0],
            "metrics": scores,
            "higher_is_better": bool(better),
            "samples": draws,
            "temperature": options.temperature if options.samples else None,
            "eval_seed": options.seed,
            "harness": EPOCH,
            "task_version": getattr(task.task, "VERSION", None),
            "task_content": prepared.content,
            "num_fewshot": prepared.few_shot,
            "fewshot_seed": prepared.fewshot_seed,
            "fewshot_as_multiturn": MULTITURN,
            "generation": None if prepared.decoding is None else asdict(prepared.decoding),
            "system": prepared.system,
            "cluster": prepared.cluster,
            "chat_template": lm.tokenizer.chat_template if prepared.templated else None,
            "limit": options.limit,
            "max_new_tokens": options.max_new_tokens,
            "batch_size": lm.used_rows,
            "device": self.device,
            "precision": target.config.precision,
            "items": len({row["item"] for row in rows}),
            "not_scored": len(prepared.skipped),
            "seconds": seconds,
            "model_seconds": lm.seconds,
            "environment": _machine(),
        }
        return summary, rows


@cache
def _machine() -> dict[str, Any]:
    """Facts for every summary, gathered once a process."""
    return environment()


def _key(weights: str, prepared: Prepared, sampling: Options | None, precision: str, max_new_tokens: int | None) -> str:
    """What a result is known by: equal keys, equal results. The requests in `digest` hold template, shots and limit."""
    parts = {
        "epoch": EPOCH,
        "weights": weights,
        "precision": precision,
        "task": prepared.digest,
        "templated": prepared.templated,
        "system": prepared.system,
        "cluster": prepared.cluster,
        "max_new_tokens": max_new_tokens,
        "sampling": [sampling.samples, sampling.temperature, sampling.seed] if sampling else None,
    }
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]


def _context(target: Target, tokenizer: PreTrainedTokenizerBase) -> int:
    """Positions of the model, from its config alone, by lm-eval's rule."""
    from lm_eval.models.utils import resolve_max_length

    config = AutoConfig.from_pretrained(resolve(target.spec), trust_remote_code=target.config.trust_remote_code)
    return resolve_max_length(config, tokenizer)


def _tokenizer_key(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else str(id(tokenizer))
    return hashlib.sha256(f"{text}\0{tokenizer.chat_template}".encode()).hexdigest()
