"""Intervals and tests against closed forms, other libraries and by simulation; `-s` shows what was measured."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from srppo.statistics.intervals import (
    calibrated_interval,
    cluster_values,
    crossed_error,
    crossed_interval,
    interquartile_mean,
    iqm_difference,
    item_interval,
    ratio_interval,
    wilson,
)
from srppo.statistics.tests import detectable, holm, mcnemar, seeds_needed, sign_flip

# Standard deviations of (training seeds, items, the noise of a cell): what varies in paired differences.
EFFECTS = (-0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2)  # of seven tasks
REGIMES = {"seeds": (0.1, 0.05, 0.1), "both": (0.1, 0.3, 0.3), "items": (0.01, 0.3, 0.3), "noise": (0.0, 0.0, 0.3)}


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


def test_items_that_agree_are_no_certainty() -> None:
    """Thirty items at one half: up to Wilson's bound at 0 of 30 of them may differ; without limits nothing is known."""
    share = wilson(0, 30).high
    assert item_interval([0.5] * 30)[:3] == pytest.approx((0.5, 0.5 - share / 2, 0.5 + share / 2))
    assert item_interval([0.5])[:3] == pytest.approx((0.5, 0.5 - wilson(0, 1).high / 2, 0.5 + wilson(0, 1).high / 2))
    assert math.isnan(item_interval([0.5] * 30, limits=None).low)
    assert math.isnan(item_interval([0.0, 0.0], limits=None).low), "rewards of 0 are no failures to count"


def test_one_seed_is_of_t_width_over_items() -> None:
    values = np.random.default_rng(0).choice([0.0, 0.5, 1.0], size=20)
    estimate = item_interval(values)
    half = scipy_stats.t.ppf(0.975, 19) * scipy_stats.sem(values)
    assert estimate.high - estimate.low == pytest.approx(2 * half)
    assert estimate == item_interval(values), "the same draws every time"


def test_ratios_are_those_of_sums() -> None:
    """By hand: 6 of 9; with equal denominators the mean of the numerators."""
    found = ratio_interval([1.0, 5.0], [2.0, 7.0])
    assert found.mean == pytest.approx(6 / 9) and found.n == 2
    values = np.random.default_rng(1).random(30)
    assert ratio_interval(3 * values, np.full(30, 3.0))[:3] == pytest.approx(item_interval(values)[:3])
    assert ratio_interval([], []).n == 0 and ratio_interval([2.0, 3.0], [2.0, 3.0], limits=(0, 1)).high == 1


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


def crossed(rng: np.random.Generator, seeds: int, items: int, spread: tuple[float, float, float]) -> np.ndarray:
    """Differences whose true mean is 0."""
    a, b, c = spread
    return rng.normal(0, a, (seeds, 1)) + rng.normal(0, b, (1, items)) + rng.normal(0, c, (seeds, items))


@pytest.mark.parametrize("regime", REGIMES)
def test_calibrated_interval_covers(regime: str) -> None:
    """93 to 97% of 700 simulations of 10 seeds and 60 items; what 3 seeds and the plain bootstrap cover is printed.

    Where nothing but noise varies, both effects' variances are estimated as at least 0, so a little more is covered.
    """
    rng, shares = np.random.default_rng(3), {}
    for make, seeds, trials in (
        (calibrated_interval, 10, 700),
        (calibrated_interval, 3, 400),
        (crossed_interval, 10, 200),
    ):
        found = [make(crossed(rng, seeds, 60, REGIMES[regime]), seed=t, draws=200) for t in range(trials)]
        shares[make.__name__, seeds] = np.mean([each.low <= 0 <= each.high for each in found])
    print(f"\ncoverage, {regime}: " + ", ".join(f"{name} {n} seeds {c:.3f}" for (name, n), c in shares.items()))
    assert 0.93 <= shares["calibrated_interval", 10] <= (0.985 if regime == "noise" else 0.97)
    assert 0.91 <= shares["calibrated_interval", 3] <= 0.99


def test_calibrated_interval_covers_right_and_wrong() -> None:
    """0/1 scores of two arms that share hard and easy items; each seed has its own luck: 10 seeds, 100 items."""
    rng, trials, covered = np.random.default_rng(4), 500, 0
    for trial in range(trials):
        hardness, luck = rng.normal(0, 1, (1, 100)), rng.normal(0, 0.4, (2, 10, 1))
        scores = rng.random((2, 10, 100)) < scipy_stats.norm.cdf(hardness + luck)
        gaps = scores[1].astype(float) - scores[0]
        found = calibrated_interval(gaps, seed=trial, draws=200)
        covered += found.low <= 0 <= found.high
    print(f"\ncoverage, 0/1 scores: 10 seeds {covered / trials:.3f}")
    assert 0.93 <= covered / trials <= 0.97


