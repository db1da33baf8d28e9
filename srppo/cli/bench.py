"""The benchmarks: kernels and step beside their rivals, and what the kernels' compiler makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from srppo.cli.options import Debug, Device, Sets


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


def step(
    preset: Annotated[str, Option(help="tiny, mixed (random weights), smollm2, gpu-0.5b, gpu-7b (LoRA).")] = "tiny",
    model: Annotated[str | None, Option(metavar="MODEL", help="A model instead of the preset's.")] = None,
    sets: Sets = None,
    steps: Annotated[int, Option(min=1, help="Steps measured, after one to warm up.")] = 3,
    threads: Annotated[int | None, Option(help="CPU threads.")] = None,
    device: Device = "auto",
    rivals: Annotated[
        list[str] | None,
        Option("--rival-python", metavar="PYTHON", help="Of an environment with TRL 1.12 or 1.16 (repeatable)."),
    ] = None,
    out: Annotated[Path, Option(metavar="FILE.jsonl", help="Rows are appended.")] = Path("runs/bench-step/step.jsonl"),
    debug: Debug = False,
) -> None:
    """One PPO step by phase. Time, tokens a second, memory, share of the bare matrix rate of the same run.

    --set takes the keys of `model` that a step's cost hangs on: adapters, lora_*, precision, scoring,
    activation_checkpointing. TRL's trainers take turns with ours on the same work: PPO of 1.12, GRPO and RLOO of 1.16.
    """
    from srppo.bench.step import model_settings, run_step_bench
    from srppo.console import Console

    config = model_settings(preset, model, sets or [])
    run_step_bench(
        preset, Console(), steps=steps, model=config, threads=threads, device=device, out=out, rivals=rivals or ()
    )


def compile_report(
    target: Annotated[list[str] | None, Option(help="sm_80, sm_90, sm_100, gfx942. (default: all)")] = None,
    debug: Debug = False,
) -> None:
    """What each Triton kernel is compiled to, without a GPU. Registers, spills, shared memory, matrix instructions."""
    from srppo.bench.compile import TARGETS, print_compile_report
    from srppo.console import Console

    raise typer.Exit(print_compile_report(Console(), tuple(target or TARGETS)))
