"""Measuring one case: prepare the rivals, check their results, take turns, and turn the samples into rows."""

from __future__ import annotations

import sys
import warnings
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import torch

from srppo.bench.inputs import Errors, Exact, Inputs, errors, exact, make_inputs
from srppo.bench.machine import machine, package_version
from srppo.bench.measure import (
    Quantiles,
    Timer,
    copy_gb_s,
    failure,
    gemm_gflops,
    peak_extra_bytes,
    quantiles,
    round_robin,
    tensor_storages,
)
from srppo.bench.options import LOGITS_DIFF, Case, KernelBench
from srppo.bench.prepare import Call, Result
from srppo.bench.rivals import Rival, missing_reason, selected
from srppo.bench.rows import SCHEMA, Row
from srppo.errors import ConfigError

if TYPE_CHECKING:
    from srppo.console import Console


@dataclass(frozen=True)
class Prepared:
    """A rival that has given its first result: how to call it, how far off it is, and what memory it takes."""

    call: Call
    errors: Errors | None
    peak_extra_bytes: int | None
    kept_bytes: int


class Session:
    """One run on one device: its rivals, and the ceilings measured before the first case."""

    def __init__(self, options: KernelBench, console: Console, device: str) -> None:
        self.options, self.console, self.device = options, console, device
        self.rivals = selected(options.rivals)
        self.machine = machine(device)
        self.copy_gb_s = copy_gb_s(device)
        self.gemm_gflops: dict[str, float] = {}
        self.date = datetime.now(UTC).isoformat(timespec="seconds")

    def measure(self, case: Case) -> list[Row]:
        """A row for every rival that computes the operation, those that are missing too."""
        if case.dtype not in self.gemm_gflops:
            self.gemm_gflops[case.dtype] = gemm_gflops(self.device, case.dtype)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # else another shape makes torch.compile switch to slower dynamic shapes
        rivals = [rival for rival in self.rivals if case.op in rival.prepare]
        try:
            inputs = make_inputs(case, self.device, self.options.seed)
        except ConfigError as error:  # too large for this machine: said in the rows; the other cases go on
            self.console.warn(str(error))
            return [self._row(case, rival, str(error), None, {}, None, 0) for rival in rivals]
        truth = exact(inputs, self.options.seed)
        prepared, missing = self._prepare(rivals, inputs, truth)
        self.console.say(f"  {len(prepared)} rivals gave their first results; now they take turns")
        samples, failed = round_robin(
            {name: each.call for name, each in prepared.items()},
            Timer(self.device),
            self.options.max_rounds,
            self.options.seconds,
            self.options.seed,
        )
        missing |= failed
        self._raise_ceiling(case, rivals, samples)
        floor = _floor(rivals, samples)
        rows = []
        for rival in rivals:
            reason = missing.get(rival.id)
            if rival.kind == "ours" and reason:
                self.console.warn(f"ours did not run: {reason}")
            figures = None if reason else prepared[rival.id]
            rows.append(self._row(case, rival, reason, figures, samples, floor, len(truth.rows_K)))
        return rows

    def _raise_ceiling(self, case: Case, rivals: list[Rival], samples: dict[str, list[float]]) -> None:
        """The GEMM ceiling is the best rate that any bare product of the run has shown."""
        times_ms = [ms for rival in rivals if rival.kind == "floor" for ms in samples.get(rival.id, [])]
        if times_ms and case.op != LOGITS_DIFF:
            best = case.floor_flops / min(times_ms) / 1e6
            self.gemm_gflops[case.dtype] = max(self.gemm_gflops[case.dtype], best)

    def _prepare(self, rivals: list[Rival], inputs: Inputs, truth: Exact) -> tuple[dict[str, Prepared], dict[str, str]]:
        prepared: dict[str, Prepared] = {}
        missing: dict[str, str] = {}
        for rival in rivals:
            reason = missing_reason(rival, inputs.case, self.device)
            if reason is None:
                try:
                    with warnings.catch_warnings():
                        warnings.simplefilter("ignore")  # of other packages, at import and compilation
                        prepared[rival.id] = _first_calls(rival, inputs, truth, self.device)
                except Exception as error:  # whatever another package raises, it is that package's reason
                    reason = failure(error)
            if reason is not None:
                missing[rival.id] = reason
        return prepared, missing

    def _row(
        self,
        case: Case,
        rival: Rival,
        reason: str | None,
        figures: Prepared | None,
        samples: dict[str, list[float]],
        floor: str | None,
        error_rows: int,
    ) -> Row:
        latency = quantiles(samples[rival.id]) if figures else None
        ratio = _within_rounds(samples, rival.id, floor) if figures else None
        ours = _within_rounds(samples, rival.id, "ours") if figures else None
        seconds = latency.median / 1e3 if latency else None
        off = figures.errors if figures else None
        return Row(
            schema=SCHEMA,
            date=self.date,
            op=case.op,
            shape=case.shape,
            n=case.n,
            d=case.d,
            v=case.v,
            dtype=case.dtype,
            rival=rival.id,
            words=rival.words,
            kind=rival.kind,
            version=package_version(rival.package or "torch"),
            missing=reason,
            rounds=len(samples[rival.id]) if figures else 0,
            **_spread("latency_ms", latency),
            floor=floor,
            **_spread("ratio", ratio),
            **_spread("times_ours", ours),
            flops=case.flops,
            gflops=case.flops / seconds / 1e9 if seconds else None,
            bytes_moved=case.bytes_moved,
            bandwidth_share=case.bytes_moved / seconds / 1e9 / self.copy_gb_s if seconds else None,
            peak_extra_bytes=figures.peak_extra_bytes if figures else None,
            kept_bytes=figures.kept_bytes if figures else None,
            rms_error=off.rms if off else None,
            max_error=off.max if off else None,
            grad_rms_error=off.grad_rms if off else None,
            error_rows=error_rows if off else None,
            copy_gb_s=self.copy_gb_s,
            gemm_gflops=self.gemm_gflops[case.dtype],
            threads=torch.get_num_threads(),
            seed=self.options.seed,
            **asdict(self.machine),
        )


