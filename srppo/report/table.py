"""One table, built once of plain texts and rendered for the terminal, HTML, Markdown, LaTeX, CSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, Literal

from rich.cells import cell_len, chop_cells
from rich.console import Console as RichConsole
from rich.console import ConsoleOptions, RenderableType
from rich.constrain import Constrain
from rich.text import Text

from srppo.ablations.spec import label
from srppo.report.page import soft_text

if TYPE_CHECKING:
    from srppo.statistics.intervals import Estimate

WIDTH = 80  # columns of the terminal that a table takes at most
NAME_LEAST = 18  # columns that a name gets before numbers go into a table below
HEAD_MOST, HEAD_WHOLE = 17, 12  # a head's longest word, and a head that is not folded
CHART_LEAST, CHART_MOST = 8, 16
MARKS = {"good": "green", "bad": "red", "unsure": "yellow", "own": "bold"}  # in HTML they are classes of the row
NO_RESULT = "no result"
VERDICT_MARKS = {"better": "good", "worse": "bad", "same": "own", NO_RESULT: "bad", "cannot tell": ""}
ASCII = str.maketrans("●─│·▁▂▃▄▅▆▇█", "o-|..:-=+*%#")
LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    "−": "$-$",
    "…": r"\ldots{}",
    **{each: f"\\{each}" for each in "&%$#_{}"},
}


@dataclass(frozen=True)
class Chart:
    """A cell that draws an estimate on a scale from `low` to `high`; it stands in columns of the terminal alone."""

    estimate: Estimate | None
    low: float
    high: float


@dataclass(frozen=True)
class Column:
    """A column by its head. short: its head in the terminal. only: the one place that shows it, "" for everywhere."""

    head: str
    short: str | None = None
    only: Literal["", "terminal", "page"] = ""

    @property
    def narrow(self) -> str:
        """The head in the terminal."""
        return self.head if self.short is None else self.short


@dataclass(frozen=True)
class Row:
    """Cells, one a column, and a mark of MARKS for the whole row."""

    cells: Sequence[Any]
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """A title, columns, rows and lines of caption. A text among the rows is a heading over those that follow it. One
    without rows and caption is nothing, in the terminal and on a page.

    names: so many of the terminal's first columns are names, which may fold; numbers never do.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row | str, ...]
    caption: tuple[str, ...] = ()
    names: int = 1

    @classmethod
    def of(
        cls,
        title: str,
        heads: Iterable[str | Column],
        rows: Iterable[Row | str | Sequence[Any]],
        caption: Iterable[str] = (),
        names: int = 1,
    ) -> Table:
        """Of heads that may be texts and rows that may be bare cells; empty lines of the caption are left out."""
        columns = tuple(Column(head) if isinstance(head, str) else head for head in heads)
        made = tuple(row if isinstance(row, Row | str) else Row(row) for row in rows)
        return cls(title, columns, made, tuple(line for line in caption if line), names)

    def telling(self) -> Table:
        """Without the columns, beside the names, in which no row says anything but `-`."""
        rows = [row for row in self.rows if isinstance(row, Row)]
        keep = [i for i in range(len(self.columns)) if i < self.names or any(row.cells[i] != "-" for row in rows)]
        return self._kept(keep)

    def shown(self, where: Literal["terminal", "page"]) -> Table:
        """With the columns of that place."""
        return self._kept([i for i, column in enumerate(self.columns) if column.only in ("", where)])

    def _kept(self, keep: Sequence[int]) -> Table:
        rows = (row if isinstance(row, str) else Row([row.cells[i] for i in keep], row.mark) for row in self.rows)
        return Table(self.title, tuple(self.columns[i] for i in keep), tuple(rows), self.caption, self.names)

    def __rich_console__(self, console: RichConsole, options: ConsoleOptions) -> Iterator[RenderableType]:
        if self.rows or self.caption:
            yield from _terminal(self.shown("terminal"), min(options.max_width, WIDTH), options.ascii_only)
            yield from (paragraph(line, "dim") for line in self.caption)
            yield Text("")


def paragraph(text: str, style: str = "") -> RenderableType:
    """Text for the terminal, no wider than the tables, in a style of rich's or of a mark of MARKS."""
    return Constrain(Text(text, MARKS.get(style, style)), WIDTH)


# ---- terminal


