"""Paired tests, Holm's correction, and the smallest difference a comparison could have shown. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as scipy_stats
from scipy.special import ndtri, stdtrit

EXACT_FLIPS = 20  # up to here all 2^n sign flips are counted


class PValue(NamedTuple):
    """A two-sided p-value, the name of its test, and the independent units (seeds, items, clusters) behind it."""

    p: float
    name: str
    n: int


def sign_flip(differences: ArrayLike, *, seed: int = 0, draws: int = 20_000) -> PValue:
    """Whether paired differences are symmetric about 0: the share of sign flips whose |sum| reaches the observed one.

    Flipping the sign of a unit exchanges the two models on it, so over items this is the paired permutation test, and
    over the clusters' sums of differences the one that exchanges whole clusters. All 2^n flips up to EXACT_FLIPS units
    that are not 0; beyond, `draws` of them, the observed one counted in (Phipson and Smyth 2010), so p is never 0.
    The smallest p of n units is 2^(1-n).
    """
    values = np.asarray(differences, dtype=float)
    moving = np.abs(values[values != 0])
    observed = abs(float(values.sum())) - 1e-9 * float(moving.sum())  # ties count, whatever the order of summing
    if moving.size <= EXACT_FLIPS:
        sums = np.zeros(1)
        for value in moving:
            sums = np.concatenate([sums + value, sums - value])
        return PValue(float(np.mean(np.abs(sums) >= observed)), "exact sign-flip", values.size)
    generator, reached, block = np.random.default_rng(seed), 0, max(1, 2_000_000 // moving.size)
    for start in range(0, draws, block):
        signs = 2.0 * generator.integers(0, 2, size=(min(block, draws - start), moving.size)) - 1
        reached += int(np.count_nonzero(np.abs(signs @ moving) >= observed))
    return PValue((reached + 1) / (draws + 1), f"sign-flip, {draws} draws", values.size)


def mcnemar(baseline: ArrayLike, model: ArrayLike) -> PValue:
    """Exact McNemar test of paired 0/1 scores: a binomial test of the items on which the two differ."""
    before, after = np.asarray(baseline, dtype=float), np.asarray(model, dtype=float)
    won, lost = int(np.sum(after > before)), int(np.sum(after < before))
    p = float(scipy_stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0
    return PValue(p, "exact McNemar", before.size)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) step-down adjusted p-values, in the order given: at most 1, never below the p-value itself."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, (len(p_values) - rank) * p_values[i])
        adjusted[i] = min(1.0, largest)
    return adjusted


def holm_levels(p_values: Sequence[float], alpha: float) -> list[float]:
    """The level that decides each comparison: Bonferroni's alpha / k, or alpha / (k - those before it) where only that
    later step of Holm rejects. A p is at most its level where Holm rejects, and nowhere else."""
    k, levels = len(p_values), [0.0] * len(p_values)
    corrected = holm(p_values)
    for rank, i in enumerate(sorted(range(k), key=lambda i: p_values[i])):
        later = corrected[i] <= alpha < k * p_values[i]
        levels[i] = alpha / (k - rank if later else k)
    return levels


def detectable(error: float, df: float = math.inf, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true difference that a two-sided test finds with this power: (t_{1-alpha/2} + t_power) standard errors.

    error: of the paired difference, in its unit: the SD of the paired differences over sqrt(n), where for 0/1 scores
    that SD is at most the square root of the share of items on which the models differ. Miller 2024 (arXiv 2411.00640,
    section 5), with quantiles of t(df) where the error is estimated.
    """
    quantile = ndtri if math.isinf(df) else lambda q: stdtrit(df, q)
    return float(quantile(1 - alpha / 2) + quantile(power)) * error


def seeds_needed(alpha: float, comparisons: int = 1) -> int:
    """Paired seeds from which an exact sign-flip test can reach alpha as the first of Holm's `comparisons`."""
    return math.ceil(round(1 + math.log2(comparisons / alpha), 9))
