"""The report of runs over seeds, whole and half finished: its tables, and what is missing or failed."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
from pages import offline_page
from records import ARMS, FAILED, NO_ITEMS, ODD, arm, finish, new_run, ppo_rows, train
from rich.console import Console as RichConsole
from worlds import make_world

from srppo.console import Console
from srppo.errors import Diverged, RecordError
from srppo.record.store import Run
from srppo.report.answers import ArmFigures, arm_rows, arms_of, differences_of
from srppo.report.run import accuracy_table, cost_table, interval_caption, problem_lines, report_run
from srppo.stages.kinds import EQUAL
from srppo.stages.run import prepare_run, run_stages
from srppo.statistics.intervals import wilson


def table_text(arms: list[ArmFigures], width: int = 80) -> str:
    out = io.StringIO()
    console = RichConsole(file=out, width=width, color_system=None)
    for table in (accuracy_table(arms), cost_table(arms), *problem_lines(arms)):
        console.print(table)
    return out.getvalue()


def report(run: Run) -> tuple[str, str]:
    """(what the terminal says, what the page says)."""
    out = io.StringIO()
    report_run(run.path, Console(plain=True, file=out))
    page = offline_page(run.path / "report" / "index.html")
    return " ".join(out.getvalue().split()), page.text


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("arms", [ARMS, NO_ITEMS, ODD, [FAILED], [*ARMS[:2], FAILED], []])
def test_tables_keep_to_80_columns(arms: list[ArmFigures], width: int) -> None:
    assert max(map(len, table_text(arms, width).splitlines())) <= 80


def test_table_shows_every_figure() -> None:
    text = table_text(ARMS)
    lines = text.splitlines()
    sft = [line for line in lines if line.strip().startswith("SFT ")]
    assert sft[0].split() == ["SFT", "0.41", "[0.33,", "0.49]", "0.39", "[0.31,", "0.47]", "0.37", "[0.29,", "0.45]"]
    assert len(sft) == 3  # greedy, sampled, cost
    assert sft[2].split() == ["SFT", "1.23", "8", "15", "of", "20", "9.2", "97%", "0.753"]
    assert "in-domain" in text and "PPO prompts only" in text and "out-of-domain" in text
    assert "n = 150 items a group" in " ".join(text.split())
    assert "one training seed, so they say nothing of other seeds" in " ".join(text.split())


def test_failed_arm_and_no_items_are_said() -> None:
    text = " ".join(table_text(NO_ITEMS).split())
    assert "no result" in text and "SRPPO: diverged at step 7" in text and "held-out answer NLL only" in text
    assert "[0." not in text and "1.900" in text


def test_caption_claims_what_the_figures_support() -> None:
    several = [arm("SFT", 60, seeds=5), arm("SRPPO", 70, seeds=4)]
    assert "items and training seeds (4 to 5 seeds): t width" in interval_caption(several)
    assert "say nothing of other" not in interval_caption(several)
    assert "(1 to 5 seeds)" in interval_caption([*several, arm("x", 9)])
    assert "With one seed they say nothing of others" in interval_caption([*several, arm("x", 9)])
    assert "paired" in interval_caption(several) and "paired" not in interval_caption(several[:1])
    mixed = [ArmFigures("SFT", {("a", "greedy"): wilson(1, 10), ("b", "greedy"): wilson(1, 20)})]
    assert "n = 10 a, 20 b" in interval_caption(mixed) and "Sampled" not in interval_caption(mixed)


def test_a_problem_that_rows_share_is_said_once() -> None:
    rows = [ArmFigures("SRPPO, last step", problem="seed 3 diverged"), ArmFigures("SFT"), FAILED]
    rows.append(ArmFigures("SRPPO, best on dev", problem="seed 3 diverged"))
    assert problem_lines(rows)[0] == "SRPPO, last step; SRPPO, best on dev: seed 3 diverged"
    assert len(problem_lines(rows)) == 2


def test_the_page_of_a_whole_run(run: Run) -> None:
    text, page = report(run)
    for words in ("Accuracy by task", "Training", "Reward against KL", "Length of answers", "Samples", "Configuration"):
        assert words in page
    assert "What length alone explains" in page and "pooled over the questions of a task, from recorded answers" in text
    assert "Missing or failed" not in page and "a CPU" in page and "ppo.steps" not in text
    assert "means over training seeds (3). Bands: 95% t interval of the mean, point by point." in page
    assert page.count("items and training seeds (3 seeds): t width") == 3, "arms, tasks and lengths"
    assert "SRPPO minus" in text and "t width" in text and "longer SFT, best on dev" in text


def test_every_seed_and_arm_that_failed_is_named(tmp_path: Path) -> None:
    """Seed 0 whole, seed 1 diverged, seed 2 killed in PPO, seed 3 not started."""
    run = new_run(tmp_path / "run", [0, 1, 2, 3])
    train(run, 0)
    _, diverged = train(run, 1, ppo=False, longer=False)
    with diverged.attempt() as attempt:
        for row in ppo_rows(1, steps=2):
            attempt.log_metrics(row)
        attempt.commit("diverged", {"reason": "step 2: KL is 130 nats"})
    _, killed = train(run, 2, ppo=False, longer=False)
    with pytest.raises(KeyboardInterrupt), killed.attempt() as attempt:
        attempt.log_metrics(ppo_rows(2)[1])
        raise KeyboardInterrupt
    text, page = report(run)
    for said in (text, page):
        assert "SRPPO: seed 1 diverged: step 2: KL is 130 nats; seed 2 is not finished" in said
        assert "SRPPO: seed 3 not started" in said and f"{EQUAL}: seeds 1, 2, 3 not started" in said
    assert "since not finished or failed: SRPPO, seed 1; SRPPO, seed 2" in page
    assert "Lines: means over training seeds (3 of SFT, 1 of longer SFT, 1 of SRPPO)" in page
    arms = {arm.name: arm for arm in arms_of(arm_rows(run))}
    assert (arms["SRPPO"].seeds, arms["SFT"].seeds) == (1, 3) and arms["SRPPO"].flops == 4e12
    assert {pair.name: pair.seeds for pair in differences_of(arm_rows(run))} == {"SFT": 1, "longer": 1, "chosen": 1}


def test_files_that_are_gone_are_named(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", [0])
    sft, ppo = train(run, 0)
    shutil.rmtree(sft.path / "eval")
    torn = ppo.path / "eval" / "kept-sampled" / "samples.jsonl"
    torn.write_text(torn.read_text()[:-30])
    shutil.rmtree(ppo.path / "attempts")
    text, page = report(run)
    for said in ("".join(text.split()), "".join(page.split())):
        assert f"sft,seed0:{sft.path}/eval/kept-greedy/samples.jsonlisgoneordamaged" in said
        assert f"ppo,seed0:{torn}isgoneordamaged" in said
        assert f"{ppo.path}/attemptshasnometrics.jsonlanymore" in said
    assert "sampled" in page and ("demonstrated", "sampled") not in arms_of(arm_rows(run))[-1].figures


@pytest.mark.parametrize("stages", [0, 1, 2])
def test_runs_that_have_hardly_begun(stages: int, tmp_path: Path) -> None:
    """A record without any stage, with a stage that has no attempt, and with the base alone."""
    run = new_run(tmp_path / "run", [0, 1])
    if stages == 1:
        run.stage("base", {"seed": 0})
    if stages == 2:
        finish(run.stage("base", {"seed": 0}), 0, 0.1, [], 0)
    text, page = report(run)
    for said in (text, page):
        assert "SFT was not run" in said and "SRPPO was not run" in said
        assert ("the base was not measured" in said) == (stages == 0)
        assert ("base: seed 1 not started" in said) == (stages > 0)
        assert ("base: seed 0 is not finished" in said) == (stages == 1)


def test_an_attempt_that_died_before_it_said_where(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", [0])
    sft, _ = train(run, 0, ppo=False, longer=False)
    (sft.path / "attempts" / "2-host-1").mkdir()
    _, page = report(run)
    assert "a CPU" in page and "SRPPO: seed 0 is not finished" in page
    assert page.count("one training seed, so they say nothing of other seeds") == 3 and "training seeds (" not in page


def test_environments_that_differ_are_said(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", [0])
    sft, _ = train(run, 0)
    (env,) = sft.path.glob("attempts/*/env.json")
    env.write_text('{"cpu":"another","packages":{"torch":"2"}}')
    assert "cpu: not the same for every stage" in report(run)[1]


def test_seeds_with_other_items_are_not_mixed(tmp_path: Path) -> None:
    """Answers to other items, as after a change of eval.items, enter neither an arm's interval nor a pair."""
    run = new_run(tmp_path / "run", [0, 1])
    train(run, 0)
    _, ppo = train(run, 1)
    path = ppo.path / "eval" / "kept-greedy" / "samples.jsonl"
    path.write_text(path.read_text().replace("sort 0", "sort 9"))
    rows = {row.name: row for row in arm_rows(run)}
    assert list(rows["SRPPO"].answers["greedy"]) == [0] and list(rows["SRPPO"].answers["sampled"]) == [0, 1]
    words = "SRPPO, seed 1: its greedy answers are to other test items than those of seed 0 and are left out"
    text, page = report(run)
    assert words in text and words in page and "its sampled answers" not in page


def test_what_is_no_record_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="is no record of a run"):
        report_run(tmp_path, Console(plain=True, file=io.StringIO()))


def test_an_arm_that_diverged_is_shown_and_one_that_was_not_run_is_said(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    world, folder = make_world(tmp_path), tmp_path / "run"
    recipe, console = world.recipe({"ppo.max_kl": 1e-6}), Console(plain=True, file=io.StringIO())
    with pytest.raises(Diverged, match=r"ppo\.max_kl"):
        run_stages(prepare_run(recipe, ["base", "ppo"], folder, console))
    out = io.StringIO()
    report_run(folder, Console(plain=True, file=out))
    text, page = " ".join(out.getvalue().split()), (folder / "report" / "index.html").read_text()
    assert "SRPPO: seed 0 diverged: step 2" in text and "no result" in text
    assert "longer SFT at equal compute was not run; add --baselines" in text
    assert "diverged" in page and "add --baselines" in page
