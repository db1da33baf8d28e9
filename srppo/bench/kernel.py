"""`srppo bench kernel`: the log-prob-difference kernels beside every rival, in one run on one machine.

    python -m srppo.bench.kernel --preset quick

needs torch, rich and matplotlib (and triton on a GPU), nothing else of this package's dependencies. For each case, a
shape in a dtype: draw inputs; prepare every rival and call it once (compilation, and the result whose error against
fp64 is reported); once more for its memory; then time the rivals in turns, a call each a round, and compare within
rounds, so that drift of the machine hits all alike.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    # Spinning threads cost 10x where two processes share the cores; read by OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from srppo.bench import measure
from srppo.bench.inputs import Errors, Exact, Inputs, errors, exact, make_inputs
from srppo.bench.measure import Quantiles, quantiles
from srppo.bench.options import DEVICES, DTYPE_ALIASES, LOGITS_DIFF, OPS, OUT, PRESETS, SHAPES, Case, KernelBench
from srppo.bench.rivals import Call, Rival, missing_reason, selected
from srppo.bench.roofline import roofline
from srppo.bench.rows import Row, append_rows, machine, write_csv
from srppo.bench.table import bench_tables
from srppo.console import Console
from srppo.environment import package_version
from srppo.errors import ConfigError, SrppoError


def run_kernel_bench(options: KernelBench, console: Console) -> list[Row]:
    """Measure every case, print the tables, write rows, CSV and plot; the rows, missing rivals' among them.

    Rows are on disk after each case. Raises ConfigError for an unknown rival, a device that is not there, or inputs
    that memory does not hold.
    """
    device = _device(options.device, torch.cuda.is_available())
    selected(options.rivals)  # an unknown one is said before anything is written
    try:  # before anything is measured: a folder that cannot be written to would cost the whole run
        append_rows([], options.out)
    except OSError as error:
        message = f"out is {str(options.out)!r}, which cannot be written: {error.strerror or error}"
        raise ConfigError(message) from None
    if options.preset == "full" and device == "cpu":
        console.warn("preset 'full' is made for a GPU; on a CPU it takes hours, where preset 'cpu' takes minutes")
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    rows: list[Row] = []
    try:
        session = KernelSession(options, console, device)
        for place, case in enumerate(options.cases, 1):
            console.say(f"case {place} of {len(options.cases)}: {case}")
            found = session.measure(case)
            append_rows(found, options.out)
            rows += found
    finally:
        torch.set_num_threads(threads)
    files = [options.out, write_csv(options.out), *roofline(rows, options.out)]
    console.print(bench_tables(rows))
    console.print("written: " + ", ".join(map(str, files)))
    return rows


def _device(wanted: str, has_gpu: bool) -> str:
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("device is 'cuda' and torch finds no GPU; allowed here: auto, cpu")
    return "cuda" if has_gpu and wanted != "cpu" else "cpu"


@dataclass(frozen=True)
class Prepared:
    """A rival that has given its first result: how to call it, how far off it is, and what memory it takes."""

    call: Call
    errors: Errors | None
    peak_extra_bytes: int | None
    kept_bytes: int


class KernelSession:
    """One run on one device: its rivals, and the ceilings measured before the first case."""

    def __init__(self, options: KernelBench, console: Console, device: str) -> None:
        self.options, self.console, self.device = options, console, device
        self.rivals = selected(options.rivals)
        self.machine = machine(device)
        self.copy_gb_s = measure.copy_gb_s(device)
        self.gemm_gflops: dict[str, float] = {}
        self.date = datetime.now(UTC).isoformat(timespec="seconds")

    def measure(self, case: Case) -> list[Row]:
        """A row for every rival that computes the operation, those that are missing too."""
        if case.dtype not in self.gemm_gflops:
            self.gemm_gflops[case.dtype] = measure.gemm_gflops(self.device, case.dtype)
        if "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # else another shape makes torch.compile switch to slower dynamic shapes
        rivals = [rival for rival in self.rivals if case.op in rival.prepare]
        try:
            inputs = make_inputs(case, self.device, self.options.seed)
        except ConfigError as error:  # too large for this machine: said in the rows; the other cases go on
            self.console.warn(str(error))
            return [self._row(case, rival, str(error), None) for rival in rivals]
        truth = exact(inputs, self.options.seed)
        prepared, missing = self._prepare(rivals, inputs, truth)
        self.console.say(f"  {len(prepared)} rivals gave their first results; now they take turns")
        samples, failed = measure.round_robin(
            {name: each.call for name, each in prepared.items()},
            measure.Timer(self.device),
            self.options.max_rounds,
            self.options.seconds,
            self.options.seed,
        )
        missing |= failed
        floors = [rival.id for rival in rivals if rival.kind == "floor" and rival.id in samples]
        if floors and case.op != LOGITS_DIFF:  # the ceiling is the best rate that any bare product has shown
            best = case.floor_flops / min(min(samples[name]) for name in floors) / 1e6
            self.gemm_gflops[case.dtype] = max(self.gemm_gflops[case.dtype], best)
        floor = min(floors, key=lambda name: quantiles(samples[name]).median, default=None)
        rows = []
        for rival in rivals:
            reason = missing.get(rival.id)
            if rival.kind == "ours" and reason:
                self.console.warn(f"ours did not run: {reason}")
            if reason:
                rows.append(self._row(case, rival, reason, floor))
            else:
                figures = self._figures(case, rival.id, prepared[rival.id], samples, floor, len(truth.rows_K))
                rows.append(self._row(case, rival, None, floor, **figures))
        return rows

    def _prepare(self, rivals: list[Rival], inputs: Inputs, truth: Exact) -> tuple[dict[str, Prepared], dict[str, str]]:
        prepared: dict[str, Prepared] = {}
        missing: dict[str, str] = {}
        for rival in rivals:
            if reason := missing_reason(rival, inputs.case, self.device):
                missing[rival.id] = reason
                continue
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of other packages, at import and compilation
                    prepared[rival.id] = _first_calls(rival, inputs, truth, self.device)
            except Exception as error:  # whatever another package raises, it is that package's reason
                missing[rival.id] = measure.failure(error)
        return prepared, missing

    def _row(self, case: Case, rival: Rival, missing: str | None, floor: str | None, **figures: Any) -> Row:
        return Row(
            date=self.date,
            **asdict(case),
            rival=rival.id,
            words=rival.words,
            kind=rival.kind,
            version=package_version(rival.package or "torch"),
            missing=missing,
            floor=floor,
            flops=case.flops,
            bytes_moved=case.bytes_moved,
            copy_gb_s=self.copy_gb_s,
            gemm_gflops=self.gemm_gflops[case.dtype],
            threads=torch.get_num_threads(),
            seed=self.options.seed,
            **self.machine,
            **figures,
        )

    def _figures(
        self, case: Case, name: str, made: Prepared, samples: dict[str, list[float]], floor: str | None, rows: int
    ) -> dict[str, Any]:
        latency, off = quantiles(samples[name]), made.errors
        seconds = latency.median / 1e3
        return {
            "rounds": len(samples[name]),
            **_spread("latency_ms", latency),
            **_spread("ratio", _within_rounds(samples, name, floor)),
            **_spread("times_ours", _within_rounds(samples, name, "ours")),
            "gflops": case.flops / seconds / 1e9,
            "bandwidth_share": case.bytes_moved / seconds / 1e9 / self.copy_gb_s,
            "peak_extra_bytes": made.peak_extra_bytes,
            "kept_bytes": made.kept_bytes,
            "rms_error": off and off.rms,
            "max_error": off and off.max,
            "grad_rms_error": off and off.grad_rms,
            "error_rows": off and rows,
        }


def _first_calls(rival: Rival, inputs: Inputs, truth: Exact, device: str) -> Prepared:
    """The call that compiles and is checked, then one for memory. What is kept between calls counts as memory too."""
    before = measure.tensor_storages()
    call = rival.prepare[inputs.case.op](inputs)
    result = call()
    if result.values_N is not None and not torch.isfinite(result.values_N).all():
        raise ArithmeticError("its result is not finite")
    off = None if result.values_N is None else errors(result.values_N, result.d_hidden_ND, truth)
    del result
    kept_bytes = sum(size for address, size in measure.tensor_storages().items() if address not in before)
    grown = measure.peak_extra_bytes(call, device)
    return Prepared(call, off, None if grown is None else grown + kept_bytes, kept_bytes)


def _within_rounds(samples: dict[str, list[float]], name: str, over: str | None) -> Quantiles | None:
    if over is None or over not in samples:
        return None
    return quantiles([a / b for a, b in zip(samples[name], samples[over], strict=True)])


def _spread(name: str, found: Quantiles | None) -> dict[str, float]:
    """The three columns of a quantity."""
    return {} if found is None else {name: found.median, f"{name}_q20": found.q20, f"{name}_q80": found.q80}


def main(argv: Sequence[str] | None = None) -> int:
    """The benchmark without the rest of the command line; returns the exit code."""
    arguments = vars(_parser().parse_args(argv))
    rivals = tuple(name for names in arguments.pop("rivals") for name in names.split(","))
    try:
        chosen: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in arguments.items()
        }
        run_kernel_bench(KernelBench(**chosen, rivals=rivals), Console())
    except SrppoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m srppo.bench.kernel", description=__doc__.splitlines()[0])
    add = parser.add_argument
    several: dict[str, Any] = {"action": "append", "default": []}
    add("--preset", default="quick", help=f"{', '.join(PRESETS)} [quick]")
    add("--op", default=OPS[0], help=f"{', '.join(OPS)} [{OPS[0]}]")
    add("--backward", action="store_true", help="linear_logprob, forward and backward, one model")
    add("--n", type=int, metavar="TOKENS", help="tokens in a batch (repeatable)", **several)
    add("--shape", dest="shapes", help=f"DxV or {', '.join(SHAPES)} (repeatable)", **several)
    add("--dtype", dest="dtypes", help=f"{', '.join(DTYPE_ALIASES)} (repeatable)", **several)
    add("--rivals", metavar="A,B", help="ids of those to run; the bare GEMMs always run", **several)
    add("--threads", type=int, help="CPU threads")
    add("--device", default="auto", help=", ".join(DEVICES))
    add("--rounds", type=int, help="repetitions of each rival")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=OUT, metavar="FILE.jsonl", help=f"appended to [{OUT}]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
