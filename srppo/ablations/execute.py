"""One task, in this process: what every engine ends in."""

from __future__ import annotations

import io
from contextlib import suppress
from functools import partial
from pathlib import Path

from srppo.ablations.ledger import Ledger
from srppo.ablations.local import Execute
from srppo.ablations.plan import Task
from srppo.config import is_embedded
from srppo.console import Console
from srppo.environment import commit_of_source, environment, package_versions
from srppo.evaluation.development import load_items
from srppo.kernels.native import compiler_version
from srppo.models.loading import fingerprint, import_model, resolve
from srppo.record.files import discard
from srppo.record.store import Stage
from srppo.stages.run import prepare_run, run_stages
from srppo.training import parallel
from srppo.training.together import first_of


def execute(task: Task, ledger: Ledger, *, device: str = "cpu", console: Console | None = None) -> None:
    """Run the task's stage to its commit, or find it committed. Raises what the stage raises.

    A finished stage's checkpoints go: nothing of a sweep reads them, and they would be most of what it holds on disk.
    """
    device = parallel.start(device)
    console = console or Console(plain=True, file=None if parallel.is_first() else io.StringIO())
    run = prepare_run(task.recipe, [task.kind], ledger.run, console, device=device, environment=environment())

    def link(kind: str, stage: Stage) -> None:
        if kind == task.kind and parallel.is_first():  # its parents have tasks of their own
            ledger.link(task, stage)

    stages = run_stages(run, on_stage=link)
    if parallel.is_first():
        discard(stages[task.kind].path / "checkpoints")


def execute_together(task: Task, ledger: Ledger, *, execute: Execute, processes: int) -> None:
    """Run a task as `execute` does, in so many processes, each of which sees the same. Raises what the first raises."""
    with first_of(processes, partial(execute, task, ledger)):
        execute(task, ledger)


def make_ready(task: Task) -> None:
    """Import and look up in a worker, before it forks its stages, what each of them would need anew. Never raises.

    No tensor work and no threads: a fork must find neither.
    """
    recipe = task.recipe
    with suppress(Exception):
        package_versions(), commit_of_source(), compiler_version()
        if is_embedded(recipe.data.demonstrations[0]):
            load_items(recipe, "dev"), load_items(recipe, "test")
        for spec in filter(None, (recipe.model.base, recipe.model.sft)):
            if not recipe.model.trust_remote_code and Path(resolve(spec)).is_dir():
                import_model(spec)
                fingerprint(spec, recipe.model)
