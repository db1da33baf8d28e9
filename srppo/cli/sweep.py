"""The commands of sweeps: ablate and worker. Registered in cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SMALL = ["model.base=embedded:xs", "ppo.steps=10", "eval.samples=1"]
"""Of the embedded world, for sweeps: the smallest base that shows the effect, and the steps that bring most of it."""

Slots = Annotated[
    int | None, typer.Option("--slots", min=1, help="Stages at once. (default: cores, or GPUs)", show_default=False)
]
Timeout = Annotated[
    float | None,
    typer.Option("--timeout", min=1, help="Seconds a stage may take. (default: ten times the estimate)"),
]
Retry = Annotated[bool, typer.Option("--retry", help="Try again what was given up.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, mps, or auto.")]
Plain = Annotated[bool, typer.Option("--plain", help="Plain lines instead of the live table.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]


def ablate(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="data-size, noise, model-scale, reward, kl, overlap, prompts, method, or grid (with --axis).",
        ),
    ],
    recipe: Annotated[
        Path | None, typer.Argument(help="TOML recipe; without one the embedded world is used.", show_default=False)
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key of the recipe (repeatable).")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Training seeds. (default: 10; --quick: 3)")] = None,
    sizes: Annotated[str | None, typer.Option(metavar="A,B", help="data-size: demonstrations.")] = None,
    rates: Annotated[str | None, typer.Option(metavar="A,B", help="noise: shares of noised rows.")] = None,
    axis: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=V1,V2",
            help="Values of an axis, instead of the sweep's own: data.size | data.noise, data.noise_rate | "
            "model.base | reward.anchor, reward.beta, ppo.steps (kl) | data.overlap_share | data.prompts_size, "
            "data.prompts; grid takes any key of a recipe.",
        ),
    ] = None,
    arms: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="grid: base, SFT, longer SFT, weight extrapolation, decode-time extrapolation, resampling, best-of-n, "
            "RLOO, SRPPO. (default: SFT,SRPPO)",
        ),
    ] = None,
    primary: Annotated[
        str | None, typer.Option(metavar="GROUP/DECODING", help="What is tested. (default: unseen/greedy)")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A look within ten minutes on two cores.")] = False,
    engine: Annotated[str, typer.Option(help="local, ray, or slurm.")] = "local",
    slots: Slots = None,
    timeout: Timeout = None,
    retry: Retry = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be run, and stop.")] = False,
    device: Device = "auto",
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Folder. (default: runs/<name>-<id>)")
    ] = None,
    plain: Plain = False,
    debug: Debug = False,
) -> None:
    """Sweep one question: cells with seeds, paired tests fixed beforehand, resume, and a report."""
    from srppo.ablations.options import read_options
    from srppo.ablations.run import Launch, ablate_command, load_sweep, raise_if_lost
    from srppo.config import load_recipe
    from srppo.console import Console

    console = Console(plain=True if plain else None)
    own = any(text.partition("=")[0].strip() in ("model.base", "data.demonstrations") for text in sets or [])
    defaults = SMALL if recipe is None and not own else []
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
    )
    launch = Launch(engine=engine, slots=slots, timeout_s=timeout, retry=retry, device=device)
    folder = ablate_command(name, options, out, launch, console, plan_only=plan)
    if folder is not None:
        from srppo.report.sweep import report_sweep

        report_sweep(folder, console)
        raise_if_lost(*load_sweep(folder))


def worker(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A sweep's folder, also on a shared disk.")],
    slots: Slots = None,
    timeout: Annotated[
        float | None,
        typer.Option("--timeout", min=1, help="Seconds a stage may take. (default: as the sweep was begun)"),
    ] = None,
    device: Device = "auto",
    plain: Plain = False,
    debug: Debug = False,
) -> None:
    """Join a sweep: run its stages until none is left. Any number of workers may, on any machines."""
    from srppo.ablations.run import Launch, work_command
    from srppo.console import Console

    work_command(folder, Launch(slots=slots, timeout_s=timeout, device=device), Console(plain=True if plain else None))
