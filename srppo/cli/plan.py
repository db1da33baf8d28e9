"""The command that says what a recipe will take."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from srppo.cli.options import Debug, Device, Keys, Recipe, Sets

SHARES = {"cpu": 0.6, "cuda": 0.3}
"""Of the rate of bare products that a step reaches: measured on CPUs (0.53 to 0.73, docs/models.md and LOG.md), assumed
on a GPU."""


def plan(
    recipe: Recipe = None,
    sets: Sets = None,
    keys: Keys = False,
    memory: Annotated[
        float | None, Option(min=0.001, metavar="GB", help="Memory of the device, 10^9 bytes. (default: this one's)")
    ] = None,
    device: Device = "auto",
    rate: Annotated[
        float | None, Option(min=0.001, metavar="GFLOPS", help="Of bare matrix products. (default: measured here)")
    ] = None,
    processes: Annotated[
        int, Option(min=1, metavar="N", help="That a launcher starts (torchrun --nproc_per_node N): the plan of one.")
    ] = 1,
    prompt_tokens: Annotated[
        int | None,
        Option(min=1, help="Tokens of a prompt. (default: counted in local data, else half of data.max_prompt_tokens)"),
    ] = None,
    debug: Debug = False,
) -> None:
    """What a run will take, before it. Memory by part and phase, what to change where it does not fit, disk, time.

    Only the model's config.json is read, and data where they are local. The device need not be there: give --memory,
    and --rate for the time.
    """
    from srppo.config import load_recipe
    from srppo.console import Console
    from srppo.errors import ConfigError
    from srppo.report.memory_plan import advice_table, cost_lines, memory_table, verdict
    from srppo.report.table import paragraph

    loaded = load_recipe(recipe, sets or [])
    import torch

    from srppo.models.loading import pick_device
    from srppo.models.memory import total_bytes
    from srppo.stages.memory_plan import advise, lengths_of
    from srppo.stages.memory_plan import plan as plan_recipe

    absent = device.startswith("cuda") and not torch.cuda.is_available()
    if absent and memory is None:
        raise ConfigError(f"device {device!r} is not here, so its memory is not known: give --memory GB")
    name = device if absent else pick_device(device)
    total = total_bytes(torch.device(name)) if memory is None else round(memory * 1e9)
    planned = plan_recipe(loaded, lengths_of(loaded, prompt_tokens), total, name, processes)
    if rate is None and not absent:
        from srppo.bench.measure import gemm_gflops

        kind = "cuda" if name.startswith("cuda") else "cpu"
        rate = gemm_gflops(kind, "bfloat16" if loaded.model.precision == "bf16" else "float32")
        source = "measured here"
        if kind == "cpu" and processes > 1:
            rate, source = rate / processes, f"measured here, shared by {processes} processes"
    else:
        source = "as given"
    console = Console()
    console.print(memory_table(planned))
    console.print(paragraph(verdict(planned), "bold" if planned.fits else "bad"))
    console.print("")
    if not planned.fits:
        console.print(advice_table(planned, advise(planned)))
    for line in cost_lines(planned, rate, SHARES["cuda" if name.startswith("cuda") else "cpu"], source):
        console.print(paragraph(line))
