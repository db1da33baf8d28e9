"""Two models' results on one task, paired on training seeds and on items; what cannot be paired is named. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from srppo.errors import DataError
from srppo.results import TaskResult

BySeed = Mapping[int | None, TaskResult]


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
    scores = [[dict(zip(r.items, r.scores, strict=True)) for r in each] for each in pairs]
    items, left_out = _pair_items(pairs, scores, names)
    clusters = _clusters(pairs, items)
    arrays = [np.array([[each[side][item] for item in items] for each in scores]) for side in (0, 1)]
    seeds = tuple(after.seed if before.seed is None else before.seed for before, after in pairs)
    return Paired(arrays[0], arrays[1], seeds, clusters, left_out, notes)


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
