"""Does a number go with another, or with being right? AUC and rank correlation, prompts as the unit. No torch.

Responses to one prompt are not independent, so intervals are over prompts, each with all its responses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats as scipy_stats
from scipy.stats import rankdata

from srppo.statistics.intervals import Estimate, ratio_interval, within

DRAWS = 1000
Floats = NDArray[np.float64]


def auc(score: Floats, right: Floats) -> float:
    """P(score of a right response > score of a wrong one), ties count half (Mann-Whitney); NaN where one is lacking."""
    positives = right.sum()
    pairs = positives * (len(right) - positives)
    if pairs == 0:
        return float("nan")
    return float((rankdata(score)[right > 0].sum() - positives * (positives + 1) / 2) / pairs)


def rank_correlation(x: Floats, y: Floats) -> float:
    """Spearman's rho with mean ranks at ties; NaN where either is constant."""
    a, b = rankdata(x), rankdata(y)
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else float("nan")


def over_prompts(
    statistic: Callable[[Floats, Floats], float],
    x: Sequence[float],
    y: Sequence[float],
    prompts: Sequence[Hashable],
    limits: tuple[float, float] = (-1.0, 1.0),
) -> Estimate:
    """A statistic of (x, y) with a 95% interval over prompts; n counts prompts.

    A percentile bootstrap, widened about the value as t(n - 1) is wider than what few units resampled vary by, and cut
    to `limits`. NaN bounds with fewer than 2 prompts, and where resampling changes nothing: that is no certainty.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    rows = _rows_by(prompts)
    generator = np.random.default_rng(0)
    value, n = statistic(a, b), len(rows)
    drawn = []
    for _ in range(DRAWS if n > 1 and np.isfinite(value) else 0):
        chosen = np.concatenate([rows[i] for i in generator.integers(n, size=n)])
        drawn.append(statistic(a[chosen], b[chosen]))
    finite = np.array([draw for draw in drawn if np.isfinite(draw)])
    if len(finite) < 2 or np.ptp(finite) < 1e-12:
        return Estimate(value, float("nan"), float("nan"), n)
    scale = scipy_stats.t.ppf(0.975, n - 1) / scipy_stats.norm.ppf(0.975) * np.sqrt(n / (n - 1))
    low, high = value + scale * (np.quantile(finite, [0.025, 0.975]) - value)
    return within(Estimate(value, float(low), float(high), n), limits)


def rank_agreement(one_PSU: Floats, other_PSU: Floats) -> Estimate:
    """Spearman's rank correlation, over P points, of two quantities' means over S seeds and U units, PSU in any unit of
    their own; n counts points. NaN where the means of either are the same at all points.

    The 95% interval is of these points: a percentile bootstrap whose seeds and units are drawn crossed, the same for
    both quantities and all points. NaN bounds where nothing varies.
    """
    generator = np.random.default_rng(0)
    _, seeds, units = one_PSU.shape

    def rho(by_seed_S: Floats, by_unit_U: Floats) -> float:
        return rank_correlation(*(np.einsum("psu,s,u->p", each, by_seed_S, by_unit_U) for each in (one_PSU, other_PSU)))

    value = rho(np.full(seeds, 1 / seeds), np.full(units, 1 / units))
    weights = (generator.multinomial(n, np.full(n, 1 / n), size=DRAWS) / n for n in (seeds, units))
    drawn = np.array([rho(*pair) for pair in zip(*weights, strict=True)])
    finite = drawn[np.isfinite(drawn)]
    if len(finite) < 2 or np.ptp(finite) < 1e-12:
        return Estimate(value, float("nan"), float("nan"), len(one_PSU))
    low, high = np.quantile(finite, [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(one_PSU))


def auc_within(score: Sequence[float], right: Sequence[float], prompts: Sequence[Hashable]) -> Estimate:
    """AUC over pairs of responses to one prompt, pooled over prompts: what PPO, which compares within a prompt, sees.

    sum over prompts of (pairs ordered rightly) / sum of pairs; n counts prompts with a right and a wrong response.
    """
    a, b = np.asarray(score, dtype=float), np.asarray(right, dtype=float)
    pairs, ordered = [], []
    for chosen in _rows_by(prompts):
        count = b[chosen].sum() * (1 - b[chosen]).sum()
        if count > 0:
            pairs.append(count)
            ordered.append(auc(a[chosen], b[chosen]) * count)
    return ratio_interval(ordered, pairs, limits=(0.0, 1.0), draws=DRAWS)


def _rows_by(prompts: Sequence[Hashable]) -> list[NDArray[np.int64]]:
    found: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(i)
    return [np.array(rows) for rows in found.values()]
