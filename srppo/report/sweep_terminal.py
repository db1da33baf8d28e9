"""A sweep in the terminal: 80 columns, legible in a plain log and in ASCII. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from srppo.ablations.analysis import CellResult, SweepResult
from srppo.console import sparkline
from srppo.report.figures import estimate_text, number_text, teraflops
from srppo.report.sweep_answer import answer, power_lines
from srppo.report.sweep_layout import label_head, metric_words, pair_words, primary_metric, tested_by_pair
from srppo.report.sweep_tables import (
    bounds_of,
    costs_caption,
    costs_table,
    difference_cells,
    label_of_point,
    length_of,
    seeds_text,
    whisker,
)
from srppo.report.sweep_words import (
    LOST,
    exploratory_line,
    family_line,
    interval_line,
    missing_lines,
    peak_lines,
    progress_line,
    trend_caption,
    trend_lines,
)
from srppo.report.terminal import WIDTH, Narrow

CHART_LEAST, CHART_MOST = 8, 16
CELL_HEADS = ("accuracy", "seeds", "fail", "div", "TFLOPs", "len")
DIFFERENCE_HEADS = ("difference", "p", "Holm", "detects", "verdict")
ASCII = str.maketrans("●─│·▁▂▃▄▅▆▇█", "o-|..:-=+*%#")
COLOURS = {"better": "green", "worse": "red", "cannot tell": "", "no result": "red"}
CELLS_CAPTION = (
    "seeds: measured of planned. fail, div: failed, diverged. TFLOPs: counted training operations, 10^12, parents "
    "included. len: tokens of a test answer."
)


def sweep_text(result: SweepResult, spent: str) -> RenderableType:
    """Everything that is printed; `spent` is the line on core-hours."""
    sweep = result.plan.sweep
    incomplete, missing = progress_line(result), missing_lines(result)
    parts: list[RenderableType] = [
        _line(f"{sweep.name}: {sweep.question}", "dim"),
        _line(answer(result), "bold"),
        *(_line(line) for line in power_lines(result)),
        *([_line(incomplete, "bold yellow")] if incomplete else []),
        Text(""),
        _cells(result),
        _line(" ".join([interval_line(result), CELLS_CAPTION]), "dim"),
        Text(""),
        *_differences(result),
        *_trends(result),
        _costs(result),
        _line(costs_caption(result), "dim"),
        *(_line(line, "red") for line in missing),
        *(_line(f"Note: {note}", "dim") for note in sweep.notes),
        _line(spent, "dim"),
    ]
    return Group(*parts)


def _line(text: str, style: str = "") -> RenderableType:
    return Narrow(Text(text, style))


def _table(title: str) -> Table:
    table = Table(title=Text(title), title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.padding, table.pad_edge = (0, 0), False  # the box itself puts a space between columns
    return table


class Chart:
    """Characters that become others where the terminal only has ASCII."""

    def __init__(self, text: str, style: str = "cyan") -> None:
        self.text, self.style = text, style

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[Text]:
        yield Text(self.text.translate(ASCII) if options.ascii_only else self.text, self.style, no_wrap=True)


def _widths(labels: Sequence[str], arms: Sequence[str], fixed: int) -> tuple[int, int, int]:
    """Columns of labels and arms, folded where they must, and what is left of 80 for the chart."""
    label, arm = max(map(len, labels), default=0), max(map(len, arms), default=0)
    names = WIDTH - fixed - CHART_LEAST
    if label + arm > names:
        label = min(label, max(names // 2, names - arm))
        arm = min(arm, names - label)
    return label, arm, min(WIDTH - fixed - label - arm, CHART_MOST)


def _add_numbers(table: Table, heads: Sequence[str], widths: Sequence[int]) -> None:
    for head, width in zip(heads, widths, strict=True):
        table.add_column(head, width=width, justify="left" if head == "verdict" else "right", no_wrap=True)


def _widest(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(heads, *rows, strict=True)]


def _cells(result: SweepResult) -> Table:
    sweep, metric = result.plan.sweep, primary_metric(result.plan.sweep)
    labels, heads = [label_of_point(result, cell) for cell in result.cells], list(CELL_HEADS)
    several, rows = any(labels), [_cell_texts(result, cell) for cell in result.cells]
    widths = _widest(heads, rows)
    words = label_head(sweep).split(" ") if several else []
    fixed = sum(widths) + len(widths) + 1 + several
    label, arm, chart = _widths([*labels, *words], [each.name for each in sweep.arms], fixed)
    table = _table(f"Cells, {metric_words(metric)}")
    if several:
        table.add_column(Text(label_head(sweep)), width=label, overflow="fold")
    table.add_column("arm", width=arm, overflow="fold")
    table.add_column("0" + "1".rjust(chart - 1), width=chart, no_wrap=True)
    _add_numbers(table, heads, widths)
    last = None
    for cell, name, texts in zip(result.cells, labels, rows, strict=True):
        lead = [Text(name if cell.cell.point != last else "")] if several else []
        picture = Chart(whisker(cell.accuracy.get(metric), chart, 0.0, 1.0))
        table.add_row(*lead, Text(cell.cell.arm), picture, *map(Text, texts), style=_alarm(cell))
        last = cell.cell.point
    return table


def _alarm(cell: CellResult) -> str:
    if any(cell.statuses.get(status) for status in LOST):
        return "red"
    return "yellow" if set(cell.statuses) - {"done"} else ""


def _cell_texts(result: SweepResult, cell: CellResult) -> list[str]:
    metric = primary_metric(result.plan.sweep)
    lost = [str(cell.statuses.get(status, 0)) for status in LOST]
    cost = [teraflops(cell.flops if cell.seeds else None), number_text(length_of(cell, metric[1]))]
    return [estimate_text(cell.accuracy.get(metric)), seeds_text(result, cell), *lost, *cost]


def _differences(result: SweepResult) -> list[RenderableType]:
    metric, parts = primary_metric(result.plan.sweep), list[RenderableType]()
    pairs = tested_by_pair(result, metric)
    reach = bounds_of(found.difference for rows in pairs.values() for _, _, found in rows if found)
    for pair, rows in pairs.items():
        heads, texts = _telling([difference_cells(found) for _, _, found in rows])
        widths = _widest(heads, texts)
        label, _, chart = _widths([row for row, _, _ in rows], [], sum(widths) + len(widths) + 1)
        table = _table(f"{pair_words(pair)}, {metric_words(metric)}")
        table.add_column("", width=max(label, 1), overflow="fold")
        ends = f"{-reach:.2f}", f"{reach:+.2f}"
        table.add_column(ends[0] + ends[1].rjust(chart - 5) if chart >= 11 else "", width=chart, no_wrap=True)
        _add_numbers(table, heads, widths)
        for (row, _, found), cells in zip(rows, texts, strict=True):
            picture = whisker(found.difference if found else None, chart, -reach, reach)
            table.add_row(Text(row), Chart(picture), *map(Text, cells), style=COLOURS[cells[-1]])
        parts += [table, Text("")]
    if pairs:
        parts += [_line(" ".join([family_line(result), exploratory_line(result)]).strip(), "dim"), Text("")]
    return parts


def _telling(rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Heads and texts without the column `detects` where it holds nothing: names need the room."""
    place = DIFFERENCE_HEADS.index("detects")
    keep = [i for i in range(len(DIFFERENCE_HEADS)) if i != place or any(row[place] != "-" for row in rows)]
    return [DIFFERENCE_HEADS[i] for i in keep], [[row[i] for i in keep] for row in rows]


