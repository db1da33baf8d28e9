"""The report of a sweep, on records made by hand: numbers against plain numpy, and nothing of the plan left out."""

from __future__ import annotations

import csv
import io
import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from srppo.ablations.analysis import Peak, SweepResult, Trend, analyse
from srppo.ablations.ledger import Ledger
from srppo.ablations.plan import Plan, Task
from srppo.ablations.spec import Ablation, Analysis, Arm, Cell, Comparison, Sweep, every
from srppo.config import canonical_json, load_recipe
from srppo.console import Console
from srppo.record.json import revive
from srppo.record.store import Attempt, Run
from srppo.report.sweep import report_sweep, stages_of
from srppo.report.sweep_tables import line_axis, panels, point_label
from srppo.report.sweep_words import peak_sentence, trend_sentence
from srppo.report.table import plain_latex
from srppo.statistics.intervals import Estimate, calibrated_interval, crossed_error
from srppo.statistics.tests import holm, sign_flip

ITEMS = 40
METRICS = [("unseen", "greedy"), ("unseen", "sampled"), ("demonstrated", "greedy"), ("demonstrated", "sampled")]
FLOPS = {"sft": 2e12, "ppo": 8e12, "chosen-sft": 10e12}
SFT, SRPPO = Arm("SFT", "sft"), Arm("SRPPO", "ppo")
LONGER = Arm("longer SFT", "chosen-sft")
Scores = dict[tuple[str, tuple[str, str]], NDArray[np.float64]]  # by task and metric


@dataclass
class Record:
    """A record, what its report printed and wrote, and the scores that it was made of."""

    result: SweepResult
    scores: Scores
    text: str
    page: str
    out: Path

    def matrix(self, point: str, arm: str, metric: tuple[str, str] = METRICS[0]) -> NDArray[np.float64]:
        """(seeds, items) of a cell."""
        plan, cell = self.result.plan, Cell(point, arm)
        return np.array([self.scores[plan.measured_by[cell, seed], metric] for seed in plan.sweep.seeds])

    def table(self, name: str) -> list[dict[str, str]]:
        return list(csv.DictReader(io.StringIO((self.out / name).read_text())))

    @property
    def flat(self) -> str:
        """What was printed, without breaks of lines."""
        return re.sub(r"\s+", " ", self.text)


def make_sweep(points: list[Ablation], arms: tuple[Arm, ...], seeds: int, **changes: Any) -> Sweep:
    models = {"family": every(points, "SRPPO", *(arm.name for arm in arms if arm.name != "SRPPO"))}
    analysis = Analysis("unseen", "greedy", **{**models, **changes.pop("analysis", {})})
    axes = tuple(points[0].values)
    given = {"name": "trial", "question": "Does it work?", "notes": ("not tuned",), **changes}
    recipe = load_recipe(None, [])
    return Sweep(
        recipe=recipe, axes=axes, points=tuple(points), arms=arms, seeds=tuple(range(seeds)), analysis=analysis, **given
    )


def sizes(*values: int) -> list[Ablation]:
    return [Ablation(f"{value} rows", {"data.size": value}, {"size": value}) for value in values]


def make(
    folder: Path,
    sweep: Sweep,
    chance: Callable[[Task], float] = lambda task: 0.7 if task.kind == "ppo" else 0.3,
    fate: Callable[[Task], str] = lambda task: "ok",
    *,
    alike: bool = False,
) -> Record:
    """Write the stages of a sweep as its engine would, report it, and read everything back.

    alike: the chance is every item's score, in halves, instead of each item's chance to be right.
    """
    run = Run.open(folder, sweep.as_spec())
    plan, ledger, scores = Plan(sweep), Ledger(run, 3), dict[tuple[str, tuple[str, str]], NDArray[np.float64]]()
    for task in plan.tasks.values():
        status = fate(task)
        if status == "failed":
            ledger.fail(task, "out of memory & 100% lost", final=True)
        if status not in ("ok", "diverged") or any(fate(plan.tasks[need]) != "ok" for need in task.needs):
            continue
        pays = task.kind == "ppo"  # what else there is starts from the base
        parents = [each.id for need in task.needs if pays and (each := ledger.stage(plan.tasks[need]))]
        stage = run.stage(task.kind, {"seed": task.recipe.seed, "task": task.key}, parents)
        ledger.link(task, stage)
        with stage.attempt({"python": "3.x", "cpu": "abacus"}) as attempt:
            if status == "diverged":
                attempt.commit("diverged", {"reason": "step 7: loss is NaN"})
            else:
                found = answer_items(task, attempt, chance, alike)
                scores |= {(task.key, metric): values for metric, values in found.items()}
    return read(folder, analyse(plan, ledger), scores)


