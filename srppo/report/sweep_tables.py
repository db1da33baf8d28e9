"""The tables of a sweep as plain texts, the same for terminal, page and LaTeX. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from srppo.ablations.analysis import CellResult, Metric, SweepResult, Tested
from srppo.ablations.spec import Cell
from srppo.evaluation.comparison import number, p_text, signed
from srppo.report.figures import GROUP_WORDS, estimate_text, number_text, teraflops
from srppo.report.sweep_layout import (
    cell_label,
    label_head,
    metric_words,
    metrics_of,
    pair_words,
    point_label,
    primary_metric,
    reference_arm,
    tested_by_pair,
)
from srppo.report.sweep_words import NO_RESULT, direction, per, slope_text
from srppo.statistics.intervals import Estimate

Table = tuple[list[str], list[list[str]]]
FIGURES: tuple[tuple[str, str, str], ...] = (
    ("kept_step", "kept step", ".1f"),
    ("steps", "of steps", ".1f"),
    ("score", "dev score", ".3f"),
    ("held_out_nll", "held-out NLL", ".3f"),
    ("reward", "reward", ".3f"),
    ("kl_sft", "KL to SFT", ".3f"),
    ("kl_base", "KL to base", ".3f"),
    ("length", "rollout length", ".1f"),
    ("ess", "ESS", ".1f"),
    ("inference_times", "cost of an answer, x", ".1f"),
    ("greedy_tokens", "greedy length", ".1f"),
    ("sampled_tokens", "sampled length", ".1f"),
    ("greedy_ended", "greedy ended", ".0%"),
    ("sampled_ended", "sampled ended", ".0%"),
)
"""What else was measured of a cell: key, head, format."""


def seeds_text(result: SweepResult, cell: CellResult) -> str:
    """`8/10`: seeds behind the figures, of those planned."""
    return f"{len(cell.seeds)}/{len(result.plan.sweep.seeds)}"


def length_of(cell: CellResult, decoding: str) -> float | None:
    """Tokens of an answer to a test item."""
    return cell.figures.get(f"{decoding}_tokens")


def cells_table(result: SweepResult) -> Table:
    """A row a cell on the primary metric, with what failed and what it cost."""
    metric = primary_metric(result.plan.sweep)
    head = [_head(result), metric_words(metric), "IQM", "seeds", "failed", "diverged", "TFLOPs", "length"]
    rows = []
    for cell in result.cells:
        iqm = cell.iqm.get(metric)
        figures = [estimate_text(cell.accuracy.get(metric)), number_text(iqm, ".2f"), seeds_text(result, cell)]
        counts = [str(cell.statuses.get(status, 0)) for status in ("failed", "diverged")]
        cost = [teraflops(cell.flops if cell.seeds else None), number_text(length_of(cell, metric[1]))]
        rows.append([_label(result, cell), *figures, *counts, *cost])
    return head, rows


def _head(result: SweepResult) -> str:
    return f"{label_head(result.plan.sweep)}: arm" if len(result.plan.sweep.points) > 1 else "arm"


def _label(result: SweepResult, cell: CellResult) -> str:
    return cell_label(result.plan.sweep, cell.cell.point, cell.cell.arm)


def metrics_table(result: SweepResult, decoding: str) -> Table:
    """Accuracy of every cell on each group of items under one decoding."""
    metrics = [metric for metric in metrics_of(result) if metric[1] == decoding]
    head = [_head(result), *(GROUP_WORDS.get(group, group) for group, _ in metrics)]
    return head, [
        [_label(result, cell), *(estimate_text(cell.accuracy.get(metric)) for metric in metrics)]
        for cell in result.cells
    ]


def figures_table(result: SweepResult) -> Table:
    """Means over seeds of what else was measured, those columns that any cell has."""
    shown = [each for each in FIGURES if any(each[0] in cell.figures for cell in result.cells)]
    return [_head(result), *(head for _, head, _ in shown)], [
        [_label(result, cell), *(number_text(cell.figures.get(key), form) for key, _, form in shown)]
        for cell in result.cells
    ]


def difference_cells(found: Tested | None) -> list[str]:
    """difference, p, Holm, detects, verdict; dashes and `no result` without one."""
    if found is None:
        return ["-", "-", "-", "-", NO_RESULT]
    if not found.primary:
        return [signed(found.difference), "-", "-", number(found.detectable), "exploratory"]
    return [signed(found.difference), p_text(found.p), p_text(found.p_holm), number(found.detectable), found.verdict]


def differences_tables(result: SweepResult, metric: Metric) -> list[tuple[str, Table]]:
    """All of the family on one metric, a table a pair: (pair, table)."""
    where = label_head(result.plan.sweep) if len(result.plan.sweep.points) > 1 else "arm"
    tested = metric == primary_metric(result.plan.sweep)
    head = [where, "difference", "p", "Holm", "detects", "verdict"] if tested else [where, "difference"]
    return [
        (pair_words(pair), (head, [[row, *difference_cells(found)][: len(head)] for row, _, found in rows]))
        for pair, rows in tested_by_pair(result, metric).items()
    ]


def trends_table(result: SweepResult) -> Table:
    """A row a slope."""
    head = ["what", "where", "slope", "unit", "points", "seeds", "in words"]
    rows = [
        [
            each.what,
            each.where or "-",
            slope_text(each),
            per(each),
            str(each.points),
            str(each.seeds),
            direction(each),
        ]
        for each in result.trends
    ]
    return head, rows


def costs_table(result: SweepResult) -> Table:
    """A row an arm, over its points: counted training operations, their ratio to the reference arm's at the same
    point, and what was spent on candidates that were trained and dropped."""
    reference = reference_arm(result.plan.sweep)
    head = ["arm", "TFLOPs", f"/ {reference}", "dropped", f"all / {reference}"]
    rows = []
    for arm in result.plan.sweep.arms:
        cells = [cell for cell in result.cells if cell.cell.arm == arm.name and cell.seeds]
        alone = _over(cells, lambda cell: cell.flops)
        dropped = _over(cells, lambda cell: cell.selection_flops)
        ratio = _over(cells, lambda cell: _ratio(result, cell, 0.0))
        whole = _over(cells, lambda cell: _ratio(result, cell, cell.selection_flops))
        rows.append(
            [arm.name, _span(alone, teraflops), _span(ratio, _times), _span(dropped, teraflops), _span(whole, _times)]
        )
    return head, rows


def _over(cells: Iterable[CellResult], value: Callable[[CellResult], float | None]) -> list[float]:
    return [found for cell in cells if (found := value(cell)) is not None]


def _ratio(result: SweepResult, cell: CellResult, extra: float) -> float | None:
    """Of a cell's operations to those of the reference arm at its point; None where there is none."""
    reference = Cell(cell.cell.point, reference_arm(result.plan.sweep))
    at = [each for each in result.cells if each.cell == reference]
    if not at or not at[0].flops or cell.flops is None:
        return None
    return (cell.flops + extra) / at[0].flops


