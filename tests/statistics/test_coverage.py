"""How often 95% intervals that users are shown hold the truth, by simulation; `-s` shows what was measured.

With 10 training seeds 93 to 97% (up to Monte Carlo error above, where an interval is wider than it need be); with 3
seeds, and with few items, as printed and bounded here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from scipy import stats as scipy_stats

from srppo.analysis.optimum import share_reached
from srppo.report.answers import SHARE, interval
from srppo.statistics.association import auc, auc_within, over_prompts, rank_correlation
from srppo.statistics.intervals import Estimate, calibrated_interval, iqm_difference, item_interval, ratio_interval


def coverage(name: str, truth: float, found: Iterable[Estimate | None]) -> float:
    """The share of intervals that hold the truth; one that is not given holds nothing."""
    held = [each is not None and each.low <= truth <= each.high for each in found]
    print(f"\ncoverage, {name}: {np.mean(held):.3f} of {len(held)}")
    return float(np.mean(held))


@pytest.mark.parametrize(("count", "least"), [(5, 0.91), (10, 0.92), (20, 0.92), (60, 0.93)])
@pytest.mark.parametrize("spread", [(1.0, 1.0), (0.5, 4.5), (8.0, 8.0)], ids=["flat", "hard", "alike"])
def test_items_of_four_samples(count: int, least: float, spread: tuple[float, float]) -> None:
    """One training seed; items' chances are beta distributed. The percentile bootstrap covered 0.86 of 5 items."""
    rng, trials = np.random.default_rng(20), 400
    chances = rng.beta(*spread, (trials, count))
    shares = rng.binomial(4, chances) / 4
    truth = spread[0] / sum(spread)
    found = [item_interval(row, seed=i, draws=200) for i, row in enumerate(shares)]
    assert coverage(f"{count} items of 4 samples", truth, found) >= least


@pytest.mark.parametrize(("seeds", "low", "high"), [(10, 0.93, 0.97), (3, 0.90, 0.985), (1, 0.0, 0.90)])
def test_accuracies_of_a_run(seeds: int, low: float, high: float) -> None:
    """Items of unequal hardness, seeds with luck of their own, 100 items. One seed: the truth over seeds is not what
    its interval is over, which every table says."""
    rng, trials, found = np.random.default_rng(21), 400, []
    for _ in range(trials):
        chance = scipy_stats.norm.cdf(rng.normal(0, 1, (1, 100)) + rng.normal(0, 0.3, (seeds, 1)))
        found.append(interval((rng.random((seeds, 100)) < chance).astype(float), SHARE, draws=200))
    assert low <= coverage(f"accuracy, {seeds} seeds", 0.5, found) <= high


@pytest.mark.parametrize(("seeds", "low", "high"), [(10, 0.93, 0.97), (3, 0.90, 0.985)])
def test_clustered_items_over_seeds(seeds: int, low: float, high: float) -> None:
    """Thirty clusters of 1 to 8 items with effects of their own, and seeds with theirs."""
    rng, trials, found = np.random.default_rng(22), 400, []
    for i in range(trials):
        names = np.repeat(np.arange(30), rng.integers(1, 9, 30))
        values = (
            rng.normal(0, 0.1, (seeds, 1)) + rng.normal(0, 0.3, 30)[names] + rng.normal(0, 0.3, (seeds, names.size))
        )
        found.append(calibrated_interval(values, names.tolist(), seed=i, draws=200))
    assert low <= coverage(f"30 clusters, {seeds} seeds", 0.0, found) <= high


@pytest.mark.parametrize(("seeds", "low", "high"), [(10, 0.93, 0.98), (3, 0.90, 0.99)])
def test_difference_of_iqms(seeds: int, low: float, high: float) -> None:
    """Five tasks, seeds shared by them all."""
    rng, trials, found = np.random.default_rng(23), 200, []
    for i in range(trials):
        before = [rng.normal(0, 0.3, (seeds, 50)) for _ in range(5)]
        common = rng.normal(0, 0.1, (seeds, 1))
        after = [b + common + rng.normal(0, 0.2, (1, 50)) + rng.normal(0, 0.2, (seeds, 50)) for b in before]
        found.append(iqm_difference(before, after, seed=i, draws=100).difference)
    assert low <= coverage(f"difference of IQMs, {seeds} seeds", 0.0, found) <= high


