"""What a sweep says, in sentences: its trends, what it cost, what is missing, what its numbers mean. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from srppo.ablations.analysis import CellResult, SweepResult
from srppo.ablations.trends import Peak, Trend
from srppo.evaluation.comparison import number, signed
from srppo.report.figures import INTERVAL, number_text
from srppo.report.sweep_layout import (
    axis_words,
    cell_label,
    difference_label,
    metric_words,
    primary_metric,
)
from srppo.statistics.intervals import Estimate

NO_RESULT = "no result"
LOST, LEFT = ("failed", "diverged"), ("waiting", "running")
ROUNDING = 1e-12  # of sums of accuracies
LOOSENS_DOWNWARDS = ("beta",)  # axes at whose small values less holds the policy back: lower there is overshot
MOST_REASONS = 3  # shown in a line; the record has all


def count_range(counts: Sequence[int], noun: str) -> str:
    """`10 seeds`, `8 to 10 seeds`."""
    low, high = min(counts), max(counts)
    text = str(low) if low == high else f"{low} to {high}"
    return f"{text} {noun}{'' if high == 1 else 's'}"


def trend_lines(result: SweepResult) -> list[str]:
    """Each slope in words; where one was planned and cannot be fitted, why not."""
    sweep, axis = result.plan.sweep, result.plan.sweep.analysis.trend
    if axis is None:
        return []
    known = {(each.what, each.where) for each in result.trends}
    without = [
        f"{arm.name} ({where})" if where else arm.name
        for where in sweep.lines(axis)
        for arm in sweep.arms
        if (arm.name, where) not in known
    ]
    why = "it takes three values and a seed that has all of them"
    last = [f"No slope along {axis} for {'; '.join(without)}: {why}."] if without else []
    return [trend_sentence(each) for each in result.trends] + last


def trend_sentence(trend: Trend) -> str:
    """`SRPPO (budget epochs) rises by +0.031 [+0.010, +0.052] with each doubling of size`."""
    where = f" ({trend.where})" if trend.where else ""
    return f"{trend.what}{where} {direction(trend)}: {slope_text(trend)} {per(trend)}"


def direction(trend: Trend) -> str:
    """What a slope allows to say: its interval, or its sign where all seeds and items have the same."""
    if trend.same:
        return "is the same at every point"
    low, high = trend.slope.low, trend.slope.high
    if math.isnan(low):
        mean = trend.slope.mean
        return "neither rises nor falls" if abs(mean) <= ROUNDING else "rises" if mean > 0 else "falls"
    return "rises" if low > 0 else "falls" if high < 0 else "shows no clear trend"


def slope_text(trend: Trend) -> str:
    """A slope with its interval; alone where all seeds and items have the same."""
    if not math.isnan(trend.slope.low):
        return signed(trend.slope)
    return "0" if abs(trend.slope.mean) <= ROUNDING else f"{number(trend.slope.mean, '+')} for every seed and item"


def per(trend: Trend) -> str:
    """The unit of a slope."""
    return f"per doubling of {trend.axis}" if trend.scale == "log2" else f"per unit of {trend.axis}"


def peak_lines(result: SweepResult) -> list[str]:
    """Where each arm is highest along the axis, under a line that says what that is worth; none without a peak."""
    if not result.peaks:
        return []
    head = (
        "Exploratory, not in the plan: where each arm's mean is highest (picked after the fact: it flatters), and "
        "how far the ends lie below, paired over seeds and items, 95% intervals, no correction."
    )
    return [head, *(peak_sentence(each) for each in result.peaks)]


def peak_sentence(peak: Peak) -> str:
    """`SRPPO is highest at beta 0.25 (0.710); at 0.125 lower by 0.050 [0.020, 0.080]: overshoots; ...`"""
    where = f" ({peak.where})" if peak.where else ""
    edge = ", an end of the axis" if len(peak.drops) < 2 else ""
    ends = [
        f"at {short_number(value)} lower by {_drop(drop)}: {_ending(peak, value, drop)}" for value, drop in peak.drops
    ]
    top = f"{peak.what}{where} is highest at {peak.axis} {short_number(peak.at)} ({number(peak.height)}){edge}"
    return "; ".join([top, *ends])


def short_number(value: float) -> str:
    """3,541,760 as 3.54M; small numbers as they are."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e5, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.3g}{unit}"
    return f"{value:g}"


def _drop(drop: Estimate) -> str:
    return f"{number(drop.mean)} [{number(drop.low)}, {number(drop.high)}]"


def _ending(peak: Peak, value: float, drop: Estimate) -> str:
    """What the interval of an end's drop below the peak allows to say."""
    if not drop.low > 0:
        return "cannot tell"
    return "overshoots" if peak.axis in LOOSENS_DOWNWARDS and value < peak.at else "falls off"


