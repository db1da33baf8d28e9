"""The benchmarks: the kernels beside their rivals, and what their compiler makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from srppo.cli.options import Debug


def kernel(
    preset: Annotated[str, Option(help="quick (a CPU, under a minute), cpu, or full (a GPU).")] = "quick",
    op: Annotated[str, Option(help="linear_logprob_diff or logprob_diff (from logits).")] = "linear_logprob_diff",
    backward: Annotated[bool, Option("--backward", help="linear_logprob forward and backward: one model.")] = False,
    n: Annotated[list[int] | None, Option("--n", help="Tokens in a batch (repeatable).")] = None,
    shape: Annotated[list[str] | None, Option(help="A model's head, e.g. llama-3-8b, or DxV (repeatable).")] = None,
    dtype: Annotated[list[str] | None, Option(help="bf16, fp16, fp32 (repeatable).")] = None,
    rivals: Annotated[str, Option(metavar="A,B", help="Only these; the bare GEMMs always run.")] = "",
    threads: Annotated[int | None, Option(help="CPU threads.")] = None,
    device: Annotated[str, Option(help="auto, cpu, cuda.")] = "auto",
    rounds: Annotated[int | None, Option(help="Calls of each rival.")] = None,
    seed: Annotated[int, Option(help="Of the inputs.")] = 0,
    out: Annotated[Path, Option(metavar="FILE.jsonl", help="Rows are appended; CSV and roofline lie beside.")] = Path(
        "runs/bench-kernel/kernel.jsonl"
    ),
    debug: Debug = False,
) -> None:
    """The log-prob kernels beside every rival, in one run. Time, memory, bandwidth and error against fp64."""
    from srppo.bench.kernel import run_kernel_bench
    from srppo.bench.options import KernelBench
    from srppo.console import Console

    options = KernelBench(
        preset=preset,
        op=op,
        backward=backward,
        n=tuple(n or ()),
        shapes=tuple(shape or ()),
        dtypes=tuple(dtype or ()),
        rivals=tuple(filter(None, rivals.split(","))),
        threads=threads,
        device=device,
        rounds=rounds,
        seed=seed,
        out=out,
    )
    run_kernel_bench(options, Console())


def compile_report(
    target: Annotated[list[str] | None, Option(help="sm_80, sm_90, sm_100, gfx942. (default: all)")] = None,
    debug: Debug = False,
) -> None:
    """What each Triton kernel is compiled to, without a GPU. Registers, spills, shared memory, matrix instructions."""
    from srppo.bench.compile import TARGETS, print_compile_report
    from srppo.console import Console

    raise typer.Exit(print_compile_report(Console(), tuple(target or TARGETS)))
