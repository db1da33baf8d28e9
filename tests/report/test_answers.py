"""Figures of a run's answers against the files that they are read from."""

from __future__ import annotations

import io
import json
from collections import Counter

import numpy as np
import pytest
import torch
from records import ITEMS, LIMIT, TASKS, verdicts
from worlds import make_world

from srppo.config import with_overrides
from srppo.console import Console
from srppo.record.store import Run
from srppo.report.answers import SAMPLES, arm_rows, arms_of, differences_of, lengths_of, samples_of, tasks_of
from srppo.report.run import length_table, rows_of, samples_html
from srppo.stages.arms import figures_of
from srppo.stages.kinds import CHOSEN, EQUAL
from srppo.stages.run import prepare_run, run_stages
from srppo.statistics.intervals import calibrated_interval


def test_accuracy_by_task_is_that_of_the_files(run: Run) -> None:
    found = tasks_of(arm_rows(run))
    stages = {(s.identity["kind"], s.identity["config"]["seed"]): s for s in run.stages()}
    for kind, name in (("ppo", "SRPPO"), ("base", "base")):
        for group, tasks in TASKS.items():
            for task in tasks:
                by_seed = []
                for seed in (0, 1, 2):
                    path = stages[kind, seed].path / "eval" / "kept-sampled" / "samples.jsonl"
                    rows = [json.loads(line) for line in path.read_text().splitlines()]
                    by_seed.append([sum(r["correct"]) / 4 for r in rows if (r["group"], r["task"]) == (group, task)])
                estimate = found[name][group, task, "sampled"]
                expected = calibrated_interval(by_seed, limits=(0.0, 1.0), draws=1000)
                assert estimate.mean == pytest.approx(np.mean(by_seed)) and estimate.n == ITEMS
                assert estimate.low == max(expected.low, 0.0) and estimate.high == min(expected.high, 1.0)


def test_lengths_count_every_sampled_answer(run: Run) -> None:
    found = {each.name: each for each in lengths_of(arm_rows(run))}
    counts = Counter(n for seed in (0, 1, 2) for row in verdicts(seed, 0.7, 4) for n in row["tokens"])
    ours = found["SRPPO"]
    assert ours.ended + ours.cut == counts and set(ours.cut) == {LIMIT}
    assert ours.cut_share.mean == pytest.approx(counts[LIMIT] / counts.total())
    assert 0 < ours.cut_share.low < ours.cut_share.mean < ours.cut_share.high < 1
    table = {row.cells[0]: row.cells for row in length_table([ours]).rows}["SRPPO"]
    assert table[1] == f"{np.mean(list(counts.elements())):.2f}" and f"{ours.cut_share.mean:.2%}" in table[5]


def test_samples_are_chosen_by_place_and_side_by_side(run: Run) -> None:
    samples = samples_of(arm_rows(run))
    assert all(sample.keys() == {"base", "SFT", EQUAL, CHOSEN, "SRPPO"} for sample in samples)
    expected = ["first 0", "first 5", "swap 2", "sort 0", "sort 2", "sort 5"]
    assert [{row["prompt"] for row in sample.values()} for sample in samples] == [{prompt} for prompt in expected]
    assert len(samples) == SAMPLES * len(TASKS) and samples[0]["SFT"] == verdicts(0, 0.4, 1)[0]
    html = samples_html(samples)
    assert (
        html.count("<div><span") == 6 * 5 and "in-domain (demonstrated), task swap" in html and "<pre>a</pre>" in html
    )
    right = sum(bool(row["correct"][0]) for sample in samples for row in sample.values())
    assert html.count("✓&nbsp;right") == right and html.count("✗&nbsp;wrong") == 6 * 5 - right


FROM = "SRPPO from chosen SFT"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Run:
    torch.set_num_threads(1)
    world = make_world(tmp_path_factory.mktemp("world"))
    folder = tmp_path_factory.mktemp("runs") / "run"
    for seed in (0, 1):
        recipe = with_overrides(world.recipe(), {"seed": seed})
        console = Console(plain=True, file=io.StringIO())
        run_stages(prepare_run(recipe, ["base", "ppo-chosen", "vote"], folder, console, seeds=[0, 1]))
    return Run.load(folder)


def test_arms_over_seeds(trained: Run) -> None:
    arms = {arm.name: arm for arm in arms_of(arm_rows(trained))}
    assert {name.split(",")[0] for name in arms} == {*("base", "SFT", "longer SFT", "SRPPO"), *("majority vote", FROM)}
    for arm in arms.values():
        assert arm.seeds == 2 and arm.problem is None
    assert {decoding for _, decoding in arms["majority vote"].figures} == {"greedy"}
    sft, srppo = arms["SFT"], next(arm for name, arm in arms.items() if name.startswith("SRPPO"))
    assert srppo.flops > sft.flops > 0, "an arm's cost includes its SFT"
    assert srppo.selection_flops > sft.selection_flops > 0, "and so does what choosing its steps took"
    lengths = sum(figures_of(s)["flops"] for s in trained.stages() if s.identity["kind"].startswith("longer-sft")) / 2
    assert arms[CHOSEN].flops + arms[CHOSEN].selection_flops > lengths
    verdicts = []
    for stage in trained.stages():
        if stage.identity["kind"] == "sft":
            lines = (stage.path / "eval" / "kept-sampled" / "samples.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            verdicts.append([np.mean(r["correct"]) for r in rows if r["group"] == "unseen"])
    expected = calibrated_interval(verdicts, limits=(0.0, 1.0))
    expected = expected._replace(low=max(expected.low, 0.0), high=min(expected.high, 1.0))
    assert sft.figures["unseen", "sampled"] == expected and expected.n == len(verdicts[0])


def test_differences_are_paired(trained: Run) -> None:
    rows = [row for row in rows_of(trained) if row["which"] == "kept"]
    mean = {(r["arm"], r["seed"], r["group"], r["decoding"]): r["accuracy"] for r in rows}
    pairs = {pair.name: pair for pair in differences_of(arm_rows(trained))}
    names = {"SFT": "SFT", "longer": EQUAL, "chosen": CHOSEN, "majority vote": "majority vote", FROM: FROM}
    assert pairs.keys() == {*names, f"{FROM} minus chosen"}
    models = {name: ("SRPPO", arm) for name, arm in names.items()} | {f"{FROM} minus chosen": (FROM, CHOSEN)}
    for name, (model, arm) in models.items():
        for (group, decoding), estimate in pairs[name].figures.items():
            expected = np.mean([mean[model, s, group, decoding] - mean[arm, s, group, decoding] for s in (0, 1)])
            assert estimate.mean == pytest.approx(expected)


def test_rows_are_complete(trained: Run) -> None:
    rows = rows_of(trained)
    assert {row["seed"] for row in rows} == {0, 1}
    kept = [row for row in rows if row["which"] == "kept"]
    assert len(kept) == (6 * 2 + 1) * 2 * 2, "arms x decodings (one of the vote), groups, seeds"
    assert all(row["selection_flops"] > 0 for row in rows if row["arm"] != "base")