def _trends(result: SweepResult) -> list[RenderableType]:
    lines = trend_lines(result)
    if not lines:
        return []
    grid = Table.grid(padding=(0, 1, 0, 0))
    courses = [_course(result, each.what, each.where) for each in result.trends]
    courses += [""] * (len(lines) - len(courses))
    width = max(map(len, courses))
    grid.add_column(width=width, no_wrap=True)
    grid.add_column(width=WIDTH - width - 1)
    for line, course in zip(lines, courses, strict=True):
        grid.add_row(Chart(course), Text(line))
    caption = f"{trend_caption(result)} Bars: an arm's means, from its least to its largest." if result.trends else ""
    found = [*([_line(caption, "dim")] if caption else []), *map(_line, peak_lines(result))]
    return [Text("Trends", "bold"), grid, *found, Text("")]


def _course(result: SweepResult, what: str, where: str) -> str:
    """An arm's means along the axis."""
    sweep, metric = result.plan.sweep, primary_metric(result.plan.sweep)
    if sweep.analysis.trend is None or what not in [arm.name for arm in sweep.arms]:
        return ""
    points = sweep.lines(sweep.analysis.trend).get(where, [])
    known = {(c.cell.point, c.cell.arm): c.accuracy[metric].mean for c in result.cells if metric in c.accuracy}
    return sparkline([known[p.name, what] for p in points if (p.name, what) in known])


def _costs(result: SweepResult) -> Table:
    head, rows = costs_table(result)
    table = _table("Training compute")
    for i, name in enumerate(head):
        table.add_column(Text(name), justify="right" if i else "left", overflow="fold", max_width=20 if i else 24)
    for row in rows:
        table.add_row(*map(Text, row))
    return table
