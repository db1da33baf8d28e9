"""The page of `srppo forecast`: whole on its own, with every figure and sentence that the terminal has."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from analysis.test_forecast import draws
from pages import offline_page

from srppo.analysis.forecast import ForecastResult
from srppo.analysis.optimum import Point, measured, optimum, point_of, reached_of
from srppo.console import Console
from srppo.report.forecast import CANNOT, report_forecast, sentences
from srppo.report.words import estimate_text

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def result() -> ForecastResult:
    many = draws(40, 200)
    groups, ours = np.array(["demonstrated", "unseen"] * 20), np.ones(40, dtype=bool)

    def point(anchor: str, beta: float) -> Point:
        return point_of(
            optimum(many, anchor, beta), groups, ours, f"{anchor} {beta:g}", anchor=anchor, beta=beta, k=200
        )

    itself = measured(many, "sft", 0.5)
    arm = replace(point_of(itself, groups, ours, "PPO, step 3 (kept)"), arm="PPO", step=3)
    reached = reached_of("PPO, step 3 (kept)", ("sft", 0.5), itself, itself, optimum(many, "sft", 0.5), ours)
    points = (point("sft", 1.0), point("sft", 0.5), point("sft", 0.02), point("base", 1.0))
    start = point_of(itself, groups, ours, "SFT")
    training = {"PPO": ({"kl_sft": 0.1, "reward": 0.2}, {"kl_sft": 0.2, "reward": 0.4, "dev/accuracy": 0.5})}
    names = (HOSTILE, "base", "sft", 0.5, 200, 40)
    return ForecastResult(*names, points, start, (arm,), (reached,), training, ("A note.",))


def test_the_page_says_what_the_terminal_says(result: ForecastResult, tmp_path: Path) -> None:
    out = io.StringIO()
    path = report_forecast(result, tmp_path, Console(plain=True, file=out))
    assert path == tmp_path / "forecast.json"
    printed = "".join(out.getvalue().split())
    for name in ("frontier.png", "frontier.svg", "forecast.json", "forecast.html"):
        assert f"forecast:{tmp_path / name}" in printed and (tmp_path / name).exists()
    page = offline_page(tmp_path / "forecast.html")
    assert page.seen.count("svg") == 2 and page.seen.count("table") == 2
    for sentence in (*sentences(result), "A note.", HOSTILE, "Effective samples (ESS)", "sft 0.5*"):
        assert sentence in page.text
    for point in (result.start, *result.checkpoints, *(p for p in result.points if p.answered)):
        assert estimate_text(point.reward).replace(", ", ",") in page.text
    own = result.own
    assert own is not None
    assert estimate_text(own.by_group["unseen"]) in page.text


def test_what_cannot_be_said_is_no_figure(result: ForecastResult, tmp_path: Path) -> None:
    hidden = next(point for point in result.points if point.beta == 0.02)
    assert not hidden.answered
    report_forecast(result, tmp_path, Console(plain=True, file=io.StringIO()))
    html = (tmp_path / "forecast.html").read_text()
    row = re.search(r"<tr><td>sft 0\.02</td>.*?</tr>", html)
    assert row is not None and CANNOT in row[0] and estimate_text(hidden.reward).replace(", ", ",") not in row[0]


def test_one_group_and_no_answers_are_left_out(result: ForecastResult, tmp_path: Path) -> None:
    def bare(point: Point) -> Point:
        return replace(point, accuracy=None, by_group={})

    reached = tuple(replace(each, differences={}) for each in result.reached)
    plain = replace(result, start=bare(result.start), points=tuple(map(bare, result.points)), reached=reached)
    plain = replace(plain, checkpoints=tuple(map(bare, result.checkpoints)), training={}, notes=())
    report_forecast(plain, tmp_path, Console(plain=True, file=io.StringIO()))
    page = offline_page(tmp_path / "forecast.html")
    assert "Accuracy by group" not in page.text and "Notes" not in page.text and page.seen.count("table") == 1
