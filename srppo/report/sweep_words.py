"""What a sweep says, in sentences: its answer and power, trends, what is missing, what its numbers mean. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from srppo.ablations.analysis import CellResult, Forecast, Peak, SweepResult, Tested, Trend
from srppo.ablations.progress import stage_seconds
from srppo.ablations.spec import Comparison
from srppo.evaluation.comparison import number, p_text, signed
from srppo.record.store import Stage
from srppo.report import sweep_tables as tables
from srppo.report.history import environment_of
from srppo.report.sweep_curves import curves_answer
from srppo.report.table import NO_RESULT
from srppo.report.words import INTERVAL, joined, number_text, short_number, span, verdict_words
from srppo.statistics.tests import seeds_needed

VERDICTS = ("better", "worse", "same", "cannot tell", NO_RESULT)
LOST, LEFT = ("failed", "diverged"), ("waiting", "running")
ROUNDING = 1e-12  # of sums of accuracies
LOOSENS_DOWNWARDS = ("beta",)  # axes at whose small values less holds the policy back: lower there is overshot
MOST_REASONS = 3  # shown in a line; the record has all


# ---- the answer


def answer(result: SweepResult) -> str:
    """The answer to the sweep's question by the tests that were planned, in plain words."""
    analysis, metric = result.plan.sweep.analysis, tables.primary_metric(result.plan.sweep)
    if analysis.curves:
        return curves_answer(result)
    family, tested = analysis.family, _tested(result)
    if not family:
        return "The plan tests no difference: what follows describes, and shows nothing."
    if not tested:
        return f"No answer yet: none of the {len(family)} planned comparisons has a result."
    seeds = span([len(each.seeds) for each in tested], "seed")
    seeds = tables.over_tasks(tested[0].tasks) + seeds
    said = [_pair_sentence(result, pair, rows) for pair, rows in tables.tested_by_pair(result, metric).items()]
    holm = f"{analysis.correction} over {len(family)}; " if len(family) > 1 else ""
    return f"{'. '.join(said)} ({tables.metric_words(metric)}; {holm}{seeds})."


def _tested(result: SweepResult) -> list[Tested]:
    return [each for each in result.differences if each.primary]


def _pair_sentence(
    result: SweepResult, pair: tables.Pair, rows: Sequence[tuple[str, Comparison, Tested | None]]
) -> str:
    """`SRPPO is better than SFT at 3 of 6 sizes, worse at none, cannot tell at 3`; arms by name at a single point."""
    by: dict[str, list[str]] = {verdict: [] for verdict in VERDICTS}
    for row, _, found in rows:
        by[found.finding.verdict if found else NO_RESULT].append(row)
    model, baseline = pair
    within = result.plan.sweep.analysis.margin
    if not baseline:  # one arm against several, or several against one
        return ", ".join(_clause(model, verdict, joined(arms), within) for verdict, arms in by.items() if arms)
    if not model:
        return ", ".join(
            _clause(joined(arms), verdict, baseline, within, len(arms)) for verdict, arms in by.items() if arms
        )
    if len(rows) == 1:
        verdict = next(verdict for verdict, named in by.items() if named)
        return _clause(model, verdict, baseline, within) + (f" at {rows[0][0]}" if rows[0][0] else "")
    axes = tables.varying(result.plan.sweep)
    where = f"{len(rows)} {axes[0].replace('_', ' ')}s" if len(axes) == 1 else f"{len(rows)} points"
    without = [f"{NO_RESULT} at {len(by[NO_RESULT])}"] if by[NO_RESULT] else []
    if len(by[NO_RESULT]) == len(rows):
        return f"{model} against {baseline}: {NO_RESULT} at any of {where}"
    if not by["better"] and not by["worse"] and not by["same"]:
        at = len(by["cannot tell"]) if without else "any"
        return ", ".join([f"{model} cannot be told from {baseline} at {at} of {where}", *without])
    better, worse, unsure = (len(by[verdict]) or "none" for verdict in ("better", "worse", "cannot tell"))
    same = [f"the same within {within:g} at {len(by['same'])}"] if by["same"] else []
    text = f"{model} is better than {baseline} at {better} of {where}"
    return ", ".join([text, f"worse at {worse}", *same, f"cannot tell at {unsure}", *without])


def _clause(model: str, verdict: str, baseline: str, margin: float, models: int = 1) -> str:
    """`A is better than B`; `models`: how many A names."""
    be = "is" if models == 1 else "are"
    words = {"cannot tell": "cannot be told from", NO_RESULT: f"{be} without a result against"}
    words["same"] = f"{be} the same within {margin:g} as"
    return f"{model} {words.get(verdict, f'{be} {verdict} than')} {baseline}"