def _first_calls(rival: Rival, inputs: Inputs, truth: Exact, device: str) -> Prepared:
    """The call that compiles and is checked, then one for memory. What is kept between calls counts as memory too."""
    before = tensor_storages()
    call = rival.prepare[inputs.case.op](inputs)
    off = _check(call(), truth)
    kept_bytes = sum(size for address, size in tensor_storages().items() if address not in before)
    grown = peak_extra_bytes(call, device)
    return Prepared(call, off, None if grown is None else grown + kept_bytes, kept_bytes)


def _check(result: Result, truth: Exact) -> Errors | None:
    if result.values_N is None:
        return None
    if not torch.isfinite(result.values_N).all():
        raise ArithmeticError("its result is not finite")
    return errors(result.values_N, result.d_hidden_ND, truth)


def _floor(rivals: list[Rival], samples: dict[str, list[float]]) -> str | None:
    """The fastest of the bare products (or reads) by median."""
    floors = [rival.id for rival in rivals if rival.kind == "floor" and rival.id in samples]
    return min(floors, key=lambda name: quantiles(samples[name]).median, default=None)


def _within_rounds(samples: dict[str, list[float]], name: str, over: str | None) -> Quantiles | None:
    if over is None or over not in samples:
        return None
    return quantiles([a / b for a, b in zip(samples[name], samples[over], strict=True)])


def _spread(name: str, found: Quantiles | None) -> dict[str, Any]:
    """The three columns of a quantity."""
    values = (found.median, found.q20, found.q80) if found else (None, None, None)
    return dict(zip((name, f"{name}_q20", f"{name}_q80"), values, strict=True))
