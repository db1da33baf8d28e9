"""A sweep's tables as LaTeX with booktabs: cells with differences, every text escaped. No torch."""

from __future__ import annotations

import re
from collections.abc import Sequence

from srppo.ablations.analysis import SweepResult
from srppo.report.sweep_answer import answer
from srppo.report.sweep_layout import metric_words, pair_words, primary_metric, tested_by_pair
from srppo.report.sweep_tables import cells_table, difference_cells
from srppo.report.sweep_words import family_line, interval_line, missing_lines, progress_line

_SPECIAL = {
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


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is, in one line."""
    return "".join(_SPECIAL.get(each, each) for each in re.sub(r"\s+", " ", text))


def to_latex(result: SweepResult) -> str:
    """Two tables to be \\input; both need \\usepackage{booktabs} and stand in files of UTF-8."""
    sweep = result.plan.sweep
    head, rows = cells_table(result)
    caption = [f"{sweep.name}: {sweep.question}", answer(result), progress_line(result), interval_line(result)]
    caption.append(
        f"Accuracy, {metric_words(primary_metric(sweep))}. TFLOPs are counted training operations, parents included."
    )
    if missing := missing_lines(result):
        caption.append(f"Without all their seeds: {'; '.join(missing)}.")
    cells = _table(head, [("", rows)], caption, f"tab:{sweep.name}")
    groups = []
    for pair, found in tested_by_pair(result, primary_metric(sweep)).items():
        groups.append((pair_words(pair), [[row or "all", *difference_cells(each)] for row, _, each in found]))
    if not groups:
        return cells
    caption = [
        f"{sweep.name}: paired differences of accuracy, {metric_words(primary_metric(sweep))}.",
        interval_line(result),
    ]
    heads = ["", "difference", "p", "Holm", "detects", "verdict"]
    return cells + "\n" + _table(heads, groups, [*caption, family_line(result)], f"tab:{sweep.name}-differences")


def _table(
    head: Sequence[str], groups: Sequence[tuple[str, list[list[str]]]], caption: Sequence[str], name: str
) -> str:
    """Groups of rows, each under its title, which may be empty."""
    columns = "l" + "r" * (len(head) - 1)
    lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", r"\small"]
    lines += [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", _row(head)]
    for title, rows in groups:
        lines.append(r"\midrule")
        if title:
            lines.append(rf"\multicolumn{{{len(head)}}}{{l}}{{{escaped(title)}}} \\")
        lines += [_row(row) for row in rows]
    text = " ".join(line for line in caption if line)
    lines += [r"\bottomrule", r"\end{tabular}", rf"\caption{{{escaped(text)}}}"]
    return "\n".join([*lines, rf"\label{{{re.sub(r'[^A-Za-z0-9:-]', '-', name)}}}", r"\end{table}", ""])


def _row(cells: Sequence[str]) -> str:
    # A row that began with [ would be read as an option of the row end before it.
    return " & ".join("{}" + escaped(cell) if cell.startswith("[") else escaped(cell) for cell in cells) + r" \\"