def answer_items(
    task: Task, attempt: Attempt, chance: Callable[[Task], float], alike: bool
) -> dict[tuple[str, str], NDArray[np.float64]]:
    recipe = task.recipe  # not its key: that changes with every option that recipes come to have
    told = (task.kind, recipe.seed, recipe.data.size, recipe.ppo.steps, recipe.reward.beta)
    rng = np.random.default_rng(zlib.crc32(repr(told).encode()))
    made = {metric: (rng.random(ITEMS) < chance(task)).astype(float) for metric in METRICS}
    if alike:
        made = dict.fromkeys(METRICS, np.full(ITEMS, chance(task)))
    for decoding in ("greedy", "sampled"):
        rows = [
            {"prompt": f"{group} {i}?", "answer": str(i), "task": "t", "group": group, "responses": ["a", "a"]}
            | {"correct": [bool(right > 0), bool(right == 1)], "ended": [True, True], "tokens": [3, 3]}
            for group in ("unseen", "demonstrated")
            for i, right in enumerate(made[group, decoding])
        ]
        text = "".join(canonical_json(row) + "\n" for row in rows)
        attempt.publish(f"eval/kept-{decoding}", partial(_write, text))
    attempt.log_metrics({"step": 5, "reward": 0.5, "kl_sft": 0.25, "kl_base": 0.5, "length": 6.0, "ended": 0.5})
    attempt.commit(
        "ok",
        {"kept_step": 5, "steps": 8, "flops": FLOPS.get(task.kind, 1e12)}
        | {"selection_flops": 2.5e12 * (task.kind == "chosen-sft"), "score": 0.5}
        | {"held_out_nll": 1.5, "greedy_tokens": 7.25, "greedy_ended": 0.5},
    )
    return made


def _write(text: str, folder: Path) -> None:
    (folder / "samples.jsonl").write_text(text)


def read(folder: Path, result: SweepResult, scores: Scores) -> Record:
    stream = io.StringIO()
    page = report_sweep(folder, Console(plain=True, file=stream))
    assert page == folder / "report" / "index.html"
    return Record(result, scores, stream.getvalue(), page.read_text(), page.parent)


