"""Which results of two models are set against each other: asked in one way, of one seed, item by item. No torch.

`made_alike` takes one of several results of one thing, `pair` pairs two models' results on seeds and items. What is not
taken, and what cannot be paired, is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from srppo.errors import DataError
from srppo.evaluation.results import SUMMARY, TaskResult, question_name
from srppo.world.items import items
from srppo.world.tasks import REPORTED

K = TypeVar("K")
Arms = Mapping[str, Sequence[TaskResult]]
BySeed = Mapping[int | None, TaskResult]
SUITE = {"short": "embedded_", "long": "embedded_long_"}  # before the name of a group: its task in a suite, by style

DECISIVE = {
    "harness": ("version of srppo eval", "with one version of srppo"),
    "task_content": ("the task's YAML or code", "with one file of the task and one lm-eval"),
    "task_version": ("version of the task", "with one file of the task and one lm-eval"),
    "num_fewshot": ("few-shot examples", "with the same --num-fewshot"),
    "fewshot_seed": ("seed of the few-shot examples", "with the same --seed"),
    "fewshot_as_multiturn": ("few-shot examples as turns of the chat", "with one version of srppo"),
    "templated": ("chat template", "with --chat-template, or both with --no-chat-template"),
    "system": ("system message", "with the same --system"),
    "generation.temperature": ("temperature", "with the same --temperature"),
    "generation.max_new_tokens": ("new tokens at most", "with the same --max-new-tokens"),
    "generation.until": ("stop texts", "with one file of the task"),
    "generation.top_k": ("top_k", "with one file of the task"),
    "generation.top_p": ("top_p", "with one file of the task"),
    "generation.extra": ("generation_kwargs", "with one file of the task"),
    "rollout.max_new_tokens": ("rollout.max_new_tokens", "with the same rollout.max_new_tokens"),
    "data.system": ("system prompt", "with the same data.system"),
}
"""Settings under which a task asks or scores otherwise: how they are called, and how to make them equal."""
HARMLESS = {
    "samples": "samples a prompt",
    "batch_size": "batch size",
    "device": "device",
    "precision": "precision",
    "environment.packages.torch": "torch",
    "environment.packages.transformers": "transformers",
    "environment.packages.lm-eval": "lm-eval",
}
"""Settings that change precision or rounding, not the question."""
OF_SAMPLING = {"samples": HARMLESS["samples"], "eval_seed": "seed of the samples (--seed)"}


def grouped(results: Iterable[TaskResult], key: Callable[[TaskResult], K]) -> dict[K, list[TaskResult]]:
    """Results by a key, in the order they come."""
    found: dict[K, list[TaskResult]] = {}
    for result in results:
        found.setdefault(key(result), []).append(result)
    return found


# ---- one way of asking


def made_alike(arms: Arms) -> tuple[dict[str, list[TaskResult]], list[str]]:
    """One result a model, training seed, task and decoding, of several the one made as the others'; and notes on it.

    A way: the settings that decide what is asked (DECISIVE), samples and their seed included, or, where arms share none
    of those, without these two. Of several ways that all arms share the one with the most arms and training seeds, then
    items, then the newest. A run's own test of a group of the embedded world and the embedded suite's are ways of one
    thing, and the suite's comes first where both have as much. Where nothing is shared `pair` says what differs.
    """
    every = [replace(result, model=name) for name, results in arms.items() for result in results]
    tasks = {result.task for result in every}
    kept: dict[str, list[TaskResult]] = {name: [] for name in arms}
    notes: list[str] = []
    for on in grouped(every, lambda result: (_questions(result, tasks), result.decoding)).values():
        several = len(on) > len({(result.model, result.seed) for result in on})
        for cell in grouped(_shared(on, notes) if several else on, _cell).values():
            kept[cell[0].model].append(max(cell, key=lambda result: (len(result.items), _time(result))))
    return kept, notes


def _questions(result: TaskResult, tasks: Collection[str]) -> str:
    """The task, or an embedded suite's, where results on that exist too, for a run's own test on the same items."""
    for style, before in SUITE.items():
        suite = before + result.task
        if suite in tasks and result.task in REPORTED and _of_world(result.task, style).issuperset(result.items):
            return suite
    return result.task


@cache
def _of_world(group: str, style: str) -> frozenset[str]:
    return frozenset(question_name(item.task, item.prompt, item.answer) for item in items(group, "test", style))


def _shared(on: list[TaskResult], notes: list[str]) -> list[TaskResult]:
    """The results of one thing that are made in the way to be compared; all of them where models share none."""
    models = {result.model for result in on}
    for further in (OF_SAMPLING, {}):
        ways = grouped(on, partial(_way, further=further)).values()
        if shared := [way for way in ways if {result.model for result in way} == models]:
            best = max(shared, key=_rank)
            notes += _not_taken(on, best, [way[0].task for way in ways])
            return best
    notes += _not_taken(on, on, [])
    return on


def _way(result: TaskResult, further: Mapping[str, str]) -> str:
    settings = comparable(result)
    wanted = [*DECISIVE, *(further if result.decoding == "sampled" else ())]
    return str((result.task, result.metric, {key: settings[key] for key in wanted if key in settings}))


def _cell(result: TaskResult) -> tuple[str, str, int | None]:
    return result.model, result.task, result.seed


def _rank(way: list[TaskResult]) -> tuple[int, int, bool, float]:
    """Arms and seeds, items, whether it is the suite's, and when the newest was written."""
    cells = grouped(way, _cell).values()
    items_in_all = sum(max(len(result.items) for result in cell) for cell in cells)
    return len(cells), items_in_all, way[0].task.startswith((*SUITE.values(),)), max(map(_time, way))


