"""Whether one model is better than another: results in, paired differences, tests and plain words out. No torch.

Every other model minus the baseline, task by task and decoding by decoding. A difference counts as shown when its p,
corrected by Holm over the tasks and models of a decoding, is at most alpha and its interval excludes 0: the sign-flip
test over seeds speaks of these items, the interval of other items too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from srppo.errors import DataError
from srppo.evaluation.pairing import Arms, Paired, by_seed, grouped, made_alike, pair
from srppo.evaluation.results import DECODINGS
from srppo.statistics.intervals import (
    Estimate,
    IqmDifference,
    calibrated_interval,
    cluster_values,
    constant_bound,
    crossed_error,
    iqm_difference,
)
from srppo.statistics.tests import PValue, detectable, holm, mcnemar, seeds_needed, sign_flip


@dataclass(frozen=True)
class Difference:
    """A model minus the baseline on one task under one decoding, in the metric's unit.

    difference: with its interval of confidence 1 - alpha; its n counts items. clusters: how many, None without.
    p, p_holm: two-sided, before and after Holm's correction over so many comparisons. detectable: the true difference
    that such data show with 80% power before correction, infinite where the test cannot reach alpha. left_out: items by
    reason.
    """

    baseline: str
    model: str
    task: str
    decoding: str
    metric: str
    group: str | None
    seeds: tuple[int | None, ...]
    clusters: int | None
    baseline_mean: float
    model_mean: float
    difference: Estimate
    p: float
    test: str
    p_holm: float
    comparisons: int
    detectable: float
    verdict: Literal["better", "worse", "cannot tell"]
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


def compare(arms: Arms, *, alpha: float = 0.05) -> ComparisonResult:
    """Compare every arm with the first. Raises DataError where nothing can be paired."""
    if len(arms) < 2:
        raise DataError(
            f"only {next(iter(arms), 'nothing')} to compare; give another model, or a run with several arms"
        )
    if not 0 < alpha < 1:
        raise DataError(f"alpha {alpha} is not between 0 and 1; 0.05 is usual")
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
        tested = [_test(paired) for paired in family]
        corrected = holm([each.p for each in tested])
        for paired, each, p_holm in zip(family, tested, corrected, strict=True):
            differences.append(_difference(paired, each, p_holm, len(family), alpha))
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


def _difference(paired: Paired, tested: PValue, p_holm: float, comparisons: int, alpha: float) -> Difference:
    first = paired.first
    draws = max(500, min(4000, 8_000_000 // paired.gaps.shape[1]))  # only the interval's shape hangs on them
    interval = calibrated_interval(
        paired.gaps, paired.clusters, limits=paired.limits, draws=draws, confidence=1 - alpha
    )
    shown = p_holm <= alpha and (interval.low > 0 or interval.high < 0)
    better = (interval.mean > 0) == first.higher_is_better
    reach = tested.n >= seeds_needed(alpha, comparisons)
    found = Difference(
        baseline=paired.names[0],
        model=paired.names[1],
        task=first.task,
        decoding=first.decoding,
        metric=first.metric,
        group=first.group,
        seeds=paired.seeds,
        clusters=len(set(paired.clusters)) if paired.clusters else None,
        baseline_mean=float(paired.baseline.mean()),
        model_mean=float(paired.model.mean()),
        difference=interval,
        p=tested.p,
        test=tested.name,
        p_holm=p_holm,
        comparisons=comparisons,
        detectable=_detectable(paired, alpha) if reach else math.inf,
        verdict="cannot tell" if not shown else "better" if better else "worse",
        sentence="",
        left_out=paired.left_out,
        notes=paired.notes,
    )
    return replace(found, sentence=sentence(found, alpha))


def _detectable(paired: Paired, alpha: float) -> float:
    """At 80% power before correction; where no item differs, as if as many did as Wilson's bound still allows."""
    units = cluster_values(paired.gaps, paired.clusters)
    error, df = crossed_error(units)
    if not error > 1e-12:
        error = math.sqrt(constant_bound(units.shape[1]) / units.shape[1]) if paired.limits else math.nan
    return detectable(error, df, alpha=alpha)


# ---- plain words


def sentence(found: Difference, alpha: float) -> str:
    """What a comparison shows, in plain words."""
    where, interval = f"on {found.task} ({found.decoding})", found.difference
    data = f"{interval.n} items" + (f" in {found.clusters} clusters" if found.clusters else "")
    data += f" and {len(found.seeds)} seeds" if len(found.seeds) > 1 else ""
    p = p_text(found.p_holm) + (f" after Holm over {found.comparisons}" if found.comparisons > 1 else "")
    if found.verdict != "cannot tell":
        bounds = sorted([abs(interval.low), abs(interval.high)])
        by = f"{number(abs(interval.mean))} [{number(bounds[0])}, {number(bounds[1])}]"
        return f"{found.model} is {found.verdict} than {found.baseline} {where} by {by}, p {p}; {data}{_one(found)}."
    text = f"cannot tell whether {found.model} differs from {found.baseline} {where}: {signed(interval)}, p {p}; "
    units, kind = (len(found.seeds), "seeds") if len(found.seeds) > 1 else (found.clusters or interval.n, "units")
    if not math.isfinite(found.detectable) and units < seeds_needed(alpha, found.comparisons):
        least = f"{units} {kind} cannot give a p below {p_text(2.0 ** (1 - units))} before correction"
        many = f" with Holm over {found.comparisons}" if found.comparisons > 1 else ""
        return f"{text}{least}, whatever the difference; {seeds_needed(alpha, found.comparisons)} could{many}."
    if found.p_holm <= alpha:
        return f"{text}these items agree, but the interval says that other items may not; {data}{_one(found)}."
    shown = f"could have shown a difference of about {number(found.detectable)} or more"
    return f"{text}{data} {shown}{_one(found)}."


def _one(found: Difference) -> str:
    """The warning of a trained model that stands alone for its method."""
    return " (one training seed; others may differ)" if len(found.seeds) == 1 and found.seeds != (None,) else ""


def number(value: float, sign: str = "") -> str:
    """Three decimals, one from 10 on; a dash where there is no number."""
    return "-" if not math.isfinite(value) else format(value, f"{sign}.3f" if abs(value) < 10 else f"{sign},.1f")


def signed(estimate: Estimate) -> str:
    """`+0.120 [+0.050, +0.190]`."""
    return f"{number(estimate.mean, '+')} [{number(estimate.low, '+')}, {number(estimate.high, '+')}]"


def p_text(p: float) -> str:
    """Three decimals, `<0.001` below."""
    return "<0.001" if p < 0.0005 else f"{p:.3f}"