def test_clusters_are_the_unit() -> None:
    """40 clusters of unequal size with a common effect: ignoring them covers far too little."""
    rng, trials, covered = np.random.default_rng(5), 500, np.zeros(2)
    for trial in range(trials):
        names = np.repeat(np.arange(40), rng.integers(1, 9, 40))
        values = (rng.normal(0, 0.3, 40)[names] + rng.normal(0, 0.3, names.size))[None]
        for i, clusters in enumerate((names.tolist(), None)):
            found = calibrated_interval(values, clusters, seed=trial, draws=200)
            covered[i] += found.low <= 0 <= found.high
    print(f"\ncoverage, 40 clusters: {covered[0] / trials:.3f}; as if there were none {covered[1] / trials:.3f}")
    assert 0.92 <= covered[0] / trials <= 0.97 and covered[1] / trials < 0.85


def test_cluster_values_are_the_ratio_estimator() -> None:
    """By hand: items 1, 2, 6 (mean 3) in clusters x = {1, 2}, y = {6}: 3 + 2/3 (-3) and 3 + 2/3 (3)."""
    np.testing.assert_allclose(cluster_values([[1.0, 2.0, 6.0]], ["x", "x", "y"]), [[1.0, 5.0]])
    values = np.random.default_rng(6).random((3, 20))
    np.testing.assert_allclose(cluster_values(values, list(range(20))), values)
    copies = np.repeat(values, 4, axis=1)
    assert calibrated_interval(copies, np.repeat(range(20), 4).tolist())[:3] == pytest.approx(
        calibrated_interval(values)[:3]
    ), "four copies of an item say no more than one"


def test_crossed_error_by_hand() -> None:
    """Squares between seeds 13.5 / 1, items 13 / 2, rest 3 / 2: variance (13.5 + 6.5 - 1.5) / 6."""
    error, df = crossed_error([[1.0, 2.0, 3.0], [3.0, 4.0, 8.0]])
    assert error == pytest.approx(math.sqrt(18.5 / 6))
    assert df == pytest.approx(18.5**2 / (13.5**2 + 6.5**2 / 2 + 1.5**2 / 2))
    values = np.random.default_rng(7).random((1, 30))
    assert crossed_error(values) == pytest.approx((scipy_stats.sem(values[0]), 29))


def test_one_seed_is_a_t_interval_for_well_behaved_items() -> None:
    values = np.random.default_rng(8).normal(0.1, 1, (1, 50))
    low, high = scipy_stats.ttest_1samp(values[0], 0).confidence_interval(0.95)
    found = calibrated_interval(values)
    assert found.high - found.low == pytest.approx(high - low)
    assert found.low == pytest.approx(low, abs=0.04)


def test_nothing_varies() -> None:
    """Wilson's bound on the share of items that may still differ; without limits nothing can be said."""
    bound = wilson(0, 50).high
    assert calibrated_interval(np.zeros((1, 50)), limits=(-1, 1))[:3] == pytest.approx((0, -bound, bound))
    assert calibrated_interval(np.ones((3, 50)), limits=(-1, 1))[:3] == pytest.approx((1, 1 - 2 * bound, 1))
    assert math.isnan(calibrated_interval(np.zeros((1, 50))).low)


@pytest.mark.parametrize("n", [2, 3, 5, 9, 13])
def test_sign_flip_is_scipys_paired_permutation_test(n: int) -> None:
    rng = np.random.default_rng(n)
    before, after = rng.integers(0, 4, n) / 3, rng.integers(0, 5, n) / 3  # with ties and zeros
    expected = scipy_stats.permutation_test(
        (after, before), lambda x, y: np.mean(x - y), permutation_type="samples", n_resamples=np.inf
    )
    assert sign_flip(after - before).p == pytest.approx(min(1.0, expected.pvalue))
    assert sign_flip(before - after).p == sign_flip(after - before).p, "two-sided"
    assert sign_flip(after - before).n == n


def test_sign_flip_edges() -> None:
    assert sign_flip([0.0] * 30).p == 1.0
    assert sign_flip([0.1] * 6).p == 2**-5 < 0.05 < sign_flip([0.1] * 5).p
    values = np.random.default_rng(9).normal(0.25, 1, 60)
    many = sign_flip(values, draws=200_000)
    assert many.p == pytest.approx(scipy_stats.ttest_1samp(values, 0).pvalue, rel=0.1), "60 units: as a t test"
    assert sign_flip(values) == sign_flip(values) and "draws" in many.name
    assert sign_flip(np.ones(40)).p == pytest.approx(1 / 20_001), "never 0"
    assert sign_flip(np.r_[values[:15], np.zeros(100)]).p == sign_flip(values[:15]).p, "zeros need no flips"


def test_mcnemar_golden() -> None:
    """statsmodels 0.15.0, mcnemar([[101, 59], [33, 121]], exact=True).pvalue; by hand, 1 against 4: 2 (1 + 5) / 2^5."""
    before = np.repeat([1, 1, 0, 0], [101, 59, 33, 121])
    after = np.repeat([1, 0, 1, 0], [101, 59, 33, 121])
    assert mcnemar(before, after).p == pytest.approx(0.008780930806975229, rel=1e-12)
    assert mcnemar([0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 0, 1]).p == pytest.approx(12 / 32)
    assert mcnemar([1, 0], [1, 0]).p == 1.0


