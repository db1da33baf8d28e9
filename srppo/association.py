"""Does a number go with another, or with being right? AUC and rank correlation, prompts as the unit. No torch.

Responses to one prompt are not independent, so intervals resample prompts, each with all its responses.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from srppo.stats import Estimate

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
    statistic: Callable[[Floats, Floats], float], x: Sequence[float], y: Sequence[float], prompts: Sequence[Hashable]
) -> Estimate:
    """A statistic of (x, y) with a 95% percentile bootstrap over prompts; n counts prompts.

    The interval is NaN with fewer than 2 prompts: one prompt says nothing of others.
    """
    a, b = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    rows = _rows_by(prompts)
    generator = np.random.default_rng(0)
    value, draws = statistic(a, b), []
    for _ in range(DRAWS if len(rows) > 1 and np.isfinite(value) else 0):
        chosen = np.concatenate([rows[i] for i in generator.integers(len(rows), size=len(rows))])
        draws.append(statistic(a[chosen], b[chosen]))
    return Estimate(value, *_bounds(draws), len(rows))


def auc_within(score: Sequence[float], right: Sequence[float], prompts: Sequence[Hashable]) -> Estimate:
    """AUC over pairs of responses to one prompt, pooled over prompts: what PPO, which compares within a prompt, sees.

    sum over prompts of (pairs ordered rightly) / sum of pairs; n counts prompts with a right and a wrong response.
    """
    a, b = np.asarray(score, dtype=float), np.asarray(right, dtype=float)
    counts = []
    for chosen in _rows_by(prompts):
        pairs = b[chosen].sum() * (1 - b[chosen]).sum()
        if pairs > 0:
            counts.append((auc(a[chosen], b[chosen]) * pairs, pairs))
    if not counts:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    table, n = np.array(counts), len(counts)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=DRAWS) @ table
    draws = list(drawn[:, 0] / drawn[:, 1]) if n > 1 else []
    return Estimate(float(table[:, 0].sum() / table[:, 1].sum()), *_bounds(draws), n)


def _rows_by(prompts: Sequence[Hashable]) -> list[NDArray[np.int64]]:
    found: dict[Hashable, list[int]] = {}
    for i, prompt in enumerate(prompts):
        found.setdefault(prompt, []).append(i)
    return [np.array(rows) for rows in found.values()]


def _bounds(draws: Sequence[float]) -> tuple[float, float]:
    finite = [draw for draw in draws if np.isfinite(draw)]
    if len(finite) < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(finite, [0.025, 0.975])
    return float(low), float(high)
