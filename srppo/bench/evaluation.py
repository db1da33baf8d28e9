"""`srppo bench eval`: what the harness adds to the model's own time on the embedded suite, against its bar."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from srppo.bench.machine import machine
from srppo.bench.measure import Quantiles, quantiles
from srppo.bench.overhead import LM_EVAL, SPANS, WAYS, Overhead, measure_overhead
from srppo.bench.rows import append_rows
from srppo.console import Console
from srppo.environment import package_version
from srppo.errors import ConfigError
from srppo.world import BASES

SCHEMA = 1
BAR = 0.15  # of the model's own time, on the embedded world
PACKAGES = ("lm_eval", "transformers", "tokenizers", "jinja2")


@dataclass(frozen=True)
class EvalBench:
    """models: names of embedded bases. rounds: of all three ways, for each model and decoding; None: for SECONDS."""

    models: tuple[str, ...] = tuple(BASES)
    rounds: int | None = None
    out: Path = Path("runs/bench-eval/eval.jsonl")


@dataclass(frozen=True)
class EvalRow:
    """One model and decoding. The ways and the parts are those of `bench.overhead`; every figure is a median over the
    rounds with its 20% and 80% quantiles; over_*: the harness's time over a way's in the same round, less 1.

    rows, steps: rows of each batch, forward passes of each way. lm_eval: CPU seconds in lm-eval's own code over the
    model's. load: of the machine in the last minute.
    """

    schema: int
    date: str
    model: str
    decoding: str
    rounds: int
    threads: int
    rows: Sequence[int]
    steps: Mapping[str, int]
    cpu_s: Mapping[str, Quantiles]
    wall_s: Mapping[str, Quantiles]
    over_model: Quantiles
    over_plain: Quantiles
    over_model_wall: Quantiles
    over_plain_wall: Quantiles
    parts_s: Mapping[str, Quantiles]
    lm_eval: float
    bar: float
    met: bool
    load: float
    versions: Mapping[str, str | None]
    machine: Mapping[str, Any] = field(default_factory=dict)


def run_eval_bench(options: EvalBench, console: Console) -> list[EvalRow]:
    """Measure each model greedily and sampled, append rows as they come, print them. Raises ConfigError."""
    for name in options.models:
        if name not in BASES:
            raise ConfigError(f"--model {name}: there is no such embedded base; choose one of {', '.join(BASES)}")
    rows = []
    for name in options.models:
        for sampled in (False, True):
            found = measure_overhead(f"embedded:{name}", sampled=sampled, rounds=options.rounds)
            rows.append(row_of(name, found))
            append_rows(rows[-1:], options.out)
            console.say(f"{name}, {rows[-1].decoding}: {rows[-1].rounds} round(s)")
    console.print(times_table(rows))
    console.print(parts_table(rows))
    for line in verdicts(rows):
        console.print(line)
    console.print(f"rows: {options.out}")
    return rows


def row_of(model: str, found: Overhead) -> EvalRow:
    """The figures of one measurement, with where they come from."""
    parts = {name: quantiles([*seconds]) for name, seconds in found.spans.items()}
    alone = quantiles([*found.cpu_s["model"]]).median
    over = quantiles(found.over("model"))
    return EvalRow(
        schema=SCHEMA,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        model=model,
        decoding="sampled" if found.sampled else "greedy",
        rounds=len(found.cpu_s["model"]),
        threads=torch.get_num_threads(),
        rows=found.batches,
        steps=found.steps,
        cpu_s={name: quantiles([*found.cpu_s[name]]) for name in WAYS},
        wall_s={name: quantiles([*found.wall_s[name]]) for name in WAYS},
        over_model=over,
        over_plain=quantiles(found.over("plain")),
        over_model_wall=quantiles(found.over("model", wall=True)),
        over_plain_wall=quantiles(found.over("plain", wall=True)),
        parts_s=parts,
        lm_eval=sum(parts[name].median for name in LM_EVAL) / alone,
        bar=BAR,
        met=over.median <= BAR,
        load=os.getloadavg()[0],
        versions={name: package_version(name) for name in PACKAGES},
        machine=asdict(machine("cpu")),
    )


def times_table(rows: Sequence[EvalRow]) -> Table:
    """CPU seconds of the three ways and what the harness adds; at most 80 columns."""
    title = f"the embedded suite, CPU s a pass: medians of n rounds, {rows[0].threads} thread(s)"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    for name in ("base", "decoding"):
        table.add_column(name, no_wrap=True)
    for name in ("n", "model", "plain", "eval", "over model", "20 to 80%", "wall", "over plain", "bar"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row.model,
            row.decoding,
            str(row.rounds),
            *(f"{row.cpu_s[way].median:.2f}" for way in WAYS),
            f"{row.over_model.median:.1%}",
            f"{100 * row.over_model.q20:.0f} to {100 * row.over_model.q80:.0f}",
            f"{row.over_model_wall.median:.0%}",
            f"{row.over_plain.median:.1%}",
            "met" if row.met else "missed",
        )
    return table


def parts_table(rows: Sequence[EvalRow]) -> Table:
    """Where the harness's CPU time goes beside the decoding, which is the model's; at most 80 columns."""
    title = "CPU ms beside decoding, medians; requests and scoring are lm-eval's own"
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), title=title, title_justify="left")
    parts = [name for name in SPANS if name != "decoding"]
    for name in ("base", "decoding", *parts):
        table.add_column(name, justify="right" if name in parts else "left", no_wrap=True)
    for row in rows:
        table.add_row(row.model, row.decoding, *(f"{1000 * row.parts_s[name].median:.0f}" for name in parts))
    return table


def verdicts(rows: Sequence[EvalRow]) -> list[str]:
    """The bar for each row, in words."""
    return [
        f"{row.model}, {row.decoding}: the harness adds {row.over_model.median:.1%} to the model's own time "
        f"({'within' if row.met else 'misses'} the bar of {row.bar:.0%}), of which lm-eval's own code {row.lm_eval:.1%}"
        for row in rows
    ]