def _times(value: float) -> str:
    return number_text(value, ".2f")


def _span(values: Sequence[float], form: Callable[[float], str]) -> str:
    """`1.20`, or `0.98 to 1.20` over the points."""
    if not values:
        return "-"
    low, high = form(min(values)), form(max(values))
    return low if low == high else f"{low} to {high}"


def costs_caption(result: SweepResult) -> str:
    """What the columns of `costs_table` are."""
    return (
        "TFLOPs: counted training operations, 10^12, parents included, a seed; from the cheapest point to the dearest. "
        f"/ {reference_arm(result.plan.sweep)}: at the same point. Dropped: candidates that were trained to choose "
        "this one by development items."
    )


def whisker(estimate: Estimate | None, width: int, low: float, high: float) -> str:
    """`··├─●─┤···` in `width` characters from low to high; where 0 lies inside, it is marked. "" without a number."""
    if estimate is None or estimate.n == 0 or not math.isfinite(estimate.mean):
        return ""

    def place(value: float) -> int:
        share = (value - low) / (high - low) if high > low else 0.5
        return min(max(int(share * width), 0), width - 1)

    marks = ["·"] * width
    if math.isfinite(estimate.low) and math.isfinite(estimate.high):
        for i in range(place(estimate.low), place(estimate.high) + 1):
            marks[i] = "─"
    if low < 0 < high:
        marks[place(0.0)] = "│"
    marks[place(estimate.mean)] = "●"
    return "".join(marks)


def bounds_of(estimates: Iterable[Estimate]) -> float:
    """The largest distance from 0 that an interval reaches; 0.01 at least, so that there is something to draw."""
    found = [abs(v) for e in estimates for v in (e.mean, e.low, e.high) if math.isfinite(v)]
    return max([0.01, *found])


def label_of_point(result: SweepResult, cell: CellResult) -> str:
    """`point_label` of a cell."""
    return point_label(result.plan.sweep, cell.cell.point)
