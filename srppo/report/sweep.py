"""`srppo report` of a sweep: reads its record, prints, and writes page, figures and files. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srppo.ablations.analysis import SweepResult, analyse
from srppo.ablations.ledger import Ledger
from srppo.ablations.plan import Plan
from srppo.ablations.progress import stage_seconds
from srppo.ablations.run import TRIES
from srppo.ablations.spec import Sweep
from srppo.console import Console
from srppo.record.files import write_atomic
from srppo.record.store import Run, Stage
from srppo.report.attempts import environment_of
from srppo.report.sweep_files import write_files
from srppo.report.sweep_page import sweep_page
from srppo.report.sweep_plots import differences_plot, sweep_plot
from srppo.report.sweep_terminal import sweep_text
from srppo.report.sweep_words import hours_line


def report_sweep(folder: Path, console: Console) -> Path:
    """Print what a sweep says, write page, figures and files into its folder `report`, name each, return the page.

    A sweep that is half finished, or has failed in part, is reported as far as it goes. Raises RecordError, in one
    line, for a folder that holds no record or a damaged one.
    """
    run = Run.load(folder)
    plan, ledger = Plan(Sweep.from_spec(run.spec)), Ledger(run, TRIES)
    result, stages = analyse(plan, ledger), stages_of(plan, ledger)
    spent, out = spent_line(stages), folder / "report"
    console.print(sweep_text(result, spent))
    page = write_report(result, out, spent, _environment(stages), folder)
    for path in sorted(out.iterdir()):
        if path.is_file() and path != page:
            console.print(f"written: {path}")
    console.print(f"report: {page}")
    return page


def write_report(result: SweepResult, out: Path, spent: str, environment: Mapping[str, Any], record: Path) -> Path:
    """Figures, files and index.html in the folder `out`. Raises StorageError when the disk refuses."""
    drawn = {
        "accuracy": sweep_plot(result, out / "accuracy"),
        "differences": differences_plot(result, out / "differences"),
    }
    files = [*write_files(result, out), *(path for paths in drawn.values() for path in paths)]
    svgs = {name: paths[-1] for name, paths in drawn.items() if paths}
    lines = [*(path.name for path in files), f"record: {record}", f"made by: srppo report {record}"]
    write_atomic(out / "index.html", sweep_page(result, svgs, spent, environment, lines))
    return out / "index.html"


def stages_of(plan: Plan, ledger: Ledger) -> dict[str, Stage]:
    """Every stage of a sweep that has begun, once, by its id."""
    found = (ledger.stage(task) for task in plan.tasks.values())
    return {stage.id: stage for stage in found if stage is not None}


def spent_line(stages: Mapping[str, Stage]) -> str:
    """Core-hours of the stages that were committed."""
    seconds = [each for stage in stages.values() if (each := stage_seconds(stage)) is not None]
    return hours_line(sum(seconds), len(seconds))


def _environment(stages: Mapping[str, Stage]) -> dict[str, Any]:
    """Of the first stage that says one."""
    return next((found for stage in stages.values() if (found := environment_of(stage))), {})
