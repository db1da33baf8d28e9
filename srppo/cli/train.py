"""The commands that train, and what gives out their models: demo, sft, train, export."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer import Argument, Option

from srppo.cli.options import Debug, Device, Keys, Plain, Recipe, RunFolder, Sets, TrainingSeed
from srppo.errors import Interrupted, OtherEnded, RecordError, StorageError

if TYPE_CHECKING:
    from srppo.config import Recipe as LoadedRecipe

PROCESS = int(os.environ.get("RANK") or 0) if int(os.environ.get("WORLD_SIZE") or 1) > 1 else 0
"""Which of a launcher's processes this is; the first one speaks."""
SPEAK_S = 30.0  # that the others give it to do so
INTERRUPTED = "interrupted; the same command goes on from what is saved"


class Precision(StrEnum):
    """Of weights on disk."""

    fp32 = "fp32"
    bf16 = "bf16"


Track = Annotated[list[str] | None, Option("--track", metavar="NAME", help="tensorboard or wandb (repeatable).")]


def demo(
    out: RunFolder = None,
    sets: Sets = None,
    seeds: Annotated[int, Option(min=1, help="Training seeds; intervals then cover seeds and items.")] = 1,
    build: Annotated[bool, Option("--build", help="Rebuild the embedded world from nothing, into --out.")] = False,
    plain: Plain = False,
    debug: Debug = False,
) -> None:
    """The whole method on the embedded world, told in a report. Base, SFT, longer SFT, SRPPO from either, the
    controls brevity and shuffled, a table."""
    if build:
        from srppo.record.folder import check_place
        from srppo.world.build import build as build_world

        folder = out or Path("runs/world")
        check_place(folder)
        build_world(folder)
        typer.echo(f"world rebuilt in {folder}")
        return
    from srppo.config import load_recipe

    kinds = ["base", "brevity", "shuffled", "ppo-chosen"]  # which brings SFT, longer SFT and SRPPO with it
    _run(load_recipe(None, sets or []), kinds, "demo", out, device="cpu", plain=plain, seeds=seeds)


def sft(
    recipe: Recipe = None,
    sets: Sets = None,
    keys: Keys = False,
    out: RunFolder = None,
    device: Device = "auto",
    track: Track = None,
    plain: Plain = False,
    debug: Debug = False,
) -> None:
    """Stage 1 alone: fine-tune the base on demonstrations."""
    from srppo.config import load_recipe

    loaded = load_recipe(recipe, sets or [], ppo=False)
    _run(loaded, ["base", "sft"], recipe, out, device=device, track=track, plain=plain)


def train(
    recipe: Recipe = None,
    sets: Sets = None,
    keys: Keys = False,
    out: RunFolder = None,
    baselines: Annotated[
        bool, Option("--baselines/--no-baselines", help="Also longer SFT: five lengths, up to the same compute.")
    ] = False,
    distil: Annotated[bool, Option("--distil", help="Also on-policy distillation, towards the same optimum.")] = False,
    device: Device = "auto",
    track: Track = None,
    plain: Plain = False,
    debug: Debug = False,
) -> None:
    """SFT, unless it is given, then PPO with the coherent reward. The same command resumes a stopped run."""
    from srppo.config import load_recipe

    kinds = ["base", *(["distil"] if distil else []), "ppo", *(["chosen-sft"] if baselines else [])]
    _run(load_recipe(recipe, sets or []), kinds, recipe, out, device=device, track=track, plain=plain)


def export(
    run: Annotated[Path, Argument(help="A run folder.")],
    arm: Annotated[str | None, Option(help="Of the run's table. (default: SRPPO)")] = None,
    seed: TrainingSeed = None,
    merged: Annotated[bool, Option("--merged", help="Add an adapter to its base: a whole model.")] = False,
    dtype: Annotated[Precision, Option(help="Of the merged weights.")] = Precision.fp32,
    out: Annotated[
        Path | None, Option("--out", metavar="DIR", help="New folder. (default: RUN/export/<arm>-seed-N)")
    ] = None,
    debug: Debug = False,
) -> None:
    """The model of an arm, as a folder of its own. Adapters stay what PEFT and vLLM load, or are merged."""
    from srppo.console import Console
    from srppo.stages.publish import export_arm

    console = Console()
    console.say(str(export_arm(run, out, arm=arm, seed=seed, merged=merged, dtype=dtype.value, console=console)))


def _run(
    recipe: LoadedRecipe,
    kinds: list[str],
    given: Path | str | None,
    out: Path | None,
    *,
    device: str,
    track: list[str] | None = None,
    plain: bool,
    seeds: int = 1,
) -> None:
    """Run the stages of a recipe, seed by seed, each prepared when its turn comes; then the report on their folder.

    Where a stage fails there is a report too, of what there is and with the reason; main prints the error.
    """
    from srppo.config import is_embedded, recipe_id, with_overrides
    from srppo.console import Console
    from srppo.environment import environment
    from srppo.record.folder import check_place

    name, several = Path(given or "embedded").stem, f"-{seeds}-seeds" if seeds > 1 else ""
    folder = out or Path("runs") / f"{name}-{recipe_id(recipe)}{several}"
    console = Console(plain=plain or None, file=io.StringIO() if PROCESS else None)
    console.say(f"run folder: {folder}")
    check_place(folder)
    if is_embedded(recipe.model.base):  # so small that a second thread only costs: 1:50 minutes for the demo, not 3:16
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    with stopping_at_once():
        from srppo.models.loading import pick_device
        from srppo.report.run import report_run
        from srppo.stages.run import prepare_run, run_stages  # torch comes with this
        from srppo.training import parallel

    recipes = [with_overrides(recipe, {"seed": recipe.seed + i}) for i in range(seeds)]
    shared: dict[str, Any] = {"environment": environment(), "seeds": [one.seed for one in recipes]}
    shared |= {"device": parallel.start(pick_device(device)), "track": (track or []) if parallel.is_first() else []}
    for one in recipes:
        run = prepare_run(one, kinds, folder, console, **shared)
        try:
            run_stages(run)
        except (
            Interrupted,
            OtherEnded,
            RecordError,
            StorageError,
        ):  # no stage's result says so, and nothing more can be written
            raise
        except Exception:
            if parallel.is_first():
                report_run(folder, console)
            raise
    if parallel.is_first():
        report_run(folder, console)


def let_the_first_speak() -> None:
    """A launcher stops all when one ends, and the first may still be writing what all have found to be wrong."""
    import time

    import psutil

    deadline = time.monotonic() + SPEAK_S
    with suppress(psutil.Error):
        siblings = psutil.Process(os.getppid()).children()
        (first,) = [each for each in siblings if each.environ().get("RANK") == "0"]
        while first.is_running() and first.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.05)


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