def power_lines(result: SweepResult) -> list[str]:
    """Whether so few seeds can show anything at all, and what the tests that cannot tell could have seen."""
    analysis, tested = result.plan.sweep.analysis, _tested(result)
    if not tested:
        return []
    needed, counts = seeds_needed(analysis.alpha, len(analysis.family)), [len(each.seeds) for each in tested]
    few = [count for count in counts if count < needed]
    lines = []
    if few:
        holm = f" by {analysis.correction} over {len(analysis.family)}" if len(analysis.family) > 1 else ""
        who = "Nothing can be significant here"
        if len(few) < len(counts):  # what stands first in Holm's order may let those through that come after
            who = f"{len(few)} of {len(counts)} comparisons can only be significant after others"
        one = " One seed says nothing of other seeds." if max(counts) == 1 else ""
        lines.append(
            f"{who}: with {span([max(few)], 'seed')} the {analysis.test} test gives no p below "
            f"{p_text(2.0 ** (1 - max(few)))}; p <= {analysis.alpha:g}{holm} needs {needed}.{one}"
        )
    unsure = [
        each.finding.detectable
        for each in tested
        if each.finding.verdict == "cannot tell" and math.isfinite(each.finding.detectable)
    ]
    if unsure:
        sizes = dict.fromkeys((number(min(unsure)), number(max(unsure))))
        lines.append(
            f"Where it cannot tell, a true difference of about {' to '.join(sizes)} or more would have been seen in "
            "80% of such sweeps, as the first in Holm's order."
        )
    return lines


# ---- trends and peaks


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
    """`SRPPO (budget epochs) rises: +0.031 [+0.010, +0.052] per doubling of size`"""
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


def trend_caption(result: SweepResult) -> str:
    """How slopes are fitted; "" where there is none."""
    trend = result.plan.sweep.analysis.trend
    if not trend or not result.trends:
        return ""
    over = "tasks" if any(each.tasks for each in _tested(result)) else "items"
    how = f"least squares seed by seed and item by item, 95% intervals over seeds and {over}, no test and no correction"
    return f"Slopes along {tables.axis_words(trend)}: {how}."


def peak_lines(result: SweepResult) -> list[str]:
    """Where each arm is highest along the axis, under a line that says what that is worth; none without a peak."""
    if not result.peaks:
        return []
    head = (
        "Exploratory, not in the plan: where each arm's mean is highest (picked after the fact: it flatters), and "
        "how far the ends lie below, paired over seeds and items, 95% intervals, no correction."
    )
    return [head, *map(peak_sentence, result.peaks)]


def peak_sentence(peak: Peak) -> str:
    """`SRPPO is highest at beta 0.25 (0.710); at 0.125 lower by 0.050 [0.020, 0.080]: overshoots; ...`"""
    where = f" ({peak.where})" if peak.where else ""
    edge = ", an end of the axis" if len(peak.drops) < 2 else ""
    said = [f"{peak.what}{where} is highest at {peak.axis} {short_number(peak.at)} ({number(peak.height)}){edge}"]
    for value, drop in peak.drops:
        overshot = peak.axis in LOOSENS_DOWNWARDS and value < peak.at
        ending = "cannot tell" if not drop.low > 0 else "overshoots" if overshot else "falls off"
        lower = f"{number(drop.mean)} [{number(drop.low)}, {number(drop.high)}]"
        said.append(f"at {short_number(value)} lower by {lower}: {ending}")
    return "; ".join(said)


def forecast_sentence(forecast: Forecast) -> str:
    """`Rank correlation, over 8 points, of the sampled accuracy of the optimum with the accuracy of SRPPO: 0.87 [0.60,
    0.98] (out-of-domain, sampled; 10 seeds, 95% over seeds and tasks)`; tasks are items where those are the units."""
    rho = forecast.rho
    bounds = "" if math.isnan(rho.low) else f" [{number(rho.low)}, {number(rho.high)}]"
    said = f"{number(rho.mean)}{bounds}" if math.isfinite(rho.mean) else "no value: one of them is the same everywhere"
    ends = (
        f"{tables.metric_words(forecast.metric)}; {span([forecast.seeds], 'seed')}, 95% over seeds and {forecast.units}"
    )
    return (
        f"Rank correlation, over {forecast.points} points, of the sampled accuracy of {forecast.by} with the accuracy "
        f"of {forecast.what}: {said} ({ends})"
    )


# ---- what is missing, and what the numbers mean