@pytest.fixture(scope="module")
def fine(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Four sizes, three arms, ten seeds; SRPPO is far better at all but the largest."""
    analysis = {"trend": "size", "scale": "log2"}
    sweep = make_sweep(sizes(4, 8, 16, 64), (SFT, LONGER, SRPPO), 10, analysis=analysis)

    def chance(task: Task) -> float:
        size = task.recipe.data.size or 0
        return 0.5 if size == 64 else 0.85 if task.kind == "ppo" else 0.15

    return make(tmp_path_factory.mktemp("fine") / "run", sweep, chance)


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """One SFT of size 4 failed, and PPO of size 16 diverged for every seed."""

    def fate(task: Task) -> str:
        if task.kind == "sft" and task.recipe.data.size == 4 and task.recipe.seed == 1:
            return "failed"
        return "diverged" if task.kind == "ppo" and task.recipe.data.size == 16 else "ok"

    sweep = make_sweep(sizes(4, 8, 16), (SFT, SRPPO), 6, analysis={"trend": "size", "scale": "log2"})
    return make(tmp_path_factory.mktemp("broken") / "run", sweep, fate=fate)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Record:
    sweep = make_sweep(sizes(4, 8, 16), (SFT, SRPPO), 3, analysis={"trend": "size", "scale": "log2"})
    return make(tmp_path_factory.mktemp("open") / "run", sweep, fate=lambda t: "ok" if t.kind == "sft" else "waiting")


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Record:
    return make(tmp_path_factory.mktemp("lone") / "run", make_sweep(sizes(4, 8), (SFT, SRPPO), 1))


AWKWARD = r"50%_of <b>{x}</b> & \#1 ~^$ \verylong{name}"


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """Two categorical axes, with names that LaTeX and HTML would stumble over."""
    points = [
        Ablation(f"{base} {kind}", {"data.size": 4 + i, "ppo.steps": 3 + j}, {"base": base, "kind": kind})
        for i, base in enumerate(("org/model-of-a-long-name", AWKWARD))
        for j, kind in enumerate((None, "b"))
    ]
    return make(tmp_path_factory.mktemp("kinds") / "run", make_sweep(points, (SFT, SRPPO), 2))


@pytest.fixture(scope="module")
def methods(tmp_path_factory: pytest.TempPathFactory) -> Record:
    """One point, many arms, tested against SRPPO and against SFT."""
    points = [Ablation("all", {}, {})]
    arms = (SFT, Arm("decode-time extrapolation", "ppo", {"ppo.steps": 3}), Arm("zero", "ppo", {"ppo.steps": 4}), SRPPO)
    pairs = [("SRPPO", "SFT"), ("SRPPO", "decode-time extrapolation"), ("SRPPO", "zero"), ("zero", "SFT")]
    family = tuple(Comparison(Cell("all", model), Cell("all", baseline)) for model, baseline in pairs)
    worth = {3: 0.2, 4: 0.97}

    def chance(task: Task) -> float:
        return 0.2 if task.kind == "sft" else worth.get(task.recipe.ppo.steps or 0, 0.7)

    return make(
        tmp_path_factory.mktemp("methods") / "run", make_sweep(points, arms, 9, analysis={"family": family}), chance
    )


ALL = ("fine", "broken", "unfinished", "lone", "kinds", "methods")


@pytest.fixture(params=ALL)
def record(request: pytest.FixtureRequest) -> Record:
    return request.getfixturevalue(request.param)


def close(text: str, value: float) -> bool:
    return bool(np.isclose(float(text), value, atol=1e-12))


# ---- numbers


def test_cells_by_hand(fine: Record) -> None:
    rows = {(r["point"], r["arm"]): r for r in fine.table("cells.csv") if r["primary"] == "True"}
    assert len(rows) == 12
    for (point, arm), row in rows.items():
        values = fine.matrix(point, arm)
        assert close(row["accuracy"], values.mean()) and float(row["low"]) < values.mean() < float(row["high"])
        by_seed = np.sort(values.mean(axis=1))
        assert close(row["iqm"], by_seed[2:8].mean())
        assert (row["seeds"], row["items"], row["failed"], row["diverged"]) == ("10", "40", "0", "0")
        assert f"{values.mean():.2f} [" in fine.text
    others = [r for r in fine.table("cells.csv") if r["primary"] == "False"]
    assert len(others) == 36
    for row in others:
        metric = row["group"], row["decoding"]
        assert close(row["accuracy"], fine.matrix(row["point"], row["arm"], metric).mean())


def test_the_part_of_a_gain_that_length_explains(fine: Record) -> None:
    """Every answer has three tokens, so length explains nothing of what SRPPO gains over SFT."""
    for point in fine.result.plan.sweep.points:
        figures = fine.result.cell(Cell(point.name, "SRPPO")).figures
        after, before = (fine.matrix(point.name, arm, ("unseen", "sampled")) for arm in ("SRPPO", "SFT"))
        assert figures["sampled_gain"] == pytest.approx((after - before).mean())
        assert figures["gain_at_lengths"] == pytest.approx(0.0, abs=1e-12)
        assert "sampled_gain" not in fine.result.cell(Cell(point.name, "SFT")).figures
    assert "of it by length" in fine.page


def test_differences_by_hand(fine: Record) -> None:
    rows = [r for r in fine.table("differences.csv") if r["planned"] == "True"]
    gaps = [fine.matrix(r["model_point"], r["model"]) - fine.matrix(r["baseline_point"], r["baseline"]) for r in rows]
    ps = [max(sign_flip(gap.mean(axis=1)).p, p_of_t(gap)) for gap in gaps]
    assert len(rows) == 8
    for row, gap, p, corrected in zip(rows, gaps, ps, holm(ps), strict=True):
        assert close(row["difference"], gap.mean()) and close(row["p"], p) and close(row["p_holm"], corrected)
        assert f"{gap.mean():+.3f} [{float(row['low']):+.3f}, {float(row['high']):+.3f}]" in fine.text
    assert {r["verdict"] for r in rows if r["model_point"] != "64 rows"} == {"better"}


def p_of_t(gap: NDArray[np.float64]) -> float:
    error, df = crossed_error(gap)
    return float(2 * scipy_stats.t.sf(abs(gap.mean()) / error, df))


def test_the_answer_counts_verdicts(fine: Record) -> None:
    first = fine.text.splitlines()[1]
    assert first.startswith("SRPPO is better than SFT at 3 of 4 sizes, worse at none, cannot tell at 1.")
    assert "SRPPO is better than longer SFT at 3 of 4 sizes" in fine.flat
    assert "(out-of-domain, greedy; Holm over 8; 10 seeds)." in fine.flat
    unsure = [float(r["detectable"]) for r in fine.table("differences.csv") if r["verdict"] == "cannot tell"]
    assert (
        len(unsure) == 2 and f"about {min(unsure):.3f} to {max(unsure):.3f} or more would have been seen" in fine.flat
    )
    assert "Nothing can be significant" not in fine.flat


def test_slopes_by_hand(fine: Record) -> None:
    """Least squares a seed and an item, then the mean; drawn per doubling."""
    doublings, slopes = np.log2([4, 8, 16, 64]), {row["what"]: float(row["slope"]) for row in fine.table("trends.csv")}
    values = {arm: np.array([fine.matrix(f"{n} rows", arm) for n in (4, 8, 16, 64)]) for arm in ("SFT", "SRPPO")}
    for what, ys in {**values, "SRPPO minus SFT": values["SRPPO"] - values["SFT"]}.items():
        slope = np.polyfit(doublings, ys.reshape(4, -1), 1)[0].mean()
        found = next(each for each in fine.result.trends if each.what == what)
        assert (
            np.isclose(found.slope.mean, slope)
            and np.isclose(slopes[what], slope)
            and found.points == 4
            and found.seeds == 10
        )
        word = "rises" if found.slope.low > 0 else "falls" if found.slope.high < 0 else "shows no clear trend"
        assert f"{what} {word}: {slope:+.3f} [" in fine.flat and "per doubling of size" in fine.flat
    assert "SRPPO falls" in fine.flat and "SFT rises" in fine.flat


def test_compute_by_hand(fine: Record) -> None:
    """SRPPO: 2 and 8. Longer SFT starts from the base: 10, beside a quarter of it that went into choosing."""
    costs = {row["arm"]: (float(row["flops"]), float(row["selection_flops"])) for row in fine.table("cells.csv")}
    assert costs == {"SFT": (2e12, 0.0), "SRPPO": (10e12, 0.0), "longer SFT": (10e12, 2.5e12)}
    table = fine.text.split("Training compute")[1].split("TFLOPs:")[0]
    found = {tuple(line.split()) for line in table.splitlines()}
    assert ("longer", "SFT", "10", "1.00", "2.5", "1.25") in found and ("SFT", "2", "0.20", "0", "0.20") in found
    assert "core-hours: the wall time of 320 finished stages." in fine.flat


# ---- nothing is dropped


def test_every_planned_comparison_and_cell_is_shown(record: Record) -> None:
    sweep = record.result.plan.sweep
    planned = [r for r in record.table("differences.csv") if r["planned"] == "True"]
    named = [(r["model_point"], r["model"], r["baseline_point"], r["baseline"]) for r in planned]
    assert named == [(c.model.point, c.model.arm, c.baseline.point, c.baseline.arm) for c in sweep.analysis.family]
    cells = {(r["point"], r["arm"]) for r in record.table("cells.csv") if r["primary"] == "True"}
    assert cells == {(cell.point, cell.arm) for cell in sweep.cells()}
    shown = record.text.split("Trends")[0].split("Training compute")[0]
    verdicts = re.findall(r"(?:better|worse|cannot tell|no result)\s*$", shown.partition("Cells,")[2], re.MULTILINE)
    assert len(verdicts) == len(sweep.analysis.family)
    words = [r["verdict"] for r in planned]
    assert sorted(map(str.strip, verdicts)) == sorted(words)
    for word in set(words):
        body = record.page.split("The plan, as sweep.json")[0]
        assert body.count(f"<td>{word}</td>") == words.count(word)
        assert (record.out / "table.tex").read_text().count(f"& {word} \\\\") == words.count(word)


def test_files_agree(record: Record) -> None:
    lines = [revive(json.loads(line)) for line in (record.out / "rows.jsonl").read_text().splitlines()]
    parquet = pq.read_table(record.out / "rows.parquet").to_pylist()
    assert parquet == lines and len(lines) == len(record.result.rows)
    rows = record.table("rows.csv")
    assert len(rows) == len(lines) > 0
    for row, line in zip(rows, lines, strict=True):
        assert row == {key: "" if value is None else str(value) for key, value in line.items()}
    done = sum(len(cell.seeds) * len(cell.accuracy) for cell in record.result.cells)
    assert len(lines) == done


def test_rows_by_task_add_up(record: Record) -> None:
    by_task = pq.read_table(record.out / "tasks.parquet").to_pylist()
    for row in pq.read_table(record.out / "rows.parquet").to_pylist():
        key = {name: row[name] for name in ("point", "arm", "seed", "group", "decoding")}
        own = [each for each in by_task if key.items() <= each.items()]
        assert len({each["task"] for each in own}) == len(own) > 0
        assert sum(each["items"] for each in own) == row["items"]
        right = sum(each["items"] * each["accuracy"] for each in own)
        assert right == pytest.approx(row["items"] * row["accuracy"])
    answered = record.out.parent.glob("stages/*/eval/kept-*/samples.jsonl")
    tasks = {json.loads(line)["task"] for path in answered for line in path.read_text().splitlines()}
    assert {each["task"] for each in by_task} == tasks


def test_widths_and_paths(record: Record) -> None:
    *lines, last = record.text.splitlines()
    body = [line for line in lines if not line.startswith("written: ") and "/" not in line[:1]]
    assert all(len(line.rstrip()) <= 80 for line in body if str(record.out)[:20] not in line), body
    assert "…" not in record.text, "no number is cut"
    names = {path.name for path in record.out.iterdir()}
    flat = record.text.replace("\n", "")
    assert last and all(f"/{name}" in flat for name in names)
    wanted = {"rows.csv", "rows.parquet", "rows.jsonl", "cells.csv", "differences.csv", "table.tex", "index.html"}
    assert wanted | {"accuracy.png", "accuracy.svg"} <= names


def test_page_stands_alone(record: Record) -> None:
    assert not re.search(r"<script|<link|<img|<iframe|@import|javascript:", record.page, re.IGNORECASE)
    assert not re.search(r"""(?:src|href|url\()\s*=?\s*["'(]?\s*(?:https?:|//|file:|data:)""", record.page)
    assert all(target.startswith("#") for target in re.findall(r'href="([^"]*)"', record.page))
    assert "exploratory: not in the plan" in record.page.casefold() or len(record.result.differences) == 0
    assert "recipe.toml" in record.page and "abacus" in record.page and "not tuned" in record.page
    plots = 2 if any(d.primary for d in record.result.differences) else 1
    assert record.page.count("<svg") == 2 * plots, "each also for phones"


def test_latex_is_well_formed(record: Record) -> None:
    text = (record.out / "table.tex").read_text()
    bare = re.sub(r"\\[\\&%$#_{}]", "", text)
    depth = 0
    for each in bare:
        depth += (each == "{") - (each == "}")
        assert depth >= 0
    assert depth == 0 and bare.count("\\begin{table}") == bare.count("\\end{table}") == 2
    for columns, body in re.findall(r"\\begin\{tabular\}\{(\w+)\}(.*?)\\end\{tabular\}", text, re.DOTALL):
        rows = [line for line in body.splitlines() if line.endswith("\\\\") and "multicolumn" not in line]
        assert rows and all(len(re.findall(r"(?<!\\)&", line)) == len(columns) - 1 for line in rows)
    assert "\\caption{" in text and "Intervals: 95\\%" in text and "[" not in [line[:1] for line in text.splitlines()]


def test_special_characters_are_escaped(kinds: Record) -> None:
    assert plain_latex(r"50%_a & {b} #1 \x ~^$ a<b>") == (
        r"50\%\_a \& \{b\} \#1 \textbackslash{}x \textasciitilde{}\textasciicircum{}\$ a$<$b$>$"
    )
    text = (kinds.out / "table.tex").read_text()
    assert plain_latex(AWKWARD) in text and AWKWARD not in text
    assert "<b>" not in kinds.page and "&lt;b&gt;" in kinds.page


# ---- shapes


def test_failed_and_diverged(broken: Record) -> None:
    rows = {(r["point"], r["arm"]): r for r in broken.table("cells.csv") if r["primary"] == "True"}
    assert (rows["4 rows", "SFT"]["seeds"], rows["4 rows", "SFT"]["failed"]) == ("5", "1")
    assert (rows["4 rows", "SRPPO"]["failed"], rows["16 rows", "SRPPO"]["diverged"]) == ("1", "6")
    assert rows["16 rows", "SRPPO"]["accuracy"] == "" and rows["16 rows", "SRPPO"]["seeds"] == "0"
    table = [line.split() for line in broken.text.split("Cells,")[1].split("Intervals")[0].splitlines()]
    assert any(line[-6:] == ["0/6", "0", "6", "-", "-", "-"] for line in table)
    assert any(line[-6:-3] == ["5/6", "1", "0"] for line in table)
    for text in (broken.flat, broken.page):
        assert "diverged (seeds 0, 1, 2, 3, 4, 5: step 7: loss is NaN)" in text and "seed 1: out of memory" in text
        assert "SRPPO minus SFT" in text and "Incomplete: of 36 trainings" in text
    assert (
        "no result at 1" in broken.flat
        and "Planned, no result, since no seed has both cells measured: 16: SRPPO minus SFT" in broken.flat
    )
    assert "100\\% lost" in (broken.out / "table.tex").read_text()
    tested = [r for r in broken.table("differences.csv") if r["p"]]
    assert len(tested) == 2
    expected = holm([*(float(row["p"]) for row in tested), 1.0])  # the family does not shrink with what failed
    assert all(close(row["p_holm"], p) for row, p in zip(tested, expected, strict=False))


def test_few_seeds_are_said_to_be_few(broken: Record) -> None:
    """Seven are needed for Holm over three: 3 * 2^(1-7) < 0.05 < 3 * 2^(1-6)."""
    assert "Nothing can be significant here: with 6 seeds the exact sign-flip over seeds test gives no p" in broken.flat
    assert "below 0.031; p <= 0.05 by Holm over 3 needs 7." in broken.flat


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.01, 0.3, "rises"), (-0.1, 0.3, "shows no clear trend"), (-0.3, -0.1, "falls")],
)
def test_trends_in_words(low: float, high: float, words: str) -> None:
    trend = Trend("SFT", "size", "log2", "", METRICS[0], Estimate((low + high) / 2, low, high, 9), 3, 2)
    assert trend_sentence(trend).startswith(f"SFT {words}") and trend_sentence(trend).endswith("per doubling of size")


