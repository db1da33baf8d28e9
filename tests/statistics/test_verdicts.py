"""The rule for verdicts: by hand, against scipy, as properties of any data, and by simulation of what is known.

Simulations have fixed seeds and so many trials that their bars lie two Monte Carlo errors or more from what is nominal.
`-s` shows what was measured, `python tools/simulation.py` writes more of it into docs/evaluation.md.
"""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from srppo.statistics.intervals import wilson
from srppo.statistics.tests import PValue, holm, holm_levels, sign_flip
from srppo.statistics.verdicts import Contrast, Finding, judge, t_interval

SURE = PValue(0.0, "says yes to everything", 99)


def contrast(gaps: NDArray[np.float64], margin: float | None = 0.05, **more: object) -> Contrast:
    return Contrast(gaps, sign_flip(gaps.mean(axis=1)), margin=margin, **more)  # type: ignore[arg-type]


def test_p_is_the_larger_of_both_tests() -> None:
    """Seeds agree and items do not: t decides. Items agree and five seeds are few: the sign flips do."""
    rng = np.random.default_rng(0)
    few_items = np.array([[1.0, 0.0, 0.5, 0.0]]) + rng.normal(0, 0.01, (10, 4))
    (found,) = judge([contrast(few_items)])
    assert sign_flip(few_items.mean(axis=1)).p == 2**-9 < 0.05 < found.p and found.verdict == "cannot tell"
    few_seeds = 0.3 + rng.normal(0, 0.05, (5, 60))
    (found,) = judge([contrast(few_seeds)])
    assert found.p == 2**-4 and found.difference.low == 0 < t_interval(contrast(few_seeds)).low
    assert found.verdict == "cannot tell" and math.isinf(found.detectable)


def test_one_unit_each_is_scipys_t_test() -> None:
    """Seeds are 1: interval and p are those of a t test over items, and sameness is two one-sided ones."""
    values = np.random.default_rng(1).normal(0.02, 0.1, (1, 40))
    each = Contrast(values, SURE, limits=None, margin=0.05)
    (found,), test = judge([each]), scipy_stats.ttest_1samp(values[0], 0.0)
    assert found.p == pytest.approx(test.pvalue)
    assert t_interval(each)[1:3] == pytest.approx(tuple(test.confidence_interval(0.95)))
    sides = [scipy_stats.ttest_1samp(values[0], bound, alternative=side).pvalue for bound, side in SIDES]
    assert found.p_same == pytest.approx(max(sides))


SIDES = ((-0.05, "greater"), (0.05, "less"))


def test_one_seed_of_a_claim_about_seeds_shows_no_sameness() -> None:
    """As it shows no difference: the exact test is over seeds and there is one. Two given models are another claim."""
    gaps = np.zeros((1, 400))
    gaps[0, :4] = 1, -1, 1, -1
    (seeds,) = judge([Contrast(gaps, sign_flip(gaps.mean(axis=1)), margin=0.05)])
    (models,) = judge([Contrast(gaps, sign_flip(gaps[0]), margin=0.05)])
    assert (seeds.verdict, seeds.p_same, models.verdict) == ("cannot tell", 1.0, "same")


def test_sameness_needs_seeds_too() -> None:
    """Ten seeds that agree within 0.001 of nothing are the same; four cannot show it: 2^-4 > 0.05."""
    gaps = np.random.default_rng(2).normal(0, 0.001, (10, 30))
    many, few = judge([contrast(gaps)])[0], judge([contrast(gaps[:4])])[0]
    assert many.verdict == "same" and many.p_same == 2**-10
    assert few.verdict == "cannot tell" and few.p_same == 2**-4
    assert judge([contrast(gaps, None)])[0].verdict == "cannot tell", "nobody asks"
    small = judge([contrast(gaps + 0.02)])[0]
    assert small.verdict == "better" and small.p_same_holm <= 0.05, "both are known, and the difference is named"


