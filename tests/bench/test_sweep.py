"""`srppo bench sweep`: what it counts as harness, and that its stages are real ones. No figure is judged here."""

from __future__ import annotations

import json
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

import srppo.cli.app
from srppo.ablations.plan import PARENTS, Task
from srppo.ablations.sweeps import SWEEPS
from srppo.bench import sweep
from srppo.bench.spans import Spans
from srppo.bench.sweep import SPANS, SweepBench, SweepRow, WarmUp, measure, nothing, run_sweep_bench, verdicts
from srppo.cli.sweep import SMALL
from srppo.config import Recipe, load_recipe
from srppo.console import Console
from srppo.errors import RunError

TINY = ["ppo.steps=1", "rollout.batch=8", "sft.steps=1", "eval.every=0", "eval.limit=2", "data.prompts_size=8"]


class Clock:
    """Time that passes only when it is told to."""

    now = 0.0

    def read(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_a_span_within_another_is_taken_out_of_it():
    clock = Clock()
    spans = Spans(clock.read)
    with spans.span("training"):
        clock.work(5)
        with spans.span("record"):
            clock.work(2)
            with spans.span("sync"):
                clock.work(1)
        with spans.span("record"):
            clock.work(4)
    clock.work(100)
    with pytest.raises(KeyError), spans.span("data"):
        clock.work(3)
        raise KeyError
    assert spans.seconds == {"training": 5, "record": 6, "sync": 1, "data": 3}


def test_wrapped_functions_do_what_they_did():
    clock = Clock()
    spans = Spans(clock.read)

    class Stage:
        def commit(self, value: int, *, twice: bool = False) -> int:
            """Said."""
            clock.work(2)
            return self.commit(value + 1) if twice else value

    spans.wrap(Stage, "commit", "record")
    assert Stage().commit(3, twice=True) == 4 and Stage.commit.__doc__ == "Said."
    assert spans.seconds == {"record": 4}  # the call within the call is not counted twice


def a_row(kind: str, wall: float, **spans: float) -> SweepRow:
    cpu = {"cpu_training": spans.get("training", 0.0) / 2, "cpu_harness": 0.02, "cpu_warm_up": 0.03}
    return sweep._row(kind, [{"wall": wall, **cpu, **spans}], total_s=30.0, cpu_s=10.0, slots=2)


def test_harness_is_all_that_neither_trains_nor_tests():
    row = a_row("ppo", 12.0, training=8.0, measuring=3.0, data=0.4, models=0.3, record=0.2, process=0.1)
    assert row.harness_s == pytest.approx(1.0) and row.share == pytest.approx(1 / 8)
    assert set(row.spans) == set(SPANS) and row.stages == 1
    assert a_row("no-op", 1.0, process=1.0).share is None


def test_rows_are_means_over_stages():
    found = [{"wall": 2.0, "training": 1.0}, {"wall": 4.0, "training": 3.0}]
    row = sweep._row("ppo", found, total_s=6.0, cpu_s=1.0, slots=1)
    assert (row.stage_s, row.spans["training"], row.stages, row.share) == (3.0, 2.0, 2, pytest.approx(0.5))


def test_the_bars_are_said_for_each_kind_and_each_shipped_sweep(monkeypatch):
    warmed = []
    monkeypatch.setattr(sweep, "warm_up", lambda tasks: warmed.append(tasks) or WarmUp(0.5, 0.3))
    recipe = load_recipe(None, SMALL)
    rows = [
        a_row("no-op", 1.0, process=1.0),
        a_row("sft", 3.0, training=2.0, measuring=0.9, data=0.06, record=0.03, sync=0.01),
        a_row("ppo", 13.0, training=10.0, measuring=2.9, data=0.06, **{"warm-up": 0.04}),
    ]
    lines = verdicts(rows, recipe)
    assert lines[0].startswith("no-op: 60000.0 ms a stage and worker (misses the bar of 60 ms), 10000.0 ms of them")
    assert (
        lines[1] == "sft: harness is 5.0% of training (misses the bar of 3 %), 5.0% in CPU time; bookkeeping alone 2.0%"
    )
    assert (
        lines[2] == "ppo: harness is 1.0% of training (within the bar of 3 %), 1.0% in CPU time; bookkeeping alone 0.0%"
    )
    said = {line.split()[1].rstrip(":"): line for line in lines if line.startswith("sweep ")}
    assert list(said) == [name for name in SWEEPS if name != "grid"]
    # 10 SFT and 80 PPO stages without their part here, and ten times the warm-up of a seed there.
    share = (10 * 0.1 + 80 * 0.06 + 10 * 0.5) / (10 * 2 + 80 * 10)
    cpu = (90 * 0.02 + 10 * 0.3) / (10 * 1 + 80 * 5)
    assert said["reward"] == f"sweep reward: {share:.1%} (within the bar of 3 %), {cpu:.1%} in CPU time"
    assert {len(tasks) for tasks in warmed} >= {9} and all(len({t.recipe.seed for t in tasks}) == 1 for tasks in warmed)
    assert said["model-scale"] == "sweep model-scale: not judged, for want of stages of kind base"
    assert "longer-sft, resampled, samples" in said["method"]
    base = verdicts([*rows, a_row("base", 2.1, measuring=2.0, models=0.1)], recipe)
    (scale,) = [line for line in base if line.startswith("sweep model-scale")]
    assert scale.endswith("; as if all bases were embedded:xs, but larger ones train longer")
    assert len(verdicts(rows[:1], recipe)) == 1


def test_a_stage_that_fails_ends_the_benchmark_with_its_reason(tmp_path):
    def fail(task: Task, ledger: Any) -> None:
        raise ValueError("no luck")

    with pytest.raises(RunError, match="a stage of the benchmark failed: no-op"):
        measure({"a": Task("a", "no-op", Recipe(), ())}, fail, SweepBench(Recipe(), out=tmp_path / "rows.jsonl"))
    assert list(tmp_path.iterdir()) == []


def test_every_stage_is_a_real_one(tmp_path, monkeypatch):
    """Committed in the record by a process of its own; what is left behind is the rows alone."""
    seen: list[int] = []

    def look(task: Task, ledger: Any) -> None:
        nothing(task, ledger)
        stage = ledger.stage(task)
        (tmp_path / f"seen-{task.key}").write_text(f"{stage.done} {stage.result()['attempt']} {len(stage.attempts())}")

    tasks = {f"{i}": Task(f"{i}", "no-op", Recipe(), ()) for i in range(4)}
    (row,) = measure(tasks, look, SweepBench(Recipe(), slots=2, out=tmp_path / "rows.jsonl"))
    assert row.stages == 4 and row.slots == 2 and seen == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"seen-{i}" for i in range(4)]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"True 1 1"}


