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
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from srppo.bench.options import DEVICES, DTYPE_ALIASES, OPS, OUT, PRESETS, SHAPES, KernelBench
from srppo.errors import ConfigError, SrppoError

if TYPE_CHECKING:
    from srppo.bench.rows import Row
    from srppo.console import Console

__all__ = ["KernelBench", "main", "run_kernel_bench"]


def run_kernel_bench(options: KernelBench, console: Console) -> list[Row]:
    """Measure every case, print the tables, write rows, CSV and plot; the rows, missing rivals' among them.

    Rows are on disk after each case. Raises ConfigError for an unknown rival, a device that is not there, or inputs
    that memory does not hold.
    """
    import torch

    from srppo.bench.rivals import selected
    from srppo.bench.roofline import roofline
    from srppo.bench.rows import append_rows, write_csv
    from srppo.bench.run import Session
    from srppo.bench.table import bench_tables

    device = _device(options.device, torch.cuda.is_available())
    selected(options.rivals)  # an unknown one is said before anything is written
    _check_out(options.out)
    if options.preset == "full" and device == "cpu":
        console.warn("preset 'full' is made for a GPU; on a CPU it takes hours, where preset 'cpu' takes minutes")
    threads = torch.get_num_threads()
    torch.set_num_threads(options.threads or threads)
    rows: list[Row] = []
    try:
        session = Session(options, console, device)
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


def _check_out(path: Path) -> None:
    """Before anything is measured: a folder that cannot be written to would cost the whole run."""
    from srppo.bench.rows import append_rows

    try:
        append_rows([], path)
    except OSError as error:
        raise ConfigError(f"out is {str(path)!r}, which cannot be written: {error.strerror or error}") from None


def _device(wanted: str, has_gpu: bool) -> str:
    if wanted == "cuda" and not has_gpu:
        raise ConfigError("device is 'cuda' and torch finds no GPU; allowed here: auto, cpu")
    return "cuda" if has_gpu and wanted != "cpu" else "cpu"


def main(argv: Sequence[str] | None = None) -> int:
    """The benchmark without the rest of the command line; returns the exit code."""
    # Spinning threads cost 10x where two processes share the cores; read by OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    arguments = _parser().parse_args(argv)
    from srppo.console import Console

    try:
        options = KernelBench(
            preset=arguments.preset,
            op=arguments.op,
            backward=arguments.backward,
            n=tuple(arguments.n),
            shapes=tuple(arguments.shape),
            dtypes=tuple(arguments.dtype),
            rivals=tuple(name for names in arguments.rivals for name in names.split(",")),
            threads=arguments.threads,
            device=arguments.device,
            rounds=arguments.rounds,
            seed=arguments.seed,
            out=arguments.out,
        )
        run_kernel_bench(options, Console())
    except SrppoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m srppo.bench.kernel", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", default="quick", help=f"{', '.join(PRESETS)} [quick]")
    add("--op", default=OPS[0], help=f"{', '.join(OPS)} [{OPS[0]}]")
    add("--backward", action="store_true", help="linear_logprob, forward and backward, one model")
    add("--n", type=int, action="append", default=[], metavar="TOKENS", help="tokens in a batch (repeatable)")
    add("--shape", action="append", default=[], help=f"DxV or {', '.join(SHAPES)} (repeatable)")
    add("--dtype", action="append", default=[], help=f"{', '.join(DTYPE_ALIASES)} (repeatable)")
    add("--rivals", action="append", default=[], metavar="A,B", help="ids of those to run; the bare GEMMs always run")
    add("--threads", type=int, help="CPU threads")
    add("--device", default="auto", help=", ".join(DEVICES))
    add("--rounds", type=int, help="repetitions of each rival")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=OUT, metavar="FILE.jsonl", help=f"appended to [{OUT}]")
    return parser


if __name__ == "__main__":
    sys.exit(main())
