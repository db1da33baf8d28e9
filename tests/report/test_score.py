"""Scored responses in words and pictures, made by hand."""

from __future__ import annotations

import re
from pathlib import Path

from tiny import quiet_console

from srppo.analysis.score import Scored, ScoreResult, Token
from srppo.report.score import report_score


def test_one_of_a_kind_is_in_the_singular_and_lengths_are_whole(tmp_path: Path) -> None:
    tokens = (Token(" a", 1.0, -30.0), Token("b", -0.5, -1.0))
    rows = tuple(Scored(f"q{i}", " ab", tokens, True, "ab", bool(i % 2)) for i in range(3))
    console = quiet_console()
    report_score(ScoreResult(rows, "sft", "base", "given"), tmp_path / "three", console, top=1, bottom=0)
    report_score(ScoreResult((Scored("q", " a", tokens[:1], True),), "sft", "base", "given"), tmp_path / "one", console)
    said = console._file.getvalue()  # type: ignore[union-attr]
    assert "1 token off the base's support" in said and "3 responses, given" in said and "1 response, given" in said
    assert not re.search(r"\b1 (tokens|responses)", said)
    svg = (tmp_path / "three" / "reward.svg").read_text()
    ticks = re.findall(r"<text[^>]*>([\d.−]+)</text>", svg.partition("length, tokens")[0])
    assert ticks[:3] == ["1", "2", "3"], "every answer has 2 tokens, none 1.95"