def missing_lines(result: SweepResult) -> list[str]:
    """Cells that failed or diverged, with reasons; those not finished; planned comparisons without a result."""
    sweep = result.plan.sweep
    lines = [_lost_line(result, cell) for cell in result.cells if set(cell.statuses) & set(LOST)]
    left = [(cell, sum(n for status, n in cell.statuses.items() if status in LEFT)) for cell in result.cells]
    if waiting := [f"{tables.cell_label(sweep, cell.cell)} {count}" for cell, count in left if count]:
        lines.append(f"Seeds not finished: {'; '.join(waiting)}")
    known = {each.comparison for each in _tested(result)}
    if unknown := [tables.difference_label(sweep, each) for each in sweep.analysis.family if each not in known]:
        lines.append(f"Planned, {NO_RESULT}, since no seed has both cells measured: {'; '.join(unknown)}")
    return lines


def _lost_line(result: SweepResult, cell: CellResult) -> str:
    """Of one cell; `seed 1: lost`, `seed 2: lost` as `seeds 1, 2: lost`."""
    counts = ", ".join(f"{cell.statuses[status]} {status}" for status in LOST if cell.statuses.get(status))
    by_reason: dict[str, list[str]] = {}
    for each in cell.reasons:
        seed, _, reason = each.removeprefix("seed ").partition(": ")
        by_reason.setdefault(reason, []).append(seed)
    said = [f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}: {why}" for why, seeds in by_reason.items()]
    more = [f"{len(said) - MOST_REASONS} more"] if len(said) > MOST_REASONS else []
    reasons = "; ".join([*said[:MOST_REASONS], *more])
    return f"{tables.cell_label(result.plan.sweep, cell.cell)}: {counts}" + (f" ({reasons})" if reasons else "")


def progress_line(result: SweepResult) -> str:
    """How much of a sweep there is; "" for a whole one."""
    counts = {each: sum(cell.statuses.get(each, 0) for cell in result.cells) for each in ("done", *LOST)}
    whole = len(result.cells) * len(result.plan.sweep.seeds)
    parts = [f"{counts[status]} {status}" for status in LOST if counts[status]]
    if waiting := whole - sum(counts.values()):
        parts.append(f"{waiting} not finished; run the same command to go on")
    said = f"Incomplete: of {whole} trainings (cells times seeds) {counts['done']} are measured, {', '.join(parts)}."
    return said if parts else ""


def interval_line(result: SweepResult) -> str:
    """What the intervals are over."""
    metric, counts = tables.primary_metric(result.plan.sweep), [len(cell.seeds) for cell in result.cells if cell.seeds]
    items = sorted({cell.accuracy[metric].n for cell in result.cells if metric in cell.accuracy})
    if not items:
        return ""
    sizes = "/".join(map(str, items))
    these = " of these tasks" if any(each.tasks for each in _tested(result)) else ""
    if max(counts) == 1:
        return f"Intervals: 95% over {sizes} items{these}; one training seed, so they say nothing of other seeds."
    over = f"{sizes} items{these} and {span(counts, 'training seed')}"
    return f"Intervals: 95% over {over} resampled crossed ({INTERVAL}). Differences are paired by item and seed."


def family_line(result: SweepResult) -> str:
    """How the verdicts came about; "" where none was planned."""
    if not result.plan.sweep.analysis.family:
        return ""
    analysis, tasks = result.plan.sweep.analysis, any(each.tasks for each in _tested(result))
    units = f"{'tasks' if tasks else 'items'} and seeds"
    narrow = " These tasks: the narrower interval over items, which says nothing of other tasks." if tasks else ""
    counted = "of the plan, those without a result counted in"
    said = verdict_words(analysis.test, units, len(analysis.family), counted, analysis.alpha)
    return f"{said} Margin: {analysis.margin:g}.{narrow}"


def exploratory_line(result: SweepResult) -> str:
    """That there is more to see, and what it is worth; "" where there is not."""
    others = dict.fromkeys(tables.metric_words(each.metric) for each in result.differences if not each.primary)
    return f"Exploratory, not in the plan, uncorrected, on the page only: {'; '.join(others)}." if others else ""


def spent_line(stages: Iterable[Stage]) -> str:
    """`Spent: 0.12 core-hours: the wall time of 18 finished stages.` A stage of several processes counts as often."""
    times = [(stage_seconds(stage), int(environment_of(stage).get("processes", 1))) for stage in stages]
    took = [(seconds, processes) for seconds, processes in times if seconds is not None]
    several = ", times its processes" if any(processes > 1 for _, processes in took) else ""
    hours = number_text(sum(seconds * processes for seconds, processes in took) / 3600, ".3g")
    return f"Spent: {hours} core-hours: the wall time of {span([len(took)], 'finished stage')}{several}."
