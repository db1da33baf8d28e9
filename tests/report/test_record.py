"""The report reads the record alone: arms over seeds, paired differences, and what is missing or failed."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from worlds import World, make_world

from srppo.config import with_overrides
from srppo.console import Console
from srppo.errors import Diverged
from srppo.record.store import Run
from srppo.report.accuracy import arms_of_run, differences_of_run, rows_of_run
from srppo.report.record import report_run
from srppo.stages.run import prepare_run, run_stages
from srppo.statistics.intervals import calibrated_interval


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("runs") / "run"
    for seed in (0, 1):
        recipe = with_overrides(world.recipe(), {"seed": seed})
        console = Console(plain=True, file=io.StringIO())
        run_stages(prepare_run(recipe, ["base", "ppo", "longer-sft"], folder, console, seeds=[0, 1]))
    return Run.load(folder)


def test_arms_over_seeds(run: Run) -> None:
    arms = {arm.name: arm for arm in arms_of_run(run)}
    assert {name.split(",")[0] for name in arms} == {"base", "SFT", "longer SFT", "SRPPO"}
    for arm in arms.values():
        assert arm.seeds == 2 and arm.problem is None
    sft, srppo = arms["SFT"], next(arm for name, arm in arms.items() if name.startswith("SRPPO"))
    assert srppo.flops > sft.flops > 0, "an arm's cost includes its SFT"
    verdicts = []
    for stage in run.stages():
        if stage.identity["kind"] == "sft":
            lines = (stage.path / "eval" / "kept-sampled" / "samples.jsonl").read_text().splitlines()
            rows = [json.loads(line) for line in lines]
            verdicts.append([np.mean(r["correct"]) for r in rows if r["group"] == "unseen"])
    expected = calibrated_interval(verdicts, limits=(0.0, 1.0))
    expected = expected._replace(low=max(expected.low, 0.0), high=min(expected.high, 1.0))
    assert sft.figures["unseen", "sampled"] == expected and expected.n == len(verdicts[0])


def test_differences_are_paired(run: Run) -> None:
    rows = [row for row in rows_of_run(run) if row["which"] == "kept"]
    mean = {(r["arm"], r["seed"], r["group"], r["decoding"]): r["accuracy"] for r in rows}
    pairs = {pair.name: pair for pair in differences_of_run(run)}
    assert pairs.keys() == {"SFT", "longer", "chosen"}
    names = {"SFT": "SFT", "longer": "longer SFT, equal compute", "chosen": "longer SFT, best on dev"}
    for name, arm in names.items():
        for (group, decoding), estimate in pairs[name].figures.items():
            expected = np.mean([mean["SRPPO", s, group, decoding] - mean[arm, s, group, decoding] for s in (0, 1)])
            assert estimate.mean == pytest.approx(expected)


def test_rows_are_complete(run: Run) -> None:
    rows = rows_of_run(run)
    assert {row["seed"] for row in rows} == {0, 1}
    kept = [row for row in rows if row["which"] == "kept"]
    assert len(kept) == 5 * 2 * 2 * 2, "arms x seeds x groups x decodings"


def test_an_arm_that_diverged_is_shown_and_one_that_was_not_run_is_said(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    recipe, console = world.recipe({"ppo.max_kl": 1e-6}), Console(plain=True, file=io.StringIO())
    with pytest.raises(Diverged, match=r"ppo\.max_kl"):
        run_stages(prepare_run(recipe, ["base", "ppo"], folder, console))
    out = io.StringIO()
    report_run(folder, Console(plain=True, file=out))
    text, page = " ".join(out.getvalue().split()), (folder / "report" / "index.html").read_text()
    assert "SRPPO: seed 0 diverged: step 2" in text and "no result" in text
    assert "longer SFT at equal compute was not run; add --baselines" in text
    assert "diverged" in page and "add --baselines" in page
