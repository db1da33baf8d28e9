"""The command line: a command loads a recipe, imports what it needs, calls one function, prints a report and a path."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from srppo.cli import measure as cli_measure
from srppo.cli import sweep as cli_ablate
from srppo.errors import Diverged, SrppoError

if TYPE_CHECKING:
    from srppo.config import Recipe

INTERRUPTED = "interrupted; the same command goes on from the last checkpoint"

UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # of click, of which some versions of Typer carry a copy

app = typer.Typer(
    name="srppo",
    help="Self-Rewarding PPO (arXiv 2510.21090): alignment from demonstrations only.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

bench_app = typer.Typer(help="Benchmarks: what is measured here, beside its rivals.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

RecipeArgument = Annotated[
    Path | None, typer.Argument(help="TOML recipe; without one the embedded world is used.", show_default=False)
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. --set ppo.lr=1e-5 (repeatable)."),
]
OutOption = Annotated[
    Path | None,
    typer.Option("--out", metavar="DIR", help="Run folder. (default: runs/<recipe>-<id>)", show_default=False),
]
DeviceOption = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")]
TrackOption = Annotated[
    list[str] | None, typer.Option("--track", metavar="NAME", help="tensorboard or wandb (repeatable).")
]
PlainOption = Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live panel.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


@app.command()
def demo(
    out: OutOption = None,
    sets: SetOption = None,
    seeds: Annotated[int, typer.Option(min=1, help="Training seeds; intervals then cover seeds and items.")] = 1,
    build: Annotated[
        bool, typer.Option("--build", help="Rebuild the embedded world (tokenizer, bases) from nothing, into --out.")
    ] = False,
    plain: PlainOption = False,
    debug: DebugOption = False,
) -> None:
    """The whole method on the embedded world: base, SFT, longer SFT and SRPPO, in a table and a report."""
    if build:
        from srppo.record.folder import check_place
        from srppo.world.build import build as build_world

        folder = out or Path("runs/world")
        check_place(folder)
        build_world(folder)
        typer.echo(f"world rebuilt in {folder}")
        return
    from srppo.config import load_recipe

    _train(load_recipe(None, sets or []), "demo", out, "cpu", [], plain, baselines=True, seeds=seeds)


@app.command()
def sft(
    recipe: RecipeArgument = None,
    sets: SetOption = None,
    out: OutOption = None,
    device: DeviceOption = "auto",
    track: TrackOption = None,
    plain: PlainOption = False,
    debug: DebugOption = False,
) -> None:
    """Stage 1 alone: fine-tune the base on demonstrations."""
    from srppo.config import load_recipe

    loaded = load_recipe(recipe, sets or [], ppo=False)
    _train(loaded, _name(recipe), out, device, track or [], plain, baselines=False, ppo=False)


@app.command()
def train(
    recipe: RecipeArgument = None,
    sets: SetOption = None,
    out: OutOption = None,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Also train SFT for the same counted compute.")
    ] = False,
    device: DeviceOption = "auto",
    track: TrackOption = None,
    plain: PlainOption = False,
    debug: DebugOption = False,
) -> None:
    """SFT (unless model.sft is given), then PPO with the coherent reward. The same command resumes a stopped run."""
    from srppo.config import load_recipe

    _train(load_recipe(recipe, sets or []), _name(recipe), out, device, track or [], plain, baselines=baselines)


@app.command()
def env() -> None:
    """Facts about this machine and installation, for a bug report."""
    import srppo.kernels.native  # noqa: F401  with it, the facts say how the kernels are built
    from srppo.environment import environment

    for key, value in environment().items():
        if isinstance(value, dict):
            typer.echo(f"{key}:")
            for name, each in value.items():
                typer.echo(f"  {name}: {each}")
        else:
            typer.echo(f"{key}: {value}")


app.command("eval")(cli_measure.evaluate)
for command in (cli_measure.compare, cli_measure.score, cli_measure.forecast, cli_measure.report):
    app.command()(command)


app.command()(cli_ablate.ablate)
app.command()(cli_ablate.worker)


@bench_app.command("kernel")
def bench_kernel(
    preset: Annotated[str, typer.Option(help="quick (a CPU, under a minute), cpu, or full (a GPU).")] = "quick",
    op: Annotated[
        str, typer.Option(help="linear_logprob_diff (from hidden states) or logprob_diff (from logits).")
    ] = "linear_logprob_diff",
    backward: Annotated[
        bool, typer.Option("--backward", help="linear_logprob forward and backward instead: one model.")
    ] = False,
    n: Annotated[list[int] | None, typer.Option("--n", help="Tokens in a batch (repeatable).")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="A model's head, e.g. llama-3-8b, or DxV (repeatable).")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="bf16, fp16, fp32 (repeatable).")] = None,
    rivals: Annotated[str, typer.Option(metavar="A,B", help="Only these; the bare GEMMs always run.")] = "",
    threads: Annotated[int | None, typer.Option(help="CPU threads.", show_default=False)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    rounds: Annotated[int | None, typer.Option(help="Calls of each rival.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(help="Of the inputs.")] = 0,
    out: Annotated[
        Path, typer.Option(metavar="FILE.jsonl", help="Rows are appended; CSV and roofline lie beside.")
    ] = Path("runs/bench-kernel/kernel.jsonl"),
    debug: DebugOption = False,
) -> None:
    """The log-prob kernels beside every rival, in one run: time, memory, bandwidth and error against fp64."""
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


@bench_app.command("compile")
def bench_compile(
    target: Annotated[
        list[str] | None, typer.Option(help="sm_80, sm_90, sm_100, gfx942 (repeatable). (default: all)")
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Registers, spills, shared memory and matrix instructions of each Triton kernel, without a GPU."""
    from srppo.bench.compile import TARGETS, print_compile_report
    from srppo.console import Console

    raise typer.Exit(print_compile_report(Console(), tuple(target or TARGETS)))