def missing_lines(result: SweepResult) -> list[str]:
    """Cells that failed or diverged, with reasons; those not finished; planned comparisons without a result."""
    sweep = result.plan.sweep
    lines = [_lost_line(result, cell) for cell in result.cells if set(cell.statuses) & set(LOST)]
    left = [(cell, sum(n for status, n in cell.statuses.items() if status in LEFT)) for cell in result.cells]
    if open_ := [f"{_label(result, cell)} {count}" for cell, count in left if count]:
        lines.append(f"Seeds not finished: {'; '.join(open_)}")
    known = {each.comparison for each in result.differences if each.primary}
    if unknown := [difference_label(sweep, each) for each in sweep.analysis.family if each not in known]:
        lines.append(f"Planned, {NO_RESULT}, since no seed has both cells measured: {'; '.join(unknown)}")
    return lines


def _lost_line(result: SweepResult, cell: CellResult) -> str:
    counts = ", ".join(f"{cell.statuses[status]} {status}" for status in LOST if cell.statuses.get(status))
    reasons = _grouped(cell.reasons)
    if len(reasons) > MOST_REASONS:
        reasons = [*reasons[:MOST_REASONS], f"{len(reasons) - MOST_REASONS} more"]
    return f"{_label(result, cell)}: {counts}" + (f" ({'; '.join(reasons)})" if reasons else "")


def _grouped(reasons: Sequence[str]) -> list[str]:
    """`seed 1: lost`, `seed 2: lost` as `seeds 1, 2: lost`."""
    seeds: dict[str, list[str]] = {}
    for each in reasons:
        seed, _, reason = each.removeprefix("seed ").partition(": ")
        seeds.setdefault(reason, []).append(seed)
    return [f"seed{'s' if len(named) > 1 else ''} {', '.join(named)}: {reason}" for reason, named in seeds.items()]


def _label(result: SweepResult, cell: CellResult) -> str:
    return cell_label(result.plan.sweep, cell.cell.point, cell.cell.arm)


def progress_line(result: SweepResult) -> str:
    """ "" for a whole sweep; else how much of it there is."""
    done = sum(cell.statuses.get("done", 0) for cell in result.cells)
    whole = len(result.cells) * len(result.plan.sweep.seeds)
    lost = {status: sum(cell.statuses.get(status, 0) for cell in result.cells) for status in LOST}
    parts = [f"{count} {status}" for status, count in lost.items() if count]
    if waiting := whole - done - sum(lost.values()):
        parts.append(f"{waiting} not finished; run the same command to go on")
    return (
        f"Incomplete: of {whole} trainings (cells times seeds) {done} are measured, {', '.join(parts)}."
        if parts
        else ""
    )


def interval_line(result: SweepResult) -> str:
    """What the intervals are over."""
    items = sorted(
        {e.n for cell in result.cells for m, e in cell.accuracy.items() if m == primary_metric(result.plan.sweep)}
    )
    counts = [len(cell.seeds) for cell in result.cells if cell.seeds]
    if not items:
        return ""
    sizes = "/".join(map(str, items))
    over = f"{sizes} items and {count_range(counts, 'training seed')}"
    if max(counts) == 1:
        return f"Intervals: 95% over {sizes} items; one training seed, so they say nothing of other seeds."
    return f"Intervals: 95% over {over} resampled crossed ({INTERVAL}). Differences are paired by item and seed."


def family_line(result: SweepResult) -> str:
    """How the verdicts came about."""
    analysis = result.plan.sweep.analysis
    return (
        f"p: {analysis.test}, two-sided; Holm: p after {analysis.correction}'s correction over the "
        f"{len(analysis.family)} comparisons of the plan, those without a result counted in. Better or worse: at most "
        f"{analysis.alpha:g} there, and an interval without 0. Detects: the true difference that 80% of such sweeps "
        "would show, before correction."
    )


def exploratory_line(result: SweepResult) -> str:
    """That there is more to see, and what it is worth; "" where there is not."""
    others = dict.fromkeys(metric_words(each.metric) for each in result.differences if not each.primary)
    return f"Exploratory, not in the plan, uncorrected, on the page only: {'; '.join(others)}." if others else ""


def hours_line(seconds: float, stages: int) -> str:
    """`Spent: 0.12 core-hours: the wall time of 18 finished stages.`"""
    many = f"{stages} finished stage{'' if stages == 1 else 's'}"
    return f"Spent: {number_text(seconds / 3600, '.3g')} core-hours: the wall time of {many}."


def trend_caption(result: SweepResult) -> str:
    """How slopes are fitted; "" where there is none."""
    trend = result.plan.sweep.analysis.trend
    return (
        f"Slopes along {axis_words(trend)}: least squares seed by seed and item by item, 95% intervals, no test and no "
        "correction."
        if trend and result.trends
        else ""
    )
