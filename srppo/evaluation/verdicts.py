"""What a comparison found on one task, and how it is said in plain words. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from srppo.statistics.intervals import Estimate
from srppo.statistics.tests import seeds_needed

Verdict = Literal["better", "worse", "cannot tell"]


@dataclass(frozen=True)
class Difference:
    """A model minus the baseline on one task under one decoding, in the metric's unit.

    difference: with its interval of confidence 1 - alpha; its n counts items. clusters: how many, None without.
    p, p_holm: two-sided, before and after Holm's correction over so many comparisons. detectable: the true difference
    that such data show with 80% power before correction, infinite where the test cannot reach alpha. left_out: items by
    reason.
    """

    baseline: str
    model: str
    task: str
    decoding: str
    metric: str
    group: str | None
    seeds: tuple[int | None, ...]
    clusters: int | None
    baseline_mean: float
    model_mean: float
    difference: Estimate
    p: float
    test: str
    p_holm: float
    comparisons: int
    detectable: float
    verdict: Verdict
    sentence: str
    left_out: Mapping[str, tuple[str, ...]]
    notes: tuple[str, ...]


def sentence(found: Difference, alpha: float) -> str:
    """What a comparison shows, in plain words."""
    where, interval = f"on {found.task} ({found.decoding})", found.difference
    data = f"{interval.n} items" + (f" in {found.clusters} clusters" if found.clusters else "")
    data += f" and {len(found.seeds)} seeds" if len(found.seeds) > 1 else ""
    p = p_text(found.p_holm) + (f" after Holm over {found.comparisons}" if found.comparisons > 1 else "")
    if found.verdict != "cannot tell":
        bounds = sorted([abs(interval.low), abs(interval.high)])
        by = f"{number(abs(interval.mean))} [{number(bounds[0])}, {number(bounds[1])}]"
        return f"{found.model} is {found.verdict} than {found.baseline} {where} by {by}, p {p}; {data}{_one(found)}."
    text = f"cannot tell whether {found.model} differs from {found.baseline} {where}: {signed(interval)}, p {p}; "
    units, kind = (len(found.seeds), "seeds") if len(found.seeds) > 1 else (found.clusters or interval.n, "units")
    if not math.isfinite(found.detectable) and units < seeds_needed(alpha, found.comparisons):
        least = f"{units} {kind} cannot give a p below {p_text(2.0 ** (1 - units))} before correction"
        many = f" with Holm over {found.comparisons}" if found.comparisons > 1 else ""
        return f"{text}{least}, whatever the difference; {seeds_needed(alpha, found.comparisons)} could{many}."
    if found.p_holm <= alpha:
        return f"{text}these items agree, but the interval says that other items may not; {data}{_one(found)}."
    shown = f"could have shown a difference of about {number(found.detectable)} or more"
    return f"{text}{data} {shown}{_one(found)}."


def _one(found: Difference) -> str:
    """The warning of a trained model that stands alone for its method."""
    return " (one training seed; others may differ)" if len(found.seeds) == 1 and found.seeds != (None,) else ""


def number(value: float, sign: str = "") -> str:
    """Three decimals, one from 10 on; a dash where there is no number."""
    return "-" if not math.isfinite(value) else format(value, f"{sign}.3f" if abs(value) < 10 else f"{sign},.1f")


def signed(estimate: Estimate) -> str:
    """`+0.120 [+0.050, +0.190]`."""
    return f"{number(estimate.mean, '+')} [{number(estimate.low, '+')}, {number(estimate.high, '+')}]"


def p_text(p: float) -> str:
    """Three decimals, `<0.001` below."""
    return "<0.001" if p < 0.0005 else f"{p:.3f}"
