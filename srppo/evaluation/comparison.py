"""Whether one model is better than another: results in, paired differences, tests and plain words out. No torch.

Every other model minus the baseline, task by task and decoding by decoding; a decoding's comparisons are a family, and
`statistics.verdicts` holds the rule. Where items belong to several tasks, tasks are the units: a claim about such a
group is a claim about tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from srppo.errors import DataError
from srppo.evaluation.pairing import Arms, Paired, by_seed, grouped, made_alike, pair
from srppo.evaluation.results import DECODINGS, TASKS
from srppo.statistics.intervals import Estimate, IqmDifference, iqm_difference
from srppo.statistics.tests import PValue, mcnemar, seeds_needed, sign_flip
from srppo.statistics.verdicts import MARGIN, Contrast, Finding, Verdict, judge, on_these_units

FEW_TASKS = 8  # with fewer as units, a verdict says so


@dataclass(frozen=True)
class Difference:
    """A model minus the baseline on one task under one decoding, in the metric's unit.

    difference: with the interval that the verdict is read from, of `confidence`; its n counts items. clusters: how many
    units of that name there are, None where items are the units. these_tasks: where tasks are the units, the interval
    over items, which speaks of no other task. p, p_holm: two-sided, before and after Holm's correction over so many
    comparisons; p_same, p_same_holm: that the difference is not below `margin` (None: not asked). test: the exact one.
    detectable: as of `verdicts.Finding`. left_out: items by reason.
    """

    baseline: str
    model: str
    task: str
    decoding: str
    metric: str
    group: str | None
    seeds: tuple[int | None, ...]
    clusters: int | None
    unit: str
    baseline_mean: float
    model_mean: float
    difference: Estimate
    confidence: float
    these_tasks: Estimate | None
    p: float
    test: str
    p_holm: float
    p_same: float
    p_same_holm: float
    margin: float | None
    comparisons: int
    detectable: float
    verdict: Verdict
    sentence: str
    left_out: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Aggregate:
    """Interquartile means over tasks (and seeds) of two models under one decoding."""

    baseline: str
    model: str
    decoding: str
    tasks: tuple[str, ...]
    seeds: int
    iqm: IqmDifference


@dataclass(frozen=True)
class ComparisonResult:
    """All differences and aggregates, and what was not compared."""

    baseline: str
    models: tuple[str, ...]
    alpha: float
    differences: tuple[Difference, ...]
    aggregates: tuple[Aggregate, ...]
    notes: tuple[str, ...]


def compare(arms: Arms, *, alpha: float = 0.05, margin: float | None = None) -> ComparisonResult:
    """Compare every arm with the first.

    margin: differences below it are as good as none, in the metric's unit; None: MARGIN where scores are shares, and
    where they are not, nobody asks. Raises DataError where nothing can be paired.
    """
    if len(arms) < 2:
        raise DataError(
            f"only {next(iter(arms), 'nothing')} to compare; give another model, or a run with several arms"
        )
    if not 0 < alpha < 1:
        raise DataError(f"alpha {alpha} is not between 0 and 1; 0.05 is usual")
    if margin is not None and not margin > 0:
        raise DataError(f"margin {margin} is not above 0: it says below what two models are the same; 0.05 is usual")
    baseline, *models = arms
    alike, notes = made_alike(arms)
    differences: list[Difference] = []
    aggregates: list[Aggregate] = []
    for decoding in DECODINGS:
        family: list[Paired] = []
        for model in models:
            pairs = _pairs(alike, (baseline, model), decoding, notes)
            aggregates += _aggregate(pairs, decoding, alpha, notes)
            family += pairs
        contrasts = [_contrast(paired, margin) for paired in family]
        for paired, contrast, found in zip(family, contrasts, judge(contrasts, alpha=alpha), strict=True):
            differences.append(_difference(paired, contrast, found, len(family), alpha))
    notes = list(dict.fromkeys(notes))
    if not differences:
        raise DataError(f"nothing to compare: {'; '.join(notes)}")
    return ComparisonResult(baseline, tuple(models), alpha, tuple(differences), tuple(aggregates), tuple(notes))


def _pairs(arms: Arms, names: tuple[str, str], decoding: str, notes: list[str]) -> list[Paired]:
    """The tasks that two models share under one decoding, paired; the others go into the notes."""
    both = [grouped((r for r in arms[name] if r.decoding == decoding), lambda r: r.task) for name in names]
    found = []
    for task in {**both[0], **both[1]}:
        missing = [name for name, own in zip(names, both, strict=True) if task not in own]
        if missing:
            notes.append(f"{task} ({decoding}) is not compared: {missing[0]} has no result on it")
        else:
            found.append(pair(by_seed(both[0][task]), by_seed(both[1][task]), names))
    return found


def _contrast(paired: Paired, margin: float | None) -> Contrast:
    asked = MARGIN if margin is None and paired.limits else margin
    return Contrast(paired.gaps, _test(paired), paired.clusters, paired.limits, asked)


def _test(paired: Paired) -> PValue:
    """Several seeds: sign-flip over their means. One: McNemar for 0/1 scores, else permutation of items or clusters."""
    gaps = paired.gaps
    if len(paired.seeds) > 1:
        tested = sign_flip(gaps.mean(axis=1))
        return tested._replace(name=f"{tested.name} over seeds")
    if paired.clusters is None and paired.binary:
        return mcnemar(paired.baseline[0], paired.model[0])
    places = {name: i for i, name in enumerate(dict.fromkeys(paired.clusters or range(gaps.shape[1])))}
    sums = np.bincount([places[name] for name in paired.clusters or range(gaps.shape[1])], weights=gaps[0])
    tested = sign_flip(sums)
    return tested._replace(name=f"paired permutation of {'clusters' if paired.clusters else 'items'}, {tested.name}")


def _aggregate(pairs: Sequence[Paired], decoding: str, alpha: float, notes: list[str]) -> list[Aggregate]:
    """The IQM over the tasks whose scores can be averaged: shares, of which more is better, under the same seeds."""
    fit = [paired for paired in pairs if paired.limits and paired.first.higher_is_better]
    seeds = [seed for seed in fit[0].seeds if all(seed in paired.seeds for paired in fit)] if fit else []
    if len(pairs) < 2:
        return []
    if len(fit) < 2 or not seeds:
        why = "tasks have no seed in common" if len(fit) > 1 else "scores are not shares of which more is better"
        notes.append(f"no aggregate over tasks ({decoding}, {pairs[0].names[1]}): {why}")
        return []
    rows = [[paired.seeds.index(seed) for seed in seeds] for paired in fit]
    iqm = iqm_difference(
        [paired.baseline[own] for paired, own in zip(fit, rows, strict=True)],
        [paired.model[own] for paired, own in zip(fit, rows, strict=True)],
        [paired.clusters for paired in fit],
        draws=max(500, min(2000, 8_000_000 // max(paired.model.shape[1] for paired in fit))),
        confidence=1 - alpha,
    )
    return [Aggregate(*fit[0].names, decoding, tuple(paired.first.task for paired in fit), len(seeds), iqm)]


def _difference(paired: Paired, contrast: Contrast, found: Finding, comparisons: int, alpha: float) -> Difference:
    first, by_task = paired.first, paired.clusters is not None and paired.first.unit == TASKS
    turned: dict[Verdict, Verdict] = {} if first.higher_is_better else {"better": "worse", "worse": "better"}
    made = Difference(
        baseline=paired.names[0],
        model=paired.names[1],
        task=first.task,
        decoding=first.decoding,
        metric=first.metric,
        group=first.group,
        seeds=paired.seeds,
        clusters=contrast.units,
        unit=first.unit,
        baseline_mean=float(paired.baseline.mean()),
        model_mean=float(paired.model.mean()),
        these_tasks=on_these_units(contrast, found.confidence) if by_task else None,
        test=contrast.exact.name,
        margin=contrast.margin,
        comparisons=comparisons,
        sentence="",
        left_out=paired.left_out,
        notes=paired.notes,
        **found._replace(verdict=turned.get(found.verdict, found.verdict))._asdict(),
    )
    return replace(made, sentence=sentence(made, alpha))


# ---- plain words


def sentence(found: Difference, alpha: float) -> str:
    """What a comparison shows, in plain words."""
    where, interval, seeds = f"on {found.task} ({found.decoding})", found.difference, len(found.seeds)
    p = f"p {p_text(found.p_holm)}" + _holm(found)
    said = f"cannot tell whether {found.model} differs from {found.baseline} {where}: {signed(interval)}, {p}"
    more = ""
    if found.verdict == "same":
        same = f"{found.model} and {found.baseline} are the same within {found.margin:g} {where}"
        said = f"{same}: {signed(interval)}, p {p_text(found.p_same_holm)}{_holm(found)}"
    elif found.verdict != "cannot tell":
        least, most = sorted([abs(interval.low), abs(interval.high)])
        by = f"{number(abs(interval.mean))} [{number(least)}, {number(most)}]"
        below = f", and by less than {found.margin:g}" if found.p_same_holm <= alpha else ""
        said = f"{found.model} is {found.verdict} than {found.baseline} {where} by {by}, {p}{below}"
    elif math.isinf(found.detectable):
        units, kind = (seeds, "seeds") if seeds > 1 else (found.clusters or interval.n, "units")
        many = f" with Holm over {found.comparisons}" if found.comparisons > 1 else ""
        more = (
            f"; {units} {kind} cannot give a p below {p_text(2.0 ** (1 - units))} before correction, whatever the "
            f"difference; {seeds_needed(alpha, found.comparisons)} could{many}"
        )
    else:
        more = f" could have shown a difference of about {number(found.detectable)} or more"
    return f"{said}; {_data(found)}{more}{_these_tasks(found)}{_one(found)}."


def _holm(found: Difference) -> str:
    return f" after Holm over {found.comparisons}" if found.comparisons > 1 else ""


def _data(found: Difference) -> str:
    """`over these 40 tasks, 400 items and 10 seeds`"""
    items = f"{found.difference.n} items"
    if found.these_tasks is not None:
        few = " (too few to say much of others)" if (found.clusters or 0) < FEW_TASKS else ""
        items = f"over these {found.clusters} tasks{few}, {items}"
    elif found.clusters:
        items += f" in {found.clusters} {found.unit}"
    return items + (f" and {len(found.seeds)} seeds" if len(found.seeds) > 1 else "")


def _these_tasks(found: Difference) -> str:
    """The narrower interval, which says nothing of other tasks."""
    narrow = found.these_tasks
    return "" if narrow is None else f"; on these tasks alone {bounds(narrow)}"


def _one(found: Difference) -> str:
    """The warning of a trained model that stands alone for its method."""
    return " (one training seed; others may differ)" if len(found.seeds) == 1 and found.seeds != (None,) else ""


def number(value: float, sign: str = "") -> str:
    """Three decimals, one from 10 on; a dash where there is no number."""
    return "-" if not math.isfinite(value) else format(value, f"{sign}.3f" if abs(value) < 10 else f"{sign},.1f")


def signed(estimate: Estimate) -> str:
    """`+0.120 [+0.050, +0.190]`."""
    return f"{number(estimate.mean, '+')} {bounds(estimate)}"


def bounds(estimate: Estimate | None) -> str:
    """`[+0.050, +0.190]`; a dash without an estimate."""
    return "-" if estimate is None else f"[{number(estimate.low, '+')}, {number(estimate.high, '+')}]"


def p_text(p: float) -> str:
    """Three decimals, `<0.001` below."""
    return "<0.001" if p < 0.0005 else f"{p:.3f}"
