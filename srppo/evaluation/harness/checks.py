"""Everything that would fail after an hour, found before the first token: requests are built, measured and checked.

Prompts must fit the model's context: lm-eval cuts them without a word, or fails at the end. Invented responses are
scored and summed up, so that what a task's checker or metrics lack comes out before a real response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from srppo.errors import DataError, ModelError
from srppo.evaluation.harness.answering import Decoding
from srppo.evaluation.harness.guards import restating
from srppo.evaluation.harness.ifeval import reason_not_scored
from srppo.evaluation.harness.model import HarnessModel
from srppo.evaluation.harness.scores import as_float
from srppo.evaluation.harness.tasks import HarnessTask, code_of, config_of, content_of, digest_of
from srppo.instructions import checkers

FEWSHOT_SEED = 1234  # lm-eval's own
MULTITURN = True  # examples under a chat template are turns of their own, as in lm-eval's own call
TRIED = 8  # items of the trial: enough that every class of a choice is guessed
TEXT = "One is 1.\n\nTwo is 2."


@dataclass(frozen=True)
class EvalOptions:
    """What changes a result, beside model and task.

    samples: so many a prompt at `temperature`; None: as the task says, nearly always greedily. chat_template None: the
    tokenizer's own if it has one, ours for our models and for the embedded suite. system: a system message, "" for
    none; None: that with which a run was trained. cluster: the items' field that says which belong together; None: as
    the task's metadata says. score_rest: what cannot be scored is left out and listed, not refused.
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


@dataclass(frozen=True)
class TaskRequests:
    """A task's requests for one tokenizer. skipped: reason by document; digest: of all that makes the score; content:
    of what the task is beside its items and the command's options; decoding: of the first request, None for scoring;
    fewshot_seed: None where no examples are drawn. system: the system message. cluster: the items' field that says
    which of them belong together.
    """

    task: HarnessTask
    instances: list[Any]
    indices: list[int] | None
    skipped: dict[int, str]
    digest: str
    content: str
    templated: bool
    few_shot: int
    fewshot_seed: int | None
    decoding: Decoding | None
    system: str | None
    cluster: str | None


def prepare(
    loaded: HarnessTask,
    model: HarnessModel,
    options: EvalOptions,
    templated: bool,
    system: str | None,
    warn: Callable[[str], None],
) -> TaskRequests:
    """Build and check the requests of one task. Raises DataError, in one line, for what cannot be evaluated here."""
    task, name = loaded.task, loaded.name
    if getattr(task, "UNSAFE_CODE", False):
        raise DataError(f"task {name} runs code that a model wrote, which is not done here; leave it out")
    if getattr(task, "MULTIMODAL", False):
        raise DataError(f"task {name} needs images or sound; models here read text: leave it out")
    shots = _few_shot(loaded, options.num_fewshot, warn)
    model.templated = templated
    cluster = options.cluster or (task.config.metadata or {}).get("cluster")
    build = partial(_build, loaded, model, FEWSHOT_SEED + options.seed, templated, system)
    with restating(name, vars(task.config)):
        count = min(len(task.eval_docs), options.limit or len(task.eval_docs))
        docs = [doc for _, doc in task.doc_iterator(limit=count)]
        if lacking := [i for i, doc in enumerate(docs) if cluster is not None and doc.get(cluster) is None]:
            raise DataError(
                f"task {name}: {len(lacking)} of {count} items, the first {lacking[0]}, have no {cluster!r} to be "
                f"clustered by; they have {', '.join(docs[lacking[0]])}: name another with --cluster, or leave it out"
            )
        instances = build(limit=count)
        absent = checkers.missing() if loaded.ifeval else []  # refused by load_tasks, unless the rest is to be scored
        reasons = {i: reason_not_scored(doc, absent) for i, doc in enumerate(docs if absent else [])}
        skipped = {i: reason for i, reason in reasons.items() if reason}
        skipped |= _too_long(loaded, instances, model, partial(build, limit=count), options.score_rest, warn)
        if len(skipped) == count:
            raise DataError(f"task {name}: none of {count} prompts can be scored: {skipped[0]}")
        indices = [i for i in range(count) if i not in skipped] if skipped else None
        if indices is not None:
            instances = build(samples=indices)
        _try_scoring(loaded, instances)
    asked = [i.args[1] for i in instances if i.request_type == "generate_until"]
    config, code = config_of(task), code_of(task)
    drawn = shots and getattr(task.fewshot_cfg, "sampler", None) != "first_n"
    return TaskRequests(
        loaded,
        instances,
        indices,
        skipped,
        digest=digest_of(config, code, instances, skipped, docs),
        content=content_of(config, code, shots),
        templated=templated,
        few_shot=shots,
        fewshot_seed=FEWSHOT_SEED + options.seed if drawn else None,
        decoding=model.decoding(asked[0]) if asked else None,
        system=system,
        cluster=cluster,
    )


