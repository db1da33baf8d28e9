"""How a sweep of any shape lies on a page: which axes vary, what its points and comparisons are called. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from srppo.ablations.analysis import Metric, SweepResult, Tested
from srppo.ablations.spec import Ablation, Comparison, Sweep, label
from srppo.report.figures import DECODINGS, GROUP_WORDS

AXIS_WORDS = {"size": "demonstrations", "lr": "learning rate", "beta": "KL coefficient beta"}
"""What an axis is called in a plot, where its own name says too little."""
LOG_SPAN = 8.0  # values that span more are drawn evenly by their logarithm
Pair = tuple[str, str]  # model, baseline; one of them "" where the rows name it


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
        if all(map(_is_number, values)) and len(set(values)) > 1:
            return axis
    return None


def is_log(sweep: Sweep, axis: str) -> bool:
    """Whether an axis is drawn by its logarithm: as its trend is fitted, else where its values span much."""
    values = [float(point.values[axis]) for point in sweep.points]
    if min(values) <= 0:
        return False
    return sweep.analysis.scale == "log2" if axis == sweep.analysis.trend else max(values) / min(values) > LOG_SPAN


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def point_label(sweep: Sweep, name: str) -> str:
    """A point by its values on the axes that vary, its name where these do not tell it; "" where it is the only one."""
    if len(sweep.points) == 1:
        return ""
    texts = {point.name: ", ".join(label(point.values.get(axis)) for axis in varying(sweep)) for point in sweep.points}
    return texts[name] if len(set(texts.values())) == len(texts) else name


def label_head(sweep: Sweep) -> str:
    """The head over `point_label`."""
    return ", ".join(varying(sweep)) or "point"


def cell_label(sweep: Sweep, point: str, arm: str) -> str:
    """`8, epochs: SRPPO`, or only the arm."""
    where = point_label(sweep, point)
    return f"{where}: {arm}" if where else arm


def panels(sweep: Sweep, axis: str) -> dict[str, list[Ablation]]:
    """Points along an axis, in its order, apart for each combination of values on the other axes."""
    beside, found = sweep.beside(axis), dict[str, list[Ablation]]()
    others = [each for each in varying(sweep) if each in beside]
    for point in sorted(sweep.points, key=lambda p: float(p.values[axis])):
        found.setdefault(", ".join(f"{each} {label(point.values.get(each))}" for each in others), []).append(point)
    return found


def metric_words(metric: Metric) -> str:
    """`out-of-domain, greedy`."""
    return f"{GROUP_WORDS.get(metric[0], metric[0])}, {metric[1]}"


def metrics_of(result: SweepResult) -> list[Metric]:
    """All that was measured, the primary metric first, then by group and decoding."""
    primary = primary_metric(result.plan.sweep)
    found = dict.fromkeys(metric for cell in result.cells for metric in cell.accuracy)
    rank = {name: i for i, name in enumerate((*GROUP_WORDS, *dict.fromkeys(group for group, _ in found)))}
    return sorted(
        found, key=lambda m: (m != primary, list(DECODINGS).index(m[1]) if m[1] in DECODINGS else 9, rank[m[0]])
    )


def primary_metric(sweep: Sweep) -> Metric:
    """(group of items, decoding) of the plan."""
    return sweep.analysis.group, sweep.analysis.decoding


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


def _hub(sweep: Sweep) -> str:
    """The arm that is the model of most planned comparisons; "" without any."""
    models = Counter(each.model.arm for each in sweep.analysis.family)
    return models.most_common(1)[0][0] if models else ""


def reference_arm(sweep: Sweep) -> str:
    """The arm whose compute the others are measured by: SRPPO, or the one that most comparisons are of."""
    names = [arm.name for arm in sweep.arms]
    return "SRPPO" if "SRPPO" in names else _hub(sweep) or names[-1]


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


def joined(texts: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else list(texts))
