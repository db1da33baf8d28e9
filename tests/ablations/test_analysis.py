"""What a sweep's record says, on records made by hand: pairing, the family, what was chosen, and what it all cost."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from srppo.ablations import Ablation, Analysis, Arm, Cell, Sweep, analysis
from srppo.ablations.analysis import SweepResult, analyse
from srppo.ablations.ledger import Ledger
from srppo.ablations.plan import Plan, Task
from srppo.ablations.progress import stage_seconds
from srppo.ablations.spec import every
from srppo.config import Recipe, canonical_json
from srppo.errors import DataError
from srppo.record.store import Run, Stage
from srppo.report.sweep_words import spent_line
from srppo.stages.kinds import KINDS

ITEMS = 10
SFT, SRPPO = Arm("SFT", "sft"), Arm("SRPPO", "ppo")
LONGER = Arm("longer SFT", "chosen-sft")


def sweep_of(*sizes: int, arms: tuple[Arm, ...] = (SFT, SRPPO), seeds: int = 3) -> Sweep:
    points = tuple(Ablation(str(size), {"data.size": size}, {"size": size}) for size in sizes)
    family = every(points, "SRPPO", "SFT") if SRPPO in arms else ()
    analysis = Analysis("unseen", "greedy", family, "size", "log2")
    return Sweep("trial", "Well?", Recipe(), ("size",), points, arms, tuple(range(seeds)), analysis)


def analysed(
    folder: Path,
    sweep: Sweep,
    right: Callable[[Task], int | None],
    figures: Callable[[Task], Mapping[str, Any]] = lambda task: {},
    item: Callable[[Task], str] = lambda task: "item",
    tasks: int = 1,
    begun: Callable[[Task, Stage], None] = lambda task, stage: None,
) -> SweepResult:
    """The analysis of a record in which each task has answered its first `right` items (None: it is not done); tasks:
    of how many tasks of the world they are."""
    plan, run = Plan(sweep), Run.open(folder, sweep.as_spec())
    ledger = Ledger(run, 3)
    for task in plan.tasks.values():
        count = right(task)
        if count is None:
            continue
        rows = [
            {"prompt": f"{item(task)} {i}", "answer": "a", "task": f"t{i * tasks // ITEMS}", "group": "unseen"}
            | {"correct": [i < count]}
            for i in range(ITEMS)
        ]
        parents = [each.id for need in task.needs if (each := ledger.stage(plan.tasks[need]))]
        stage = run.stage(
            task.kind, {"seed": task.recipe.seed, "task": task.key}, parents * (KINDS[task.kind].share is None)
        )
        ledger.link(task, stage)
        begun(task, stage)
        with stage.attempt() as attempt:
            text = "".join(canonical_json(row) + "\n" for row in rows)
            attempt.publish("eval/kept-greedy", partial(_write, text))
            attempt.commit("ok", {"flops": 0, **figures(task)})
    return analyse(plan, ledger)


def _write(text: str, folder: Path) -> None:
    (folder / "samples.jsonl").write_text(text)


def test_differences_are_paired_by_seed(tmp_path: Path) -> None:
    """SRPPO is one item better at each of the seeds that both have; seeds differ by more than that."""

    def right(task: Task) -> int | None:
        seed = task.recipe.seed
        return 2 * seed if task.kind == "sft" else 2 * seed + 1 if seed else None

    (found,) = analysed(tmp_path / "run", sweep_of(8, seeds=4), right).differences
    assert found.seeds == (1, 2, 3) and found.finding.difference.mean == pytest.approx(0.1)
    assert found.finding.p == 2 / 8, "the gap has one sign in all three"


def test_the_family_does_not_shrink_with_what_is_missing(tmp_path: Path) -> None:
    """p is below 0.05 at two of three points, and the correction is over three; that settles the verdicts."""

    def right(task: Task) -> int | None:
        return 1 if task.kind == "sft" else 9 if task.recipe.data.size != 32 else None

    found = analysed(tmp_path / "run", sweep_of(8, 16, 32, seeds=6), right).differences
    assert [each.comparison.model.point for each in found] == ["8", "16"]
    for each in found:
        assert each.finding.p == 2 / 64 and each.finding.p_holm == 3 * 2 / 64
        assert each.finding.verdict == "cannot tell" and each.finding.difference.low == 0 < each.finding.difference.mean


def test_tasks_are_the_units_where_there_are_several(tmp_path: Path) -> None:
    """SRPPO is right on the first six of ten items, SFT on two of them: five tasks of two items are won whole or not at
    all and say less than ten items. A sweep gives both intervals, and slopes are over tasks too."""

    def right(task: Task) -> int:
        return 2 if task.kind == "sft" else 5 + (task.recipe.data.size or 0) // 8 + task.recipe.seed % 2

    items, tasks = (analysed(tmp_path / str(n), sweep_of(4, 8, 16, seeds=10), right, tasks=n) for n in (1, 5))
    one, five = items.differences[0], tasks.differences[0]
    assert one.tasks is None and one.these_tasks is None and five.tasks == 5
    assert five.these_tasks is not None and five.these_tasks.mean == one.finding.difference.mean
    assert five.finding.difference.low < five.these_tasks.low and five.finding.p > one.finding.p
    assert five.finding.confidence == 1 - 0.05 / 3
    narrow, wide = (next(t.slope for t in found.trends if t.what == "SRPPO") for found in (items, tasks))
    assert wide.mean == narrow.mean and wide.high > narrow.high


def test_other_items_are_not_paired(tmp_path: Path) -> None:
    def analyse_with(name: str) -> SweepResult:
        item: Callable[[Task], str] = lambda task: name if task.kind == "ppo" else "item"  # noqa: E731
        return analysed(tmp_path / name, sweep_of(8), lambda task: 3, item=item)

    assert len(analyse_with("item").differences) == 1
    with pytest.raises(DataError, match="answers other items than"):
        analyse_with("another")


def test_a_slope_is_least_squares_per_doubling(tmp_path: Path) -> None:
    """2, 3 and 7 of 10 right at 4, 8 and 32 rows: sum(dx dy) / sum(dx dx) = 0.8 / (14 / 3)."""
    right = {4: 2, 8: 3, 32: 7}
    sweep = sweep_of(*right, arms=(SFT,), seeds=2)
    (found,) = analysed(tmp_path / "run", sweep, lambda task: right[task.recipe.data.size or 0]).trends
    assert found.slope.mean == pytest.approx(0.8 / (14 / 3)) and (found.what, found.points, found.seeds) == (
        "SFT",
        3,
        2,
    )


def test_the_chosen_length_pays_for_itself_and_what_was_dropped_is_beside_it(tmp_path: Path) -> None:
    """It starts from the base: neither SFT nor PPO, which set its budget, is paid for; PPO from it pays for both."""
    spent = {"sft": (1, 2), "ppo": (4, 8), "longer-sft-1/4": (100, 10), "ppo-chosen": (1000, 3000)}
    chosen: list[str] = []

    def figures(task: Task) -> dict[str, Any]:
        if task.kind == "chosen-sft":
            return {"chosen": chosen[0], "flops": 0, "selection_flops": 700}
        training, choosing = spent.get(task.kind, (400, 40))
        return {"flops": training, "selection_flops": choosing, "steps": 3}

    def begun(task: Task, stage: Stage) -> None:
        chosen.extend([stage.id] * (task.kind == "longer-sft-1/4"))

    arms = (SFT, LONGER, Arm("SRPPO from chosen SFT", "ppo-chosen"))
    found = analysed(tmp_path / "run", sweep_of(8, arms=arms, seeds=1), lambda task: 3, figures, begun=begun).cells
    assert [(cell.flops, cell.selection_flops) for cell in found] == [(1, 2), (100, 710), (1100, 3710)]


def test_a_choice_waits_for_all_its_candidates(tmp_path: Path) -> None:
    def right(task: Task) -> int | None:
        return None if task.kind in ("longer-sft-1/64", "chosen-sft") else 3

    cell = analysed(tmp_path / "run", sweep_of(8, arms=(SFT, LONGER)), right).cell(Cell("8", LONGER.name))
    assert cell.seeds == () and not cell.accuracy and cell.statuses == {"waiting": 3}


def test_all_training_on_the_way_to_a_cell_is_paid_once(tmp_path: Path) -> None:
    """SFT, its samples, and what chooses from them; effective samples are the harmonic mean, in cells and in rows."""
    paid = {"sft": 1000, "samples": 100, "resampled": 10, "best-of-n": 1}

    def figures(task: Task) -> dict[str, Any]:
        ess = {"ess": {"harmonic": 4.5, "median": 7.0}} if task.kind == "resampled" else {}
        return {"flops": paid[task.kind], **ess}

    arms = (SFT, Arm("resampling", "resampled"), Arm("best-of-n", "best-of-n"))
    found = analysed(tmp_path / "run", sweep_of(8, arms=arms), lambda task: 3, figures)
    assert [cell.flops for cell in found.cells] == [1000, 1110, 1101]
    assert [cell.figures.get("ess") for cell in found.cells] == [None, 4.5, None]
    assert {row["arm"]: row.get("ess") for row in found.rows} == {"SFT": None, "resampling": 4.5, "best-of-n": None}


def test_the_seconds_of_a_stage_survive_copying(tmp_path: Path) -> None:
    """Of two folders united, one's interrupted attempt may be younger than the other's commit; copies are new files."""
    stage = Run.open(tmp_path, {"sweep": "x"}).stage("no-op", {})
    assert stage_seconds(stage) is None  # not committed
    with stage.attempt() as attempt:
        attempt.commit("ok", {})
    shutil.rmtree(stage.path / "attempts")
    committed = datetime.fromisoformat((stage.result() or {})["time"])
    for number, before_s in enumerate((120, 20, -1000), start=1):
        folder = stage.path / "attempts" / f"{number}-somewhere"
        folder.mkdir(parents=True)
        time = (committed - timedelta(seconds=before_s)).isoformat()
        (folder / "events.jsonl").write_text(canonical_json({"time": time}) + "\n")
        (folder / "metrics.jsonl").write_text("")
        written = 2**32 if number == 1 else committed.timestamp() - 10  # the first is a copy: new, whatever it holds
        os.utime(folder / "metrics.jsonl", (written, written))
    assert stage_seconds(stage) == pytest.approx(100 + 20)
    assert spent_line([stage, stage]) == "Spent: 0.0667 core-hours: the wall time of 2 finished stages."
    (folder / "env.json").write_text(canonical_json({"processes": 3}))
    assert spent_line([stage]) == "Spent: 0.1 core-hours: the wall time of 1 finished stage, times its processes."


@pytest.mark.parametrize(
    ("kind", "start"),
    [
        ("ppo", "sft"),
        ("ppo-chosen", "chosen-sft"),
        ("ppo-equal", "longer-sft-1"),
        ("longer-sft-1", "sft"),
        ("distil", "sft"),
    ],
)
def test_what_length_explains_is_told_of_where_an_arm_started(
    kind: str, start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest SFT model on the way to an arm, and for longer SFT the one that it goes beyond."""
    tasks = {name: Task(name, name, Recipe(), each.parents) for name, each in KINDS.items()}
    plan = cast(Plan, SimpleNamespace(tasks=tasks, sweep=sweep_of(1)))
    ledger = cast(Ledger, SimpleNamespace(stage=lambda task: task.key))
    compared: list[tuple[object, object]] = []
    monkeypatch.setattr(analysis, "recorded", lambda stage: stage)
    monkeypatch.setattr(analysis, "gain_at_lengths", lambda sft, policy, group: compared.append((sft, policy)) or {})
    analysis._by_length(plan, ledger, kind, cast(Stage, kind))
    assert compared == [(start, kind)]


def test_rows_by_task_are_what_a_cell_answered(tmp_path: Path) -> None:
    """Seven of ten right, the first ones, in two tasks of five items."""
    found = analysed(tmp_path / "run", sweep_of(4, seeds=2), lambda task: 7, tasks=2)
    own = [row for row in found.tasks if row["arm"] == "SRPPO" and row["seed"] == 1 and row["decoding"] == "greedy"]
    assert [(row["task"], row["items"], row["accuracy"]) for row in own] == [("t0", 5, 1.0), ("t1", 5, 0.4)]
    assert all(row["size"] == 4 and row["group"] == "unseen" and row["tokens"] is None for row in own)