@pytest.mark.parametrize(
    ("right", "words"),
    [
        ({4: 0.0, 8: 0.5, 16: 1.0}, "SFT rises: +0.500 for every seed and item per doubling of size"),
        ({4: 1.0, 8: 0.5, 16: 0.0}, "SFT falls: -0.500 for every seed and item per doubling of size"),
        ({4: 0.5, 8: 0.5, 16: 0.5}, "SFT is the same at every point: 0 per doubling of size"),
        ({4: 0.0, 8: 1.0, 16: 0.0}, "SFT neither rises nor falls: 0 per doubling of size"),
    ],
)
def test_a_slope_that_all_seeds_and_items_share_is_no_zero(right: dict[int, float], words: str, tmp_path: Path) -> None:
    sweep = make_sweep(sizes(*right), (SFT,), 2, analysis={"family": (), "trend": "size", "scale": "log2"})
    record = make(tmp_path / "run", sweep, lambda task: right[task.recipe.data.size or 0], alike=True)
    assert words in record.flat and "nan" not in record.flat.lower()


def betas(*values: float) -> list[Ablation]:
    return [Ablation(f"beta {beta}", {"reward.beta": beta}, {"beta": beta}) for beta in values]


def test_where_an_arm_peaks_and_what_its_ends_lack(tmp_path: Path) -> None:
    """Far below the peak at one end, as good as there at the other; SFT, the same everywhere, has no peak."""
    chances = {0.125: 0.1, 0.25: 0.75, 0.5: 0.7, 1.0: 0.7}
    sweep = make_sweep(betas(*chances), (SFT, SRPPO), 6, analysis={"trend": "beta", "scale": "log2"})
    record = make(tmp_path / "run", sweep, lambda t: chances[t.recipe.reward.beta] if t.kind == "ppo" else 0.3)
    values = {beta: record.matrix(f"beta {beta}", "SRPPO") for beta in chances}
    at = max(values, key=lambda beta: values[beta].mean())
    (peak,) = record.result.peaks
    assert (peak.what, peak.at, peak.seeds) == ("SRPPO", at, 6) and at != 0.125
    assert np.isclose(peak.height, values[at].mean())
    for beta, drop in peak.drops:
        gap = values[at] - values[beta]
        again = calibrated_interval(gap, limits=(-1.0, 1.0), draws=1000)
        assert np.isclose(drop.mean, gap.mean()) and np.allclose(drop, again)
    assert peak.drops[0][0] == 0.125 and peak.drops[0][1].low > 0
    for text in (record.flat, re.sub(r"\s+", " ", record.page)):
        assert f"SRPPO is highest at beta {at:g} ({values[at].mean():.3f})" in text
        assert f"at 0.125 lower by {values[at].mean() - values[0.125].mean():.3f} [" in text and ": overshoots" in text
        assert "Exploratory, not in the plan: where each arm" in text and "SFT is highest" not in text


