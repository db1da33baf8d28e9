"""What `srppo eval` measured reaches the page and the terminal; plots have a form for phones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import offline_page

from srppo.console import Console
from srppo.evaluation.results import write_result
from srppo.report.answers import SHARE, interval
from srppo.report.evaluated import TITLE, evaluated_of
from srppo.report.figures import estimate_text
from srppo.report.html import inline_plot
from srppo.report.places import page_folder
from srppo.report.plots import narrow_of, save_figure
from srppo.report.record import report_run
from srppo.statistics.intervals import item_interval
from tests.report.test_run_page import finish, new_run


def write(stage_path: Path, model: str, seed: int, scores: list[list[float]], **more: Any) -> None:
    """A result of one arm and seed, an inner list an item's samples."""
    summary = {"model": model, "task": "sums", "decoding": "greedy", "metric": "acc", "seed": seed, "group": None}
    rows = [{"item": f"i{i}", "sample": j, "acc": value} for i, row in enumerate(scores) for j, value in enumerate(row)]
    write_result(stage_path / "eval", {**summary, "num_fewshot": 5, "key": f"{len(more)}{seed}", **more}, rows)


def test_every_evaluated_task_of_every_arm_is_shown(tmp_path: Path) -> None:
    """Two seeds of two arms on one task, sampled on another by one arm, with an item that was not scored."""
    run, rng = new_run(tmp_path / "run", [0, 1]), np.random.default_rng(0)
    greedy = rng.integers(0, 2, (2, 2, 20)).astype(float)
    for seed in (0, 1):
        sft = finish(run.stage("sft", {"seed": seed}), seed, 0.3, [], 0)
        ppo = finish(run.stage("ppo", {"seed": seed}, [sft.id]), seed, 0.5, [], 0)
        for arm, stage, scores in zip(("SFT", "SRPPO"), (sft, ppo), greedy[:, seed], strict=True):
            write(stage.path, arm, seed, [[value] for value in scores])
    shares = rng.integers(0, 2, (8, 4)).astype(float)
    extra = {"task": "odd_one", "decoding": "sampled", "samples": 4, "eval_seed": 3, "num_fewshot": 0}
    write(sft.path, "SFT", 1, [*shares.tolist(), [float("nan")] * 4], **extra)
    said = io.StringIO()
    report_run(run.path, Console(plain=True, file=said))
    page, printed = offline_page(run.path / "report" / "index.html").text, said.getvalue()
    assert TITLE in page and TITLE in printed and max(map(len, printed.splitlines()[:-3])) <= 80
    wanted = [estimate_text(interval(values, SHARE)) for values in greedy]
    wanted.append(estimate_text(item_interval(shares.mean(axis=1))))
    for text in wanted:
        assert text in page and text in printed
    for text in ("odd_one", "sums", "sampled (4, seed 3)", "1 of odd_one (SFT)"):
        assert text in page and text in printed
    assert "sums, acc, greedy, 5 shots" in printed and "items and training seeds (1 to 2 seeds)" in page


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", [0])
    assert evaluated_of(run.path) == ([], [])
    stage = finish(run.stage("sft", {"seed": 0}), 0, 0.3, [], 0)
    assert evaluated_of(run.path) == ([], []), "a run's own tests have sections of their own"
    write(stage.path, "SFT", 0, [[1.0]])
    next(stage.path.glob("eval/sums@*/samples.parquet")).write_bytes(b"")
    found, problems = evaluated_of(run.path)
    assert found == [] and "is damaged" in problems[0]


def test_plots_have_a_form_for_phones(tmp_path: Path) -> None:
    def draw(figure: Any) -> None:
        for axis, title in zip(figure.subplots(1, 3, sharey=True), "abc", strict=True):
            axis.plot([0, 1], label="a line with a rather long name")
            axis.set_title(title)
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower left")

    svg = save_figure(draw, tmp_path / "plot", height=3.0)[1]
    sizes = [path.read_text().partition('viewBox="0 0 ')[2].partition('"')[0].split() for path in (svg, narrow_of(svg))]
    (wide, low), (narrow, tall) = [list(map(float, size)) for size in sizes]
    assert narrow < 0.5 * wide and tall > 2.5 * low
    html = inline_plot("A plot", svg, 7)
    assert html.count("<svg") == 2 and 'class="wide roomy"' in html and 'class="narrow"' in html
    narrow_of(svg).unlink()
    assert inline_plot("A plot", svg, 7).count("<svg") == 1


@pytest.mark.parametrize(
    ("run", "sft", "seed", "name"),
    [
        (Path("elsewhere/mine"), "x", None, "mine"),
        (Path("runs/mine"), "x", 3, "mine-seed-3"),
        (None, "runs/newest/stages/0123/model", None, "newest"),
        (None, "hub/some-model", None, "hub-some-model"),
    ],
)
def test_pages_of_two_runs_do_not_meet(run: Path | None, sft: str, seed: int | None, name: str) -> None:
    assert page_folder("score", run, sft, seed) == Path("runs/score") / name
