"""One table in every form: what folds, what never does, and what each form escapes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.cells import cell_len
from rich.console import Console as RichConsole

from srppo.report.table import (
    Chart,
    Column,
    Row,
    Table,
    folded,
    records,
    to_csv,
    to_html,
    to_latex,
    to_markdown,
    to_parquet,
    whisker,
)
from srppo.statistics.intervals import Estimate


def printed(table: Table, width: int = 80, encoding: str = "utf-8") -> list[str]:
    """The lines on a terminal so wide."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    RichConsole(file=stream, width=width, color_system=None).print(table)
    stream.flush()
    return [line.rstrip() for line in raw.getvalue().decode(encoding).splitlines()]


LONG = "Llama-3.2-1B-Instruct-of-a-rather-long-name, prompt_level_strict_acc"
WIDE = Table.of(
    "Scores",
    ["", *(f"metric {i}" for i in range(8))],
    [[LONG, *(f"0.{i}85 [0.100, 0.999]" for i in range(8))], ["short", *["-"] * 8]],
    ["What it means."],
)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_numbers_are_never_folded(width: int) -> None:
    """The kind of fault: a name that wraps while the numbers of the next metric stand beside its second line."""
    lines = printed(WIDE, width)
    assert max(map(len, lines)) <= min(width, 80)
    for i in range(8):
        assert sum(f"0.{i}85 [0.100, 0.999]" in line for line in lines) == 1
    assert lines[0] == "Scores" and "What it means." in lines


def test_a_folded_name_hangs_and_its_numbers_stand_beside_its_first_line() -> None:
    lines = printed(Table.of("", ["", "a"], [[LONG, "0.285 [0.1, 0.9]"], ["second", "1"]]), 40)
    first = next(i for i, line in enumerate(lines) if line.startswith("Llama"))
    second = next(i for i, line in enumerate(lines) if line.startswith("second"))
    assert "0.285 [0.1, 0.9]" in lines[first]
    assert second - first > 1 and all(line.startswith("  ") for line in lines[first + 1 : second])
    name = "".join(line.strip() for line in [lines[first].split(" 0.285")[0], *lines[first + 1 : second]])
    assert name.replace(" ", "") == LONG.replace(" ", "")


def test_what_does_not_fit_stands_below_with_its_names() -> None:
    lines = printed(WIDE)
    shown = [line for line in lines if "metric" in line]
    assert len(shown) > 1 and [word for line in shown for word in line.replace("metric ", "metric").split()] == [
        f"metric{i}" for i in range(8)
    ]
    assert sum(line.startswith("short") for line in lines) == len(shown), "each part names its rows"


@pytest.mark.parametrize(
    "text", ["", "a b", "x" * 50, "one, two/three_four-five:six", "日本語の名前はとても長い" * 3, "[bold]x[/bold]"]
)
@pytest.mark.parametrize("width", [4, 9, 18])
def test_folding_keeps_every_character_and_the_width(text: str, width: int) -> None:
    lines = folded(text, width)
    assert max(map(cell_len, lines)) <= width
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_columns_that_say_nothing_are_left_out_and_places_have_their_own() -> None:
    heads = [Column("long head", "short"), Column("page", only="page"), Column("", only="terminal"), Column("empty")]
    table = Table.of("t", heads, ["over", Row(["a", "1", Chart(Estimate(0.5, 0.4, 0.6, 9), 0.0, 1.0), "-"], "good")])
    assert [column.head for column in table.telling().columns] == ["long head", "page", ""]
    text, html = "\n".join(printed(table)), to_html(table)
    assert "short" in text and "●" in text and "page" not in text and "over" in text
    assert "<td>1</td>" in html and "●" not in html and '<tr class="good">' in html and 'colspan="3"' in html
    assert to_markdown(table).splitlines() == [
        "| long head | page | empty |",
        "|---|---:|---:|",
        "| over |  |  |",
        "| a | 1 | - |",
    ]
    latex = to_latex(table, "tab:a b")
    assert r"\multicolumn{3}{l}{over} \\" in latex and r"a & 1 & - \\" in latex and r"\label{tab:a-b}" in latex
    assert "o" in "\n".join(printed(table, encoding="ascii"))


def test_markdown_and_html_show_text_as_it_is() -> None:
    table = Table.of("", ["a|b", "c*"], [["<b>_x_", "`1`\n#"]])
    assert to_markdown(table).splitlines()[2] == r"| \<b>\_x\_ | \`1\` \# |"
    assert "<b>" not in to_html(table) and "&lt;b&gt;_x_" in to_html(table)


def test_whiskers() -> None:
    assert whisker(Estimate(0.5, 0.25, 0.75, 9), 8, 0.0, 1.0) == "··──●──·"
    assert whisker(Estimate(1.0, 0.9, 1.0, 9), 10, 0.0, 1.0) == "·········●"
    assert whisker(Estimate(0.5, 0.3, 0.7, 9), 10, -1.0, 1.0) == "·····│─●─·"
    assert whisker(None, 8, 0.0, 1.0) == ""
    below = whisker(Estimate(-0.5, -0.9, -0.2, 9), 11, -1.0, 1.0)
    assert below[5] == "│" and below.index("●") < 5


def test_values_that_are_not_all_numbers_become_text() -> None:
    rows: list[Mapping[str, Any]] = [
        {"a": 1, "b": 1, "c": "x"},
        {"a": 0.5, "b": "many"},
        {"a": None, "b": None, "c": [1]},
    ]
    even = records(rows)
    assert even == [
        {"a": 1.0, "b": "1", "c": "x"},
        {"a": 0.5, "b": "many", "c": None},
        {"a": None, "b": None, "c": "[1]"},
    ]
    assert pq.read_table(io.BytesIO(to_parquet(even))).to_pylist() == even
    assert to_csv(even).splitlines() == ["a,b,c", "1.0,1,x", "0.5,many,", ",,[1]"]
    assert to_csv(records([])) == ""
