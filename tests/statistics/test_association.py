"""Whether two quantities order the same points alike."""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from srppo.statistics.association import rank_agreement


def test_the_order_of_points_is_spearmans_of_their_means():
    rng = np.random.default_rng(3)
    truth_P = np.array([0.1, 0.2, 0.3, 0.35, 0.6, 0.62])
    one, other = (truth_P[:, None, None] + rng.normal(0, 0.3, (6, 5, 20)) for _ in range(2))
    found = rank_agreement(one, other)
    assert np.isclose(found.mean, scipy_stats.spearmanr(one.mean((1, 2)), other.mean((1, 2))).statistic)
    assert found.n == 6 and -1 <= found.low < found.mean <= found.high <= 1


def test_what_seeds_and_units_share_with_all_points_does_not_blur_their_order():
    """Seeds and units are drawn once for all points: effects that are the same at each leave the order alone."""
    rng = np.random.default_rng(4)
    truth_P = np.arange(5) / 100
    shared = rng.normal(0, 10, (1, 6, 1)) + rng.normal(0, 10, (1, 1, 8))
    found = rank_agreement(truth_P[:, None, None] + shared, truth_P[::-1, None, None] + shared)
    assert np.isclose(found.mean, -1) and np.isnan(found.low), "nothing varies: no interval, rather than one of width 0"


def test_a_quantity_that_is_the_same_at_all_points_has_no_order():
    assert np.isnan(rank_agreement(np.zeros((4, 3, 2)), np.random.default_rng(0).random((4, 3, 2))).mean)


@pytest.mark.parametrize("shape", [(6, 12, 1), (6, 1, 12)], ids=["seeds alone", "units alone"])
def test_both_seeds_and_units_widen_the_interval(shape: tuple[int, int, int]):
    rng = np.random.default_rng(5)
    truth_P = np.arange(6) / 10
    one, other = (truth_P[:, None, None] + rng.normal(0, 0.5, shape) for _ in range(2))
    found = rank_agreement(one, other)
    assert found.high - found.low > 0.2
