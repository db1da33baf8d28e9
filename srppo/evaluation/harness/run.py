"""`srppo eval`: check everything, look up what is known, evaluate the rest, write each result at once.

Requests are shared by arms with one tokenizer, and results by arms with the same weights.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from srppo.config import canonical_json
from srppo.console import Console, duration
from srppo.data.chat import ensure_chat_template
from srppo.environment import environment
from srppo.errors import ConfigError, UserError
from srppo.evaluation.harness.answering import Answering
from srppo.evaluation.harness.checks import MULTITURN, EvalOptions, TaskRequests, prepare
from srppo.evaluation.harness.guards import Problems, quiet, restating, seeded
from srppo.evaluation.harness.model import HarnessModel
from srppo.evaluation.harness.scores import Row, figures, not_scored_rows, rows_of
from srppo.evaluation.harness.targets import Target, find_targets
from srppo.evaluation.harness.tasks import HarnessTask, load_tasks, wanted
from srppo.evaluation.meter import Meter
from srppo.evaluation.results import NOT_SCORED, SAMPLES, SUMMARY, read_result, write_result
from srppo.instructions.checkers import checkers_importable
from srppo.models.loading import check_weights, configured, fingerprint, load_tokenizer
from srppo.record.arms import ArmsOf, stages_by_kind
from srppo.record.files import write_atomic
from srppo.record.folder import check_place
from srppo.record.json import plain, read_json
from srppo.training import parallel
from srppo.training.together import first_of

EPOCH = 3  # raised when the same request would get another response or score
NAMED = 10  # reasons for prompts not scored that are printed; every prompt is in the file beside the result


def evaluate_command(
    model: str | None,
    options: EvalOptions,
    *,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    data: Path | None = None,
    include_path: Sequence[Path] = (),
    batch_size: int | None = None,
    device: str = "cpu",
    processes: int = 1,
    out: Path | None = None,
    console: Console | None = None,
    arms: ArmsOf = stages_by_kind,
) -> list[Path]:
    """Evaluate a model, or every arm of a run; returns the folders of the results. arms: what the arms of a run are.

    processes: that this one starts, itself included, to share the prompts; or a launcher has started them, of which
    the first does all else, and the others return no folders.
    Raises a UserError, before anything is generated, for whatever cannot be loaded, scored or fitted into the context.
    """
    console = console or Console()
    answering = Answering(parallel.start(device), batch_size)
    if not parallel.is_first():
        answering.follow()
        return []
    with ExitStack() as closing:
        closing.callback(answering.dismiss)  # of a launcher's processes
        _check_numbers(options, batch_size)
        _check_processes(processes, device)
        targets = find_targets(model, out, console.say, arms)
        if model is None:
            console.say(f"no MODEL given: {targets[0].spec if len(targets) == 1 else 'the newest run'} is evaluated")
        problems = Problems()
        for target in targets:  # places of results that cannot be written, and weights of any arm that are not whole
            with problems.gathered():
                check_place(target.parent)
            with problems.gathered():
                check_weights(target.spec, target.config)
        closing.enter_context(quiet())
        closing.enter_context(seeded(options.seed))
        names, rest, say = wanted(tasks, suite), options.score_rest, console.say
        loaded = load_tasks(names, data=data, include_path=include_path, score_rest=rest, say=say, problems=problems)
        evaluation = _Evaluation(options, answering, processes, console, closing)
        plan = []
        for target in targets:
            with problems.gathered():
                plan.append((target, *evaluation.prepare(target, loaded, problems)))
            problems.raise_any()  # of one arm: the other arms have the same
        found = []
        for target, lm, requests in plan:
            weights = fingerprint(target.spec, target.config)
            found += [evaluation.evaluate(target, weights, lm, each) for each in requests]
    _say_not_scored(console, found)
    folders = list(dict.fromkeys(str(path.parent) for path in found))
    console.print(f"results: {folders[0]}{f' and {len(folders) - 1} more such folders' if folders[1:] else ''}")
    return found


def _check_numbers(options: EvalOptions, rows: int | None) -> None:
    floors = {"samples": 1, "limit": 1, "max_new_tokens": 1, "num_fewshot": 0, "seed": 0}
    for name, least in floors.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: it must be at least {least}")
    if rows is not None and rows < 1:
        raise ConfigError(f"--batch-size {rows}: it must be at least 1, or left out to fit the memory")
    if not options.temperature > 0:
        raise ConfigError(f"--temperature {options.temperature}: it must be above 0; leave out --samples for greedy")


def _check_processes(processes: int, device: str) -> None:
    if processes < 1:
        raise ConfigError(f"--processes {processes}: it must be at least 1")
    if processes > 1 and parallel.size() > 1:
        raise ConfigError(f"--processes {processes}: a launcher has started {parallel.size()} already; leave it out")
    if processes > 1 and device not in ("cpu", "cuda"):
        raise ConfigError(f"--processes {processes} on {device}: several processes take cpu, or cuda (a GPU each)")
    if processes > 1 and device == "cuda" and processes > torch.cuda.device_count():
        raise ConfigError(
            f"--processes {processes} want as many GPUs, and {torch.cuda.device_count()} are visible; give fewer"
        )


def _follow(device: str, rows: int | None) -> None:
    """What each process does that is started here."""
    Answering(parallel.start(device), rows).follow()


@dataclass
class _Evaluation:
    """One command: requests by tokenizer, context and task; results by key.

    processes: that it starts once there is something to answer, this one included; they end with `closing`."""

    options: EvalOptions
    answering: Answering
    processes: int
    console: Console
    closing: ExitStack
    requests: dict[tuple[Any, ...], TaskRequests] = field(default_factory=dict)
    written: dict[str, tuple[dict[str, Any], list[Row]]] = field(default_factory=dict)

    @cached_property
    def machine(self) -> dict[str, Any]:
        """Facts for every summary."""
        return environment()

    def prepare(
        self, target: Target, tasks: Sequence[HarnessTask], problems: Problems
    ) -> tuple[HarnessModel, list[TaskRequests]]:
        """The model, not loaded yet, and its requests for every task, checked; what is wrong with the tasks is added to
        `problems`. Raises ConfigError where a chat template was asked for that the tokenizer lacks."""
        from lm_eval.models.utils import resolve_max_length

        options = self.options
        tokenizer = load_tokenizer(target.spec, target.config)
        own = tokenizer.chat_template is not None
        if options.chat_template and not own and not target.ours:
            raise ConfigError(
                f"the tokenizer of {target.spec} has no chat template: pass --no-chat-template, or set one in its "
                "tokenizer_config.json"
            )
        ensure_chat_template(tokenizer)
        config = AutoConfig.from_pretrained(configured(target.spec), trust_remote_code=target.config.trust_remote_code)
        lm = HarnessModel(
            self.answering,
            (target.spec, target.config),
            tokenizer,
            context=resolve_max_length(config, tokenizer),  # positions, by lm-eval's rule
            seed=options.seed,
            temperature=options.temperature if options.samples else None,
            new_tokens=options.max_new_tokens,
        )
        backend = getattr(tokenizer, "backend_tokenizer", None)
        text = backend.to_str() if backend is not None else str(id(tokenizer))
        encoding = hashlib.sha256(f"{text}\0{tokenizer.chat_template}".encode()).hexdigest()
        asked = (target.system if options.system is None else options.system) or None
        found: list[TaskRequests] = []
        for task in tasks:
            templated = own or target.ours or task.embedded if options.chat_template is None else options.chat_template
            system = asked if templated else None
            place = (encoding, lm.context, task.name, templated, system)
            with problems.gathered():
                if place not in self.requests:
                    if asked and not templated:
                        self.console.warn(
                            f"task {task.name}: without the chat template there is no system message either"
                        )
                    self.requests[place] = prepare(task, lm, options, templated, system, self.console.warn)
                found.append(self.requests[place])
        return lm, found

    def evaluate(self, target: Target, weights: str, lm: HarnessModel, requests: TaskRequests) -> Path:
        """The folder with the result of one task: found, shared with an arm of the same weights, or made.

        It is known by a key: equal keys, equal results. The requests in `digest` hold template, shots and limit.
        """
        name, options = f"{requests.task.name}, {target.title}", self.options
        sampled = requests.decoding is not None and requests.decoding.temperature is not None
        parts = {
            "epoch": EPOCH,
            "weights": weights,
            "precision": target.config.precision,
            "task": requests.digest,
            "templated": requests.templated,
            "system": requests.system,
            "cluster": requests.cluster,
            "max_new_tokens": options.max_new_tokens,
            "sampling": [options.samples, options.temperature, options.seed] if sampled else None,
        }
        key = hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]
        for known in (path.parent for path in target.parent.glob(f"*@{key}/{SUMMARY}")):
            try:
                read_result(known)
            except UserError as error:
                self.console.warn(f"{name}: {error}; it is evaluated again")
            else:
                self.console.say(f"{name}: known, {known}")
                return known
        if key not in self.written:
            self.written[key] = self._generate(target, lm, requests, (options.samples or 1) if sampled else 1)
        made, rows = self.written[key]
        own = {"model": target.label, "spec": target.spec, "seed": target.seed, "key": key, "weights": weights}
        return write_result(target.parent, {**made, **own, "decoding": "sampled" if sampled else "greedy"}, rows)

    def _start_others(self) -> None:
        """Those that share the prompts, once."""
        if parallel.size() == 1 < self.processes:
            device, rows = self.answering.device, self.answering.rows
            self.closing.enter_context(first_of(self.processes, partial(_follow, device, rows)))
            self.answering.device = parallel.start(device)
            self.closing.callback(self.answering.dismiss)

    def _generate(
        self, target: Target, lm: HarnessModel, requests: TaskRequests, draws: int
    ) -> tuple[dict[str, Any], list[Row]]:
        """(what a summary says but for whose weights they are, rows of samples)."""
        task, options, began = requests.task, self.options, self.console.clock()
        results, rows = [], []
        lm.templated, self.answering.used_rows = requests.templated, None
        self._start_others()
        total = sum(max(instance.repeats or 1, 1) for instance in requests.instances) * draws
        with Meter(self.console, f"{task.name}, {target.title}", total) as lm.meter, checkers_importable():
            for draw in range(draws):
                lm.draw = draw
                result = _by_lm_eval(lm, requests, options.seed)
                results.append(result["results"][task.task.task_name])
                rows += rows_of(result["samples"][task.task.task_name], draw, requests.cluster)
        scores = figures(rows, results)
        numeric = [name for name, value in rows[0].items() if name in scores and value == value]  # NaN is not
        if not numeric:
            raise ConfigError(
                f"task {task.name} has no metric with a value for each item; such tasks are not supported"
            )
        rows += not_scored_rows(task.task, requests.skipped, requests.cluster)
        seconds = self.console.clock() - began
        self.console.say(f"{task.name}, {target.title}: {total} requests in {duration(seconds)}")
        summary = {
            "task": task.name,
            "group": task.group,
            "metric": numeric[0],
            "metrics": scores,
            "higher_is_better": bool(task.task.higher_is_better().get(numeric[0].partition(",")[0], True)),
            "samples": draws,
            "temperature": options.temperature if options.samples else None,
            "eval_seed": options.seed,
            "harness": EPOCH,
            "task_version": getattr(task.task, "VERSION", None),
            "task_content": requests.content,
            "num_fewshot": requests.few_shot,
            "fewshot_seed": requests.fewshot_seed,
            "fewshot_as_multiturn": MULTITURN,
            "generation": None if requests.decoding is None else asdict(requests.decoding),
            "system": requests.system,
            "cluster": requests.cluster,
            "chat_template": lm.tokenizer.chat_template if requests.templated else None,
            "limit": options.limit,
            "max_new_tokens": options.max_new_tokens,
            "batch_size": self.answering.used_rows,
            "device": self.answering.device,
            "processes": parallel.size(),
            "precision": target.config.precision,
            "items": len({row["item"] for row in rows}),
            "not_scored": len(requests.skipped),
            "seconds": seconds,
            "environment": self.machine,
        }
        return summary, rows


def _by_lm_eval(lm: HarnessModel, requests: TaskRequests, seed: int) -> Any:
    """What lm-eval's own `evaluate` returns for one task on requests that are built and checked already; its bootstrap,
    at 15 s a metric, stays off. Raises DataError, in one line, for what its checkers and metrics raise."""
    from lm_eval import evaluator

    task, name = requests.task.task, requests.task.task.task_name

    def already_built(**_: Any) -> None:
        for instance in requests.instances:
            instance.resps, instance.filtered_resps = [], {}
        task._instances = requests.instances

    task.build_all_requests = already_built
    try:
        with seeded(seed), restating(requests.task.name, vars(task.config), "scored"):
            count = max(instance.doc_id for instance in requests.instances) + 1
            chosen = {"limit": count} if requests.indices is None else {"samples": {name: requests.indices}}
            return evaluator.evaluate(
                lm, {"tasks": {name: task}}, bootstrap_iters=0, apply_chat_template=requests.templated, **chosen
            )
    finally:
        del task.build_all_requests


def _say_not_scored(console: Console, found: Sequence[Path]) -> None:
    """How many prompts were left out, by reason; all of them stand in a file beside the result."""
    import pyarrow.parquet as pq

    for path in found:
        if read_json(path / SUMMARY)["not_scored"]:
            rows = [row for row in pq.read_table(path / SAMPLES).to_pylist() if row.get("not_scored")]
            console.print(f"{path.name}: {len(rows)} prompts not scored (left out, not counted as failed):")
            for reason, count in Counter(row["not_scored"] for row in rows).most_common(NAMED):
                first = next(row for row in rows if row["not_scored"] == reason)
                console.print(f"  {count}: {reason}; such as {first['item'][:8]} {first['prompt'][:40]!r}")
            listed = path.with_name(f"{path.name}{NOT_SCORED}")
            lines = ({"item": row["item"], "reason": row["not_scored"], "prompt": row["prompt"]} for row in rows)
            write_atomic(listed, "".join(canonical_json(plain(line)) + "\n" for line in lines))
            console.print(f"  all of them: {listed}")
