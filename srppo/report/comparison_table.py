"""A comparison in the terminal: tables of 80 columns, a sentence for each difference, and what the columns mean."""

from __future__ import annotations

from rich import box
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from srppo.evaluation.comparison import Aggregate, ComparisonResult, Difference, number, p_text, signed
from srppo.statistics.intervals import Estimate
from srppo.statistics.tests import seeds_needed

WIDTH = 80
COLOURS = {"better": "green", "worse": "red", "cannot tell": ""}
NAMES_SHOWN = 3


def comparison_table(found: ComparisonResult) -> RenderableType:
    """A table and sentences for each decoding and model, then what the columns mean; at most 80 columns."""
    parts: list[RenderableType] = []
    for decoding, model in dict.fromkeys((each.decoding, each.model) for each in found.differences):
        rows = [each for each in found.differences if (each.decoding, each.model) == (decoding, model)]
        whole = [each for each in found.aggregates if (each.decoding, each.model) == (decoding, model)]
        parts.append(_table(f"{decoding}: {model} minus {found.baseline}", rows, whole))
        parts.append(Text(""))
        parts += [_line(each.sentence, COLOURS[each.verdict]) for each in rows]
        parts += [_line(line, "dim") for line in dict.fromkeys(line for each in rows for line in remarks(each))]
        parts.append(Text(""))
    return Group(*parts, *(_line(line, "dim") for line in captions(found)))


def _line(text: str, style: str) -> RenderableType:
    return Constrain(Text(text, style), WIDTH)


def _table(title: str, rows: list[Difference], whole: list[Aggregate]) -> Table:
    table = Table(title=Text(title), title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, show_edge=False)
    table.padding, table.pad_edge = (0, 1, 0, 0), False  # ends of lines are free: 80 columns are just enough
    table.add_column("", width=13, overflow="fold")
    for head, width in (("baseline", 8), ("model", 5), ("difference", 23), ("p", 6), ("Holm", 6), ("detects", 7)):
        table.add_column(head, justify="right", min_width=width, overflow="fold")
    for each in rows:
        cells = [number(each.baseline_mean), number(each.model_mean), signed(each.difference)]
        cells += [p_text(each.p), p_text(each.p_holm), number(each.detectable)]
        table.add_row(Text(each.task), *map(Text, cells), style=COLOURS[each.verdict])
    if whole:
        table.add_section()
    for one in whole:
        cells = [number(one.iqm.baseline.mean), number(one.iqm.model.mean), signed(one.iqm.difference)]
        table.add_row(Text(average(one)), *map(Text, cells), "", "", "")
    return table


def average(one: Aggregate) -> str:
    """`IQM, 3 tasks`; with fewer than four values nothing is cut, and it is a mean."""
    return f"{'IQM' if len(one.tasks) * one.seeds > 3 else 'mean'}, {len(one.tasks)} tasks"


def aggregate_sentence(one: Aggregate) -> str:
    """Both models' interquartile means and their difference, with intervals."""
    over = f"{len(one.tasks)} tasks" + (f" and {one.seeds} seeds" if one.seeds > 1 else "")
    arms = f"{one.model} {_plain(one.iqm.model)}, {one.baseline} {_plain(one.iqm.baseline)}"
    return f"{average(one)} ({one.decoding}), over {over}: {arms}, difference {signed(one.iqm.difference)}."


def _plain(estimate: Estimate) -> str:
    return f"{number(estimate.mean)} [{number(estimate.low)}, {number(estimate.high)}]"


def remarks(found: Difference) -> list[str]:
    """What could not be paired, counted, the first few named; and how seeds were paired."""
    lines = [f"{found.task}: {note}" for note in found.notes]
    for reason, items in found.left_out.items():
        named = "; ".join(items[:NAMES_SHOWN]) + ("; ..." if len(items) > NAMES_SHOWN else "")
        lines.append(f"{found.task}: {len(items)} items left out, {reason} ({named})")
    return lines


def captions(found: ComparisonResult) -> list[str]:
    """What the columns are, and what few seeds cannot show."""
    several = [len(each.seeds) for each in found.differences if len(each.seeds) > 1]
    over = "items and training seeds, resampled crossed" if several else "items, resampled"
    if any(each.clusters for each in found.differences):
        over += " in their clusters"
    tests = ", ".join(dict.fromkeys(each.test for each in found.differences))
    comparisons = max(each.comparisons for each in found.differences)
    family = f"Holm: p corrected over the {comparisons} comparisons of a decoding. " if comparisons > 1 else ""
    lines = [
        f"Paired on items{' and seeds' if several else ''}. {100 * (1 - found.alpha):.4g}% intervals over {over}, as "
        f"wide as t intervals. p: {tests}, two-sided. {family}Better or worse: Holm at most {found.alpha:g} and an "
        "interval without 0. Detects: the true difference that 80% of such comparisons would show, before correction."
    ]
    for one, needed in ((1, seeds_needed(found.alpha)), (comparisons, seeds_needed(found.alpha, comparisons))):
        if several and min(several) < needed:
            asked = f"p <= {found.alpha:g}" + (f" by Holm over {one} comparisons" if one > 1 else "")
            lines.append(f"Too few seeds ({min(several)}): the exact sign-flip test needs {needed} to reach {asked}.")
            break
    return lines