def test_the_forecast_is_judged_by_the_order_of_the_points(tmp_path: Path) -> None:
    """Sampled answers of the optimum against SRPPO's, sampled and greedy; without the optimum there is nothing."""
    chances = {0.125: 0.42, 0.25: 0.5, 0.5: 0.46, 1.0: 0.44}  # so near that no two orders are the same by themselves
    optimum, analysis = Arm("optimum (forecast)", "resampled"), {"trend": "beta", "scale": "log2"}
    sweep = make_sweep(betas(*chances), (SFT, optimum, SRPPO), 4, analysis=analysis)
    record = make(tmp_path / "run", sweep, lambda t: chances[t.recipe.reward.beta] if t.kind != "sft" else 0.3)
    for forecast, metric in zip(record.result.forecasts, (METRICS[1], METRICS[0]), strict=True):
        means = [
            [record.matrix(f"beta {beta}", arm, of).mean() for beta in chances]
            for arm, of in ((optimum.name, METRICS[1]), ("SRPPO", metric))
        ]
        rho = scipy_stats.spearmanr(*means).statistic
        assert np.isclose(forecast.rho.mean, rho) and forecast.metric == metric
        assert (forecast.points, forecast.seeds) == (4, 4) and forecast.rho.low <= rho <= forecast.rho.high
        words = f"of optimum (forecast) with the accuracy of SRPPO: {rho:.3f} ["
        assert words in record.flat and words in re.sub(r"\s+", " ", record.page)
    without = make(
        tmp_path / "without",
        replace(
            sweep, arms=(SFT, SRPPO), analysis=make_sweep(betas(*chances), (SFT, SRPPO), 4, analysis=analysis).analysis
        ),
    )
    assert not without.result.forecasts and "Rank correlation" not in without.flat