def _few_shot(loaded: HarnessTask, asked: int | None, warn: Callable[[str], None]) -> int:
    """Set and return the number of examples, by lm-eval's rule: a task that fixes 0 keeps 0."""
    task = loaded.task
    own = task.get_config("num_fewshot")
    if asked is not None and own == 0 and asked != 0:
        warn(f"task {loaded.name} fixes zero few-shot examples: --num-fewshot {asked} is not used for it")
    shots = own if asked is None or own == 0 else asked
    task.set_config("num_fewshot", shots or 0)
    config, few = task.config, getattr(task, "fewshot_cfg", None)
    source = few is not None and (few.split is not None or few.samples is not None)
    if shots and not (source or task.has_training_docs() or task.has_validation_docs()):
        beside = "put train.jsonl beside the file of --data" if loaded.name == "gsm8k" else "give it a fewshot_split"
        raise DataError(
            f"task {loaded.name} has no examples for {shots} shots (lm-eval would take them from the test items): "
            f"pass --num-fewshot 0, or {beside}"
        )
    if shots and config.test_split is None and few is not None and few.split == config.validation_split:
        warn(f"task {loaded.name} takes its examples from the items it is tested on, without the item itself")
    return int(shots or 0)


def _build(
    loaded: HarnessTask, model: HarnessModel, seed: int, templated: bool, system: str | None, **which: Any
) -> list[Any]:
    """The requests of a task as it is configured now: of `limit` items, or of those whose places are `samples`."""
    loaded.task.set_fewshot_seed(seed)
    try:
        type(loaded.task).build_all_requests(
            loaded.task,
            system_instruction=system,
            apply_chat_template=templated,
            fewshot_as_multiturn=MULTITURN and templated,
            chat_template=model.apply_chat_template if templated else None,
            tokenizer_name="",
            **which,
        )
    except ModelError as error:
        turns = ", or --num-fewshot 0: examples are turns of the chat" if loaded.task.config.num_fewshot else ""
        raise ModelError(f"task {loaded.name}: {error}{turns}") from None
    return list(loaded.task.instances)


# ---- whether prompts fit


def _too_long(
    loaded: HarnessTask,
    instances: list[Any],
    model: HarnessModel,
    build: Callable[[], list[Any]],
    score_rest: bool,
    warn: Callable[[str], None],
) -> dict[int, str]:
    """Items whose request exceeds the context, with the reason. Raises DataError for them unless the rest is scored."""
    found, cut = _beyond(instances, model)
    if cut:
        warn(f"task {loaded.name}: {cut} of {len(instances)} prompts exceed the context and lose their beginning")
    if found and not score_rest:
        prompts = [len(model.tok_encode(i.args[0])) for i in instances if i.request_type == "generate_until"]
        room = model.context - max(prompts, default=model.context)
        ways = [f"--max-new-tokens {room} or less"] if room > 0 else []
        ways += [*_fewer_shots(loaded, model, build), "--score-rest to score the others and list these"]
        doc, reason = min(found.items())
        raise DataError(
            f"task {loaded.name}: {len(found)} prompts do not fit, the first ({doc}): {reason}; "
            f"pass {', or '.join(ways)}"
        )
    return found


