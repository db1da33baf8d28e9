"""Arms compared at equal distance from the SFT model: accuracy over KL, read off each arm's curve at the same KLs.

Equal beta is not equal distance, since rewards have scales of their own. An arm's curve, at one seed, goes through the
start (KL 0) and every policy that was measured (eval.curve) at any point of the sweep, in the order of their KL. Along
one training the KL need not rise, and two points may lead to one distance by different ways: where a policy came from
is not asked, only how far it is. Between two neighbours accuracy is taken to be linear in KL, item by item, so a
difference of two curves is paired by seed and item as that of two policies is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from srppo.ablations.spec import Cell, Curves, Sweep
from srppo.errors import DataError
from srppo.evaluation.results import TaskResult, own_tests
from srppo.record.json import read_lines
from srppo.record.store import Stage
from srppo.statistics.curves import interpolated
from srppo.statistics.intervals import Estimate, calibrated_interval
from srppo.statistics.tests import sign_flip
from srppo.statistics.verdicts import Contrast, Finding, judge, on_these_units, untested

GRID = 12  # places at which a curve is drawn
Metric = tuple[str, str]  # group of items, decoding
Stages = Mapping[Cell, Mapping[int, Stage]]  # those that are done, by seed


@dataclass(frozen=True)
class Measured:
    """A policy on the test items of one group: the point of the sweep and the step that made it; KL to the SFT model,
    nats a response; accuracy by item; mean length of an answer, tokens."""

    made: tuple[str, int]
    kl: float
    result: TaskResult
    length: float


@dataclass(frozen=True)
class Line:
    """An arm's curve, as far as every seed reaches: mean accuracy with 95% intervals over seeds, on these items, and
    mean length, at rising KLs. points: means over seeds of (KL, accuracy, length) of each policy that was measured."""

    arm: str
    kls: tuple[float, ...]
    accuracy: tuple[Estimate, ...]
    length: tuple[float, ...]
    points: tuple[tuple[float, float, float], ...]
    seeds: int


@dataclass(frozen=True)
class Matched:
    """The model minus another arm at one KL. reach: the KL that the other reaches at every seed. finding None: it does
    not reach that far, or is not measured. tasks, these_tasks: as in `analysis.Tested`."""

    other: str
    share: float
    kl: float
    reach: float
    seeds: tuple[int, ...]
    finding: Finding | None
    tasks: int | None = None
    these_tasks: Estimate | None = None


@dataclass(frozen=True)
class CurveResult:
    """The curves on one metric. primary: the planned one, whose matched differences are tested; the others' are not."""

    metric: Metric
    primary: bool
    reach: float
    lines: tuple[Line, ...]
    matched: tuple[Matched, ...]


def curves_of(sweep: Sweep, stages: Stages, metrics: Sequence[Metric]) -> tuple[CurveResult, ...]:
    """The curves on each metric, the primary one first; nothing where the plan has none, or none is measured yet."""
    plan, primary = sweep.analysis.curves, (sweep.analysis.group, sweep.analysis.decoding)
    if plan is None:
        return ()
    found = []
    for metric in sorted(metrics, key=lambda metric: metric != primary):
        curves = {arm: _curve(sweep, plan, stages, arm, metric) for arm in (plan.model, *plan.others)}
        if curves[plan.model]:
            found.append(_compared(sweep, plan, curves, metric, metric == primary))
    return tuple(found)


Curve = Mapping[int, Sequence[Measured]]  # by seed, in any order


def _curve(sweep: Sweep, plan: Curves, stages: Stages, arm: str, metric: Metric) -> Curve:
    """The start and all that was measured of an arm, at the seeds that have both."""
    group = metric[0]
    found: dict[int, list[Measured]] = {}
    for point in sweep.points:
        starts = stages[Cell(point.name, plan.start)]
        for seed, stage in stages[Cell(point.name, arm)].items():
            for row in (stage.result() or {})["figures"].get("curve", ()) if seed in starts else ():
                if seed not in found:
                    found[seed] = [_measured(("start", 0), starts[seed], "kept", 0.0, seed, metric)]
                made, kl = (point.name, int(row["step"])), float(row["kl"][group])
                found[seed].append(_measured(made, stage, f"step-{made[1]}", kl, seed, metric))
                if (last := found[seed][-1].result).items != (first := found[seed][0].result).items:
                    raise DataError(f"{last.path} answers other items than {first.path}; they cannot be paired")
    return found


