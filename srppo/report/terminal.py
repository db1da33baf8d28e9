"""Tables for the terminal: 80 columns, legible in a plain log."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from srppo.report.figures import (
    GROUP_MEANING,
    GROUP_WORDS,
    ArmFigures,
    cost_caption,
    decodings_of,
    estimate_text,
    groups_of,
    interval_caption,
    kept_text,
    number_text,
    problem_lines,
    teraflops,
)

NAME_WIDTH = 18
CELL_WIDTH = len("0.43 [0.38, 0.49]")
SIGNS_WIDTH = 3  # a difference has a sign before each of its three numbers
GROUPS_A_TABLE = 3
NO_RESULT = "no result"
WIDTH = 80


def arms_table(arms: Sequence[ArmFigures], title: str = "Test items") -> RenderableType:
    """Accuracy by group and decoding, cost of each arm, and what the intervals mean; at most 80 columns."""
    groups, parts = groups_of(arms), []
    for start in range(0, len(groups), GROUPS_A_TABLE):
        parts.append(_accuracy_table(arms, groups[start : start + GROUPS_A_TABLE], title if start == 0 else ""))
    parts.append(_cost_table(arms))
    problems = problem_lines(arms)
    notes = [f"{arm.name}: {arm.note}" for arm in arms if arm.note]
    captions = [interval_caption(arms), *_meanings(groups), cost_caption(arms), *notes]
    lines = [Text(line, "bold red") for line in problems] + [Text(line, "dim") for line in captions if line]
    return Group(*parts, *(Narrow(line) for line in lines))


def differences_table(
    pairs: Sequence[ArmFigures], title: str = "Paired differences: SRPPO minus", caption: str = ""
) -> RenderableType:
    """Differences of accuracy between arms on the same items and seeds; at most 80 columns."""
    groups = groups_of(pairs)
    starts = range(0, len(groups), GROUPS_A_TABLE)
    tables = [_accuracy_table(pairs, groups[i : i + GROUPS_A_TABLE], title, sign="+") for i in starts]
    return Group(*tables, Narrow(Text(caption, "dim")))


def _accuracy_table(arms: Sequence[ArmFigures], groups: Sequence[str], title: str, sign: str = "") -> Table:
    table = _table(title)
    signs = SIGNS_WIDTH if sign else 0  # the name gives way, so that the table stays as wide
    table.add_column("", width=NAME_WIDTH - GROUPS_A_TABLE * signs, overflow="fold")
    for group in groups:
        head = Text(GROUP_WORDS.get(group, group))
        table.add_column(head, width=CELL_WIDTH + signs, justify="right", overflow="fold")
    decodings = decodings_of(arms)
    for decoding in decodings:
        table.add_row(Text(decoding, "bold"))
        for arm in arms:
            cells = [estimate_text(arm.figures.get((group, decoding)), sign) for group in groups]
            if arm.problem and not arm.figures:
                cells = [NO_RESULT] + [""] * (len(groups) - 1)
            table.add_row(_name(arm), *map(Text, cells))
        if decoding != decodings[-1]:
            table.add_section()
    return table


def _cost_table(arms: Sequence[ArmFigures]) -> Table:
    columns = [
        ("TFLOPs", [teraflops(arm.flops) for arm in arms]),
        ("seconds", [number_text(arm.seconds, ",.0f") for arm in arms]),
        ("kept step", [kept_text(arm) for arm in arms]),
        ("length", [number_text(arm.mean_length) for arm in arms]),
        ("ended", [number_text(arm.ended_share, ".0%") for arm in arms]),
        ("NLL", [number_text(arm.nll, ".3f") for arm in arms]),
    ]
    table = _table("")
    table.add_column("", width=NAME_WIDTH, overflow="fold")
    shown = [(head, cells) for head, cells in columns if any(cell != "-" for cell in cells)]
    for head, _ in shown:
        table.add_column(head, justify="right", overflow="fold", max_width=9)
    for i, arm in enumerate(arms):
        cells = [column[i] for _, column in shown]
        if arm.problem and shown and all(cell == "-" for cell in cells):
            cells = [NO_RESULT] + [""] * (len(shown) - 1)
        table.add_row(_name(arm), *map(Text, cells))
    return table


def _table(title: str) -> Table:
    return Table(
        title=Text(title) if title else None,
        title_style="bold",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )


def _name(arm: ArmFigures) -> Text:
    """Long names break before their bracket."""
    name = arm.name if len(arm.name) <= NAME_WIDTH else arm.name.replace(" (", "\n (")
    return Text(name, "red" if arm.problem else "")


def _meanings(groups: Sequence[str]) -> list[str]:
    known = [GROUP_MEANING[g] for g in groups if g in GROUP_MEANING]
    return ["; ".join(known) + "."] if known else []


class Narrow:
    """A paragraph no wider than the tables."""

    def __init__(self, text: Text) -> None:
        self.text = text

    def __rich_console__(self, console, options):  # type: ignore[no-untyped-def]
        yield from console.render(self.text, options.update(width=min(options.max_width, WIDTH)))