def _terminal(table: Table, width: int, ascii_only: bool) -> Iterator[RenderableType]:
    """Title, head and rows in `width` columns; what does not fit goes into a further table with the same names."""
    if table.title:
        yield paragraph(table.title, "bold")
    for number, (keep, widths, gap) in enumerate(_layouts(table, width) if table.rows else ()):
        part = table._kept(keep)
        heads = [_head_lines(part, i, size) for i, size in enumerate(widths)]
        yield from [Text("")] if number else []
        if any(heads):
            yield from _lines(heads, "", widths, gap, table.names, ascii_only)
            yield Text(("-" if ascii_only else "─") * (sum(widths) + gap * (len(widths) - 1)), "dim")
        for place, row in enumerate(part.rows):
            if isinstance(row, Row):
                columns = [
                    [whisker(cell.estimate, size, cell.low, cell.high)]
                    if isinstance(cell, Chart)
                    else folded(str(cell), size)
                    for cell, size in zip(row.cells, widths, strict=True)
                ]
                yield from _lines(columns, MARKS.get(row.mark, ""), widths, gap, table.names, ascii_only)
            else:
                yield from [Text("")] if place else []
                yield from (Text(line, "bold") for line in folded(row, width) if line)


def _head_lines(table: Table, place: int, width: int) -> list[str]:
    """A column's head; over charts the ends of their scale, where there is room."""
    chart = next((row.cells[place] for row in table.rows if isinstance(row, Row)), None)
    if isinstance(chart, Chart):
        low, high = (f"{end:+.2f}" if chart.low < 0 else f"{end:g}" for end in (chart.low, chart.high))
        return [low + high.rjust(width - len(low))] if len(low) + len(high) < width else []
    head = table.columns[place].narrow
    return folded(head, width, hang="") if head else []


def _lines(
    columns: Sequence[Sequence[str]], style: str, widths: Sequence[int], gap: int, names: int, ascii_only: bool
) -> Iterator[Text]:
    """The lines of a row, given those of its cells: names to the left, numbers to the right."""
    for parts in zip_longest(*columns, fillvalue=""):
        cells = []
        for i, (part, width) in enumerate(zip(parts, widths, strict=True)):
            space = " " * (width - cell_len(part))
            cells.append(part + space if i < names else space + part)
        line = (" " * gap).join(cells).rstrip()
        yield Text(line.translate(ASCII) if ascii_only else line, style, no_wrap=True)


