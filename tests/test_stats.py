"""Intervals against closed forms and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from srppo.stats import crossed_interval, item_interval, wilson


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (3, 10), (10, 10), (120, 300)])
def test_wilson_is_the_published_formula(successes: int, n: int) -> None:
    """Wilson 1927: centre and half-width with z = 1.959964, written out."""
    z, p = 1.959963984540054, successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    estimate = wilson(successes, n)
    assert estimate.mean == p and estimate.n == n
    assert estimate.low == pytest.approx(max(centre - half, 0), abs=1e-9)
    assert estimate.high == pytest.approx(min(centre + half, 1), abs=1e-9)


def test_items_without_variance_keep_a_width() -> None:
    assert item_interval([1.0] * 20) == wilson(20, 20)
    assert item_interval([0.0, 1.0, 1.0]) == wilson(2, 3)
    assert math.isnan(item_interval([]).mean)


def test_one_seed_is_the_bootstrap_over_items() -> None:
    values = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=200)
    estimate = item_interval(values)
    error = values.std() / math.sqrt(len(values))
    assert estimate.high - estimate.low == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert estimate == item_interval(values), "the same draws every time"


def test_seeds_widen_the_interval() -> None:
    rng = np.random.default_rng(1)
    items = rng.random(300) < 0.5
    same = np.tile(items, (6, 1)).astype(float)
    seeds = same + rng.normal(0, 0.3, size=(6, 1))
    narrow, wide = crossed_interval(same), crossed_interval(seeds)
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_crossed_interval_covers() -> None:
    """Nominal 95% with 10 seeds and 100 items, both with their own effects: about 93 to 97% of 300 simulations."""
    rng, covered, trials = np.random.default_rng(2), 0, 300
    for trial in range(trials):
        values = 0.5 + rng.normal(0, 0.1, (10, 1)) + rng.normal(0, 0.3, (1, 100)) + rng.normal(0, 0.3, (10, 100))
        estimate = crossed_interval(values, seed=trial, draws=500)
        covered += estimate.low <= 0.5 <= estimate.high
    assert 0.90 <= covered / trials <= 0.985, covered / trials
