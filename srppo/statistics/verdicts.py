"""One rule for "better", "worse", "the same" and "cannot tell", of one paired difference or of a family. No torch.

A difference is shown when both an exact test and a t test say so: p is the larger of the two. The exact one (sign flips
over training seeds) asks nothing of the distribution and speaks of these items; t, with `crossed_error`, speaks of
other items or tasks too, and leans on its degrees of freedom. Holm's correction goes over these p. The interval is what
they leave standing (a test and its confidence set: Lehmann and Romano 2005, section 3.5), so it excludes 0 where, and
only where, the verdict is "better" or "worse".
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, stdtr, stdtrit

from srppo.statistics.intervals import Estimate, cluster_values, constant_bound, crossed_error, within
from srppo.statistics.tests import PValue, detectable, holm, holm_levels, seeds_needed, sign_flip

MARGIN = 0.05  # of accuracy: below it, two models are as good as the same, unless a plan says otherwise
Verdict = Literal["better", "worse", "same", "cannot tell"]


@dataclass(frozen=True)
class Contrast:
    """One comparison to be judged.

    gaps: model minus baseline, (training seeds, items). exact: the two-sided exact test that they are 0; its n is what
    its smallest p depends on. clusters: the unit of each item (its task, its passage); None where items are the units.
    limits: what a difference cannot exceed, None where there is nothing such. margin: differences below it are as good
    as none; None: whether they are is not asked.
    """

    gaps: NDArray[np.float64]
    exact: PValue
    clusters: Sequence[Hashable] | None = None
    limits: tuple[float, float] | None = (-1.0, 1.0)
    margin: float | None = None

    @property
    def units(self) -> int | None:
        """How many clusters are the units; None where items are."""
        return None if self.clusters is None else len(set(self.clusters))


class Finding(NamedTuple):
    """What is said of a contrast in its family.

    difference: the interval that the verdict is read from, of `confidence`; n counts items. p: that there is no
    difference, two-sided; p_same: that it is not below the margin (1 where there is no margin); each before and after
    Holm's correction. detectable: the true difference that is shown with 80% power as the first of its family, infinite
    where the exact test cannot show any. Where a difference is shown and is below the margin, the verdict names it.
    """

    difference: Estimate
    confidence: float
    p: float
    p_holm: float
    p_same: float
    p_same_holm: float
    detectable: float
    verdict: Verdict


def judge(family: Sequence[Contrast], *, alpha: float = 0.05, missing: int = 0) -> list[Finding]:
    """A finding for each contrast; `missing` more are counted in the correction, as if they had p = 1.

    Both questions, whether there is a difference and whether it is below the margin (two one-sided tests, Schuirmann
    1987), are corrected by Holm over the family. Intervals are simultaneous, of confidence 1 - alpha / k (Bonferroni),
    and then changed where the tests say more or less: drawn to 0 where the exact test does not exclude it; begun at the
    bound of Holm's later step where that alone shows a difference; cut at the margin where the difference is below it.
    The far end stays Bonferroni's: that of a later step would hold too rarely (`tools/simulation.py`).
    """
    errors = [_Error.of(each) for each in family]
    padding = [1.0] * missing
    p_values = [max(each.exact.p, error.p(0.0)) for each, error in zip(family, errors, strict=True)] + padding
    p_same = [_p_same(each, error) for each, error in zip(family, errors, strict=True)] + padding
    p_holm, levels, same_holm = holm(p_values), holm_levels(p_values, alpha), holm(p_same)
    level, found = alpha / len(p_values) if p_values else alpha, []
    for i, (each, error) in enumerate(zip(family, errors, strict=True)):
        least = error.detectable(level) if each.exact.n >= seeds_needed(alpha, len(p_values)) else math.inf
        verdict: Verdict = "same" if same_holm[i] <= alpha else "cannot tell"
        low, high = error.interval(level)[1:3]
        if p_holm[i] <= alpha:
            verdict, decided = "better" if error.mean > 0 else "worse", error.interval(levels[i])
            low, high = (decided.low, high) if error.mean > 0 else (low, decided.high)
        elif each.exact.p > level:
            low, high = min(low, 0.0), max(high, 0.0)
        interval = Estimate(error.mean, low, high, error.items)
        if same_holm[i] <= alpha and each.margin is not None:
            interval = within(interval, (-each.margin, each.margin))
        found.append(Finding(interval, 1 - level, p_values[i], p_holm[i], p_same[i], same_holm[i], least, verdict))
    return found


def t_interval(contrast: Contrast, level: float = 0.05) -> Estimate:
    """The interval of confidence 1 - level by t and the crossed error alone, whatever the exact test says."""
    return _Error.of(contrast).interval(level)


def on_these_units(contrast: Contrast, confidence: float) -> Estimate | None:
    """The narrower interval over items, which speaks of these clusters alone; None where items are the units."""
    return None if contrast.clusters is None else t_interval(replace(contrast, clusters=None), 1 - confidence)


def untested(contrast: Contrast) -> Finding:
    """A plain 95% interval, neither tested nor corrected."""
    unknown = math.nan
    return Finding(t_interval(contrast), 0.95, unknown, unknown, unknown, unknown, unknown, "cannot tell")


def _p_same(contrast: Contrast, error: _Error) -> float:
    """The larger p of two one-sided tests, that the difference is not above -margin and that it is not below +margin;
    each the larger of t's and, with several seeds, the exact sign flips'."""
    margin, by_seed = contrast.margin, contrast.gaps.mean(axis=1)
    if margin is None or contrast.exact.n < 2:  # one seed, of a claim about seeds: nothing is shown, sameness neither
        return 1.0
    shifted = (by_seed + margin, margin - by_seed) if len(by_seed) > 1 else ()
    flips = [sign_flip(each).p / 2 if each.sum() > 0 else 1.0 for each in shifted]  # half of them, by symmetry
    return max(*flips, error.p_above(-margin), error.p_below(margin))


@dataclass(frozen=True)
class _Error:
    """A mean over (seeds, units), with its error; where nothing varies, Wilson's bound on units that may differ."""

    mean: float
    error: float
    df: float
    units: int
    items: int
    limits: tuple[float, float] | None

    @classmethod
    def of(cls, contrast: Contrast) -> _Error:
        units = cluster_values(contrast.gaps, contrast.clusters)
        return cls(float(units.mean()), *crossed_error(units), units.shape[1], contrast.gaps.shape[1], contrast.limits)

    @property
    def varies(self) -> bool:
        return self.error > 1e-12

    def interval(self, level: float) -> Estimate:
        """Two-sided, of confidence 1 - level; NaN bounds where nothing varies and there are no limits."""
        if self.varies:
            half = -float(stdtrit(self.df, level / 2)) * self.error
            return within(Estimate(self.mean, self.mean - half, self.mean + half, self.items), self.limits)
        low, high = self.limits or (math.nan, math.nan)
        share = constant_bound(self.units, 1 - level)
        return Estimate(
            self.mean, self.mean - share * (self.mean - low), self.mean + share * (high - self.mean), self.items
        )

    def p(self, value: float) -> float:
        """Two-sided, that the true mean is `value`: the level at which the interval begins to exclude it."""
        return min(1.0, 2 * min(self.p_above(value), self.p_below(value)))

    def p_above(self, value: float) -> float:
        """One-sided, that the true mean is not above `value`."""
        if self.varies:
            return float(stdtr(self.df, (value - self.mean) / self.error))
        return self._p_constant(self.mean - value, value - self.limits[0]) if self.limits else 1.0

    def p_below(self, value: float) -> float:
        """One-sided, that the true mean is not below `value`."""
        if self.varies:
            return float(stdtr(self.df, (self.mean - value) / self.error))
        return self._p_constant(value - self.mean, self.limits[1] - value) if self.limits else 1.0

    def _p_constant(self, inside: float, outside: float) -> float:
        """The level at which Wilson's bound at 0 of n, z^2 / (n + z^2), is inside / (inside + outside)."""
        if inside <= 0:
            return 1.0
        return float(ndtr(-math.sqrt(self.units * inside / outside))) if outside > 0 else 0.0

    def detectable(self, level: float) -> float:
        """At 80% power; where no unit differs, as if as many did as Wilson's bound still allows."""
        if self.varies:
            return detectable(self.error, self.df, alpha=level)
        share = constant_bound(self.units)
        return detectable(math.sqrt(share / self.units), self.df, alpha=level) if self.limits else math.nan