def _not_taken(on: list[TaskResult], best: list[TaskResult], tasks: Sequence[str]) -> list[str]:
    """Notes on the results that are not taken; tasks: that of each way."""
    first, others = best[0], [result for result in on if result not in best]
    where = f"({first.decoding})"
    notes = [
        f"{task} {where} is left out: {first.task} asks the same questions, and each counts once"
        for task in dict.fromkeys(result.task for result in others if result.task != first.task)
    ]
    if same := [comparable(result) for result in others if result.task == first.task]:
        names = {key: words for key, (words, _) in DECISIVE.items()}
        names |= OF_SAMPLING if first.decoding == "sampled" else {}
        own, parts = comparable(first), []
        for key, words in names.items():
            unlike = dict.fromkeys(said(each[key]) for each in same if key in each and each[key] != own.get(key))
            parts += [f"{words}: {said(own.get(key))}, not {', '.join(unlike)}"] if unlike else []
        differing = f" ({'; '.join(parts)})" if parts else ""
        notes.append(
            f"{first.task} {where} was evaluated in {tasks.count(first.task)} ways; compared is the newest that all "
            f"share{differing}"
        )
    if max(map(len, grouped(best, _cell).values())) > 1:
        notes.append(f"{first.task} {where}: of several results of a model, that with most items counts")
    return notes


def _time(result: TaskResult) -> float:
    """When a result was written, as its file says; 0 where there is none."""
    file = Path(result.path) / SUMMARY
    return file.stat().st_mtime if file.is_file() else 0.0


# ---- pairs of one seed and one item


@dataclass(frozen=True)
class Paired:
    """Scores of the same items under the same seeds: (seeds, items) arrays, clusters of the items where there are any.

    names: of both models. first: one of the baseline's results, for what all have in common. seeds: training seeds,
    None where unknown. left_out: why, then the items. notes: what else a reader should know.
    """

    names: tuple[str, str]
    first: TaskResult
    baseline: NDArray[np.float64]
    model: NDArray[np.float64]
    seeds: tuple[int | None, ...]
    clusters: tuple[str, ...] | None
    left_out: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    @property
    def gaps(self) -> NDArray[np.float64]:
        """Model minus baseline, (seeds, items)."""
        return self.model - self.baseline

    @property
    def binary(self) -> bool:
        """Whether every score is 0 or 1."""
        return bool(np.isin(self.baseline, (0.0, 1.0)).all() and np.isin(self.model, (0.0, 1.0)).all())

    @property
    def limits(self) -> tuple[float, float] | None:
        """What a difference cannot exceed, where all scores look like shares."""
        both = np.stack([self.baseline, self.model])
        return (-1.0, 1.0) if both.min() >= 0 and both.max() <= 1 else None


