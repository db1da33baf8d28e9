"""Invented responses, scored and summed up: what a task's checker or metrics lack comes out before a real response."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from srppo.errors import DataError
from srppo.evaluation.harness.scores import as_float
from srppo.evaluation.harness.tasks import Loaded

TRIED = 8  # items: enough that every class of a choice is guessed
TEXT = "One is 1.\n\nTwo is 2."


def try_scoring(loaded: Loaded, instances: Sequence[Any]) -> None:
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
    values: dict[tuple[str, str], list[Any]] = {}
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
    if kind == "generate_until":
        return TEXT
    nats = -5.0 if chosen else -10.0
    return nats if kind == "loglikelihood_rolling" else (nats, chosen)


def _try_metrics(loaded: Loaded, values: dict[str, list[Any]]) -> None:
    """Whether each metric can be summed up, and whether one has a value for each item."""
    for metric, found in values.items():
        if how := loaded.task.aggregation().get(metric):
            _try_sum(loaded.name, metric, how, found)
    if not any(as_float(metric, found[0]) == as_float(metric, found[0]) for metric, found in values.items()):
        raise DataError(
            f"task {loaded.name}: {', '.join(values) or 'none'} (its metrics) have a value for the whole set alone and "
            "none for an item, so that results could not be paired; add one such as acc or exact_match to metric_list"
        )


def _try_sum(task: str, metric: str, how: Callable[[list[Any]], Any], values: list[Any]) -> None:
    """lm-eval's own sums must take the values; a sum of the task's own may need all items: it is tried for packages."""
    try:
        how(values)
    except Exception as error:  # scikit-learn and others, each with errors of its own
        if isinstance(error, ImportError | OSError):
            raise
        if str(getattr(how, "__module__", "")).startswith("lm_eval.api."):
            text = " ".join(str(error).split())[:200]
            raise DataError(
                f"task {task}: its metric {metric} cannot be summed up over these items ({text}); take it out of "
                "metric_list, or give one that fits the number of classes"
            ) from error
