"""What accuracy does along an ordered axis: slopes, as planned, and peaks, which are exploratory. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from srppo.ablations.spec import Cell, Sweep
from srppo.evaluation.results import TaskResult
from srppo.statistics.intervals import Estimate, calibrated_interval

DRAWS = 1000  # only the shape of an interval hangs on them, not its width
Metric = tuple[str, str]  # group of items, decoding
Scores = Mapping[int, Mapping[Metric, TaskResult]]  # by seed
Line = Sequence[tuple[float, Mapping[int, NDArray[np.float64]]]]  # value on the axis, and scores of items by seed


@dataclass(frozen=True)
class Trend:
    """Slope of an arm's accuracy, or of a difference of arms, along an axis; per doubling, or per unit of the axis.

    same: every seed and item has one value at all points. Bounds are NaN where all seeds and items have one slope.
    """

    what: str
    axis: str
    scale: str
    where: str
    metric: Metric
    slope: Estimate
    points: int
    seeds: int
    same: bool = False


@dataclass(frozen=True)
class Peak:
    """Where along an axis an arm's mean accuracy is highest, and by how much each end of the axis lies below.

    at, height: value and mean of the highest point. drops: (value, peak minus this end, paired by seed and item), the
    lower end first; an end that is the peak itself is left out.
    """

    what: str
    axis: str
    where: str
    at: float
    height: float
    drops: tuple[tuple[float, Estimate], ...]
    seeds: int


def trends(sweep: Sweep, scores: Mapping[Cell, Scores]) -> tuple[Trend, ...]:
    """Slopes along the planned axis, of each arm and of each kind of difference, apart for each other axis value."""
    analysis = sweep.analysis
    metric, found = (analysis.group, analysis.decoding), []
    for what, where, line in _lines(sweep, scores, _pairs(sweep)):
        slope = _slope(line, analysis.scale)
        if slope is not None:
            estimate, seeds, same = slope
            axis = analysis.trend or ""
            found.append(Trend(what, axis, analysis.scale, where, metric, estimate, len(line), seeds, same))
    return tuple(found)


def peaks(sweep: Sweep, scores: Mapping[Cell, Scores]) -> tuple[Peak, ...]:
    """Of each arm that is not the same at every point, along the planned axis."""
    found = [_peak(sweep, *line) for line in _lines(sweep, scores, ())]
    return tuple(each for each in found if each is not None)


def _pairs(sweep: Sweep) -> tuple[tuple[str, str], ...]:
    """(model, baseline) of the comparisons within a point."""
    within = [each for each in sweep.analysis.family if each.model.point == each.baseline.point]
    return tuple(dict.fromkeys((each.model.arm, each.baseline.arm) for each in within))


def _lines(
    sweep: Sweep, scores: Mapping[Cell, Scores], pairs: Sequence[tuple[str, str]]
) -> Iterator[tuple[str, str, Line]]:
    """(what, where, values along the planned axis) of each arm and pair of arms, on the primary metric."""
    axis, metric = sweep.analysis.trend, (sweep.analysis.group, sweep.analysis.decoding)
    for where, points in sweep.lines(axis).items() if axis is not None else ():
        lines: dict[str, list[tuple[float, dict[int, NDArray[np.float64]]]]] = {}
        for point in points:
            x = float(point.values[axis or ""])
            by_arm = {a.name: _by_seed(scores[Cell(point.name, a.name)], metric) for a in sweep.arms}
            for name, own in by_arm.items():
                lines.setdefault(name, []).append((x, own))
            for model, baseline in pairs:
                after, before = by_arm[model], by_arm[baseline]
                gap = {seed: after[seed] - before[seed] for seed in after if seed in before}
                lines.setdefault(f"{model} minus {baseline}", []).append((x, gap))
        for what, line in lines.items():
            yield what, where, line


def _by_seed(scores: Scores, metric: Metric) -> dict[int, NDArray[np.float64]]:
    return {seed: np.array(found[metric].scores) for seed, found in scores.items() if metric in found}


def _seeds(line: Line) -> list[int]:
    """Seeds that have every point; none where there are not three values on the axis."""
    return [s for s in line[0][1] if all(s in own for _, own in line)] if len({x for x, _ in line}) >= 3 else []


def _same(line: Line, seeds: Sequence[int]) -> bool:
    return all(np.array_equal(own[seed], line[0][1][seed]) for _, own in line for seed in seeds)


def _slope(line: Line, scale: str) -> tuple[Estimate, int, bool] | None:
    """(slope, seeds, whether nothing differs between points). None without three points and a seed that has them all.

    Least squares over the points, seed by seed and item by item: linear, so its interval is that of a mean.
    """
    xs = np.array([math.log2(x) if scale == "log2" else x for x, _ in line])
    seeds = _seeds(line)
    if not seeds:
        return None
    weights = (xs - xs.mean()) / ((xs - xs.mean()) ** 2).sum()
    values = np.array([sum(w * own[seed] for w, (_, own) in zip(weights, line, strict=True)) for seed in seeds])
    return calibrated_interval(values, draws=DRAWS), len(seeds), _same(line, seeds)


def _peak(sweep: Sweep, what: str, where: str, line: Line) -> Peak | None:
    """None without three points and a seed that has them all, and where all points are the same."""
    seeds = _seeds(line)
    if not seeds or _same(line, seeds):
        return None
    values = {x: np.array([own[seed] for seed in seeds]) for x, own in sorted(line, key=lambda each: each[0])}
    at = max(values, key=lambda x: float(values[x].mean()))
    ends = [x for x in (min(values), max(values)) if x != at]
    drops = [(x, calibrated_interval(values[at] - values[x], limits=(-1.0, 1.0), draws=DRAWS)) for x in ends]
    return Peak(what, sweep.analysis.trend or "", where, at, float(values[at].mean()), tuple(drops), len(seeds))