def by_seed(results: Sequence[TaskResult]) -> dict[int | None, TaskResult]:
    """Results by training seed, in the order of the seeds; one without a seed stands last."""
    return {each.seed: each for each in sorted(results, key=lambda each: (each.seed is None, each.seed or 0))}


def pair(baseline: BySeed, model: BySeed, names: tuple[str, str]) -> Paired:
    """Pair two models' results of one task and decoding on seeds, then on items by id.

    Raises DataError, in one line, where metrics differ or nothing can be paired.
    """
    pairs, notes = _pair_seeds(baseline, model, names)
    first = pairs[0][0]
    for before, after in pairs:
        for result in (before, after):
            if (result.metric, result.higher_is_better) != (first.metric, first.higher_is_better):
                raise DataError(
                    f"{first.task}: {first.path} has the metric {first.metric}, {result.path} has {result.metric}; "
                    "pick one that both have with --metric"
                )
    made = _check_settings([result for each in pairs for result in each])
    scores = [[dict(zip(r.items, r.scores, strict=True)) for r in each] for each in pairs]
    items, left_out = _pair_items(pairs, scores, names)
    clusters = _clusters(pairs, items)
    arrays = [np.array([[each[side][item] for item in items] for each in scores]) for side in (0, 1)]
    seeds = tuple(after.seed if before.seed is None else before.seed for before, after in pairs)
    return Paired(names, first, arrays[0], arrays[1], seeds, clusters, left_out, (*notes, *made))


def _check_settings(results: Sequence[TaskResult]) -> list[str]:
    """What a reader should know of how results were made. Raises DataError where they cannot be compared."""
    every = [comparable(result) for result in results]
    first = every[0]
    for result, settings in zip(results, every, strict=True):
        unlike = [key for key in DECISIVE if key in first and key in settings and first[key] != settings[key]]
        if unlike:
            what = "; ".join(f"{DECISIVE[key][0]}: {said(first[key])} and {said(settings[key])}" for key in unlike)
            ways = " and ".join(dict.fromkeys(DECISIVE[key][1] for key in unlike))
            raise DataError(
                f"{result.task}: {results[0].path} and {result.path} were made in ways that cannot be compared "
                f"({what}); make both {ways}"
            )
    values = {name: dict.fromkeys(said(e[key]) for e in every if key in e) for key, name in HARMLESS.items()}
    differ = [f"{name} ({', '.join(found)})" for name, found in values.items() if len(found) > 1]
    notes = [f"results differ in {', '.join(differ)}; the questions are the same"] if differ else []
    if len({each["chat_template"] for each in every if each.get("templated")}) > 1:
        notes.append("the models have different chat templates; each was asked in its own")
    recorded = {key for each in every for key in DECISIVE if key in each}
    lacking = [result.path for result, each in zip(results, every, strict=True) if not recorded <= each.keys()]
    if lacking:
        notes.append(f"{lacking[0]} does not record all of its settings: move it away and evaluate again")
    return notes


def comparable(result: TaskResult) -> dict[str, Any]:
    """A result's settings, with whether there was a chat template beside its text, and all further keys as one."""
    settings = dict(result.settings)
    if "chat_template" in settings:
        settings["templated"] = settings["chat_template"] is not None
    if "generation.until" in settings:
        further = {key.rpartition(".")[2]: value for key, value in settings.items() if ".extra." in key}
        settings["generation.extra"] = further
    return settings