@pytest.mark.parametrize(
    ("axis", "at", "drops", "ends"),
    [
        ("beta", 0.25, {0.1: (0.05, 0.02, 0.08), 1.0: (0.03, 0.01, 0.05)}, ["overshoots", "falls off"]),
        ("beta", 0.25, {0.1: (0.05, -0.02, 0.12), 1.0: (0.03, 0.0, 0.06)}, ["cannot tell", "cannot tell"]),
        ("size", 8, {4: (0.05, 0.02, 0.08), 16: (0.03, 0.01, 0.05)}, ["falls off", "falls off"]),
        ("beta", 0.1, {1.0: (0.05, 0.02, 0.08)}, ["an end of the axis", "falls off"]),
    ],
)
def test_peaks_in_words(axis: str, at: float, drops: dict[float, tuple[float, ...]], ends: list[str]) -> None:
    found = tuple((value, Estimate(*drop, 40)) for value, drop in drops.items())
    said = peak_sentence(Peak("SRPPO", axis, "anchor sft", at, 0.71, found, 9))
    assert said.startswith(f"SRPPO (anchor sft) is highest at {axis} {at:g} (0.710)")
    assert re.findall("overshoots|falls off|cannot tell|an end of the axis", said) == ends
    mean, low, high = next(iter(drops.values()))
    assert f"lower by {mean:.3f} [{low:.3f}, {high:.3f}]" in said