def _layouts(table: Table, width: int) -> Iterator[tuple[list[int], list[int], int]]:
    """(places of columns, their widths, the gap between them) of each table that a wide one is cut into."""
    rows = [row.cells for row in table.rows if isinstance(row, Row)]
    natural = [_natural(column, [row[i] for row in rows]) for i, column in enumerate(table.columns)]
    names, rest = list(range(table.names)), list(range(table.names, len(natural)))
    gap = 2 if sum(natural) + 2 * (len(natural) - 1) <= width else 1
    least = sum(min(natural[i], NAME_LEAST if table.names == 1 else NAME_LEAST // 2) + gap for i in names)
    while True:
        keep: list[int] = []
        used = least
        for i in rest:
            size = min(natural[i], width - least)
            if keep and used + size > width:
                break
            keep, used, natural[i] = [*keep, i], used + size + gap, size
        free = width - sum(natural[i] + gap for i in keep) - gap * (len(names) - 1)
        widths = {**{i: natural[i] for i in keep}, **_name_widths([natural[i] for i in names], free)}
        charts = [i for i in keep if any(isinstance(row[i], Chart) for row in rows)]
        for i in charts:  # a chart grows into what the names leave
            widths[i] = min(widths[i] + free - sum(widths[name] for name in names), CHART_MOST)
        yield [*names, *keep], [widths[i] for i in (*names, *keep)], gap
        rest = rest[len(keep) :]
        if not rest:
            return


def _natural(column: Column, cells: Sequence[Any]) -> int:
    """The width at which nothing of a column folds but a long head."""
    if any(isinstance(cell, Chart) for cell in cells):
        return CHART_LEAST
    head = column.narrow
    words = cell_len(head) if cell_len(head) <= HEAD_WHOLE else max(map(cell_len, head.split()))
    return max([min(words, HEAD_MOST), 1, *(cell_len(str(cell)) for cell in cells)])


def _name_widths(natural: Sequence[int], free: int) -> dict[int, int]:
    """Names as wide as they are, or in what is left: of two the second folds first where the first is short."""
    if sum(natural) <= free or len(natural) == 1:
        return dict(enumerate([min(natural[0], max(free, 4)), *natural[1:]]))
    first = min(natural[0], max(free // 2, free - natural[1]))
    return {0: first, 1: min(natural[1], free - first)}


def folded(text: str, width: int, hang: str = "  ") -> list[str]:
    """Lines of at most `width` columns, broken after a space or a mark where there is one; all but the first hang, so
    that none is taken for a row of its own."""
    lines, text = [], " ".join(text.split())
    while cell_len(text) > width:
        piece = chop_cells(text, width)[0]
        cut = max(text.rfind(" ", 0, len(piece) + 1), *(piece.rfind(mark) + 1 for mark in ",/_-:"))
        cut = cut if cut > len(hang) else len(piece)
        lines.append(text[:cut].rstrip())
        text = hang + text[cut:].lstrip()
    return [*lines, text]


def whisker(estimate: Estimate | None, width: int, low: float, high: float) -> str:
    """`··──●──···` in `width` characters from low to high; where 0 lies inside, it is marked. "" without a number."""
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


# ---- pages and papers


def to_html(table: Table) -> str:
    """The table, every text escaped, and its caption below; the title is left to the page's sections."""
    shown = table.shown("page")
    heads = "".join(f'<th scope="col">{escape(column.head)}</th>' for column in shown.columns)
    lines = "".join(_html_row(row, len(shown.columns)) for row in shown.rows)
    body = f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{lines}</tbody></table></div>'
    return (body if lines else "") + "".join(map(soft_text, table.caption))


def _html_row(row: Row | str, columns: int) -> str:
    if isinstance(row, str):
        return f'<tr class="over"><th colspan="{columns}" scope="rowgroup">{escape(row)}</th></tr>' if row else ""
    mark = f' class="{row.mark}"' if row.mark else ""
    return f"<tr{mark}>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row.cells)}</tr>"


def to_markdown(table: Table) -> str:
    """The table alone; a heading is a row of its own."""
    shown = table.shown("page")
    empty = [""] * (len(shown.columns) - 1)
    lines = [[column.head for column in shown.columns]]
    lines += [[row, *empty] if isinstance(row, str) else [*map(str, row.cells)] for row in shown.rows]
    head, *rest = (f"| {' | '.join(map(plain_markdown, cells))} |\n" for cells in lines)
    return "".join([head, f"|---|{'---:|' * len(empty)}\n", *rest])


def plain_markdown(text: str) -> str:
    """Text that Markdown shows as it is."""
    return "".join(f"\\{each}" if each in "|*_`<#" else " " if each in "\r\n" else each for each in text)


def to_latex(table: Table, name: str) -> str:
    """A floating table to be \\input, with its caption; it needs \\usepackage{booktabs} and a file of UTF-8."""
    shown = table.shown("page")
    lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", r"\small"]
    lines += [rf"\begin{{tabular}}{{l{'r' * (len(shown.columns) - 1)}}}", r"\toprule"]
    lines += [_latex_row([column.head for column in shown.columns])]
    lines += [] if isinstance(shown.rows[0], str) else [r"\midrule"]
    for row in shown.rows:
        over = rf"\multicolumn{{{len(shown.columns)}}}{{l}}{{{plain_latex(row)}}} \\" if isinstance(row, str) else ""
        lines += [r"\midrule", over] if isinstance(row, str) else [_latex_row(row.cells)]
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{plain_latex(' '.join(table.caption))}}}"]
    return "\n".join([*lines, rf"\label{{{re.sub(r'[^A-Za-z0-9:-]', '-', name)}}}", r"\end{table}", ""])


def _latex_row(cells: Sequence[str]) -> str:
    # A row that began with [ would be read as an option of the row end before it.
    return " & ".join("{}" * cell.startswith("[") + plain_latex(cell) for cell in cells) + r" \\"


def plain_latex(text: str) -> str:
    """Text that LaTeX prints as it is, in one line."""
    return "".join(LATEX.get(each, each) for each in re.sub(r"\s+", " ", text))


# ---- data


def records(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the same columns, each of one type: what is not numbers throughout becomes text; None stays."""
    rows = list(rows)
    columns = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    for key, values in columns.items():
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 or not kinds <= {int, float, bool, str}:
            form = float if kinds == {int, float} else _text
            columns[key] = [None if value is None else form(value) for value in values]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, list | tuple | dict) else label(value)


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """`records` with a head, no number rounded; an empty field is None; "" without rows."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue()


def to_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """`records` with their types."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()
