"""What a sweep says, from its record alone: cells, tested differences, slopes and peaks. The plan is not changed here.

Differences of the family that sweep.json lists are tested and corrected; all others are marked exploratory. Slopes
along the planned axis are planned as well, peaks are exploratory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srppo.ablations.curves import CurveResult, curves_of
from srppo.ablations.ledger import Ledger, State
from srppo.ablations.plan import Plan
from srppo.ablations.progress import CellProgress, Watch, stage_seconds
from srppo.ablations.spec import Cell, Comparison, Sweep
from srppo.analysis.explain import gain_at_lengths, recorded
from srppo.errors import DataError
from srppo.evaluation.results import DECODINGS, TaskResult, answers_file, means_by_task, own_tests
from srppo.record.json import read_lines
from srppo.record.store import Stage
from srppo.stages.arms import compute_of, figures_of
from srppo.stages.kinds import STARTS
from srppo.statistics.association import rank_agreement
from srppo.statistics.intervals import Estimate, calibrated_interval, cluster_values, interquartile_mean
from srppo.statistics.tests import sign_flip
from srppo.statistics.verdicts import Contrast, Finding, judge, on_these_units, untested

FEWEST_POINTS = 4  # whose order says something
DRAWS = 1000  # only the shape of an interval hangs on them, not its width
Metric = tuple[str, str]  # group of items, decoding
Scores = Mapping[int, Mapping[Metric, TaskResult]]  # by seed
Line = Sequence[tuple[float, Mapping[int, NDArray[np.float64]]]]  # value on the axis, and scores of items by seed


@dataclass(frozen=True)
class CellResult:
    """What came out of a cell.

    accuracy: by group and decoding, with 95% intervals over seeds and items. iqm: interquartile means over the seeds.
    statuses: seeds by how they ended. flops: counted operations of training, parents included, mean over seeds;
    selection_flops: of what chose steps, lengths and the like: answers to development items, and trainings that were
    dropped. figures: means over seeds of what else was measured (length, KL, ...).
    """

    cell: Cell
    seeds: tuple[int, ...]
    statuses: Mapping[str, int]
    accuracy: Mapping[Metric, Estimate]
    iqm: Mapping[Metric, float]
    flops: float | None
    selection_flops: float
    seconds: float | None
    figures: Mapping[str, float]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tested:
    """A paired difference. One that is not `primary` is exploratory: its finding is a plain 95% interval.

    tasks: how many are the units, None where items are; these_tasks: then the interval over items, which speaks of no
    other tasks.
    """

    comparison: Comparison
    metric: Metric
    seeds: tuple[int, ...]
    finding: Finding
    primary: bool
    tasks: int | None
    these_tasks: Estimate | None


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


@dataclass(frozen=True)
class Forecast:
    """How well the closed form's optimum orders the points: Spearman's rho of its mean sampled accuracy and an arm's
    mean accuracy at them.

    metric: of the arm. rho: with a 95% interval from points whose seeds and units, tasks or items, are resampled
    together.
    """

    what: str
    by: str
    metric: Metric
    rho: Estimate
    points: int
    seeds: int
    units: str


@dataclass(frozen=True)
class SweepResult:
    """All of it, and plain rows for CSV and parquet: one a cell, seed, group and decoding, and in `tasks` one of each
    task of that, from which differences between arms can be tested again, also with the seeds of other sweeps."""

    plan: Plan
    cells: tuple[CellResult, ...]
    differences: tuple[Tested, ...]
    trends: tuple[Trend, ...]
    rows: tuple[Mapping[str, Any], ...]
    tasks: tuple[Mapping[str, Any], ...] = ()
    peaks: tuple[Peak, ...] = ()
    curves: tuple[CurveResult, ...] = ()
    forecasts: tuple[Forecast, ...] = ()

    def cell(self, cell: Cell) -> CellResult:
        return next(each for each in self.cells if each.cell == cell)


@dataclass(frozen=True)
class _Measured:
    """A cell at one seed: the stage that stands for it, its test scores, and what `CellResult` says of its cost."""

    stage: Stage
    scores: Mapping[Metric, TaskResult]
    flops: float
    selection_flops: float
    seconds: float | None
    figures: Mapping[str, float]


def analyse(plan: Plan, ledger: Ledger) -> SweepResult:
    """Read the record of a sweep, finished or not."""
    watch = Watch(plan, ledger)
    states = watch.states()
    found = {cell: _measured(plan, ledger, cell, states) for cell in plan.sweep.cells()}
    scores = {cell: {seed: each.scores for seed, each in by_seed.items()} for cell, by_seed in found.items()}
    cells = tuple(_cell(progress, found[progress.cell]) for progress in watch.cells(states))
    rows = tuple(row for cell, by_seed in found.items() for row in _rows(plan.sweep, cell, by_seed))
    trends, peaks = _along_the_axis(plan.sweep, scores)
    stages = {cell: {seed: each.stage for seed, each in by_seed.items()} for cell, by_seed in found.items()}
    metrics = list(dict.fromkeys(metric for cell in cells for metric in cell.accuracy))
    curves = curves_of(plan.sweep, stages, metrics)
    forecasts = tuple(_forecasts(plan.sweep, scores))
    tasks = tuple(row for cell, by_seed in found.items() for row in _task_rows(plan.sweep, cell, by_seed))
    return SweepResult(plan, cells, _differences(plan, scores), trends, rows, tasks, peaks, curves, forecasts)


def _measured(plan: Plan, ledger: Ledger, cell: Cell, states: Mapping[str, State]) -> dict[int, _Measured]:
    """By seed, those that are done."""
    found = {}
    for seed in plan.sweep.seeds:
        key = plan.measured_by[cell, seed]
        if states[key].status == "done" and (stage := ledger.stage(plan.tasks[key])):
            tests = [(d, result) for d in DECODINGS for result in own_tests(stage, "", seed, d)]
            scores = {(str(result.group), decoding): result for decoding, result in tests}
            figures = _figures(stage) | _by_length(plan, ledger, key, stage)
            found[seed] = _Measured(stage, scores, *compute_of(stage), stage_seconds(stage), figures)
    return found


def _by_length(plan: Plan, ledger: Ledger, key: str, stage: Stage) -> dict[str, float]:
    """The gain over the SFT model that the cell started from or stands beside, and what of it length explains."""
    before = [*plan.tasks[key].needs]
    for need in before:  # it grows: nearest first
        task = plan.tasks[need]
        if task.kind in STARTS and (sft := ledger.stage(task)):
            return gain_at_lengths(recorded(sft), recorded(stage), plan.sweep.analysis.group)
        before += task.needs
    return {}


def _cell(progress: CellProgress, found: Mapping[int, _Measured]) -> CellResult:
    scores, measured = {seed: each.scores for seed, each in found.items()}, list(found.values())
    accuracy, iqm = {}, {}
    for metric in dict.fromkeys(metric for each in measured for metric in each.scores):
        values = _matrix([scores], metric)[0]
        accuracy[metric] = calibrated_interval(values, limits=(0.0, 1.0), draws=DRAWS)
        iqm[metric] = interquartile_mean(values.mean(axis=1))
    figures: dict[str, list[float]] = {}
    for key, value in (figure for each in measured for figure in each.figures.items()):
        figures.setdefault(key, []).append(value)
    return CellResult(
        progress.cell,
        tuple(found),
        dict(Counter(progress.statuses.values())),
        accuracy,
        iqm,
        _mean([each.flops for each in measured]),
        _mean([each.selection_flops for each in measured]) or 0.0,
        _mean([each.seconds for each in measured if each.seconds is not None]),
        {key: float(np.mean(values)) for key, values in figures.items()},
        progress.reasons,
    )


def _figures(stage: Stage) -> dict[str, float]:
    """Plain numbers of a stage's result, and what PPO's rollouts were like at the kept step (and at the first)."""
    figures = figures_of(stage)
    plain = {key: value for key, value in figures.items() if isinstance(value, int | float)}
    found = {key: float(value) for key, value in plain.items() if key != "selection_flops"}
    if "ess" in figures:
        found["ess"] = float(figures["ess"]["harmonic"])
    rollouts = [row for row in stage.metrics() if "reward" in row]
    wanted = ("reward", "kl_sft", "kl_base", "length", "ended")
    for row in rollouts[:1]:
        found |= {f"{key}_start": float(row[key]) for key in ("length", "ended") if key in row}
    for row in rollouts:
        if row["step"] == figures.get("kept_step"):
            found |= {key: float(row[key]) for key in wanted if key in row}
    return found


def _rows(sweep: Sweep, cell: Cell, found: Mapping[int, _Measured]) -> list[dict[str, Any]]:
    """Plain rows, one a seed, group and decoding."""
    point, made = sweep.point(cell.point), []
    wanted = (
        "kept_step",
        "steps",
        "held_out_nll",
        "reward",
        "kl_sft",
        "kl_base",
        "length",
        "ended",
        "length_start",
        "ended_start",
        "sampled_tokens",
        "sampled_ended",
        "ess",
        "gain_at_lengths",
    )
    for seed, each in found.items():
        base = {"base": sweep.recipe_of(cell, seed).model.base} if sweep.bases else {}
        common = {"sweep": sweep.name, "point": cell.point, **base, **point.values, "arm": cell.arm, "seed": seed}
        cost = {"flops": each.flops, "selection_flops": each.selection_flops, "seconds": each.seconds}
        figures = {key: value for key, value in each.figures.items() if key in wanted}
        figures = {f"measured_{key}" if key in point.values else key: value for key, value in figures.items()}
        for (group, decoding), result in each.scores.items():
            value = {"group": group, "decoding": decoding, "items": len(result.items)}
            value["accuracy"] = float(np.mean(result.scores))
            made.append({**common, **value, **cost, "stage": each.stage.id, **figures})
    return made


def _task_rows(sweep: Sweep, cell: Cell, found: Mapping[int, _Measured]) -> Iterator[dict[str, Any]]:
    """Plain rows, one a seed, decoding, group and task."""
    common = {"sweep": sweep.name, "point": cell.point, **sweep.point(cell.point).values, "arm": cell.arm}
    for seed, each in found.items():
        for decoding in DECODINGS:
            for row in means_by_task(read_lines(answers_file(each.stage, "kept", decoding))):
                yield {**common, "seed": seed, "decoding": decoding, **row}


# ---- differences


def _differences(plan: Plan, scores: Mapping[Cell, Scores]) -> tuple[Tested, ...]:
    """The family on the primary metric, corrected by Holm; then the same pairs on every other metric, exploratory."""
    family = plan.sweep.analysis.family
    primary = (plan.sweep.analysis.group, plan.sweep.analysis.decoding)
    metrics = dict.fromkeys(m for by_seed in scores.values() for by_metric in by_seed.values() for m in by_metric)
    alpha, margin = plan.sweep.analysis.alpha, plan.sweep.analysis.margin
    found = []
    for metric in metrics:
        usable = {each: pair for each in family if (pair := _paired(scores, each, metric, margin)) is not None}
        contrasts = [contrast for contrast, _ in usable.values()]
        if metric == primary:
            # What failed still counts in the correction: a family does not shrink because some of it is missing.
            findings = judge(contrasts, alpha=alpha, missing=len(family) - len(usable))
        else:
            findings = [untested(contrast) for contrast in contrasts]
        for (each, (contrast, seeds)), finding in zip(usable.items(), findings, strict=True):
            these = on_these_units(contrast, finding.confidence)
            found.append(Tested(each, metric, seeds, finding, metric == primary, contrast.units, these))
    return tuple(sorted(found, key=lambda each: not each.primary))


def _paired(
    scores: Mapping[Cell, Scores], comparison: Comparison, metric: Metric, margin: float
) -> tuple[Contrast, tuple[int, ...]] | None:
    """(differences, seeds) of the seeds that both cells have; None without any."""
    model, baseline = scores[comparison.model], scores[comparison.baseline]
    seeds = tuple(s for s in model if s in baseline and metric in model[s] and metric in baseline[s])
    if not seeds:
        return None
    after, before = _matrix([{s: model[s] for s in seeds}, {s: baseline[s] for s in seeds}], metric)
    gaps = after - before
    exact = sign_flip(gaps.mean(axis=1))
    return Contrast(gaps, exact, model[seeds[0]][metric].clusters, margin=margin), seeds


def _matrix(arms: Sequence[Scores], metric: Metric) -> list[NDArray[np.float64]]:
    """A (seeds, items) array an arm, on the same items. Raises DataError where items differ."""
    results = [[by_metric[metric] for by_metric in arm.values() if metric in by_metric] for arm in arms]
    items = results[0][0].items
    for result in (each for arm in results for each in arm):
        if result.items != items:
            raise DataError(f"{result.path} answers other items than {results[0][0].path}; they cannot be paired")
    return [np.array([result.scores for result in arm], dtype=float) for arm in results]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


# ---- the closed form's forecast


def _forecasts(sweep: Sweep, scores: Mapping[Cell, Scores]) -> Iterator[Forecast]:
    """The optimum's order of the points beside PPO's, sampled and greedy, on the primary group, over the seeds that
    have every point."""
    group, names = sweep.analysis.group, {arm.kind: arm.name for arm in reversed(sweep.arms)}  # the first of a kind
    by, what = names.get("resampled"), names.get("ppo")
    if by is None or what is None or len(sweep.points) < FEWEST_POINTS:
        return
    for decoding in reversed(DECODINGS):
        sides = [(by, (group, "sampled")), (what, (group, decoding))]
        at = [[(scores[Cell(point.name, arm)], metric) for point in sweep.points] for arm, metric in sides]
        known = [{s for s in cell if metric in cell[s]} for side in at for cell, metric in side]
        if not (seeds := sorted(set.intersection(*known))):
            continue
        results = [[[cell[seed][metric] for seed in seeds] for cell, metric in side] for side in at]
        clusters = results[0][0][0].clusters
        means = [np.array([cluster_values([one.scores for one in own], clusters) for own in side]) for side in results]
        units = "items" if clusters is None else "tasks"
        rho = rank_agreement(*means)
        yield Forecast(what, by, (group, decoding), rho, len(sweep.points), len(seeds), units)


# ---- along an axis


def _along_the_axis(sweep: Sweep, scores: Mapping[Cell, Scores]) -> tuple[tuple[Trend, ...], tuple[Peak, ...]]:
    """(slopes of each arm and of each kind of difference, peaks of each arm) along the planned axis, on the primary
    metric, apart for each other axis value.

    Over the seeds that have every point, where there are three; an arm that is the same at all of them has no peak.
    Slopes are least squares, seed by seed and item by item: linear, so their intervals are those of a mean, over tasks
    where there are several.
    """
    analysis, trends, peaks = sweep.analysis, list[Trend](), list[Peak]()
    metric, axis, scale = (analysis.group, analysis.decoding), analysis.trend or "", analysis.scale
    measured = (each[metric] for by_seed in scores.values() for each in by_seed.values() if metric in each)
    clusters = next((each.clusters for each in measured), None)
    for what, where, line in _lines(sweep, scores, metric):
        seeds = [s for s in line[0][1] if all(s in own for _, own in line)] if len({x for x, _ in line}) >= 3 else []
        if not seeds:
            continue
        rows = [(x, np.array([own[seed] for seed in seeds])) for x, own in line]
        same = all(np.array_equal(row, rows[0][1]) for _, row in rows)
        xs = np.array([math.log2(x) if scale == "log2" else x for x, _ in line])
        weights = (xs - xs.mean()) / ((xs - xs.mean()) ** 2).sum()
        slopes = np.asarray(sum(weight * row for weight, (_, row) in zip(weights, rows, strict=True)))
        slope = calibrated_interval(slopes, clusters, draws=DRAWS)
        trends.append(Trend(what, axis, scale, where, metric, slope, len(line), len(seeds), same))
        if same or not any(arm.name == what for arm in sweep.arms):
            continue
        values = dict(sorted(rows, key=lambda row: row[0]))
        at = max(values, key=lambda x: float(values[x].mean()))
        ends = [x for x in (min(values), max(values)) if x != at]
        gaps = {x: values[at] - values[x] for x in ends}
        drops = [(x, calibrated_interval(gaps[x], clusters, limits=(-1.0, 1.0), draws=DRAWS)) for x in ends]
        peaks.append(Peak(what, axis, where, at, float(values[at].mean()), tuple(drops), len(seeds)))
    return tuple(trends), tuple(peaks)


def _lines(sweep: Sweep, scores: Mapping[Cell, Scores], metric: Metric) -> Iterator[tuple[str, str, Line]]:
    """(what, where, values along the planned axis) of each arm, and of each pair that is compared within a point."""
    axis, family = sweep.analysis.trend, sweep.analysis.family
    within = [(each.model.arm, each.baseline.arm) for each in family if each.model.point == each.baseline.point]
    for where, points in sweep.lines(axis).items() if axis is not None else ():
        lines: dict[str, list[tuple[float, dict[int, NDArray[np.float64]]]]] = {}
        for point in points:
            x = float(point.values[axis or ""])
            by_arm = {}
            for arm in sweep.arms:
                seeds = scores[Cell(point.name, arm.name)].items()
                by_arm[arm.name] = {seed: np.array(each[metric].scores) for seed, each in seeds if metric in each}
                lines.setdefault(arm.name, []).append((x, by_arm[arm.name]))
            for model, baseline in dict.fromkeys(within):
                after, before = by_arm[model], by_arm[baseline]
                gap = {seed: after[seed] - before[seed] for seed in after if seed in before}
                lines.setdefault(f"{model} minus {baseline}", []).append((x, gap))
        for what, line in lines.items():
            yield what, where, line
