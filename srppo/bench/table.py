"""The benchmark in the terminal: a table for each case, who was missing and why, and whether ours was the fastest."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.constrain import Constrain
from rich.table import Table
from rich.text import Text

from srppo.bench.options import BACKWARD, LOGITS_DIFF
from srppo.bench.rows import Row
from srppo.console import figure

WIDTH = 80
NAME_WIDTH = 27
MARK = "> "
COARSE = 1e-3  # nats: logits were rounded to 16 bits


def bench_tables(rows: Sequence[Row]) -> RenderableType:
    """All cases of a run; at most 80 columns. Ours first and marked, the others by time."""
    parts: list[RenderableType] = []
    for _, case in groupby(rows, key=lambda row: row.case):
        measured = [row for row in case if row.missing is None]
        if measured:
            parts += [_table(measured), Text()]
    parts += [Constrain(Text(line), WIDTH) for line in _missing(rows)]
    parts += [Constrain(Text(line, style), WIDTH) for line, style in [*_verdict(rows), *_twice(rows)]]
    parts += [Constrain(Text(line, "dim"), WIDTH) for line in _captions(rows)]
    return Group(*parts)


def _table(rows: Sequence[Row]) -> Table:
    title: dict[str, Any] = {"title": Text(str(rows[0].case)), "title_style": "bold", "title_justify": "left"}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=0, show_edge=False, **title)
    table.add_column(rows[0].op.replace("linear_logprob+", "linear_logprob, "), width=NAME_WIDTH, overflow="ellipsis")
    over = "/read" if rows[0].op == LOGITS_DIFF else "/GEMMs"
    for head in ("ms", "20-80%", over, "GF/s", "copy", "MB", "error"):
        table.add_column(head, justify="right", no_wrap=True)
    for row in sorted(rows, key=lambda row: (row.kind != "ours", row.latency_ms or 0.0)):
        ours = row.kind == "ours"
        style = "bold" if ours else "dim" if row.kind in ("floor", "bound") else ""
        name = (MARK if ours else " " * len(MARK)) + row.words + (" *" if row.rival == row.floor else "")
        table.add_row(Text(name), *map(Text, _cells(row)), style=style)
    return table


def _cells(row: Row) -> list[str]:
    megabytes = None if row.peak_extra_bytes is None else row.peak_extra_bytes / 1e6
    return [
        figure(row.latency_ms),
        f"{figure(row.latency_ms_q20)}-{figure(row.latency_ms_q80)}",
        "-" if row.ratio is None else f"{row.ratio:.2f}",
        "-" if row.gflops is None else f"{row.gflops:.0f}",
        "-" if row.bandwidth_share is None else f"{row.bandwidth_share:.0%}",
        "-" if megabytes is None else f"{megabytes:.1f}" if megabytes < 10 else f"{megabytes:.0f}",
        "-" if row.rms_error is None else f"{row.rms_error:.1e}".replace("e-0", "e-"),
    ]


def _missing(rows: Sequence[Row]) -> list[str]:
    """Each rival without figures, with its reason; the cases only where it ran in others."""
    ran = {row.rival for row in rows if row.missing is None}
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.missing is not None:
            found.setdefault((row.words, row.missing), []).append(row)
    lines = []
    for (words, reason), where in found.items():
        cases = "; ".join(dict.fromkeys(str(row.case) for row in where)) if where[0].rival in ran else ""
        lines.append(f"missing: {words}: {reason}" + (f" ({cases})" if cases else ""))
    return lines


def _verdict(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Whether ours beats every outside rival that ran, by the median of the ratios within a round, and which not."""
    outside = [row for row in rows if row.kind == "outside" and row.times_ours is not None]
    if not any(row.kind == "ours" and row.missing is None for row in rows):
        return [("ours did not run: nothing to compare", "bold red")]
    if not outside:
        return [("no outside rival ran: nothing to compare with", "bold")]
    names, cases = {row.rival for row in outside}, {row.case for row in rows}
    faster = [row for row in outside if row.times_ours is not None and row.times_ours <= 1]
    over = f"{len(names)} outside rival{'s' * (len(names) > 1)} over {len(cases)} case{'s' * (len(cases) > 1)}"
    if not faster:
        nearest = _compared(min(outside, key=lambda row: row.times_ours or 0.0), rows)
        return [(f"ours is faster than every outside rival here: {over}; the nearest, {nearest}", "bold green")]
    lines = [(f"ours is not faster than every outside rival here ({over}); latency over ours, 1 or less:", "bold")]
    for _, case in groupby(faster, key=lambda row: row.case):
        found = list(case)
        lines.append((f"  {found[0].case}: " + ", ".join(_short(row) for row in found), "bold"))
    return lines


def _twice(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Our one-model kernel run for each model: on a CPU the difference is no more than that, so neither wins."""
    times = [row.times_ours for row in rows if row.rival == "ours-twice" and row.times_ours is not None]
    if not times:
        return []
    span = " to ".join(f"{time:.2f}" for time in dict.fromkeys([min(times), max(times)]))
    return [(f"our own kernel for one model, run twice, takes {span} times ours", "bold")]


def _short(row: Row) -> str:
    """A rival that is as fast or faster, and its error where it bought the time with accuracy."""
    coarse = f" (error {row.rms_error:.0e})" if row.rms_error and row.rms_error > COARSE else ""
    return f"{row.words} {row.times_ours:.2f}{coarse}"


def _compared(row: Row, rows: Sequence[Row]) -> str:
    ours = next(each for each in rows if each.case == row.case and each.kind == "ours")
    span = f"{row.times_ours:.2f} [{row.times_ours_q20:.2f}, {row.times_ours_q80:.2f}]"
    rounding = f"; error {row.rms_error:.0e}, ours {ours.rms_error:.0e}" if row.rms_error and ours.rms_error else ""
    return f"{row.words}, takes {span} times ours at {row.case}{rounding}"


def _captions(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    floor = "the bare products of both models"
    if first.op == BACKWARD:
        floor = "its four products: logits, logits again since they are not kept, and both gradients"
    elif first.op == LOGITS_DIFF:
        floor = "reading both matrices"
    over = "/read" if first.op == LOGITS_DIFF else "/GEMMs"
    gemms = ", ".join(f"{dtype} {rate:.0f} GF/s" for dtype, rate in {r.dtype: r.gemm_gflops for r in rows}.items())
    flags = f" ({first.cpu_flags})" if first.device_kind == "cpu" else ""
    cached = " Above 100%: from the cache." if any((row.bandwidth_share or 0) > 1 for row in rows) else ""
    return [
        f"* the denominator of {over}: {floor}, whichever way is fastest; median over {_rounds(rows)} interleaved "
        f"rounds. GF/s: useful operations. copy: share of copy bandwidth, from the bytes that must move.{cached} "
        "MB: memory a call adds. error: RMS against fp64 of the same inputs, nats.",
        f"{first.device}{flags}, {first.threads} thread{'s' * (first.threads > 1)}; torch {first.torch}, "
        f"triton {first.triton or 'none'}; measured ceilings: copy {first.copy_gb_s:.0f} GB/s, {gemms}.",
    ]


def _rounds(rows: Sequence[Row]) -> str:
    counts = sorted({row.rounds for row in rows if row.rounds})
    return "-".join(map(str, dict.fromkeys([counts[0], counts[-1]]))) if counts else "no"
