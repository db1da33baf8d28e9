"""What the harness of a sweep costs: stages that do nothing, and all that is no training in stages that train.

Spans are timed inside the stages' processes, by wrapping the functions named below; a span within another is taken out
of it. What no span covers is the process itself: forking, importing, ending.

    training    `train_sft` or `train_ppo`, development items included: they choose the kept step
    measuring   test items and held-out NLL of the trained model; all that a stage without training does
    data        everything the pipeline prepares before its stage: demonstrations, prompts, items, encoding
    models      tokenizer and weights
    record      lease, logs, checkpoints, export, commit
    sync        of these, waiting for the disk (`fsync`)
    warm-up     what the worker makes ready before it forks, in equal parts for all its stages

Harness is the wall time of a stage's process less training and measuring, and its part of the warm-up. Of a shipped
sweep the warm-up is that of its own first seed, made in a process of its own; its stages are taken as those of their
kind that were measured here, at the defaults.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rich.table import Table

import srppo.stages.run
from srppo.ablations.execute import execute
from srppo.ablations.ledger import Ledger
from srppo.ablations.local import Worker
from srppo.ablations.options import build_sweep, read_options
from srppo.ablations.pace import apart
from srppo.ablations.plan import Plan, Task
from srppo.ablations.sweeps import BASE, SWEEPS
from srppo.ablations.warm import Warm
from srppo.bench.machine import machine
from srppo.bench.rows import append_rows
from srppo.bench.spans import Spans
from srppo.config import Recipe
from srppo.console import Console
from srppo.errors import RunError
from srppo.record.store import Attempt, Run
from srppo.stages.run import Pipeline

SCHEMA = 2
MOST_MS, MOST_SHARE = 60.0, 0.03  # the bars: 1,000 no-op stages a minute and worker; harness to training
SPANS = ("training", "measuring", "data", "models", "record", "sync", "process", "warm-up")


@dataclass(frozen=True)
class SweepBench:
    """stages: that do nothing; seeds: of the sweep that trains (0: none). out: rows are appended to this file."""

    recipe: Recipe
    stages: int = 1000
    slots: int = 1
    seeds: int = 1
    out: Path = Path("runs/bench-sweep/sweep.jsonl")


@dataclass(frozen=True)
class SweepRow:
    """Stages of one kind: seconds are means over them, `spans` of their processes; share: harness to training.

    total_s, cpu_s: of the worker and all its stages, of whatever kind; on a busy machine the second one tells more.
    cpu_training_s, cpu_harness_s, cpu_warm_up_s: the same without waiting for disk and neighbours, of the stage's
    process and of its part of the warm-up. load: of the machine in the last minute.
    """

    schema: int
    date: str
    kind: str
    stages: int
    slots: int
    total_s: float
    cpu_s: float
    stage_s: float
    spans: Mapping[str, float]
    share: float | None
    cpu_training_s: float
    cpu_harness_s: float
    cpu_warm_up_s: float
    load: float
    machine: Mapping[str, Any] = field(default_factory=dict)

    @property
    def harness_s(self) -> float:
        return self.stage_s - self.spans["training"] - self.spans["measuring"]


def wrap_stage(spans: Spans) -> None:
    """Time what the table above names, in a process that ends soon: it is never undone."""
    for train in ("train_sft", "train_ppo"):
        spans.wrap(srppo.stages.run, train, "training")
    spans.wrap(Pipeline, "measure", "measuring")
    spans.wrap(Pipeline, "__post_init__", "data")
    spans.wrap(Pipeline, "load", "models")
    spans.wrap(Warm, "tokenizer", "models")
    untrained = Pipeline.untrained
    Pipeline.untrained = lambda self_, kind, parents, measure, *rest, **more: untrained(  # type: ignore[method-assign,assignment]
        self_, kind, parents, spans.timing(measure, "measuring"), *rest, **more
    )
    for method in ("__init__", "log_metrics", "log_rollout", "log_event", "save_checkpoint", "publish", "commit"):
        spans.wrap(Attempt, method, "record")
    for method in ("stage", "write_data_manifest"):
        spans.wrap(Run, method, "record")
    spans.wrap(os, "fsync", "sync")


def timed(run: Callable[[Task, Ledger], None], task: Task, ledger: Ledger) -> None:
    """Run a task in its own process and leave its spans in the record; what went wrong is not timed."""
    spans, cpu = Spans(), Spans(time.process_time)
    for each in (cpu, spans):
        wrap_stage(each)
    run(task, ledger)
    trained, tested = cpu.seconds["training"], cpu.seconds["measuring"]
    computing = {"cpu_training": trained, "cpu_harness": time.process_time() - trained - tested}
    began_ns = max(int(path.name.split("-")[1]) for path in ledger.folder(task).glob("log-*"))
    wall = time.time() - began_ns / 1e9
    spans.seconds["process"] = wall - sum(spans.seconds.values())
    (ledger.folder(task) / "spans.json").write_text(json.dumps({"wall": wall, **computing, **spans.seconds}))


def nothing(task: Task, ledger: Ledger) -> None:
    """A stage that does nothing: named, leased, committed."""
    stage = ledger.run.stage(task.kind, {"key": task.key})
    ledger.link(task, stage)
    with stage.attempt() as attempt:
        attempt.commit("ok", {})


def run_sweep_bench(options: SweepBench, console: Console) -> None:
    """Run, append rows, print them."""
    rows = []
    options.out.parent.mkdir(parents=True, exist_ok=True)  # beside which the stages run: on the disk that counts
    if options.stages:
        tasks = {f"{i:08}": Task(f"{i:08}", "no-op", options.recipe, ()) for i in range(options.stages)}
        rows += measure(tasks, nothing, options)
        console.say(f"{options.stages} stages that do nothing: {rows[-1].total_s:.1f} s")
    if options.seeds:
        warm = Warm(options.slots + 1)
        rows += measure(training_tasks(options), functools.partial(execute, warm=warm), options, warm.before)
    append_rows(rows, options.out)
    console.print(table_of(rows))
    for line in verdicts(rows, options.recipe):
        console.print(line)
    console.print(f"rows: {options.out}")


def training_tasks(options: SweepBench) -> dict[str, Task]:
    """Every kind of stage, at the defaults of the shipped sweeps: the base, and all that `method` compares."""
    sweep = build_sweep("method", read_options("method", options.recipe, seeds=options.seeds))
    return Plan(replace(sweep, arms=(BASE, *sweep.arms))).tasks


def measure(
    tasks: Mapping[str, Task],
    run: Callable[[Task, Ledger], None],
    options: SweepBench,
    before: Callable[[Task], None] = lambda task: None,
) -> list[SweepRow]:
    """One row a kind of task, by a real worker in a record that is then deleted. Raises RunError if a stage failed."""
    worker, computing = Spans(), Spans(time.process_time)
    with TemporaryDirectory(dir=options.out.parent, prefix="stages-") as folder:
        ledger = Ledger(Run.open(Path(folder) / "run", {"sweep": "bench"}), tries=1)
        failures: list[str] = []
        began, cpu = time.perf_counter(), _cpu_seconds()
        Worker(
            tasks,
            ledger,
            functools.partial(timed, run),
            slots=options.slots,
            on_event=failures.append,
            before=computing.timing(worker.timing(before, "warm-up"), "warm-up"),
        ).run()
        total = time.perf_counter() - began, _cpu_seconds() - cpu
        if failures:
            raise RunError(f"a stage of the benchmark failed: {failures[0]}")
        by_kind: dict[str, list[dict[str, float]]] = defaultdict(list)
        for task in tasks.values():
            by_kind[task.kind].append(json.loads((ledger.folder(task) / "spans.json").read_text()))
    each = WarmUp(worker.seconds["warm-up"] / len(tasks), computing.seconds["warm-up"] / len(tasks))
    return [_row(kind, [_with(each, s) for s in spans], *total, options.slots) for kind, spans in by_kind.items()]


class WarmUp(NamedTuple):
    """Seconds that a worker takes to make ready: by the clock, and computing."""

    wall_s: float
    cpu_s: float


def _with(warm: WarmUp, spans: Mapping[str, float]) -> dict[str, float]:
    return {**spans, "wall": spans["wall"] + warm.wall_s, "warm-up": warm.wall_s, "cpu_warm_up": warm.cpu_s}


def warm_up(tasks: Sequence[Task]) -> WarmUp:
    """What a new worker takes to make ready for some tasks, one after the other."""

    def warm() -> dict[str, float]:
        began, computed, made = time.perf_counter(), time.process_time(), Warm(2)
        for task in tasks:
            made.before(task)
        return {"wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - computed}

    return WarmUp(**apart(warm))


def _cpu_seconds() -> float:
    """Of this process and of all its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def _row(kind: str, found: Sequence[Mapping[str, float]], total_s: float, cpu_s: float, slots: int) -> SweepRow:
    names = ("wall", "cpu_training", "cpu_harness", "cpu_warm_up", *SPANS)
    mean = {name: sum(each.get(name, 0.0) for each in found) / len(found) for name in names}
    wall, cpu_train, cpu_harness, cpu_warm = (mean.pop(name) for name in names[:4])
    harness = wall - mean["training"] - mean["measuring"]
    share = harness / mean["training"] if mean["training"] else None
    date, load, here = datetime.now(UTC).isoformat(timespec="seconds"), os.getloadavg()[0], asdict(machine("cpu"))
    cpu = (cpu_train, cpu_harness, cpu_warm)
    return SweepRow(SCHEMA, date, kind, len(found), slots, total_s, cpu_s, wall, mean, share, *cpu, load, here)