def _measured(made: tuple[str, int], stage: Stage, which: str, kl: float, seed: int, metric: Metric) -> Measured:
    group, decoding = metric
    result = next(each for each in own_tests(stage, "", seed, decoding, which) if each.group == group)
    rows = read_lines(result.path / "samples.jsonl")
    length = float(np.mean([np.mean(row["tokens"]) for row in rows if row["group"] == group]))
    return Measured(made, kl, result, length)


def _compared(sweep: Sweep, plan: Curves, curves: Mapping[str, Curve], metric: Metric, primary: bool) -> CurveResult:
    """Every planned comparison at every planned share, and the lines to be drawn."""
    reach = _reach(curves[plan.model])
    matched = [
        _matched(curves[plan.model], curves[other], other, share, share * reach, sweep.analysis.margin)
        for share in plan.shares
        for other in plan.others
    ]
    contrasts = [contrast for _, contrast in matched if contrast is not None]
    # What is out of reach still counts in the correction: a family does not shrink because some of it is missing.
    findings = iter(
        judge(contrasts, alpha=sweep.analysis.alpha, missing=len(matched) - len(contrasts))
        if primary
        else [untested(contrast) for contrast in contrasts]
    )
    told = tuple(_told(each, contrast, next(findings)) if contrast else each for each, contrast in matched)
    lines = tuple(_line(arm, curve) for arm, curve in curves.items() if curve)
    return CurveResult(metric, primary, reach, lines, told)


def _reach(curve: Curve) -> float:
    """The KL that is reached at every seed."""
    return min((max(each.kl for each in points) for points in curve.values()), default=0.0)


def _matched(
    model: Curve, other: Curve, name: str, share: float, kl: float, margin: float
) -> tuple[Matched, Contrast | None]:
    seeds = tuple(seed for seed in model if seed in other)
    found = Matched(name, share, kl, _reach(other), seeds, None)
    pairs = [(_accuracy(model[seed], kl), _accuracy(other[seed], kl)) for seed in seeds]
    gaps = [after - before for after, before in pairs if after is not None and before is not None]
    if not gaps or len(gaps) < len(seeds):  # seeds that happen to reach so far are no sample of the seeds
        return found, None
    gaps_SI = np.array(gaps)
    clusters = model[seeds[0]][0].result.clusters
    return found, Contrast(gaps_SI, sign_flip(gaps_SI.mean(axis=1)), clusters, margin=margin)


def _accuracy(points: Sequence[Measured], kl: float) -> NDArray[np.float64] | None:
    """By item, at a KL; None beyond the last point."""
    return interpolated([each.kl for each in points], [each.result.scores for each in points], kl)


def _told(each: Matched, contrast: Contrast, finding: Finding) -> Matched:
    these = on_these_units(contrast, finding.confidence)
    return replace(each, finding=finding, tasks=contrast.units, these_tasks=these)


def _line(arm: str, curve: Curve) -> Line:
    kls = np.linspace(0.0, _reach(curve), GRID)
    accuracy, length = [], []
    for kl in kls:
        values_SI = np.array([_accuracy(points, kl) for points in curve.values()])
        accuracy.append(calibrated_interval(values_SI.mean(axis=1, keepdims=True), draws=200))
        lengths = [interpolated([p.kl for p in points], [p.length for p in points], kl) for points in curve.values()]
        length.append(float(np.mean(np.array(lengths, dtype=float))))
    policies: dict[tuple[str, int], list[Measured]] = {}
    for each in (each for points in curve.values() for each in points):
        policies.setdefault(each.made, []).append(each)
    means = [
        (
            float(np.mean([p.kl for p in of])),
            float(np.mean([p.result.scores for p in of])),
            float(np.mean([p.length for p in of])),
        )
        for of in policies.values()
    ]
    return Line(arm, tuple(kls.tolist()), tuple(accuracy), tuple(length), tuple(means), len(curve))