def said(value: Any) -> str:
    """A setting in few characters."""
    text = {None: "none", True: "yes", False: "no"}[value] if isinstance(value, bool | None) else str(value)
    return text if len(text) <= 24 else f"{text[:12]}..."


def _pair_seeds(
    baseline: BySeed, model: BySeed, names: tuple[str, str]
) -> tuple[list[tuple[TaskResult, TaskResult]], list[str]]:
    """Results of one seed each. One result without a seed, such as a model from the hub, meets every seed."""
    if len(baseline) == len(model) == 1:
        (a,), (b,) = baseline, model
        note = f"seeds {_seeds([a])} and {_seeds([b])} are not the same: paired on items only"
        return [(baseline[a], model[b])], [] if a == b else [note]
    for one, several, name in ((baseline, model, names[0]), (model, baseline, names[1])):
        if set(one) == {None}:
            pairs = [(one[None], r) if one is baseline else (r, one[None]) for r in several.values()]
            return pairs, [f"{name} is one model without a training seed, set against every seed of the other"]
    common = [seed for seed in baseline if seed in model]
    if not common:
        raise DataError(
            f"{names[0]} has the seeds {_seeds(baseline)}, {names[1]} has {_seeds(model)}: none in common, so nothing "
            "can be paired; train both with the same seeds, or give one result of each"
        )
    notes = [
        f"{name}: seeds {_seeds(alone)} left out, {other} lacks them"
        for name, other, own, others in ((*names, baseline, model), (*names[::-1], model, baseline))
        if (alone := [seed for seed in own if seed not in others])
    ]
    return [(baseline[seed], model[seed]) for seed in common], notes


def _seeds(seeds: Iterable[int | None]) -> str:
    return ", ".join("unknown" if seed is None else str(seed) for seed in seeds)


def _pair_items(
    pairs: Sequence[tuple[TaskResult, TaskResult]],
    scores: Sequence[Sequence[Mapping[str, float]]],
    names: tuple[str, str],
) -> tuple[list[str], dict[str, tuple[str, ...]]]:
    """Items that every result has a score for, in the first one's order, and the others by reason."""
    left_out: dict[str, dict[str, None]] = {}
    wanted = dict.fromkeys(item for each in pairs for result in each for item in result.items)
    items = []
    for item in wanted:
        reasons = []
        for side, name in enumerate(names):
            values = [each[side].get(item) for each in scores]
            if any(value is None for value in values):
                reasons.append(f"not in {name}" + ("" if all(value is None for value in values) else " at every seed"))
            elif any(value is not None and math.isnan(value) for value in values):
                why = next(r[side].not_scored[item] for r in pairs if item in r[side].not_scored)
                reasons.append(f"not scored in {name}: {why}")
        for reason in reasons:
            left_out.setdefault(reason, {})[item] = None
        if not reasons:
            items.append(item)
    if not items:
        raise DataError(
            f"{pairs[0][0].task}: {names[0]} ({len(scores[0][0])} items) and {names[1]} ({len(scores[0][1])} items) "
            f"share no scored item ({'; '.join(f'{len(each)} {why}' for why, each in left_out.items())}); "
            "evaluate both on the same items"
        )
    return items, {reason: tuple(each) for reason, each in left_out.items()}


def _clusters(pairs: Sequence[tuple[TaskResult, TaskResult]], items: Sequence[str]) -> tuple[str, ...] | None:
    """Clusters of the paired items; None where there are none or every item is its own."""
    known: dict[str, str] = {}
    for result in (each for both in pairs for each in both):
        for item, cluster in zip(result.items, result.clusters or (), strict=False):
            if known.setdefault(item, cluster) != cluster:
                raise DataError(
                    f"{result.task}: item {item!r} is in cluster {known[item]!r} and, in {result.path}, "
                    f"in {cluster!r}; evaluate both with the same task"
                )
    clusters = tuple(known[item] for item in items) if known else ()
    return clusters if len(set(clusters)) < len(clusters) else None