SHORT = {"training": "train", "measuring": "tests", "process": "rest", "warm-up": "warm"}


def table_of(rows: Sequence[SweepRow]) -> Table:
    """Milliseconds of a stage's process, by what they went into; at most 80 columns."""
    table = Table(box=None, pad_edge=False, title="ms a stage", title_justify="left")
    for name in ("", "wall", *SPANS):
        table.add_column(SHORT.get(name, name), justify="right" if name else "left", no_wrap=True)
    for row in rows:
        table.add_row(row.kind, *(f"{1000 * value:.0f}" for value in (row.stage_s, *(row.spans[n] for n in SPANS))))
    return table


def verdicts(rows: Sequence[SweepRow], recipe: Recipe) -> list[str]:
    """The bars, and the shares of the shipped sweeps whose kinds of stages were measured."""
    lines = []
    for row in rows:
        if row.kind == "no-op":
            each_ms = 1000 * row.total_s * row.slots / row.stages
            cpu_ms = 1000 * row.cpu_s / row.stages
            bar = _bar(each_ms, MOST_MS, "ms")
            lines.append(f"{row.kind}: {each_ms:.1f} ms a stage and worker {bar}, {cpu_ms:.1f} ms of them computing")
        elif row.share is not None:
            bar = _bar(100 * row.share, 100 * MOST_SHARE, "%")
            record = (row.spans["record"] + row.spans["sync"]) / row.spans["training"]
            cpu = (row.cpu_harness_s + row.cpu_warm_up_s) / row.cpu_training_s
            lines.append(
                f"{row.kind}: harness is {row.share:.1%} of training {bar}, {cpu:.1%} in CPU time; "
                f"bookkeeping alone {record:.1%}"
            )
    known = {row.kind: row for row in rows if row.kind != "no-op"}
    if "ppo" in known:
        lines += [_sweep_verdict(name, known, recipe) for name in SWEEPS if name != "grid"]
    return lines