def responses(rng: np.random.Generator, prompts: int, gap: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(reward, right, prompt) of 4 responses a prompt; rewards share a prompt's level."""
    prompt = np.repeat(np.arange(prompts), 4)
    right = (rng.random(4 * prompts) < rng.beta(1.5, 1.5, prompts)[prompt]).astype(float)
    return rng.normal(0, 0.7, prompts)[prompt] + rng.normal(0, 1, 4 * prompts) + gap * right, right, prompt


Statistic = Callable[[np.ndarray, np.ndarray, np.ndarray], Estimate]
ASSOCIATIONS: dict[str, Statistic] = {
    "AUC": lambda score, right, prompt: over_prompts(auc, list(score), list(right), list(prompt), (0.0, 1.0)),
    "AUC within a prompt": lambda score, right, prompt: auc_within(list(score), list(right), list(prompt)),
    "rank correlation": lambda score, right, prompt: over_prompts(
        rank_correlation, list(score), list(right), list(prompt)
    ),
}


@pytest.mark.parametrize(("prompts", "least"), [(10, 0.90), (40, 0.92)])
@pytest.mark.parametrize("name", ASSOCIATIONS)
def test_whether_a_reward_is_right(name: str, prompts: int, least: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The truth is the statistic of twenty thousand responses."""
    monkeypatch.setattr("srppo.statistics.association.DRAWS", 80)
    rng, statistic = np.random.default_rng(24), ASSOCIATIONS[name]
    score, right, prompt = responses(rng, 5_000, 1.0)
    whole = {"AUC": auc, "rank correlation": rank_correlation}
    truth = whole[name](score, right) if name in whole else statistic(score, right, prompt).mean
    found = [statistic(*responses(rng, prompts, 1.0)) for _ in range(100)]
    assert coverage(f"{name}, {prompts} prompts", truth, found) >= least


def test_few_prompts_have_wider_intervals_than_their_bootstrap() -> None:
    """Five prompts: t(4) and 5/4 of the variance, against the same draws; equal ones give none."""
    score, right, prompt = responses(np.random.default_rng(27), 5, 1.0)
    found = over_prompts(auc, list(score), list(right), list(prompt), (-9.0, 9.0))
    generator, rows = np.random.default_rng(0), [np.flatnonzero(prompt == i) for i in range(5)]
    drawn = [np.concatenate([rows[i] for i in generator.integers(5, size=5)]) for _ in range(1000)]
    low, high = np.nanquantile([auc(score[each], right[each]) for each in drawn], [0.025, 0.975])
    widened = scipy_stats.t.ppf(0.975, 4) / scipy_stats.norm.ppf(0.975) * (5 / 4) ** 0.5
    assert found.high - found.low == pytest.approx(widened * (high - low)) and found.n == 5
    assert np.isnan(over_prompts(auc, [1.0, 2.0] * 4, [0.0, 1.0] * 4, [0, 0, 1, 1, 2, 2, 3, 3]).low)


@pytest.mark.parametrize(("prompts", "least"), [(10, 0.91), (60, 0.93)])
def test_share_of_what_the_objective_allows(prompts: int, least: float) -> None:
    """PPO gains 0.6 of the optimum's gain on average; both vary by prompt and are measured with noise."""
    rng, trials, found = np.random.default_rng(25), 300, []
    for _ in range(trials):
        gain = rng.gamma(4, 0.25, prompts)
        policy = 0.6 * gain + rng.normal(0, 0.3, prompts)
        found.append(share_reached(policy, np.zeros(prompts), gain + rng.normal(0, 0.2, prompts), draws=200))
    assert coverage(f"share reached, {prompts} prompts", 0.6, found) >= least


def test_shares_of_units() -> None:
    """IFEval's instruction level: 20 prompts of 1 to 3 instructions, those of a prompt alike."""
    rng, trials, found = np.random.default_rng(26), 400, []
    for _ in range(trials):
        counts = rng.integers(1, 4, 20)
        right = rng.binomial(counts, rng.beta(2, 1, 20))
        found.append(ratio_interval(right, counts, limits=(0.0, 1.0), draws=200))
    assert coverage("instructions of 20 prompts", 2 / 3, found) >= 0.92
