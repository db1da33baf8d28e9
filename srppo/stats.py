"""Intervals. No torch; every random choice comes from an explicit generator."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
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
    interval = scipy_stats.binomtest(successes, n).proportion_ci(confidence, method="wilson")
    return Estimate(successes / n, float(interval.low), float(interval.high), n)


def item_interval(values_by_item: ArrayLike, *, seed: int = 0, draws: int = 4000, confidence: float = 0.95) -> Estimate:
    """Mean over items with a percentile bootstrap over items; Wilson where every item is 0 or 1.

    `values_by_item`: one number an item, such as the share of its samples that were right (samples of an item are not
    independent; the item is the unit).
    """
    values = np.asarray(values_by_item, dtype=float)
    if values.size == 0 or np.isin(values, (0.0, 1.0)).all():
        return wilson(int(values.sum()), values.size, confidence)
    return crossed_interval(values[None, :], seed=seed, draws=draws, confidence=confidence)


def crossed_interval(
    values_by_seed_item: ArrayLike, *, seed: int = 0, draws: int = 4000, confidence: float = 0.95
) -> Estimate:
    """Mean of a (training seeds, items) array; seeds and items are resampled crossed, one draw of items for all seeds.

    With one seed this is the bootstrap over items alone and says nothing of other seeds. n counts items.
    """
    values = np.asarray(values_by_seed_item, dtype=float)
    seeds, items = values.shape
    generator = np.random.default_rng(seed)
    seed_weights = generator.multinomial(seeds, np.full(seeds, 1 / seeds), size=draws) / seeds
    item_weights = generator.multinomial(items, np.full(items, 1 / items), size=draws) / items
    means = np.einsum("ds,si,di->d", seed_weights, values, item_weights, optimize=True)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Estimate(float(values.mean()), float(low), float(high), items)