def test_models_are_named_and_their_sizes_are_the_axis(tmp_path: Path) -> None:
    counts = {"tiny": 200_000, "small": 900_000, "large": 4_000_000}
    points = [
        Ablation(name, {"data.size": 4 + i}, {"base": name, "parameters": count})
        for i, (name, count) in enumerate(counts.items())
    ]
    analysis = {"trend": "parameters", "scale": "log2"}
    sweep = replace(make_sweep(points, (SFT, SRPPO), 3, analysis=analysis), axes=("base",))
    record = make(tmp_path / "run", sweep, lambda task: 0.3 + 0.1 * (task.recipe.data.size or 0) / 4)
    assert {(each.what, each.where, each.points) for each in record.result.trends} == {
        (what, "", 3) for what in ("SFT", "SRPPO", "SRPPO minus SFT")
    }
    assert "per doubling of parameters" in record.flat and "at any of 3 bases" in record.flat
    assert line_axis(sweep) == "parameters" and list(panels(sweep, "parameters")) == [""]
    assert [point_label(sweep, name) for name in counts] == list(counts)


def test_a_stage_that_two_tasks_share_is_paid_once(tmp_path: Path) -> None:
    sweep = make_sweep(sizes(4, 8), (SFT, SRPPO), 1)
    run, plan = Run.open(tmp_path / "run", sweep.as_spec()), Plan(sweep)
    ledger = Ledger(run, 3)
    for task in plan.tasks.values():
        ledger.link(task, run.stage(task.kind, {"seed": 0}))
    assert len(plan.tasks) == 4 and len(stages_of(plan, ledger)) == 2


