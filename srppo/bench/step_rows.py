"""Rows of `srppo bench step`, ours and those of TRL's trainers, and their tables in the terminal."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from srppo.bench.measure import quantiles
from srppo.console import figure

PHASES = ("rollout", "score", "update")
NAMES = {"ppo": "PPO", "rloo": "RLOO"}


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One step of one preset. seconds, cpu_s: by phase; cpu: of this process, over its threads.

    method: ppo, or rloo: without a critic, several answers a prompt. tokens: of prompts and answers, without padding.
    flops: counted operations (`models.flops`), of which `share` is the part of the bare rate that was reached: flops
    over seconds over gemm_gflops. peak_bytes: of the process on a CPU, of the device on a GPU. load: the machine's mean
    of the last minute, this run included; None where the system has none.
    """

    date: str
    preset: str
    method: str
    work: dict[str, Any]
    model: dict[str, Any]
    step: int
    seconds: dict[str, float]
    cpu_s: dict[str, float]
    tokens: int
    answer_tokens: int
    padded_tokens: int
    flops: int
    gemm_gflops: float
    share: float
    peak_bytes: int
    threads: int
    load: float | None
    machine: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class RivalRow:
    """One step of a rival, next to ours of the same method, step and tokens. `missing` says why there is none.

    versions: of its environment. seconds, cpu_s: by phase, as `trl_worker.Turns` tells them apart; gc_cpu_s: of that,
    in Python's garbage collector. times_ours, times_ours_cpu: its seconds and CPU seconds over ours; above 1: ours is
    faster.
    """

    date: str
    preset: str
    rival: str
    trainer: str
    method: str
    versions: dict[str, str | None]
    work: dict[str, Any]
    step: int
    missing: str | None
    seconds: dict[str, float] | None = None
    cpu_s: dict[str, float] | None = None
    gc_cpu_s: float | None = None
    tokens: int | None = None
    answer_tokens: int | None = None
    peak_bytes: int | None = None
    times_ours: float | None = None
    times_ours_cpu: float | None = None
    threads: int
    load: float | None
    machine: dict[str, Any]


def step_table(rows: Sequence[StepRow]) -> RenderableType:
    """Our steps of one method, by phase: medians."""
    first = rows[0]
    title = (
        f"{NAMES[first.method]} step, {first.preset}: {first.work['rollouts']} rollouts, {first.tokens} tokens, "
        f"{first.threads} threads"
    )
    table = _table(title, "s", "CPU s", "tokens/s", "of the step")
    whole = median(sum(row.seconds.values()) for row in rows)
    for phase in PHASES:
        seconds, cpu_s = (median(getattr(row, key)[phase] for row in rows) for key in ("seconds", "cpu_s"))
        tokens = median(row.answer_tokens if phase == "rollout" else row.tokens for row in rows)
        table.add_row(phase, figure(seconds), figure(cpu_s), figure(tokens / seconds), f"{seconds / whole:.0%}")
    tokens = median(row.tokens for row in rows)
    cpu_s = median(sum(row.cpu_s.values()) for row in rows)
    table.add_row("step", figure(whole), figure(cpu_s), figure(tokens / whole), "100%", style="bold")
    share, peak = median(row.share for row in rows), max(row.peak_bytes for row in rows)
    rate = median(row.gemm_gflops for row in rows)
    padded = median(row.padded_tokens for row in rows)
    note = (
        f"{share:.0%} of the bare matrix rate ({rate:.0f} GF/s) on {tokens:.0f} real tokens; peak memory "
        f"{peak / 1e9:.2f} GB; padded to one width it would be {padded / tokens:.2f} times the tokens. Rollout: answer "
        "tokens a second."
    )
    return Group(table, Constrain(Text(note, "dim"), 80))


def rival_table(ours: Sequence[StepRow], rivals: Sequence[RivalRow]) -> RenderableType:
    """Rivals beside our steps of their method: medians, ratios with 20% and 80% quantiles; who dropped out and why."""
    parts: list[RenderableType] = []
    measured = [row for row in rivals if row.missing is None]
    if measured:
        table = _table("beside TRL, the same work", "s", "CPU s", "tokens/s", "CPU/ours", "20-80%", "s/ours")
        for method in dict.fromkeys(row.method for row in measured):
            mine, by_name = [row for row in ours if row.method == method], defaultdict(list)
            table.add_row(f"ours, {NAMES[method]}", *_medians(mine))
            for row in measured:
                if row.method == method:
                    by_name[row.rival].append(row)
            for name, rows in by_name.items():
                table.add_row(name, *_medians(rows), *_ratio(rows, "times_ours_cpu"), _ratio(rows, "times_ours")[0])
        loads = [row.load for row in measured if row.load is not None]
        note = "Steps take turns, with the same prompts and answers of the same lengths; /ours: the ratio step by step."
        note += f" Load of the machine: {min(loads):.1f} to {max(loads):.1f}." if loads else ""
        parts += [table, Constrain(Text(note, "dim"), 80)]
    parts += [Text(f"missing: {row.rival}, step {row.step}: {row.missing}") for row in rivals if row.missing]
    return Group(*parts)


def _table(title: str, *heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=Text(title, "bold"), title_justify="left")
    for name in ("", *heads):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    return table


def _medians(rows: Sequence[Any]) -> list[str]:
    seconds, cpu_s = (median(sum(getattr(row, key).values()) for row in rows) for key in ("seconds", "cpu_s"))
    rate = median(row.tokens / sum(row.seconds.values()) for row in rows)
    return [figure(seconds), figure(cpu_s), figure(rate)]


def _ratio(rows: Sequence[RivalRow], key: str) -> list[str]:
    found = quantiles([getattr(row, key) for row in rows])
    return [f"{found.median:.2f}", f"{found.q20:.2f}-{found.q80:.2f}"]
