"""What a report says of curves: the answer, the table, the figure, and where an arm does not get so far."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from curve_records import PLAN, analysed, sweep_of

from srppo.ablations.analysis import SweepResult
from srppo.console import Console
from srppo.report.sweep import report_sweep
from srppo.report.sweep_curves import curves_answer, matched_records, matched_table
from srppo.report.table import to_markdown


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SweepResult]:
    """(folder, result) of every seed and step, as `curve_records` makes them."""
    folder = tmp_path_factory.mktemp("curves") / "run"
    return folder, analysed(folder, sweep_of())


def test_the_answer_and_the_table_name_what_is_out_of_reach(whole: tuple[Path, SweepResult]) -> None:
    _, result = whole
    said = curves_answer(result)
    assert "At KL 0.5: coherent is better than brevity and shuffled" in said
    assert "At KL 1.5: coherent is better than brevity; out of reach: shuffled" in said
    assert "Holm over 4; over these 10 tasks; 8 seeds" in said
    text = to_markdown(matched_table(result.curves[0], PLAN))
    assert "coherent minus each, at KL 1.5 (75% of what it reaches)" in text and "| out of reach | 0.6 |" in text
    rows = list(matched_records(result))
    assert [row["verdict"] for row in rows] == ["better", "better", "better", "out of reach"]


def test_nothing_measured_is_no_answer(tmp_path: Path) -> None:
    result = analysed(tmp_path / "run", sweep_of(1), steps=())
    assert curves_answer(result) == "No answer yet: none of the 4 planned comparisons has a result."


def test_page_terminal_and_files(whole: tuple[Path, SweepResult]) -> None:
    out = io.StringIO()
    page = report_sweep(whole[0], Console(plain=True, file=out))
    text = out.getvalue()
    assert max(map(len, text.splitlines()[: text.splitlines().index("")])) <= 80
    assert "out of reach" in text and "coherent minus each, at KL 0.5" in text
    html = page.read_text()
    assert "At equal distance from the SFT model" in html and "curves.svg" in html
    for name in ("curves.png", "matched.csv", "curves.csv"):
        assert (page.parent / name).stat().st_size > 0
    assert len((page.parent / "curves.csv").read_text().splitlines()) == 1 + 3 * 5  # the start and 4 policies an arm
