"""The report of runs over seeds, whole and half finished, made on disk without any training."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pages import offline_page
from scipy import stats as scipy_stats

from srppo.config import build_recipe, canonical_json
from srppo.console import Console
from srppo.errors import RecordError
from srppo.record.store import Run, Stage
from srppo.report.accuracy import arms_of, differences_of, tasks_of
from srppo.report.answers import arm_rows
from srppo.report.attempts import missing_of_run
from srppo.report.curves import reward_kl_plot
from srppo.report.lengths import length_table, lengths_of
from srppo.report.record import report_run
from srppo.report.samples import SHOWN, samples_of
from srppo.report.training import LONGER, SeedRows, band, band_words, curves_of_run, over_seeds
from srppo.stages.arms import CHOSEN, EQUAL
from srppo.statistics.intervals import calibrated_interval

TASKS = {"demonstrated": ("first", "swap"), "unseen": ("sort",)}
ITEMS, STEPS, LIMIT = 8, 3, 6  # items of a task, PPO steps, tokens


def verdicts(seed: int, skill: float, samples: int) -> list[dict[str, Any]]:
    """Answers whose tokens and rightness are drawn; those of LIMIT tokens did not end."""
    draw = np.random.default_rng([seed, int(100 * skill), samples])
    rows = []
    for group, tasks in TASKS.items():
        for task in tasks:
            for i in range(ITEMS):
                tokens = [int(n) for n in draw.integers(2, LIMIT + 1, size=samples)]
                row = {"group": group, "task": task, "prompt": f"{task} {i}", "answer": "a", "tokens": tokens}
                row["correct"] = [bool(value) for value in draw.random(samples) < skill]
                rows.append(row | {"responses": [" a"] * samples, "ended": [n < LIMIT for n in tokens]})
    return rows


def publish(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "samples.jsonl").write_text("".join(canonical_json(row) + "\n" for row in rows))


def dev(step: int, skill: float, **columns: float) -> dict[str, Any]:
    groups = {f"dev/{group}": skill + 0.01 * step for group in TASKS}
    return {"step": step, **groups, "dev/accuracy": skill, **columns}


def finish(stage: Stage, seed: int, skill: float, rows: list[dict[str, Any]], flops: int, **more: Any) -> Stage:
    """Run a stage to its commit: metric rows, answers to the test items, figures."""
    with stage.attempt({"cpu": "a CPU", "packages": {"torch": "2"}}) as attempt:
        for row in rows:
            attempt.log_metrics(row)
        for decoding, samples in (("greedy", 1), ("sampled", 4)):
            attempt.publish(f"eval/kept-{decoding}", partial(publish, rows=verdicts(seed, skill, samples)))
        steps = int(rows[-1]["step"]) if rows else 0
        test = {group: {"greedy": 0, "sampled": 0} for group in TASKS}
        attempt.commit("ok", {"kept_step": steps, "steps": steps, "flops": flops, "test": test, **more})
    return stage


def new_run(folder: Path, seeds: list[int]) -> Run:
    recipe = build_recipe({}).model_dump(mode="json", exclude={"seed"})
    return Run.open(folder, {"recipe": recipe, "seeds": seeds})


def ppo_rows(seed: int, steps: int = STEPS) -> list[dict[str, Any]]:
    return [dev(0, 0.4)] + [
        dev(
            step, 0.4, flops=step * 10**12, reward=step + seed, kl_sft=0.1 * step, kl_base=0.2 * step, length=5, ended=1
        )
        for step in range(1, steps + 1)
    ]


def train(run: Run, seed: int, *, ppo: bool = True, longer: bool = True) -> tuple[Stage, Stage]:
    """All stages of one seed; its SFT and its PPO stage, which without `ppo` is left for the test to run."""
    finish(run.stage("base", {"seed": seed}), seed, 0.1, [], 0)
    sft = finish(run.stage("sft", {"seed": seed}), seed, 0.4, [dev(0, 0.1), dev(2, 0.4, flops=seed + 1)], 10**12)
    stage = run.stage("ppo", {"seed": seed}, [sft.id])
    if ppo:
        finish(stage, seed, 0.7, ppo_rows(seed), 3 * 10**12)
    for steps in (40, 10) if longer else ():
        rows = [dev(0, 0.1), dev(steps + seed, 0.5, flops=steps * 10**11)]
        config = {"seed": seed, "steps": steps + seed}
        finish(run.stage("longer-sft", config), seed, 0.5, rows, steps * 10**11, score=1 / steps)
    return sft, stage


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    found = new_run(tmp_path_factory.mktemp("whole") / "run", [0, 1, 2])
    for seed in (0, 1, 2):
        train(found, seed)
    return found


def report(run: Run) -> tuple[str, str]:
    """(what the terminal says, what the page says)."""
    out = io.StringIO()
    report_run(run.path, Console(plain=True, file=out))
    page = offline_page(run.path / "report" / "index.html")
    return " ".join(out.getvalue().split()), page.text


def test_a_band_is_the_t_interval_of_the_mean() -> None:
    low, high = band([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    half = 4.302653 * 1.0 / 3**0.5  # t(2) at 97.5%, standard deviation 1, three seeds
    assert low == pytest.approx([2 - half, 5.0], abs=1e-6) and high == pytest.approx([2 + half, 5.0], abs=1e-6)
    values = np.random.default_rng(0).normal(size=(7, 4))
    hand = scipy_stats.t.interval(0.95, 6, values.mean(axis=0), scipy_stats.sem(values, axis=0))
    assert np.allclose(band(values), hand)
    assert [list(bound) for bound in band([[1.0, 4.0], [3.0, 2.0]])] == [[1.0, 2.0], [3.0, 4.0]], "two seeds: the range"
    assert [list(bound) for bound in band([[1.0]])] == [[1.0], [1.0]]


def test_seeds_meet_at_the_steps_that_all_of_them_have() -> None:
    rows = {0: [{"step": 1, "y": 1.0}, {"step": 2, "y": 2.0}, {"step": 3, "y": 5.0}]}
    rows[1] = [{"step": 1, "y": 3.0}, {"step": 2, "y": float("nan")}, {"step": 3, "y": 7.0}, {"step": 4, "y": 9.0}]
    line = over_seeds(rows, "step", "y")
    assert line is not None and list(line.x) == [1, 3] and list(line.mean) == [2, 6] and list(line.low) == [1, 5]
    assert over_seeds({}, "step", "y") is None and over_seeds(rows, "step", "z") is None


def test_captions_say_what_the_bands_are() -> None:
    def arms(*counts: int) -> dict[str, SeedRows]:
        return {f"arm {n}": SeedRows({seed: [] for seed in range(n)}) for n in counts}

    assert band_words(arms(1)) == "One training seed: lines without bands."
    assert "(10). Bands: 95% t interval of the mean, point by point." in band_words(arms(10))
    assert "the range of both seeds" in band_words(arms(2)) and "t interval" not in band_words(arms(2))
    mixed = band_words(arms(3, 1) | {"broken": SeedRows(broken={4: []})})
    assert "3 of arm 3, 1 of arm 1" in mixed and "none where there is 1" in mixed and "broken, seed 4" in mixed


def test_curves_hold_every_seed_and_count_the_sft_of_each(run: Run) -> None:
    curves = curves_of_run(run)
    assert {name: len(arm.done) for name, arm in curves.items()} == {"SFT": 3, LONGER: 3, "SRPPO": 3}
    line = over_seeds(curves["SRPPO"].done, "tflops", "reward")
    assert line is not None and list(line.x) == pytest.approx([2, 3, 4]) and list(line.mean) == [2, 3, 4]
    assert line.high - line.mean == pytest.approx([4.302653 / 3**0.5] * 3, abs=1e-6)
    ends = over_seeds(curves[LONGER].done, "tflops", "dev/accuracy")
    assert ends is not None and list(ends.x) == pytest.approx([0, 1, 4]), "the base, then each length"


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
    table = {row[0]: row for row in length_table([ours])}["SRPPO"]
    assert table[1] == f"{np.mean(list(counts.elements())):.2f}" and f"{ours.cut_share.mean:.2%}" in table[5]


def test_samples_are_chosen_by_place_and_side_by_side(run: Run) -> None:
    samples = samples_of(arm_rows(run))
    assert [sample.prompt for sample in samples] == ["first 0", "first 5", "swap 2", "sort 0", "sort 2", "sort 5"]
    assert len(samples) == SHOWN * len(TASKS) and "task swap" in samples[2].group
    expected = {"base", "SFT", EQUAL, CHOSEN, "SRPPO"}
    assert all(sample.responses.keys() == expected == (sample.right or {}).keys() for sample in samples)
    assert samples[0].responses["SFT"] == "a" and samples[0].right is not None
    assert samples[0].right["SFT"] == verdicts(0, 0.4, 1)[0]["correct"][0]


def test_the_page_of_a_whole_run(run: Run) -> None:
    text, page = report(run)
    for words in ("Accuracy by task", "Training", "Reward against KL", "Length of answers", "Samples", "Configuration"):
        assert words in page
    assert "Missing or failed" not in page and "a CPU" in page and "ppo.steps" not in text
    assert "means over training seeds (3). Bands: 95% t interval of the mean, point by point." in page
    assert page.count("items and training seeds (3 seeds): t width") == 3, "arms, tasks and lengths"
    assert "SRPPO minus" in text and "t width" in text and "longer SFT, best on dev" in text


def test_reward_against_kl_needs_both(tmp_path: Path) -> None:
    assert reward_kl_plot(SeedRows({0: [{"step": 1, "reward": 1.0}]}), tmp_path / "a", "#d55e00") == []
    broken = SeedRows(broken={0: ppo_rows(0)})
    assert len(reward_kl_plot(broken, tmp_path / "a", "#d55e00")) == 2


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


def test_longer_sft_that_is_not_whole(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run", [0])
    train(run, 0)
    run.stage("longer-sft", {"seed": 0, "steps": 5})
    train(run, 1, longer=False)
    finish(run.stage("longer-sft", {"seed": 1, "steps": 11}), 1, 0.5, [dev(11, 0.5, flops=1)], 1, score=1)
    assert list(curves_of_run(run)[LONGER].done) == [0], "seed 1 has one length of two"
    lines = missing_of_run(run)
    assert any(line.startswith(f"{CHOSEN}: not chosen for seed 0, since") for line in lines)
    assert "longer SFT of 5 steps: seed 0 is not finished; run the same command to go on" in lines
