"""docs/sweeps.md and `results/sweeps/` from finished sweeps: `python tools/sweeps.py runs/a kl-steps=runs/b`.

Each sweep's plan, rows and figure are copied from its report (`srppo report DIR`), and the page says what that says.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

from blocks import ROOT, write_block

from srppo.ablations.analysis import analyse
from srppo.ablations.run import load_sweep
from srppo.record.store import Stage
from srppo.report.history import environment_of
from srppo.report.sweep import stages_of
from srppo.report.sweep_words import answer, spent_line, trend_lines

EXTRA = {"kl-steps": "kl --axis reward.anchor=sft --axis reward.beta=0.125,0.25,0.5 --axis ppo.steps=5,10,20,40"}
"""Sweeps that are no shipped one at its defaults: NAME=FOLDER names them, and this follows `srppo ablate`."""
COPIED = ("rows.parquet", "cells.csv", "differences.csv", "trends.csv", "table.tex", "accuracy.png", "differences.png")


def copy_results(folder: Path, name: str, stages: Mapping[str, Stage]) -> None:
    """Plan, rows and figures of a sweep, and the machine, versions and commits that its stages were run with."""
    target = ROOT / "results" / "sweeps" / name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "sweep.json", target / "sweep.json")
    for file in COPIED:
        if (folder / "report" / file).read_bytes():  # without an ordered axis there are no trends
            shutil.copy(folder / "report" / file, target / file)
    found = [each for stage in stages.values() if (each := environment_of(stage))]
    commits = sorted({str(each.get("commit")) for each in found})
    told = {**found[0], "commit": commits[0] if len(commits) == 1 else commits}
    (target / "environment.json").write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")


def said(argument: str) -> tuple[str, str]:
    """(command, what the page says of a sweep); the argument is FOLDER or NAME=FOLDER."""
    given, _, place = argument.rpartition("=")
    folder = Path(place)
    plan, ledger = load_sweep(folder)
    name, stages = given or plan.sweep.name, stages_of(plan, ledger)
    copy_results(folder, name, stages)
    result = analyse(plan, ledger)
    command = f"srppo ablate {EXTRA.get(name, name)}"
    where = f"../results/sweeps/{name}"
    picture = f"![Accuracy of every cell of {name}, with intervals]({where}/accuracy.png)"
    trends = "; ".join(line for line in trend_lines(result) if " minus " in line)
    slopes = [f"Slopes, neither tested nor corrected: {trends}."] if trends else []
    files = {"Cells": "cells.csv", "differences": "differences.csv", "slopes": "trends.csv"}
    links = [f"[{word}]({where}/{file})" for word, file in files.items() if (ROOT / "docs" / where / file).exists()]
    lines = [answer(result), *slopes, spent_line(stages.values()), f"{', '.join(links)}."]
    return command, f"{picture}\n\n{' '.join(lines)}"


def main(arguments: list[str]) -> None:
    for command, text in map(said, arguments):
        write_block("docs/sweeps.md", command, text)


if __name__ == "__main__":
    main(sys.argv[1:])