def test_unfinished(unfinished: Record) -> None:
    assert unfinished.text.splitlines()[1] == "No answer yet: none of the 3 planned comparisons has a result."
    assert "Incomplete: of 18 trainings (cells times seeds) 9 are measured, 9 not finished" in unfinished.flat
    assert "Seeds not finished: 4: SRPPO 3; 8: SRPPO 3; 16: SRPPO 3" in unfinished.flat
    assert (
        "SFT shows no clear trend" in unfinished.flat
        or "SFT rises" in unfinished.flat
        or "SFT falls" in unfinished.flat
    )


def test_one_seed(lone: Record) -> None:
    assert "SRPPO cannot be told from SFT at any of 2 sizes (out-of-domain, greedy; Holm over 2; 1 seed)." in lone.flat
    assert "Nothing can be significant here: with 1 seed the exact sign-flip" in lone.flat
    assert "needs 7" in lone.flat and "One seed says nothing of other seeds." in lone.flat
    assert "one training seed, so they say nothing of other seeds" in lone.flat


def test_categories(kinds: Record) -> None:
    assert "base, kind" in kinds.page and "org/model-of-a-long-name, none: SFT" in kinds.page
    assert "at any of 4 points" in kinds.flat
    assert {r["kind"] for r in kinds.table("rows.csv")} == {"", "b"}


def test_one_point_many_arms(methods: Record) -> None:
    first = "SRPPO is better than SFT and decode-time extrapolation, SRPPO is worse than zero."
    assert methods.flat.startswith(f"trial: Does it work? {first}")
    assert ". zero is better than SFT (out-of-domain, greedy; Holm over 4; 9 seeds)." in methods.flat
    assert "SRPPO minus each SFT" in methods.flat and "each minus SFT zero" in methods.flat
    assert "all" not in {line.split(" ")[0] for line in methods.text.splitlines()}


def test_slope_of_what_does_not_vary(tmp_path: Path) -> None:
    """SFT is one training at every beta: no slope, and no interval of it."""
    points = betas(0.1, 0.2, 0.4)
    arms = (SFT, Arm("coherent", "ppo"))
    family = every(points, "coherent", "SFT")
    sweep = make_sweep(points, arms, 3, analysis={"family": family, "trend": "beta", "scale": "log2"})
    record = make(tmp_path / "run", sweep)
    assert "SFT is the same at every point: 0 per doubling of beta" in record.flat and "nan" not in record.flat.lower()
    assert "arm TFLOPs / coherent" in record.flat and "coherent 10 1.00 0 1.00" in record.flat


def test_an_axis_keeps_its_values_beside_a_figure_of_its_name(tmp_path: Path) -> None:
    points = [Ablation(f"{steps} steps", {"ppo.steps": steps}, {"steps": steps}) for steps in (3, 6)]
    record = make(tmp_path / "run", make_sweep(points, (SFT, SRPPO), 1))
    for name in ("rows.csv", "cells.csv"):
        assert {row["steps"] for row in record.table(name)} == {"3", "6"}
        assert {float(row["measured_steps"]) for row in record.table(name)} == {8.0}


def test_no_family(tmp_path: Path) -> None:
    record = make(tmp_path / "run", make_sweep(sizes(4, 8), (SFT, SRPPO), 2, analysis={"family": ()}))
    assert "The plan tests no difference" in record.flat and "Accuracy" in record.page


def test_legible_in_ascii(fine: Record) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    report_sweep(fine.out.parent, Console(plain=True, file=stream))
    stream.flush()
    text = raw.getvalue().decode("ascii")
    assert re.search(r"\.+-+o-+\.+", text) and "SRPPO minus SFT" in text
