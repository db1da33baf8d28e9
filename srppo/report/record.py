"""`srppo report`: the tables, plots and page of a run folder. Reads the record, trusts nothing else, needs no torch."""

from __future__ import annotations

from pathlib import Path

from srppo.config import build_recipe, canonical_json, to_toml
from srppo.console import Console
from srppo.record.files import write_atomic
from srppo.record.store import Run
from srppo.report.accuracy import PAIRS, arms_of, differences_of, rows_of_run
from srppo.report.answers import arm_rows, left_out
from srppo.report.attempts import environment_of_run, missing_of_run
from srppo.report.evaluated import evaluated_of, evaluated_part, evaluated_table
from srppo.report.run_page import write_report
from srppo.report.run_parts import accuracy_figure, length_part, task_part, training_parts
from srppo.report.samples import CHOICE, samples_of
from srppo.report.terminal import arms_table, differences_table
from srppo.report.training import curves_of_run
from srppo.stages.arms import stages_by_arm


def report_run(folder: Path, console: Console) -> None:
    """Print the tables of a run, write plots, rows and index.html into its folder `report`, and name every path.

    A run that is half finished, or has failed in part, is reported as far as it goes. Raises RecordError, in one line,
    for a folder that holds no record or a damaged one.
    """
    run = Run.load(folder)
    rows, out, seeds = arm_rows(run), folder / "report", run.spec["seeds"]
    arms, pairs, missing = arms_of(rows), differences_of(rows), missing_of_run(run) + left_out(rows)
    console.print(arms_table(arms))
    if pairs:
        console.print(differences_table(pairs, caption=PAIRS))
    evaluated, unread = evaluated_of(folder)
    missing += unread
    if evaluated:
        console.print(evaluated_table(evaluated))
    page = write_report(
        out / "index.html",
        title=f"srppo: {folder.name}",
        arms=arms,
        differences=pairs,
        differences_caption=PAIRS,
        results=accuracy_figure(arms, out),
        parts=[
            task_part(rows, out),
            evaluated_part(evaluated),
            *training_parts(curves_of_run(run), out),
            length_part(rows, out),
        ],
        samples=samples_of(rows),
        samples_caption=CHOICE,
        recipe_toml=to_toml(build_recipe({**run.spec["recipe"], "seed": seeds[0]})),
        environment=environment_of_run(run),
        missing=missing,
        notes=[f"Training seeds: {', '.join(map(str, seeds))}. Made by: srppo report {folder}"],
    )
    write_atomic(out / "rows.jsonl", "".join(canonical_json(row) + "\n" for row in rows_of_run(run)))
    for line in missing:
        console.print(line)
    for name, stages in stages_by_arm(run).items():
        for stage in stages:
            if (stage.path / "model").is_dir():
                console.print(f"{name}: {stage.path / 'model'}")
    console.print(f"report: {page}")