def _beyond(instances: list[Any], model: HarnessModel) -> tuple[dict[int, str], int]:
    """(reason by item that does not fit, number of contexts that lose their beginning)."""
    found, cut = dict[int, str](), 0
    model.encode_all([instance.args[0] for instance in instances if instance.request_type == "generate_until"])
    for instance in instances:
        if instance.request_type == "generate_until":
            asked = model.decoding(instance.args[1]).max_new_tokens
            prompt = len(model.tok_encode(instance.args[0]))
            if prompt + asked > model.context:
                found[instance.doc_id] = f"{prompt} prompt and {asked} new tokens exceed the context of {model.context}"
        elif instance.request_type == "loglikelihood" and instance.args[0]:
            context, continuation = model._encode_pair(*instance.args[:2])
            if not continuation or len(continuation) > model.context:
                found[instance.doc_id] = f"a continuation of {len(continuation)} tokens in a context of {model.context}"
            cut += len(context) + len(continuation) > model.context + 1
    return found, cut


def _fewer_shots(loaded: HarnessTask, model: HarnessModel, build: Callable[[], list[Any]]) -> list[str]:
    """The most examples with which all prompts fit; where none do, how many fit without any."""
    shots = loaded.task.config.num_fewshot or 0
    ways: list[str] = []
    for fewer in range(shots - 1, -1, -1):
        loaded.task.set_config("num_fewshot", fewer)
        instances = build()
        items, beyond = len({instance.doc_id for instance in instances}), len(_beyond(instances, model)[0])
        fit = f"{items - beyond:,} of {items:,}" if beyond else f"all {items:,}"
        ways = [f"--num-fewshot {fewer} (then {fit} fit)"]
        if not beyond:
            break
    loaded.task.set_config("num_fewshot", shots)
    return ways


# ---- a trial of the checker and the metrics


def _try_scoring(loaded: HarnessTask, instances: Sequence[Any]) -> None:
    """Score the first items as lm-eval will. Raises DataError for metrics that cannot be used here; what the task's own
    functions raise passes through."""
    task = loaded.task
    by_item: dict[int, list[Any]] = {}
    for instance in instances:
        if instance.doc_id not in by_item and len(by_item) == TRIED:
            break
        by_item.setdefault(instance.doc_id, []).append(instance)
    asked = [instance for each in by_item.values() for instance in each]
    for number, each in enumerate(by_item.values()):
        for place, instance in enumerate(each):
            invented = _invented(instance.request_type, place == number % len(each))
            instance.resps = [invented] * max(instance.repeats or 1, 1)
    for ensemble in getattr(task, "_filters", []):
        ensemble.apply(asked)
    values: dict[tuple[str, str], list[Any]] = {}  # by metric and filter, a value an item
    for each in by_item.values():
        for name in each[0].filtered_resps:
            task.doc_to_target(each[0].doc)
            for metric, value in task.process_results(each[0].doc, [i.filtered_resps[name] for i in each]).items():
                values.setdefault((metric, name), []).append(value)
    for instance in asked:
        instance.resps, instance.filtered_resps = [], {}
    _try_metrics(loaded, {metric: found for (metric, _), found in values.items()})


def _invented(kind: str, chosen: bool) -> Any:
    """A response of the type that the model gives; of an item's choices, one is the likeliest."""
    nats = -5.0 if chosen else -10.0
    return TEXT if kind == "generate_until" else nats if kind == "loglikelihood_rolling" else (nats, chosen)


def _try_metrics(loaded: HarnessTask, values: dict[str, list[Any]]) -> None:
    """Whether each metric can be summed up, and whether one has a value for each item.

    lm-eval's own sums must take the values; a sum of the task's own may need all items: it is tried for packages.
    """
    for metric, found in values.items():
        how = loaded.task.aggregation().get(metric)
        try:
            if how:
                how(found)
        except Exception as error:  # scikit-learn and others, each with errors of its own
            if isinstance(error, ImportError | OSError):
                raise
            if str(getattr(how, "__module__", "")).startswith("lm_eval.api."):
                text = " ".join(str(error).split())[:200]
                raise DataError(
                    f"task {loaded.name}: its metric {metric} cannot be summed up over these items ({text}); take it "
                    "out of metric_list, or give one that fits the number of classes"
                ) from error
    if not any(as_float(metric, found[0]) == as_float(metric, found[0]) for metric, found in values.items()):
        raise DataError(
            f"task {loaded.name}: {', '.join(values) or 'none'} (its metrics) have a value for the whole set alone and "
            "none for an item, so that results could not be paired; add one such as acc or exact_match to metric_list"
        )
