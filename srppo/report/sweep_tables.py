"""A sweep of any shape: which axes vary, what its points and comparisons are called, and its tables. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from srppo.ablations.analysis import Metric, SweepResult, Tested
from srppo.ablations.spec import Ablation, Cell, Comparison, Sweep, label
from srppo.console import sparkline
from srppo.evaluation.comparison import FEW_TASKS, bounds, number, p_text, signed
from srppo.report.table import NO_RESULT, VERDICT_MARKS, Chart, Column, Row, Table
from srppo.report.words import DECODINGS, GROUP_WORDS, estimate_text, is_number, number_text, teraflops

AXIS_WORDS = {"size": "demonstrations", "lr": "learning rate", "beta": "KL coefficient beta"}
"""What an axis is called in a plot, where its own name says too little."""
LOG_SPAN = 8.0  # values that span more are drawn evenly by their logarithm
Pair = tuple[str, str]  # model, baseline; one of them "" where the rows name it
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
    ("sampled_gain", "sampled gain", "+.3f"),
    ("gain_at_lengths", "of it by length", "+.3f"),
)
"""What else was measured of a cell: key, head, format."""
SHAPE = {"tokens": ".1f", "ended": ".0%"}  # of the answers under the primary metric, beside each accuracy


# ---- axes and names


def varying(sweep: Sweep) -> list[str]:
    """The axes on which points differ."""
    return [axis for axis in sweep.axes if len({label(p.values.get(axis)) for p in sweep.points}) > 1]


def axis_words(axis: str) -> str:
    """An axis as plots name it."""
    return AXIS_WORDS.get(axis, axis.replace("_", " "))


def line_axis(sweep: Sweep) -> str | None:
    """The axis to draw lines along: the planned one, else the first that varies in numbers; None: draw points."""
    planned = [sweep.analysis.trend] if sweep.analysis.trend else []
    for axis in (*planned, *varying(sweep)):
        values = [point.values.get(axis) for point in sweep.points]
        if all(map(is_number, values)) and len(set(values)) > 1:
            return axis
    return None


def is_log(sweep: Sweep, axis: str) -> bool:
    """Whether an axis is drawn by its logarithm: as its trend is fitted, else where its values span much."""
    values = [float(point.values[axis]) for point in sweep.points]
    if min(values) <= 0:
        return False
    return sweep.analysis.scale == "log2" if axis == sweep.analysis.trend else max(values) / min(values) > LOG_SPAN


def point_label(sweep: Sweep, name: str) -> str:
    """A point by its values on the axes that vary, its name where these do not tell it; "" where it is the only one."""
    if len(sweep.points) == 1:
        return ""
    texts = {point.name: ", ".join(label(point.values.get(axis)) for axis in varying(sweep)) for point in sweep.points}
    return texts[name] if len(set(texts.values())) == len(texts) else name


def cell_label(sweep: Sweep, cell: Cell) -> str:
    """`8, epochs: SRPPO`, or only the arm."""
    where = point_label(sweep, cell.point)
    return f"{where}: {cell.arm}" if where else cell.arm


def panels(sweep: Sweep, axis: str) -> dict[str, list[Ablation]]:
    """Points along an axis, in its order, apart for each combination of values on the other axes."""
    beside, found = sweep.beside(axis), dict[str, list[Ablation]]()
    others = [each for each in varying(sweep) if each in beside]
    for point in sorted(sweep.points, key=lambda p: float(p.values[axis])):
        found.setdefault(", ".join(f"{each} {label(point.values.get(each))}" for each in others), []).append(point)
    return found


def over_tasks(tasks: int | None) -> str:
    """`over these 40 tasks; `, which a claim about tasks is made of; nothing where items are the units."""
    few = ", too few to say much of others" if tasks and tasks < FEW_TASKS else ""
    return f"over these {tasks} tasks{few}; " if tasks else ""


def metric_words(metric: Metric) -> str:
    """`out-of-domain, greedy`."""
    return f"{GROUP_WORDS.get(metric[0], metric[0])}, {metric[1]}"


def metrics_of(result: SweepResult) -> list[Metric]:
    """All that was measured, the primary metric first, then by decoding, groups as they come."""
    primary = primary_metric(result.plan.sweep)
    found = dict.fromkeys(metric for cell in result.cells for metric in cell.accuracy)
    groups = [*dict.fromkeys(group for group, _ in found)]
    decodings = [*DECODINGS, *dict.fromkeys(decoding for _, decoding in found)]
    return sorted(found, key=lambda m: (m != primary, decodings.index(m[1]), groups.index(m[0])))


def primary_metric(sweep: Sweep) -> Metric:
    """(group of items, decoding) of the plan."""
    return sweep.analysis.group, sweep.analysis.decoding


def reference_arm(sweep: Sweep) -> str:
    """The arm whose compute the others are measured by: SRPPO, or the one that most comparisons are of."""
    names = [arm.name for arm in sweep.arms]
    return "SRPPO" if "SRPPO" in names else _hub(sweep) or names[-1]


def _hub(sweep: Sweep) -> str:
    """The arm that is the model of most planned comparisons; "" without any."""
    if sweep.analysis.curves:
        return sweep.analysis.curves.model
    models = Counter(each.model.arm for each in sweep.analysis.family)
    return models.most_common(1)[0][0] if models else ""


def places(sweep: Sweep) -> dict[Comparison, tuple[Pair, str]]:
    """For each comparison of the family, in its order: the pair that it belongs to, and its row there.

    Rows are points; at a single point they are the arms that differ.
    """
    family, one_point = sweep.analysis.family, len(sweep.points) == 1
    hub = _hub(sweep)
    rows = sum(each.model.arm == hub for each in family)
    found: dict[Comparison, tuple[Pair, str]] = {}
    for each in family:
        model, baseline = each.model.arm, each.baseline.arm
        if one_point and rows > 1 and model == hub:
            found[each] = ((model, ""), baseline)
        elif one_point and len(family) > 1:
            found[each] = (("", baseline), model)
        elif each.model.point == each.baseline.point:
            found[each] = ((model, baseline), point_label(sweep, each.model.point))
        else:
            where = point_label(sweep, each.baseline.point)
            found[each] = ((model, f"{baseline} at {where}"), point_label(sweep, each.model.point))
    return found


def pair_words(pair: Pair) -> str:
    """`SRPPO minus SFT`; `SRPPO minus each` and `each minus SFT`, where rows name the other."""
    return f"{pair[0] or 'each'} minus {pair[1] or 'each'}"


def difference_label(sweep: Sweep, comparison: Comparison) -> str:
    """A comparison in one line: `8, epochs: SRPPO minus SFT`."""
    (model, baseline), row = places(sweep)[comparison]
    if len(sweep.points) > 1:
        return f"{row}: {model} minus {baseline}"
    return f"{model or row} minus {baseline or row}"


def tested_by_pair(result: SweepResult, metric: Metric) -> dict[Pair, list[tuple[str, Comparison, Tested | None]]]:
    """All of the family, by pair: (row, comparison, what was found on a metric, None without a result)."""
    known: Mapping[Comparison, Tested] = {each.comparison: each for each in result.differences if each.metric == metric}
    found: dict[Pair, list[tuple[str, Comparison, Tested | None]]] = {}
    for comparison, (pair, row) in places(result.plan.sweep).items():
        found.setdefault(pair, []).append((row, comparison, known.get(comparison)))
    return found


# ---- tables


def cells_table(result: SweepResult, caption: Sequence[str]) -> Table:
    """A row a cell on the primary metric, with what failed and what it cost."""
    sweep, metric = result.plan.sweep, primary_metric(result.plan.sweep)
    several, last = len(sweep.points) > 1, ""
    heads = [Column(_head(sweep), only="page"), Column("arm", only="terminal"), Column("", only="terminal")]
    heads[1:1] = [Column(_points_head(sweep), only="terminal")] if several else []
    heads += [Column(metric_words(metric), "accuracy"), Column("IQM", only="page"), Column("seeds")]
    heads += [Column("failed", "fail"), Column("diverged", "div"), Column("TFLOPs")]
    heads += [Column("length", "len"), Column("ended by EOS", "end")]
    rows = []
    for each in result.cells:
        point, arm, estimate = each.cell.point, each.cell.arm, each.accuracy.get(metric)
        where = [point_label(sweep, point) if point != last else ""] if several else []
        cells = [cell_label(sweep, each.cell), *where, arm, Chart(estimate, 0.0, 1.0), estimate_text(estimate)]
        cells += [number_text(each.iqm.get(metric), ".2f"), f"{len(each.seeds)}/{len(sweep.seeds)}"]
        lost = [each.statuses.get(status, 0) for status in ("failed", "diverged")]
        cost = [teraflops(each.flops if each.seeds else None)]
        cost += [number_text(each.figures.get(f"{metric[1]}_{name}"), form) for name, form in SHAPE.items()]
        mark = "bad" if any(lost) else "unsure" if set(each.statuses) - {"done"} else ""
        rows.append(Row([*cells, *map(str, lost), *cost], mark))
        last = point
    return Table.of(f"Cells, {metric_words(metric)}", heads, rows, caption, names=1 + several)


def _points_head(sweep: Sweep) -> str:
    return ", ".join(varying(sweep)) or "point"


def _head(sweep: Sweep) -> str:
    return f"{_points_head(sweep)}: arm" if len(sweep.points) > 1 else "arm"


def metrics_table(result: SweepResult, decoding: str) -> Table:
    """Accuracy of every cell on each group of items under one decoding."""
    sweep, metrics = result.plan.sweep, [metric for metric in metrics_of(result) if metric[1] == decoding]
    heads = [_head(sweep), *(GROUP_WORDS.get(group, group) for group, _ in metrics)]
    cells = ((cell_label(sweep, c.cell), *(estimate_text(c.accuracy.get(m)) for m in metrics)) for c in result.cells)
    return Table.of(f"accuracy, {decoding}", heads, cells)


def figures_table(result: SweepResult) -> Table:
    """Means over seeds of what else was measured, those columns that any cell has."""
    sweep, rows = result.plan.sweep, []
    for cell in result.cells:
        figures = (number_text(cell.figures.get(key), form) for key, _, form in FIGURES)
        rows.append([cell_label(sweep, cell.cell), *figures])
    return Table.of("What else was measured", [_head(sweep), *(head for _, head, _ in FIGURES)], rows).telling()


def differences_table(result: SweepResult, metric: Metric, caption: Sequence[str] = ()) -> Table:
    """All of the family on one metric, under a heading a pair; tests where the plan has them."""
    sweep, pairs = result.plan.sweep, tested_by_pair(result, metric)
    known = [found.finding.difference for rows in pairs.values() for _, _, found in rows if found]
    reach = max([0.01, *(abs(v) for e in known for v in (e.mean, e.low, e.high) if v == v)])
    head = _points_head(sweep) if len(sweep.points) > 1 else "arm"
    heads: list[str | Column] = [head, Column("", only="terminal"), "difference", "these tasks"]
    heads += [Column("p", only="page"), "Holm", "detects", "verdict"] if metric == primary_metric(sweep) else []
    rows: list[Row | str] = []
    for pair, members in pairs.items():
        rows.append(pair_words(pair))
        for row, _, found in members:
            told, chart = _difference_cells(found), Chart(found.finding.difference if found else None, -reach, reach)
            rows.append(Row([row or "all", chart, *told][: len(heads)], VERDICT_MARKS.get(told[-1], "")))
    return Table.of(f"Paired differences, {metric_words(metric)}", heads, rows, caption if rows else ()).telling()


def _difference_cells(found: Tested | None) -> list[str]:
    """difference, these tasks, p, Holm (of sameness, where that is the verdict), detects, verdict."""
    if found is None:
        return ["-", "-", "-", "-", "-", NO_RESULT]
    said = found.finding
    p_values = (said.p_same, said.p_same_holm) if said.verdict == "same" else (said.p, said.p_holm)
    told = [signed(said.difference), bounds(found.these_tasks), *map(p_text, p_values)]
    return [*told, number(said.detectable), said.verdict]


def costs_table(result: SweepResult) -> Table:
    """A row an arm, over its points: counted training operations, their ratio to the reference arm's at the same
    point, and what was spent on choosing steps and lengths."""
    reference = reference_arm(result.plan.sweep)
    theirs = {each.cell.point: each.flops for each in result.cells if each.cell.arm == reference}
    heads = ["arm", "TFLOPs", f"/ {reference}", "selection", f"all / {reference}"]
    rows = []
    for arm in result.plan.sweep.arms:
        cells = [each for each in result.cells if each.cell.arm == arm.name]
        costs = [(c.flops, c.selection_flops, theirs.get(c.cell.point)) for c in cells if c.flops is not None]
        alone = _range((own for own, _, _ in costs), teraflops)
        chosen = _range((extra for _, extra, _ in costs), teraflops)
        ratio = _range((own / their for own, _, their in costs if their), "{:.2f}".format)
        whole = _range(((own + extra) / their for own, extra, their in costs if their), "{:.2f}".format)
        rows.append([arm.name, alone, ratio, chosen, whole])
    caption = (
        "TFLOPs: counted training operations, 10^12, parents included, a seed; from the cheapest point to the dearest. "
        f"/ {reference}: at the same point. Selection: what chose steps and lengths: answers to development items, and "
        "trainings that were dropped."
    )
    return Table.of("Training compute", heads, rows, [caption])


def _range(values: Iterable[float], form: Callable[[float], str]) -> str:
    """`1.20`, or `0.98 to 1.20` over the points."""
    shown = [form(value) for value in sorted(values)]
    return " to ".join(dict.fromkeys([shown[0], shown[-1]])) if shown else "-"


def course(result: SweepResult, what: str, where: str) -> str:
    """An arm's means along the axis of the plan, as bars; "" for a difference."""
    sweep, metric = result.plan.sweep, primary_metric(result.plan.sweep)
    if sweep.analysis.trend is None or what not in [arm.name for arm in sweep.arms]:
        return ""
    points = sweep.lines(sweep.analysis.trend).get(where, [])
    known = {(c.cell.point, c.cell.arm): c.accuracy[metric].mean for c in result.cells if metric in c.accuracy}
    return sparkline([known[p.name, what] for p in points if (p.name, what) in known])
