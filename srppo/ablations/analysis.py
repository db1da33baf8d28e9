"""What a sweep says, from its record alone: cells, tested differences, trends. No torch; the plan is not changed here.

Differences of the family that sweep.json lists are tested and corrected; all others are marked exploratory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srppo.ablations.ledger import Ledger, State
from srppo.ablations.plan import Plan, Task
from srppo.ablations.progress import Watch, stage_seconds
from srppo.ablations.spec import Cell, Comparison
from srppo.ablations.trends import DRAWS, Metric, Peak, Scores, Trend, peaks, trends
from srppo.errors import DataError
from srppo.evaluation.results import DECODINGS, TaskResult, own_tests
from srppo.record.store import Stage
from srppo.stages.kinds import KINDS
from srppo.statistics.intervals import Estimate, calibrated_interval, crossed_error, interquartile_mean
from srppo.statistics.tests import detectable, holm, seeds_needed, sign_flip


@dataclass(frozen=True)
class CellResult:
    """What came out of a cell.

    accuracy: by group and decoding, with 95% intervals over seeds and items. iqm: interquartile means over the seeds.
    statuses: seeds by how they ended. flops: counted operations of training, parents included, mean over seeds;
    selection_flops: of trainings that were made to choose this one and then dropped. figures: means over seeds of what
    else was measured (length, KL, ...).
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
    """A paired difference. p, p_holm: NaN where exploratory. detectable: at 80% power, before correction."""

    comparison: Comparison
    metric: Metric
    seeds: tuple[int, ...]
    difference: Estimate
    p: float
    p_holm: float
    detectable: float
    verdict: str
    primary: bool


@dataclass(frozen=True)
class SweepResult:
    """All of it, and a plain row a cell, seed, group and decoding for CSV and parquet."""

    plan: Plan
    cells: tuple[CellResult, ...]
    differences: tuple[Tested, ...]
    trends: tuple[Trend, ...]
    rows: tuple[Mapping[str, Any], ...]
    peaks: tuple[Peak, ...] = ()

    def cell(self, cell: Cell) -> CellResult:
        return next(each for each in self.cells if each.cell == cell)


def analyse(plan: Plan, ledger: Ledger) -> SweepResult:
    """Read the record of a sweep, finished or not."""
    states = Watch(plan, ledger).states()
    stages = {cell: _stages(plan, ledger, cell, states) for cell in plan.sweep.cells()}
    scores = {cell: {seed: _scores(chosen, seed) for seed, (chosen, _) in s.items()} for cell, s in stages.items()}
    cells = tuple(_cell(plan, ledger, cell, stages[cell], scores[cell], states) for cell in stages)
    rows = tuple(row for cell in stages for row in _rows(plan, ledger, cell, stages[cell], scores[cell]))
    differences = _differences(plan, scores)
    return SweepResult(plan, cells, differences, trends(plan.sweep, scores), rows, peaks(plan.sweep, scores))


def _stages(
    plan: Plan, ledger: Ledger, cell: Cell, states: Mapping[str, State]
) -> dict[int, tuple[Stage, list[Stage]]]:
    """For each seed that is done: the stage that is measured, and all it was chosen from."""
    found = {}
    for seed in plan.sweep.seeds:
        keys = plan.measured_by[cell, seed]
        if all(states[key].status == "done" for key in keys):
            candidates = [stage for key in keys if (stage := ledger.stage(plan.tasks[key]))]
            candidates = list({stage.id: stage for stage in candidates}.values())
            found[seed] = (_chosen(candidates), candidates)
    return found


def _chosen(stages: Sequence[Stage]) -> Stage:
    """The one that scored best on development items; the shorter at a tie."""

    def rank(stage: Stage) -> tuple[float, float]:
        figures = (stage.result() or {}).get("figures", {})
        score = figures.get("score")
        return (-math.inf if score is None else float(score), -float(figures.get("steps") or 0))

    return max(stages, key=rank)


def _scores(stage: Stage, seed: int) -> dict[Metric, TaskResult]:
    found = {}
    for decoding in DECODINGS:
        for result in own_tests(stage, "", seed, decoding):
            found[str(result.group), decoding] = result
    return found


def _cell(
    plan: Plan,
    ledger: Ledger,
    cell: Cell,
    stages: Mapping[int, tuple[Stage, list[Stage]]],
    scores: Scores,
    states: Mapping[str, State],
) -> CellResult:
    progress = next(each for each in Watch(plan, ledger).cells(states) if each.cell == cell)
    accuracy, iqm = {}, {}
    for metric in dict.fromkeys(metric for by_metric in scores.values() for metric in by_metric):
        values = _matrix([scores], metric)[0]
        accuracy[metric] = calibrated_interval(values, limits=(0.0, 1.0), draws=DRAWS)
        iqm[metric] = interquartile_mean(values.mean(axis=1))
    costs = [_costs(plan, ledger, cell, seed, chosen, all_) for seed, (chosen, all_) in stages.items()]
    return CellResult(
        cell,
        tuple(stages),
        dict(Counter(progress.statuses.values())),
        accuracy,
        iqm,
        _mean([cost[0] for cost in costs]),
        _mean([cost[1] for cost in costs]) or 0.0,
        _mean([cost[2] for cost in costs if cost[2] is not None]),
        _means([_figures(chosen) for chosen, _ in stages.values()]),
        progress.reasons,
    )


