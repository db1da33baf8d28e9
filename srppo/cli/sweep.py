"""The commands of sweeps: ablate and worker."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from srppo.cli.options import Debug, Device, Plain, Recipe, RunFolder, Sets

Slots = Annotated[int | None, Option(min=1, help="Stages at once. (default: cores, or GPUs)")]
Processes = Annotated[int, Option(min=1, help="Processes of a stage, each with a core or GPU of its own.")]
Timeout = Annotated[float | None, Option(min=1, help="Seconds a stage may take. (default: ten times the estimate)")]

TURNS = "embedded:xs,embedded:xs-1,embedded:xs-2"  # three pretrainings
SMALL = ["model.base=embedded:xs", "ppo.steps=10", "eval.samples=1"]
"""Of the embedded world, for sweeps: the smallest base that shows the effect, and the steps that bring most of it."""


def ablate(
    name: Annotated[
        str,
        Argument(
            metavar="NAME",
            help="data-size, data-prompts, noise, model-scale, reward, length, kl, overlap, prompts, method, or grid "
            "(with --axis).",
        ),
    ],
    recipe: Recipe = None,
    sets: Sets = None,
    seeds: Annotated[int | None, Option(min=1, help="Training seeds. (default: 10; --quick: 3)")] = None,
    sizes: Annotated[str | None, Option(metavar="A,B", help="data-size, data-prompts: demonstrations.")] = None,
    rates: Annotated[str | None, Option(metavar="A,B", help="noise: shares of noised rows.")] = None,
    axis: Annotated[
        list[str] | None,
        Option(
            metavar="KEY=V1,V2",
            help="Values of an axis, instead of the sweep's own: data.size | data.noise, data.noise_rate, "
            "data.noise_dev | model.base | reward.anchor, reward.beta, ppo.steps (kl) | data.overlap_share | "
            "data.prompts_size, data.prompts; grid takes any key of a recipe.",
        ),
    ] = None,
    arms: Annotated[
        str | None,
        Option(
            metavar="A,B",
            help="grid and method: base, SFT, longer SFT, weight extrapolation, decode-time extrapolation, majority "
            "vote, weighted vote, resampling, best-of-n, on-policy distillation, self-distilled, rejection FT, "
            "brevity, longer SFT, equal compute, sharpening, by length, beyond length, RLOO, shuffled, SRPPO, SRPPO "
            "from chosen SFT, SRPPO from equal-compute SFT. (default of grid: SFT,longer SFT,shuffled,SRPPO)",
        ),
    ] = None,
    primary: Annotated[
        str | None, Option(metavar="GROUP/DECODING", help="What is tested. (default: unseen/greedy, of kl sampled)")
    ] = None,
    bases: Annotated[
        str | None,
        Option(
            metavar="A,B",
            help="Pretrainings that the seeds take turns with. (default: without a recipe embedded:xs, xs-1, xs-2)",
        ),
    ] = None,
    margin: Annotated[float, Option(help="Arms that differ by less accuracy are the same.")] = 0.05,
    quick: Annotated[bool, Option("--quick", help="A look within ten minutes on two cores.")] = False,
    engine: Annotated[str, Option(help="local, ray, or slurm.")] = "local",
    slots: Slots = None,
    processes: Processes = 1,
    timeout: Timeout = None,
    retry: Annotated[bool, Option("--retry", help="Try again what was given up.")] = False,
    plan: Annotated[
        bool, Option("--plan", help="Say what would be run, and stop; with --out its sweep.json is written.")
    ] = False,
    device: Device = "auto",
    out: RunFolder = None,
    plain: Plain = False,
    debug: Debug = False,
) -> None:
    """Sweep one question over seeds, with tests fixed beforehand. It goes on where it stopped, and ends in a report."""
    from srppo.ablations.options import read_options
    from srppo.ablations.run import Launch, ablate_command, load_sweep, raise_if_lost
    from srppo.config import load_recipe
    from srppo.console import Console

    console = Console(plain=plain or None)
    own = any(text.partition("=")[0].strip() in ("model.base", "data.demonstrations") for text in sets or [])
    defaults = SMALL if recipe is None and not own else []
    if bases is None and defaults and name != "model-scale" and not any("model.base=" in text for text in axis or []):
        bases = None if any(text.strip().startswith("model.sft=") for text in sets or []) else TURNS
    options = read_options(
        name,
        load_recipe(recipe, [*defaults, *(sets or [])]),
        seeds=seeds,
        sizes=sizes,
        rates=rates,
        axes=axis or [],
        arms=arms,
        primary=primary,
        quick=quick,
        margin=margin,
        bases=bases,
    )
    launch = Launch(engine, slots=slots, timeout_s=timeout, retry=retry, device=device, processes=processes)
    folder = ablate_command(name, options, out, launch, console, plan_only=plan)
    if folder is not None:
        from srppo.report.sweep import report_sweep

        report_sweep(folder, console)
        raise_if_lost(*load_sweep(folder))


def worker(
    folder: Annotated[Path, Argument(metavar="DIR", help="A sweep's folder, also on a shared disk.")],
    slots: Slots = None,
    processes: Processes = 1,
    timeout: Timeout = None,
    device: Device = "auto",
    plain: Plain = False,
    debug: Debug = False,
) -> None:
    """Join a sweep: run its stages until none is left. Any number of workers may, on any machines."""
    from srppo.ablations.run import Launch, work_command
    from srppo.console import Console

    launch = Launch(slots=slots, timeout_s=timeout, device=device, processes=processes)
    work_command(folder, launch, Console(plain=plain or None))