def test_levels_by_hand() -> None:
    """p of 0.01 passes Bonferroni's 0.05 / 3; 0.02 only Holm's second step, 0.05 / 2; 0.06 nothing."""
    assert holm([0.02, 0.06, 0.01]) == pytest.approx([0.04, 0.06, 0.03])
    assert holm_levels([0.02, 0.06, 0.01], 0.05) == pytest.approx([0.05 / 2, 0.05 / 3, 0.05 / 3])
    assert holm_levels([], 0.05) == []


def test_a_later_step_moves_the_near_end_alone() -> None:
    rng = np.random.default_rng(3)
    family = [Contrast(rng.normal(0, 1, (1, 200)), SURE, limits=None) for _ in range(4)]
    wanted = [0.001, 0.002, 0.02, 0.9]  # the third: above 0.05 / 4, below 0.05 / 2
    t_values = scipy_stats.t.isf(np.array(wanted) / 2, 199)
    family = [
        Contrast(each.gaps - each.gaps.mean() + t * scipy_stats.sem(each.gaps[0]), SURE, limits=None)
        for each, t in zip(family, t_values, strict=True)
    ]
    third = judge(family)[2]
    assert third.p == pytest.approx(0.02) and third.verdict == "better" and third.confidence == 1 - 0.05 / 4
    bonferroni, step = t_interval(family[2], 0.05 / 4), t_interval(family[2], 0.05 / 2)
    assert bonferroni.low < 0 < step.low == third.difference.low and third.difference.high == bonferroni.high


def test_what_is_missing_counts() -> None:
    gaps = 0.1 + np.random.default_rng(4).normal(0, 0.1, (10, 50))
    alone, one_of_30 = judge([contrast(gaps)])[0], judge([contrast(gaps)], missing=29)[0]
    assert alone.verdict == "better" and one_of_30.p_holm == 30 * alone.p and one_of_30.verdict == "cannot tell"
    assert one_of_30.difference.low == 0 and judge([]) == []


@pytest.mark.parametrize(("value", "n"), [(0.0, 30), (0.2, 12), (0.2, 30), (1.0, 4), (-0.3, 20), (0.03, 400)])
def test_where_nothing_varies_wilsons_bound_decides(value: float, n: int) -> None:
    """The interval by hand: up to Wilson's bound at 0 of n of the units may have any value within the limits."""
    (found,) = judge([Contrast(np.full((1, n), value), SURE, margin=0.05)])
    share = wilson(0, n).high
    low, high = value - share * (value + 1), value + share * (1 - value)
    assert (found.verdict in ("better", "worse")) == (low > 0 or high < 0) == (found.p <= 0.05)
    if found.verdict == "cannot tell":
        assert found.difference[1:3] == pytest.approx((low, high))
    at = [wilson(0, n, 1 - 2 * p).high for p in (0.049, 0.051)]  # sameness at 5%: Wilson's bound of 90%
    reach = [max(abs(value - share * (value + 1)), abs(value + share * (1 - value))) for share in at]
    assert (found.p_same < 0.049) <= (reach[0] < 0.05) <= (found.p_same < 0.051)
    (unbounded,) = judge([Contrast(np.full((1, n), value), SURE, limits=None)])
    assert math.isnan(unbounded.difference.low) and unbounded.verdict == "cannot tell"