def _costs(
    plan: Plan, ledger: Ledger, cell: Cell, seed: int, chosen: Stage, candidates: Sequence[Stage]
) -> tuple[float, float, float | None]:
    """(training operations with parents, operations of candidates dropped, seconds of the chosen stage)."""
    task = plan.tasks[plan.measured_by[cell, seed][0]]
    # What has shares starts from the base, whatever set its budget.
    before = [] if KINDS[task.kind].shares else _ancestors(plan, task)
    flops = sum(_flops(ledger.stage(each)) for each in before) + _flops(chosen)
    dropped = sum(_flops(stage) for stage in candidates if stage.id != chosen.id)
    dropped += float((chosen.result() or {}).get("figures", {}).get("selection_flops") or 0.0)
    return flops, dropped, stage_seconds(chosen)


def _ancestors(plan: Plan, task: Task) -> list[Task]:
    """All that had to be done before a task, each once."""
    found: dict[str, Task] = {}
    for key in task.needs:
        found |= {each.key: each for each in (plan.tasks[key], *_ancestors(plan, plan.tasks[key]))}
    return list(found.values())


def _flops(stage: Stage | None) -> float:
    return float((stage.result() or {}).get("figures", {}).get("flops") or 0.0) if stage else 0.0


def _figures(stage: Stage) -> dict[str, float]:
    """Plain numbers of a stage's result, and of the last row of its metrics that PPO wrote."""
    figures = (stage.result() or {}).get("figures", {})
    found = {
        key: float(value)
        for key, value in figures.items()
        if isinstance(value, int | float) and key != "selection_flops"
    }
    if "ess" in figures:
        found["ess"] = float(figures["ess"]["harmonic"])
    kept = figures.get("kept_step")
    rows = (row for row in reversed(stage.metrics()) if row.get("step") == kept and "reward" in row)
    row: Mapping[str, Any] = next(rows, {})
    return found | {key: float(row[key]) for key in ("reward", "kl_sft", "kl_base", "length") if key in row}


def _rows(
    plan: Plan, ledger: Ledger, cell: Cell, stages: Mapping[int, tuple[Stage, list[Stage]]], scores: Scores
) -> list[dict[str, Any]]:
    point, made = plan.sweep.point(cell.point), []
    for seed, (chosen, candidates) in stages.items():
        flops, dropped, seconds = _costs(plan, ledger, cell, seed, chosen, candidates)
        common = {"sweep": plan.sweep.name, "point": cell.point, **point.values, "arm": cell.arm, "seed": seed}
        cost = {"flops": flops, "selection_flops": dropped, "seconds": seconds, "stage": chosen.id}
        wanted = ("kept_step", "steps", "held_out_nll", "reward", "kl_sft", "kl_base", "length", "ess")
        figures = {key: value for key, value in _figures(chosen).items() if key in wanted}
        figures = {f"measured_{key}" if key in point.values else key: value for key, value in figures.items()}
        for (group, decoding), result in scores[seed].items():
            value = {"group": group, "decoding": decoding, "items": len(result.items)}
            made.append({**common, **value, "accuracy": float(np.mean(result.scores)), **cost, **figures})
    return made


# ---- differences


def _differences(plan: Plan, scores: Mapping[Cell, Scores]) -> tuple[Tested, ...]:
    """The family on the primary metric, corrected by Holm; then the same pairs on every other metric, exploratory."""
    analysis = plan.sweep.analysis
    primary = (analysis.group, analysis.decoding)
    metrics = dict.fromkeys(m for by_seed in scores.values() for by_metric in by_seed.values() for m in by_metric)
    found = []
    pairs = {each: _paired(scores, each, primary) for each in analysis.family}
    usable = {each: pair for each, pair in pairs.items() if pair is not None}
    flips = [sign_flip(gaps.mean(axis=1)).p for gaps, _ in usable.values()]
    # What failed still counts in the correction: a family does not shrink because some of it is missing.
    corrected = holm([*flips, *[1.0] * (len(pairs) - len(usable))])
    for (each, (gaps, seeds)), p, p_holm in zip(usable.items(), flips, corrected, strict=False):
        found.append(_tested(each, primary, gaps, seeds, p, p_holm, analysis.alpha, len(pairs)))
    for metric in metrics:
        for each in analysis.family if metric != primary else ():
            pair = _paired(scores, each, metric)
            if pair is not None:
                found.append(_tested(each, metric, *pair, math.nan, math.nan, analysis.alpha, len(pairs)))
    return tuple(found)


def _tested(
    comparison: Comparison,
    metric: Metric,
    gaps: NDArray[np.float64],
    seeds: tuple[int, ...],
    p: float,
    p_holm: float,
    alpha: float,
    comparisons: int,
) -> Tested:
    interval = calibrated_interval(gaps, limits=(-1.0, 1.0), draws=DRAWS)
    verdict = "cannot tell"
    if p_holm <= alpha and (interval.low > 0 or interval.high < 0):
        verdict = "better" if interval.mean > 0 else "worse"
    error, df = crossed_error(gaps)
    can = len(seeds) >= seeds_needed(alpha, comparisons)
    least = detectable(error, df, alpha=alpha) if can and error > 1e-12 else math.inf
    return Tested(comparison, metric, seeds, interval, p, p_holm, least, verdict, not math.isnan(p))


def _paired(
    scores: Mapping[Cell, Scores], comparison: Comparison, metric: Metric
) -> tuple[NDArray[np.float64], tuple[int, ...]] | None:
    """((seeds, items) differences, seeds) of the seeds that both cells have; None without any."""
    model, baseline = scores[comparison.model], scores[comparison.baseline]
    seeds = tuple(s for s in model if s in baseline and metric in model[s] and metric in baseline[s])
    if not seeds:
        return None
    after, before = _matrix([{s: model[s] for s in seeds}, {s: baseline[s] for s in seeds}], metric)
    return after - before, seeds


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


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for row in rows for key in row)
    return {key: float(np.mean([row[key] for row in rows if key in row])) for key in keys}
