"""Two models' results on one task, paired on training seeds and on items; what cannot be paired is named. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srppo.errors import DataError
from srppo.evaluation.results import TaskResult

BySeed = Mapping[int | None, TaskResult]

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


@dataclass(frozen=True)
class Paired:
    """Scores of the same items under the same seeds: (seeds, items) arrays, clusters of the items where there are any.

    seeds: training seeds, None where unknown. left_out: why, then the items. notes: what else a reader should know.
    """

    baseline: NDArray[np.float64]
    model: NDArray[np.float64]
    seeds: tuple[int | None, ...]
    clusters: tuple[str, ...] | None
    left_out: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]

    @property
    def binary(self) -> bool:
        """Whether every score is 0 or 1."""
        return bool(np.isin(self.baseline, (0.0, 1.0)).all() and np.isin(self.model, (0.0, 1.0)).all())

    @property
    def limits(self) -> tuple[float, float] | None:
        """What a difference cannot exceed, where all scores look like shares."""
        both = np.stack([self.baseline, self.model])
        return (-1.0, 1.0) if both.min() >= 0 and both.max() <= 1 else None


def by_seed(results: Sequence[TaskResult]) -> tuple[dict[int | None, TaskResult], tuple[str, ...]]:
    """One result a training seed, and a note where there were more: the one with most items counts.

    Raises DataError where several have equally many.
    """
    found: dict[int | None, TaskResult] = {}
    notes = []
    for result in results:
        other = found.get(result.seed)
        if other is None:
            found[result.seed] = result
            continue
        if len(other.items) == len(result.items):
            seed = "" if result.seed is None else f", seed {result.seed}"
            raise DataError(
                f"two results of {result.model} on {result.task} ({result.decoding}{seed}) with {len(result.items)} "
                f"items: {other.path} and {result.path}; give the path of the one that is meant, or move the other away"
            )
        found[result.seed] = max(other, result, key=lambda each: len(each.items))
        notes.append(f"{result.model} on {result.task}: of several results the one with most items is used")
    return dict(sorted(found.items(), key=lambda each: (each[0] is None, each[0] or 0))), tuple(dict.fromkeys(notes))


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
    made = _made_alike([result for each in pairs for result in each])
    scores = [[dict(zip(r.items, r.scores, strict=True)) for r in each] for each in pairs]
    items, left_out = _pair_items(pairs, scores, names)
    clusters = _clusters(pairs, items)
    arrays = [np.array([[each[side][item] for item in items] for each in scores]) for side in (0, 1)]
    seeds = tuple(after.seed if before.seed is None else before.seed for before, after in pairs)
    return Paired(arrays[0], arrays[1], seeds, clusters, left_out, (*notes, *made))


def _made_alike(results: Sequence[TaskResult]) -> tuple[str, ...]:
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
    return (*_harmless(every), *_unrecorded(results, every))


def _harmless(every: Sequence[Mapping[str, Any]]) -> list[str]:
    """Notes on settings that differ and do not forbid to compare."""
    values = {key: list(dict.fromkeys(said(each[key]) for each in every if key in each)) for key in HARMLESS}
    differ = [f"{HARMLESS[key]} ({', '.join(found)})" for key, found in values.items() if len(found) > 1]
    notes = [f"results differ in {', '.join(differ)}; the questions are the same"] if differ else []
    if len({each["chat_template"] for each in every if each.get("templated")}) > 1:
        notes.append("the models have different chat templates; each was asked in its own")
    return notes


def _unrecorded(results: Sequence[TaskResult], every: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note where some results, such as older ones, do not say what others do."""
    recorded = {key for each in every for key in DECISIVE if key in each}
    lacking = [result.path for result, each in zip(results, every, strict=True) if not recorded <= each.keys()]
    return [f"{lacking[0]} does not record all of its settings: move it away and evaluate again"] if lacking else []


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
) -> tuple[list[tuple[TaskResult, TaskResult]], tuple[str, ...]]:
    """Results of one seed each. One result without a seed, such as a model from the hub, meets every seed."""
    if len(baseline) == len(model) == 1:
        (a,), (b,) = baseline, model
        note = () if a == b else (f"seeds {_seed(a)} and {_seed(b)} are not the same: paired on items only",)
        return [(baseline[a], model[b])], note
    for one, several, name in ((baseline, model, names[0]), (model, baseline, names[1])):
        if set(one) == {None}:
            pairs = [(one[None], r) if one is baseline else (r, one[None]) for r in several.values()]
            return pairs, (f"{name} is one model without a training seed, set against every seed of the other",)
    common = [seed for seed in baseline if seed in model]
    if not common:
        raise DataError(
            f"{names[0]} has the seeds {_seeds(baseline)}, {names[1]} has {_seeds(model)}: none in common, so nothing "
            "can be paired; train both with the same seeds, or give one result of each"
        )
    notes = [
        f"{name}: seeds {', '.join(map(_seed, alone))} left out, {other} lacks them"
        for name, other, own, others in ((*names, baseline, model), (*names[::-1], model, baseline))
        if (alone := [seed for seed in own if seed not in others])
    ]
    return [(baseline[seed], model[seed]) for seed in common], tuple(notes)


def _seed(seed: int | None) -> str:
    return "unknown" if seed is None else str(seed)


def _seeds(results: BySeed) -> str:
    return ", ".join(map(_seed, results))


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
    if not known:
        return None
    clusters = tuple(known[item] for item in items)
    return clusters if len(set(clusters)) < len(clusters) else None
