"""Means and their 95% intervals. No torch; every random choice comes from an explicit generator.

`tests.py` holds the tests. Values are (training seeds, items) arrays; items that share a passage or a template
form a cluster and are resampled together.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats


class Estimate(NamedTuple):
    """A mean with the bounds of its 95% interval and the number of independent units behind it."""

    mean: float
    low: float
    high: float
    n: int


def wilson(successes: int, n: int, confidence: float = 0.95) -> Estimate:
    """Wilson score interval of a share (Wilson 1927); stays inside [0, 1] also at 0 and n successes."""
    if n == 0:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    z, share = NormalDist().inv_cdf((1 + confidence) / 2), successes / n
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    low, high = max(middle - half, 0.0), min(middle + half, 1.0)
    return Estimate(share, low if successes else 0.0, high if successes < n else 1.0, n)


def item_interval(
    values_by_item: ArrayLike,
    *,
    limits: tuple[float, float] | None = (0.0, 1.0),
    seed: int = 0,
    draws: int = 4000,
    confidence: float = 0.95,
) -> Estimate:
    """Mean over items with `calibrated_interval`, cut to `limits`; Wilson for shares where every item is 0 or 1.

    `values_by_item`: one number an item, such as the share of its samples that were right (samples of an item are not
    independent; the item is the unit). limits: what the values cannot leave; None where there is nothing such, and then
    a single item, or items that are all equal, have NaN bounds.
    """
    values = np.asarray(values_by_item, dtype=float)
    if values.size == 0 or (limits == (0.0, 1.0) and np.isin(values, (0.0, 1.0)).all()):
        return wilson(int(values.sum()), values.size, confidence)
    return within(
        calibrated_interval(values[None, :], limits=limits, seed=seed, draws=draws, confidence=confidence), limits
    )


def within(estimate: Estimate, limits: tuple[float, float] | None) -> Estimate:
    """An interval cut where no value can lie; NaN bounds stay."""
    if limits is None:
        return estimate
    low, high = np.maximum(estimate.low, limits[0]), np.minimum(estimate.high, limits[1])
    return estimate._replace(low=float(low), high=float(high))


def ratio_interval(
    numerators: ArrayLike,
    denominators: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    limits: tuple[float, float] | None = None,
    draws: int = 4000,
) -> Estimate:
    """sum(numerators) / sum(denominators) over units, or over (seeds, units), with a 95% interval; n counts units.

    `calibrated_interval` of the linearised ratio R: unit i has the value R + (a_i - R b_i) / mean(b) (Cochran 1977, ch.
    6).
    """
    a, b = np.asarray(numerators, dtype=float), np.asarray(denominators, dtype=float)
    if a.size == 0:
        return wilson(0, 0)
    ratio = a.sum() / b.sum()
    values = np.atleast_2d(ratio + (a - ratio * b) / b.mean())
    return within(calibrated_interval(values, clusters, limits=limits, draws=draws), limits)


def crossed_interval(
    values_by_seed_item: ArrayLike, *, seed: int = 0, draws: int = 4000, confidence: float = 0.95
) -> Estimate:
    """Mean of a (training seeds, items) array; seeds and items are resampled crossed, one draw of items for all seeds.

    The shape of `calibrated_interval`, which is what users are shown: this one alone covers too little where seeds or
    items are few. With one seed this is the bootstrap over items alone and says nothing of other seeds. n counts items.
    """
    values = np.asarray(values_by_seed_item, dtype=float)
    seeds, items = values.shape
    generator = np.random.default_rng(seed)
    seed_weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    means = (seed_weights * _item_means(values, generator, draws)).sum(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(values.mean()), float(low), float(high), items)


def calibrated_interval(
    values_by_seed_item: ArrayLike,
    clusters: Sequence[Hashable] | None = None,
    *,
    limits: tuple[float, float] | None = None,
    seed: int = 0,
    draws: int = 4000,
    confidence: float = 0.95,
) -> Estimate:
    """`crossed_interval` over items or clusters, its width set to that of t(df) standard errors (`crossed_error`).

    Resampling takes few seeds for all there are and counts the noise of a cell three times (Owen 2007, "The pigeonhole
    bootstrap"): alone it covers too little where seeds vary and too much where they do not. Here it gives the shape,
    the closed form the width. Where nothing varies, a Wilson bound takes over (`constant_bound`), given the `limits`
    that a value cannot leave; without limits the bounds are NaN. n counts items.
    """
    values = np.asarray(values_by_seed_item, dtype=float)
    mean, units = float(values.mean()), cluster_values(values, clusters)
    error, df = crossed_error(units)
    plain = crossed_interval(units, seed=seed, draws=draws, confidence=confidence)
    if error > 1e-12 and plain.high > plain.low:
        scale = 2 * float(scipy_stats.t.ppf((1 + confidence) / 2, df)) * error / (plain.high - plain.low)
        return Estimate(mean, mean - scale * (mean - plain.low), mean + scale * (plain.high - mean), values.shape[1])
    low, high = limits or (float("nan"), float("nan"))
    share = constant_bound(units.shape[1], confidence)
    return Estimate(mean, mean - share * (mean - low), mean + share * (high - mean), values.shape[1])


def constant_bound(n: int, confidence: float = 0.95) -> float:
    """The largest share of units that may differ although none of n did: Wilson's upper bound at 0 of n."""
    return wilson(0, n, confidence).high


def cluster_values(values_by_seed_item: ArrayLike, clusters: Sequence[Hashable] | None) -> NDArray[np.float64]:
    """(seeds, clusters): one value a cluster, so that clusters can be treated as independent units of equal weight.

    The value is the seed's mean m plus C/N times the sum of the cluster's deviations from m (C clusters, N items): the
    ratio estimator, linearised (Cochran 1977, chapter 6). Means over clusters are means over items. Without clusters,
    or where every item is its own, these are the items' values.
    """
    values = np.asarray(values_by_seed_item, dtype=float)
    if clusters is None:
        return values
    places = {name: i for i, name in enumerate(dict.fromkeys(clusters))}
    means = values.mean(axis=1, keepdims=True)
    sums = np.zeros((values.shape[0], len(places)))
    np.add.at(sums.T, [places[name] for name in clusters], (values - means).T)
    return means + sums * len(places) / values.shape[1]


def crossed_error(values_by_seed_unit: ArrayLike) -> tuple[float, float]:
    """(standard error of the mean, degrees of freedom) where seeds and units are both samples of many.

    Two-way random effects with one value a cell: the variance of the mean is (MS_seed + MS_unit - MS_rest) / (seeds
    units), with Satterthwaite's degrees of freedom (Clark 1973, "The language-as-fixed-effect fallacy"). With one seed
    it is the plain error over units and says nothing of other seeds.
    """
    values = np.asarray(values_by_seed_unit, dtype=float)
    seeds, units = values.shape
    if min(seeds, units) == 1:
        n = max(seeds, units)
        return (float(values.std(ddof=1) / np.sqrt(n)), n - 1.0) if n > 1 else (float("nan"), float("nan"))
    mean = values.mean()
    by_seed, by_unit = values.mean(axis=1, keepdims=True) - mean, values.mean(axis=0, keepdims=True) - mean
    df = np.array([seeds - 1, units - 1, (seeds - 1) * (units - 1)], dtype=float)
    rest = ((values - mean - by_seed - by_unit) ** 2).sum()
    squares = np.array([units * (by_seed**2).sum(), seeds * (by_unit**2).sum(), rest]) / df
    total = squares[0] + squares[1] - squares[2]
    if total <= squares[2]:  # no sign of either effect: only noise is left
        return float(np.sqrt(squares[2] / values.size)), float(df[2])
    return float(np.sqrt(total / values.size)), float(total**2 / (squares**2 / df).sum())


def interquartile_mean(values: ArrayLike) -> float:
    """Mean of the middle half of all values: a quarter, rounded down, is cut at each end (Agarwal et al. 2021)."""
    return float(scipy_stats.trim_mean(np.asarray(values, dtype=float), 0.25, axis=None))


class IqmDifference(NamedTuple):
    """Interquartile means over tasks and seeds of two models, and the model's minus the baseline's; n counts tasks."""

    baseline: Estimate
    model: Estimate
    difference: Estimate


def iqm_difference(
    baseline: Sequence[NDArray[np.float64]],
    model: Sequence[NDArray[np.float64]],
    clusters: Sequence[Sequence[Hashable] | None] | None = None,
    *,
    seed: int = 0,
    draws: int = 2000,
    confidence: float = 0.95,
) -> IqmDifference:
    """IQM of the (seed, task) scores of two models on the same seeds and items, one (seeds, items) array a task.

    Resampled crossed: one draw of seeds for all tasks and both models, one of items (clusters) within each task. Each
    interval is widened by what the plain mean over tasks needs to be as wide as its t(df) errors (`crossed_error`).
    """
    clusters = clusters or [None] * len(baseline)
    arms = [[cluster_values(v, c) for v, c in zip(arm, clusters, strict=True)] for arm in (baseline, model)]
    seeds, generator = arms[0][0].shape[0], np.random.default_rng(seed)
    drawn = generator.integers(0, seeds, size=(draws, seeds))
    cells: list[list[NDArray[np.float64]]] = [[], []]  # of each arm, for each task: (draws, seeds)
    for before, after in zip(*arms, strict=True):
        means = _item_means(np.concatenate([before, after]), generator, draws)
        for arm, values in zip(cells, (means[:, :seeds], means[:, seeds:]), strict=True):
            arm.append(np.take_along_axis(values, drawn, axis=1))
    iqms = [scipy_stats.trim_mean(np.concatenate(arm, axis=1), 0.25, axis=1) for arm in cells]
    plain = [np.mean(arm, axis=(0, 2)) for arm in cells]
    whole = [interquartile_mean([task.mean(axis=1) for task in arm]) for arm in arms]
    gaps = [after - before for before, after in zip(*arms, strict=True)]
    return IqmDifference(
        _widened(whole[0], iqms[0], plain[0], arms[0], confidence),
        _widened(whole[1], iqms[1], plain[1], arms[1], confidence),
        _widened(whole[1] - whole[0], iqms[1] - iqms[0], plain[1] - plain[0], gaps, confidence),
    )


def _widened(
    value: float,
    resampled: NDArray[np.float64],
    plain: NDArray[np.float64],
    tasks: Sequence[NDArray[np.float64]],
    confidence: float,
) -> Estimate:
    """Percentile bounds of `resampled` about `value`, widened as the plain mean over tasks would have to be."""
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]
    means = np.mean([task.mean(axis=1) for task in tasks], axis=0)[:, None]
    share = sum(task.shape[1] for task in tasks) / len(tasks)
    deviations = [(task - task.mean(axis=1, keepdims=True)) * share / task.shape[1] for task in tasks]
    error, df = crossed_error(means + np.concatenate(deviations, axis=1))
    low, high = np.quantile(plain, tails)
    scale = 2 * float(scipy_stats.t.ppf(tails[1], df)) * error / (high - low) if high > low else 1.0
    bounds = value + scale * (np.quantile(resampled, tails) - value)
    return Estimate(value, float(bounds[0]), float(bounds[1]), len(tasks))


def _item_means(values: NDArray[np.float64], generator: np.random.Generator, draws: int) -> NDArray[np.float64]:
    """(draws, seeds): means over items drawn with replacement, the same for every seed; memory is bounded."""
    items = values.shape[1]
    block = max(1, 4_000_000 // items)
    sizes = [min(block, draws - start) for start in range(0, draws, block)]
    shares = np.full(items, 1 / items)
    return np.concatenate([generator.multinomial(items, shares, size=size) @ values.T / items for size in sizes])