def agree(found: Finding, margin: float) -> bool:
    """Whether verdict and interval say the same, and each what the corrected p does."""
    low, high = found.difference.low, found.difference.high
    known = {"better": low > 0, "worse": high < 0, "same": low <= 0 <= high and -margin <= low <= high <= margin}
    told = known.get(found.verdict, not (low > 0 or high < 0 or found.p_holm <= 0.05 or found.p_same_holm <= 0.05))
    return told and (found.verdict in ("better", "worse")) == (found.p_holm <= 0.05)


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    st.sampled_from([1, 2, 3, 6, 8]),
    st.sampled_from(["normal", "shares", "constant"]),
)
def test_interval_and_verdict_never_disagree(seed: int, comparisons: int, exponent: int, kind: str) -> None:
    """Any number of seeds, items, tasks and comparisons, effects from none to all there is."""
    rng = np.random.default_rng(seed)
    seeds, items = int(rng.integers(1, 12)), int(rng.integers(2, 40))
    family = []
    for _ in range(comparisons):
        gaps = rng.normal(rng.normal(0, 0.2), 10.0**-exponent, (seeds, items)) * rng.integers(0, 2)
        if kind == "shares":
            gaps = rng.integers(-2, 3, (seeds, items)) / 2
        if kind == "constant":
            gaps = np.full((seeds, items), rng.choice([0.0, 0.01, 0.3, 1.0]))
        clusters = list(rng.integers(0, 5, items)) if rng.random() < 0.5 else None
        family.append(contrast(gaps.clip(-1, 1), clusters=clusters))
    for found in judge(family, missing=int(rng.integers(0, 3))):
        assert agree(found, 0.05), found


# ---- by simulation


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
        return importlib.import_module("simulation")


@pytest.mark.parametrize("name", ["items", "tasks", "seeds", "seeds and tasks"])
def test_errors_of_families_and_coverage_over_tasks(simulation: ModuleType, name: str) -> None:
    """Equal arms, 10 seeds, 40 tasks as units: family-wise error at most 0.07, coverage 0.93 to 0.97 of one interval;
    of all intervals of a family together at least 0.93, also where the arms are 0.1 apart."""
    trials, spread = {1: 1500, 6: 600, 12: 600}, simulation.SPREADS[name]
    for comparisons, count in trials.items():
        found = list(simulation.families(count, spread, comparisons))
        wrong = np.mean([simulation.differs(each) for each in found])
        held = np.mean([simulation.all_hold(each, 0.0) for each in found])
        print(f"\n{name}, {comparisons}: error {wrong:.3f}, coverage {held:.3f} (+- {(0.0475 / count) ** 0.5:.3f})")
        assert wrong <= 0.07 and held >= 0.93 and (held <= 0.97 or comparisons > 1)
    apart = [simulation.all_hold(each, 0.1) for each in simulation.families(600, spread, 6, effect=0.1)]
    print(f"{name}, 6 that are 0.1 apart: coverage {np.mean(apart):.3f}")
    assert np.mean(apart) >= 0.93


def test_the_rule_before_erred_in_many_families(simulation: ModuleType) -> None:
    """Sign flips corrected, the interval not: independent items decide, 1 - 0.95^6 of families of six."""
    rng, spread, trials = np.random.default_rng(6), simulation.SPREADS["items"], 300
    found = [simulation.contrasts(simulation.drawn(rng, spread, 6), by_task=False) for _ in range(trials)]
    before = np.mean([any(simulation.old_verdicts(family)) for family in found])
    now = np.mean([simulation.differs(judge(family)) for family in found])
    print(f"\nfamilies of six with a false verdict: before {before:.3f}, now {now:.3f}")
    assert before > 0.13 > 2 * now


def test_models_a_margin_apart_are_rarely_called_the_same(simulation: ModuleType) -> None:
    """At most 5% where they differ by just the margin; and equal ones are found to be, given data enough."""
    spread = simulation.Spread(0.01, 0.05, 0.1, 0.02, 0.1)
    found = simulation.families(1000, spread, 1, effect=0.05, margin=0.05)
    apart = [each.p_same_holm <= 0.05 for (each,) in found]  # "better" or "same"
    equal = [each.verdict == "same" for (each,) in simulation.families(300, spread, 1, margin=0.05)]
    print(f"\ncalled the same: a margin apart {np.mean(apart):.3f}, equal {np.mean(equal):.3f}")
    assert np.mean(apart) <= 0.07 and np.mean(equal) > 0.8