def _sweep_verdict(name: str, known: Mapping[str, SweepRow], recipe: Recipe) -> str:
    sweep = build_sweep(name, read_options(name, recipe))
    tasks = list(Plan(sweep).tasks.values())
    first = [task for task in tasks if task.recipe.seed == sweep.seeds[0]]
    if missing := sorted({task.kind for task in tasks} - known.keys()):
        return f"sweep {name}: not judged, for want of stages of kind {', '.join(missing)}"
    rows, warm, seeds = [known[task.kind] for task in tasks], warm_up(first), len(sweep.seeds)
    harness_s = sum(row.harness_s - row.spans["warm-up"] for row in rows) + warm.wall_s * seeds
    share = harness_s / sum(row.spans["training"] for row in rows)
    cpu_s = sum(row.cpu_harness_s for row in rows) + warm.cpu_s * seeds
    cpu = cpu_s / sum(row.cpu_training_s for row in rows)
    others = {task.recipe.model.base for task in tasks} - {recipe.model.base}
    note = f"; as if all bases were {recipe.model.base}, but larger ones train longer" if others else ""
    return f"sweep {name}: {share:.1%} {_bar(100 * share, 100 * MOST_SHARE, '%')}, {cpu:.1%} in CPU time{note}"


def _bar(value: float, most: float, unit: str) -> str:
    return f"({'within' if value < most else 'misses'} the bar of {most:g} {unit})"