def _name(recipe: Path | None) -> str:
    return recipe.stem if recipe else "embedded"


def _train(
    recipe: Recipe,
    name: str,
    out: Path | None,
    device: str,
    track: list[str],
    plain: bool,
    *,
    baselines: bool,
    ppo: bool = True,
    seeds: int = 1,
) -> None:
    from srppo.config import is_embedded, recipe_id, with_overrides
    from srppo.console import Console
    from srppo.environment import environment
    from srppo.record.folder import check_place

    several = f"-{seeds}-seeds" if seeds > 1 else ""
    folder = out or Path("runs") / f"{name}-{recipe_id(recipe)}{several}"
    console = Console(plain=True if plain else None)
    console.say(f"run folder: {folder}")
    check_place(folder)
    if is_embedded(recipe.model.base):  # so small that a second thread only costs: 1:50 minutes for the demo, not 3:16
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with stopping_at_once():
        from srppo.models.device import pick_device
        from srppo.report.record import report_run
        from srppo.stages.run import Pipeline, run_sft, run_train  # torch comes with this
        from srppo.training.trackers import trackers

    trackers(track, folder.name, folder, {})  # an unknown or missing one is said now; none starts before it is used
    recipes = [with_overrides(recipe, {"seed": recipe.seed + i}) for i in range(seeds)]
    try:
        for each in recipes:
            if seeds > 1:
                console.say(f"seed {each.seed}, {recipes.index(each) + 1} of {seeds}")
            pipeline = Pipeline(
                each,
                folder,
                console,
                device=pick_device(device),
                environment=environment(),
                seeds=[each.seed for each in recipes],
                needs_prompts=ppo,
                make_trackers=lambda stage: trackers(
                    track, f"{folder.name}-{stage.id}", stage.path, recipe.model_dump(mode="json")
                ),
            )
            if ppo:
                run_train(pipeline, baselines=baselines)
            else:
                run_sft(pipeline)
    except Diverged:
        report_run(folder, console)  # what there is, with the reason; main prints the error and sets the exit code
        raise
    report_run(folder, console)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Ctrl-C ends the process here and now: while modules load, an exception may be swallowed by a half-loaded one."""

    def stop(signum: int, frame: object) -> None:
        os.write(2, f"{INTERRUPTED}\n".encode())
        os._exit(130)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def main() -> None:
    """Entry point: every expected error in one line, whoever finds it; a traceback only with --debug."""
    debug = "--debug" in sys.argv
    # Spinning threads cost 10x where two processes share the cores; read by OpenMP when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    try:
        code = app(standalone_mode=False) or 0  # an exit comes back as its code
        if code == 130:  # Ctrl-C outside of the training loop, as Typer reports it
            typer.echo(INTERRUPTED, err=True)
    except SrppoError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        code = error.exit_code
    except UsageError as error:
        if line := usage_line(error):
            typer.echo(f"error: {line}", err=True)
        code = 2
    sys.exit(code)


def usage_line(error: Any) -> str:
    """What is wrong with the words of a command, with the nearest option; "" where help has been shown instead."""
    if near := getattr(error, "possibilities", None):
        return f"{error.message}; did you mean {near[0]}?"
    text, context = " ".join(error.format_message().split()), error.ctx
    if not text or text.endswith("?") or context is None:
        return text
    return f"{text.rstrip('.')}; see `{context.command_path} --help`"
