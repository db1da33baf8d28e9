"""A benchmark row that explains itself, and its files: JSONL that is only ever appended to, and the same as CSV."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from srppo.bench.options import Case
from srppo.environment import commit_of_source, cpu_model, package_version

SCHEMA = 1
CPU_FLAGS = "avx2 avx512f avx512_bf16 avx512_fp16 amx_tile amx_bf16 amx_fp16 asimd bf16 sve"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One rival on one case. `missing` says why there are no figures; figures are then None.

    op, shape, n, d, v, dtype   the case; d is 0 from logits
    rival, words, kind          see rivals.Rival; version: of the package it comes from
    rounds                      timed calls; the quantiles are over them
    floor                       the denominator of `ratio`: the fastest bare product (or read) of the case, by rival id
    ratio                       latency over the floor's in the same round: median, 20% and 80% quantile
    times_ours                  latency over ours in the same round, likewise; above 1: ours is faster
    gflops                      useful operations (options.Case.flops) a second, 10^9
    bytes_moved                 the least that must be read and written (options.Case.bytes_moved)
    bandwidth_share             bytes_moved a second over the measured copy bandwidth
    peak_extra_bytes            memory a call adds, and kept_bytes, what its tensors hold between calls
    rms_error, max_error        of the result against fp64 on error_rows rows, nats; grad_rms_error: relative
    copy_gb_s, gemm_gflops      ceilings measured in the run so far; the latter in the dtype of the row
    device .. dirty             see machine()
    """

    schema: int = SCHEMA
    date: str
    op: str
    shape: str
    n: int
    d: int
    v: int
    dtype: str
    rival: str
    words: str
    kind: str
    version: str | None
    missing: str | None
    rounds: int = 0
    latency_ms: float | None = None
    latency_ms_q20: float | None = None
    latency_ms_q80: float | None = None
    floor: str | None
    ratio: float | None = None
    ratio_q20: float | None = None
    ratio_q80: float | None = None
    times_ours: float | None = None
    times_ours_q20: float | None = None
    times_ours_q80: float | None = None
    flops: int
    gflops: float | None = None
    bytes_moved: int
    bandwidth_share: float | None = None
    peak_extra_bytes: int | None = None
    kept_bytes: int | None = None
    rms_error: float | None = None
    max_error: float | None = None
    grad_rms_error: float | None = None
    error_rows: int | None = None
    copy_gb_s: float
    gemm_gflops: float
    threads: int
    seed: int
    device: str
    device_kind: str
    cpu: str
    cpu_flags: str
    python: str
    torch: str
    triton: str | None
    commit: str | None
    dirty: bool | None

    @property
    def case(self) -> Case:
        return Case(self.op, self.shape, self.n, self.d, self.v, self.dtype)


COLUMNS = [each.name for each in fields(Row)]


def machine(device: str) -> dict[str, Any]:
    """Which machine, versions and commit a row of a run on "cpu" or "cuda" comes from; of no person, host or folder.

    device: model of the GPU or CPU; cpu_flags: its matrix and vector extensions; commit: None without a checkout.
    """
    commit = commit_of_source()
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_model(),
        "device_kind": device,
        "cpu": cpu_model(),
        "cpu_flags": _cpu_flags(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "commit": commit.rstrip("+") if commit else None,
        "dirty": commit.endswith("+") if commit else None,
    }


def _cpu_flags() -> str:
    """The matrix and vector extensions that the system names; empty where it names none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    named = next((line for line in lines if line.lower().startswith(("flags", "features"))), "").split()
    return " ".join(flag for flag in CPU_FLAGS.split() if flag in named)


def append_rows(rows: Sequence[Any], path: Path) -> None:
    """Add rows, of any dataclass, to a JSONL file, on disk when this returns; a line cut off by a crash is closed
    first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(asdict(row), allow_nan=False) + "\n" for row in rows)
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Every whole row of a JSONL file; lines that are none (cut off by a crash) are passed over."""
    found = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            found.append(row)
    return found


def write_csv(jsonl: Path) -> Path:
    """FILE.csv with the rows of FILE.jsonl, older ones and their columns too. An empty cell is null."""
    rows, path = read_rows(jsonl), jsonl.with_suffix(".csv")
    columns = list(dict.fromkeys([*COLUMNS, *(key for row in rows for key in row)]))
    aside = path.with_suffix(".csv.tmp")
    with aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    aside.replace(path)
    return path