def test_holm_golden() -> None:
    """statsmodels 0.15.0, multipletests(p, method="holm")[1]."""
    assert holm([0.01, 0.04, 0.03, 0.005, 0.5, 0.03]) == pytest.approx([0.05, 0.12, 0.12, 0.03, 0.5, 0.12])
    assert holm([]) == [] and holm([0.7, 0.8]) == [1.0, 1.0]


def test_detectable_differences() -> None:
    """Models that differ on 30% of items; then statsmodels 0.15.0, TTestPower().solve_power(nobs=300, power=0.8)."""
    assert detectable(math.sqrt(0.3 / 541)) == pytest.approx(0.066, abs=0.0005), "IFEval: 6.6 points"
    assert detectable(math.sqrt(0.3 / 100)) == pytest.approx(0.153, abs=0.001)
    assert detectable(1 / math.sqrt(300), 299) == pytest.approx(0.16227121662192304, rel=1e-3)
    rng = np.random.default_rng(10)
    found = np.abs(rng.normal(detectable(0.02), 0.02, 20_000)) > 1.959964 * 0.02
    assert found.mean() == pytest.approx(0.8, abs=0.01)


def test_seeds_needed() -> None:
    for comparisons in range(1, 70):
        needed = next(n for n in range(1, 40) if 2.0 ** (1 - n) <= 0.05 / comparisons)
        assert seeds_needed(0.05, comparisons) == needed
    assert seeds_needed(0.05) == 6 and seeds_needed(0.05, 25) == 10 and seeds_needed(0.25) == 3


def at_most_nominal(name: str, p_values: list[float]) -> None:
    """At most 5% of p-values are at most 0.05, up to three Monte Carlo errors."""
    share = np.mean(np.asarray(p_values) <= 0.05)
    print(f"\ntype I error, {name}: {share:.4f} of {len(p_values)}")
    assert share <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / len(p_values))


def test_type_one_errors() -> None:
    rng, trials = np.random.default_rng(11), 2000
    at_most_nominal("sign-flip, 6 seeds", [sign_flip(rng.normal(0, 1, 6)).p for _ in range(trials)])
    at_most_nominal("sign-flip, 10 seeds", [sign_flip(rng.standard_t(2, 10)).p for _ in range(trials)])
    pairs = [rng.random((2, 80)) < rng.random(80) for _ in range(trials)]
    at_most_nominal("McNemar, 80 items", [mcnemar(*pair).p for pair in pairs])
    gaps = [(rng.integers(0, 5, 40) - rng.integers(0, 5, 40)) / 4 for _ in range(trials)]
    at_most_nominal("permutation, 40 items", [sign_flip(each, draws=999).p for each in gaps])
    names = np.repeat(np.arange(15), 6)
    clustered = [rng.normal(0, 1, 15)[names] + rng.normal(0, 1, names.size) for _ in range(trials)]
    at_most_nominal("permutation, 15 clusters", [sign_flip(np.bincount(names, each)).p for each in clustered])
    alone = np.mean([sign_flip(each, draws=199).p <= 0.05 for each in clustered[:300]])
    assert alone > 0.2, "which is why clusters flip together"
    at_most_nominal("Holm, any of 8", [min(holm(each.tolist())) for each in rng.random((trials, 8))])


def test_interquartile_means() -> None:
    assert interquartile_mean(range(1, 9)) == 4.5, "3, 4, 5, 6 are left"
    assert interquartile_mean([[0.0, 1.0], [2.0, 9.0]]) == 1.5
    values = [np.random.default_rng(i).random((4, 30)) for i in range(5)]
    same = iqm_difference(values, values)
    assert same.difference[:3] == (0.0, 0.0, 0.0) and same.baseline == same.model and same.model.n == 5
    alike = [np.repeat(np.arange(4.0)[:, None] + i, 9, axis=1) for i in range(5)]  # only seeds differ
    gap = iqm_difference([0 * v for v in alike], alike)
    assert gap.difference.high - gap.difference.low == pytest.approx(2 * 3.18 * scipy_stats.sem(range(4)), rel=0.3)
    assert same.model.mean == pytest.approx(scipy_stats.trim_mean([v.mean(axis=1) for v in values], 0.25, axis=None))


@pytest.mark.parametrize("seeds", [1, 10])
def test_iqm_difference_covers(seeds: int) -> None:
    """Seven tasks with effects symmetric about 0, seeds shared by the tasks: at least 93% of 200 simulations."""
    rng, trials, covered = np.random.default_rng(12), 200, 0
    for trial in range(trials):
        before = [rng.normal(0, 0.3, (seeds, 60)) for _ in range(7)]
        common = rng.normal(0, 0.1 if seeds > 1 else 0, (seeds, 1))
        after = [b + common + e + crossed(rng, seeds, 60, (0, 0.2, 0.2)) for b, e in zip(before, EFFECTS, strict=True)]
        found = iqm_difference(before, after, seed=trial, draws=200).difference
        covered += found.low <= 0 <= found.high
    print(f"\ncoverage, difference of IQMs: {seeds} seeds {covered / trials:.3f}")
    assert covered / trials >= 0.93
