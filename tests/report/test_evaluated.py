"""What `srppo eval` measured reaches the page and the terminal; plots have a form for phones."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from pages import offline_page
from records import evaluate, finish, new_run

from srppo.config import canonical_json
from srppo.console import Console
from srppo.record.json import plain
from srppo.report.answers import SHARE, interval
from srppo.report.evaluated import evaluated_table, scores_table
from srppo.report.run import report_run
from srppo.report.words import estimate_text
from srppo.statistics.intervals import item_interval


def test_every_evaluated_task_of_every_arm_is_shown(tmp_path: Path) -> None:
    """Two seeds of two arms on one task, sampled on another by one arm, with an item that was not scored."""
    run, rng = new_run(tmp_path / "run", [0, 1]), np.random.default_rng(0)
    greedy = rng.integers(0, 2, (2, 2, 20)).astype(float)
    for seed in (0, 1):
        sft = finish(run.stage("sft", {"seed": seed}), seed, 0.3, [], 0)
        ppo = finish(run.stage("ppo", {"seed": seed}, [sft.id]), seed, 0.5, [], 0)
        for arm, stage, scores in zip(("SFT", "SRPPO"), (sft, ppo), greedy[:, seed], strict=True):
            evaluate(stage, arm, seed, [[value] for value in scores])
    shares = rng.integers(0, 2, (8, 4)).astype(float)
    extra = {"task": "odd_one", "decoding": "sampled", "samples": 4, "eval_seed": 3, "num_fewshot": 0}
    evaluate(sft, "SFT", 1, [*shares.tolist(), [float("nan")] * 4], **extra)
    said = io.StringIO()
    report_run(run.path, Console(plain=True, file=said))
    page, printed = offline_page(run.path / "report" / "index.html").text, said.getvalue()
    assert (
        all("Tasks of srppo eval" in said for said in (page, printed))
        and max(map(len, printed.splitlines()[:-3])) <= 80
    )
    wanted = [estimate_text(interval(values, SHARE)) for values in greedy]
    wanted.append(estimate_text(item_interval(shares.mean(axis=1))))
    for text in wanted:
        assert text in page and text in printed
    for text in ("odd_one", "sums", "sampled (4, seed 3)", "1 of odd_one (SFT)"):
        assert text in page and text in printed
    assert "sums, acc, greedy, 5 shots" in printed and "items and training seeds (1 to 2 seeds)" in page


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", [0])
    nothing = evaluated_table(run.path)
    assert not nothing[0].rows and not nothing[0].caption and nothing[1] == []
    stage = finish(run.stage("sft", {"seed": 0}), 0, 0.3, [], 0)
    assert evaluated_table(run.path) == nothing, "a run's own tests have sections of their own"
    evaluate(stage, "SFT", 0, [[1.0]])
    next(stage.path.glob("eval/sums@*/samples.parquet")).write_bytes(b"")
    found, problems = evaluated_table(run.path)
    assert not found.rows and "is damaged" in problems[0]


def test_scores_of_srppo_eval_stand_one_a_row(tmp_path: Path) -> None:
    """At 80 columns each metric's name, value and interval stand on one line, whatever the names are."""
    metrics = [f"{scope}_level_{kind}_acc" for scope in ("prompt", "inst") for kind in ("strict", "loose")]
    figures: dict[str, dict[str, Any]] = {
        name: {"value": 0.285 + 0.1 * i, "low": 0.2, "high": 0.9, "n": 541} for i, name in enumerate(metrics)
    }
    figures["inst_level_loose_acc"] |= {"low": None, "high": None}
    summary = {"task": "ifeval_with_a_rather_long_name", "model": "a/" + "model-" * 12, "decoding": "sampled"}
    summary |= {"seed": 3, "samples": 4, "items": 541, "not_scored": 3}
    summary |= {"metric": "inst_level_strict_acc", "metrics": figures}
    folder = tmp_path / "ifeval@1"
    folder.mkdir()
    (folder / "summary.json").write_text(canonical_json(plain(summary)))
    out = io.StringIO()
    Console(plain=True, file=out).print(scores_table([folder]))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line.split() for line in lines if "_acc" in line]
    others = sorted(set(metrics) - {"inst_level_strict_acc"})
    assert [cells[0] for cells in shown] == ["inst_level_strict_acc", *others]
    for name, *cells in shown:
        value = figures[name]["value"]
        assert cells[0] == f"{value:.3f}" and cells[-1] == "538"
        assert cells[1:-1] == ([] if figures[name]["low"] is None else ["[0.200,", "0.900]"])
    assert "seed 3, 4 samples" in " ".join(out.getvalue().split())
