"""The two figures of a sweep: accuracy of every arm, and the paired differences of the plan. PNG and SVG, no torch."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from srppo.ablations.analysis import Metric, SweepResult
from srppo.ablations.spec import Ablation, Cell
from srppo.console import rate
from srppo.report.figures import GROUP_WORDS
from srppo.report.plots import arm_colours, save_figure
from srppo.report.style import GRID, INK, PAPER
from srppo.report.sweep_layout import (
    axis_words,
    is_log,
    line_axis,
    metric_words,
    metrics_of,
    pair_words,
    panels,
    point_label,
    primary_metric,
    tested_by_pair,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from srppo.statistics.intervals import Estimate

LABEL_CHARACTERS = 30
MOST_GROUPS = 3  # panels side by side; the tables hold all groups
Estimates = Mapping[tuple[str, str], "Estimate"]  # by point and arm


def sweep_plot(result: SweepResult, path: Path) -> list[Path]:
    """Accuracy of each arm on each group under the primary decoding, 95% intervals: lines with bands along an axis of
    numbers, a row of panels for each value of the other axes; else dots. Returns the files, or nothing to show."""
    decoding = primary_metric(result.plan.sweep)[1]
    metrics = [metric for metric in metrics_of(result) if metric[1] == decoding][:MOST_GROUPS]
    if not metrics:
        return []
    axis = line_axis(result.plan.sweep)
    return _lines(result, axis, metrics, path) if axis else _dots(result, metrics, path)


def _estimates(result: SweepResult, metric: Metric) -> dict[tuple[str, str], Estimate]:
    return {(c.cell.point, c.cell.arm): c.accuracy[metric] for c in result.cells if metric in c.accuracy}


def _lines(result: SweepResult, axis: str, metrics: Sequence[Metric], path: Path) -> list[Path]:
    sweep = result.plan.sweep
    rows, colours = panels(sweep, axis), arm_colours([arm.name for arm in sweep.arms])

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(rows), len(metrics), sharex=True, sharey="col", squeeze=False)
        for row, (where, points) in enumerate(rows.items()):
            for column, metric in enumerate(metrics):
                panel = grid[row][column]
                _bands(panel, axis, points, _estimates(result, metric), colours)
                title = GROUP_WORDS.get(metric[0], metric[0])
                panel.set_title(f"{title}, {where}" if where else title, fontsize=9.5)
        for panel in grid[0]:
            _clamp(panel, 0.0, 1.0, upright=True)
        _numeric_axis(grid[0][0], result, axis)
        figure.supxlabel(axis_words(axis), fontsize=10)
        figure.supylabel(f"accuracy, {metrics[0][1]}", fontsize=10)
        _legend(figure, colours)

    return save_figure(draw, path, height=1.2 + 2.5 * len(rows))


def _bands(panel: Axes, axis: str, points: Sequence[Ablation], known: Estimates, colours: Mapping[str, str]) -> None:
    for arm, colour in colours.items():
        shown = [(float(p.values[axis]), known[p.name, arm]) for p in points if (p.name, arm) in known]
        xs, estimates = [x for x, _ in shown], [estimate for _, estimate in shown]
        panel.fill_between(xs, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.16, lw=0)
        panel.plot(xs, [e.mean for e in estimates], "o-", ms=4, lw=1.6, color=colour)
        if len(shown) == 1:  # a band of one point cannot be seen
            _whisker(panel, xs[0], estimates[0], colour, upright=True)


def _numeric_axis(panel: Axes, result: SweepResult, axis: str) -> None:
    """The values of the sweep as ticks, even by their logarithm where they span much."""
    values = sorted({float(point.values[axis]) for point in result.plan.sweep.points})
    if is_log(result.plan.sweep, axis):
        panel.set_xscale("log", base=2)
    panel.set_xticks(values, [f"{value:g}" if value < 1e5 else rate(value) for value in values])
    panel.minorticks_off()


def _dots(result: SweepResult, metrics: Sequence[Metric], path: Path) -> list[Path]:
    """A line a cell: points in groups, in each a dot with whiskers an arm."""
    sweep = result.plan.sweep
    colours = arm_colours([arm.name for arm in sweep.arms])
    several = len(sweep.points) > 1
    cells, names = sweep.cells(), [point_label(sweep, point.name) for point in sweep.points]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(1, len(metrics), sharex=True, sharey=True, squeeze=False)[0]
        for panel, metric in zip(grid, metrics, strict=True):
            known = _estimates(result, metric)
            for y, cell in enumerate(cells):
                if (cell.point, cell.arm) in known:
                    _whisker(panel, y, known[cell.point, cell.arm], colours[cell.arm])
            for border in range(len(sweep.arms), len(cells), len(sweep.arms)):
                panel.axhline(border - 0.5, color=GRID, lw=0.8)
            panel.set_title(GROUP_WORDS.get(metric[0], metric[0]))
            panel.grid(axis="y", visible=False)
            panel.tick_params(axis="y", length=0)
        _clamp(grid[0], 0.0, 1.0)
        middle = (len(sweep.arms) - 1) / 2
        at = [i * len(sweep.arms) + middle for i in range(len(names))] if several else range(len(cells))
        grid[0].set_yticks(list(at), [_short(text) for text in (names if several else [cell.arm for cell in cells])])
        grid[0].set_ylim(len(cells) - 0.5, -0.5)
        figure.supxlabel(f"accuracy, {metrics[0][1]}, 95% interval", fontsize=10)
        if several:
            _legend(figure, colours)

    return save_figure(draw, path, height=1.3 + 0.3 * len(cells))


def _whisker(panel: Axes, at: float, estimate: Estimate, colour: str, *, upright: bool = False) -> None:
    """A dot with its interval; nothing without a number."""
    if not math.isfinite(estimate.mean):
        return
    reach = [[max(estimate.mean - estimate.low, 0.0)], [max(estimate.high - estimate.mean, 0.0)]]
    if upright:
        panel.errorbar(at, estimate.mean, yerr=reach, fmt="o", ms=4, color=colour)
    else:
        panel.errorbar(estimate.mean, at, xerr=reach, fmt="o", ms=4.5, color=colour)


def _legend(figure: Figure, colours: Mapping[str, str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, marker="o", ms=4, lw=1.6) for colour in colours.values()]
    figure.legend(handles, list(colours), loc="outside upper left", ncols=min(len(colours), 5), handlelength=1.4)


def differences_plot(result: SweepResult, path: Path) -> list[Path]:
    """Every planned difference on the primary metric with its interval against zero, a panel a pair; filled where the
    plan's test calls it better or worse. Returns the files, or nothing to show."""
    metric = primary_metric(result.plan.sweep)
    pairs = tested_by_pair(result, metric)
    if not any(found for rows in pairs.values() for _, _, found in rows):
        return []
    colours = arm_colours([arm.name for arm in result.plan.sweep.arms])
    most = [len(rows) for rows in pairs.values()]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(
            len(pairs), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": [n + 0.8 for n in most]}
        )[:, 0]
        for panel, (pair, rows) in zip(grid, pairs.items(), strict=True):
            panel.axvline(0.0, color=INK, lw=1)
            for y, (_, comparison, found) in enumerate(rows):
                if found is None:
                    panel.text(0.0, y, " no result", va="center", fontsize=8.5)
                    continue
                colour = colours[_telling(pair, comparison.model, comparison.baseline)]
                _whisker(panel, y, found.difference, colour)
                if found.verdict == "cannot tell":
                    panel.plot(found.difference.mean, y, "o", ms=4.5, color=colour, mfc=PAPER, zorder=3)
            panel.set_yticks(range(len(rows)), [_short(row) for row, _, _ in rows])
            panel.set_ylim(len(rows) - 0.5, -0.5)
            panel.set_title(pair_words(pair))
            panel.grid(axis="y", visible=False)
            panel.tick_params(axis="y", length=0)
        _clamp(grid[0], -1.0, 1.0)
        figure.supxlabel(f"difference of accuracy, {metric_words(metric)}, 95% interval", fontsize=10)

    return save_figure(draw, path, height=0.9 + 0.5 * len(pairs) + 0.3 * sum(most))


def _telling(pair: tuple[str, str], model: Cell, baseline: Cell) -> str:
    """The arm that gives a row its colour: the one that rows differ by, else the model."""
    return model.arm if pair[1] else baseline.arm


def _short(text: str) -> str:
    """In two lines at most."""
    return "\n".join(textwrap.wrap(text, LABEL_CHARACTERS, max_lines=2, placeholder="…"))


def _clamp(panel: Axes, low: float, high: float, *, upright: bool = False) -> None:
    """Let no axis run beyond what a value can be, however wide the intervals of few seeds are."""
    start, end = panel.get_ylim() if upright else panel.get_xlim()
    margin = 0.02 * (high - low)
    bounds = max(start, low - margin), min(end, high + margin)
    panel.set_ylim(*bounds) if upright else panel.set_xlim(*bounds)