def run_plainly(options: SweepBench) -> None:
    run_sweep_bench(options, Console(plain=True))


def test_stages_that_train_are_timed_in_every_part(tmp_path, monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    items = [{"prompt": "p", "answer": "a", "split": split} for split in ("dev", "test")]
    (file := tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in items))
    recipe = load_recipe(None, [*SMALL, *TINY, f"eval.items={file}"])
    out = tmp_path / "new" / "rows.jsonl"
    bench = SweepBench(recipe, stages=2, seeds=1, out=out)
    # In a process of its own: a worker forks, and this one may have threads of torch's from other tests.
    process = get_context("spawn").Process(target=run_plainly, args=(bench,))
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
    rows = {row["kind"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert set(rows) == {"no-op", *PARENTS} and {row["stages"] for row in rows.values()} == {1, 2, 3}
    for row in rows.values():
        assert sum(row["spans"].values()) == pytest.approx(row["stage_s"])
        assert row["machine"]["cpu"] and row["schema"] == 2 and row["load"] >= 0
    for kind in ("sft", "ppo"):
        spans = rows[kind]["spans"]
        assert all(spans[name] > 0 for name in SPANS), spans
        harness = rows[kind]["stage_s"] - spans["training"] - spans["measuring"]
        assert rows[kind]["share"] == pytest.approx(harness / spans["training"])
    for kind in ("no-op", "base", "extrapolated", "samples", "best-of-n"):
        assert rows[kind]["spans"]["training"] == 0 and rows[kind]["share"] is None
        assert (rows[kind]["spans"]["measuring"] > 0) == (kind != "no-op")
    assert len({rows[kind]["spans"]["warm-up"] for kind in PARENTS}) == 1, "in equal parts"
    assert [path.name for path in out.parent.iterdir()] == ["rows.jsonl"]


def test_the_command_fits_80_columns_and_appends(tmp_path, monkeypatch, capsys):
    out: Path = tmp_path / "rows.jsonl"
    for _ in range(2):
        argv = ["srppo", "bench", "sweep", "--stages", "2", "--seeds", "0", "--out", str(out)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            srppo.cli.app.main()
        assert not stop.value.code
        printed = capsys.readouterr().out.splitlines()
        assert max(map(len, printed)) <= 80 and any(line.startswith("no-op") for line in printed)
    assert len(out.read_text().splitlines()) == 2
