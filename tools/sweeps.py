"""docs/sweeps.md and `results/sweeps/` from finished sweeps: `python tools/sweeps.py runs/a "NAME=COMMAND=runs/b"`.

Each sweep's plan, rows and figure are copied from its report (`srppo report DIR`), and the page says what that says:
question, design, figure, verdict. A sweep that is no shipped one at its defaults is given a name, and what follows
`srppo ablate`. A plan that is registered under the name has to be the one that was run. The table at the page's head
is made of the committed rows; without an argument it is all that is written.
"""

import csv
import json
import re
import shutil
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from blocks import ROOT, write_block
from PIL import Image

from srppo.ablations.analysis import SweepResult, analyse
from srppo.ablations.run import load_sweep
from srppo.ablations.spec import Sweep, label
from srppo.evaluation.comparison import number
from srppo.record.store import Stage
from srppo.report.history import environment_of
from srppo.report.sweep import stages_of
from srppo.report.sweep_words import VERDICTS, answer, forecast_sentence, spent_line, trend_lines

COPIED = ("rows.parquet", "cells.csv", "differences.csv", "trends.csv", "table.tex", "accuracy.png")
MOST_NAMES = 10
AGAINST = ("SFT", "longer SFT", "shuffled")
SRPPO = ("SRPPO", "coherent reward")
CURVES = ("matched.csv", "curves.csv", "curves.png")


def copy_results(folder: Path, name: str, stages: Mapping[str, Stage]) -> None:
    """Plan, rows and figures of a sweep, and the machine, versions and commits that its stages were run with."""
    target = ROOT / "results" / "sweeps" / name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "sweep.json", target / "sweep.json")
    for file in (*COPIED, *CURVES):
        made = folder / "report" / file
        if not made.exists() or not made.read_bytes():  # without an ordered axis there are no trends
            continue
        if made.suffix == ".png":  # a fifth of the bytes, for a repository
            Image.open(made).convert("RGB").quantize(64).save(target / file, optimize=True)
        else:
            shutil.copy(made, target / file)
    found = [each for stage in stages.values() if (each := environment_of(stage))]
    commits = sorted({str(each.get("commit")) for each in found})
    told = {**found[0], "commit": commits[0] if len(commits) == 1 else commits}
    (target / "environment.json").write_text(json.dumps(told, indent=1, sort_keys=True) + "\n")


def check_registered(folder: Path, name: str) -> str:
    """What to say of the plan. Stops where the registered one is another."""
    registered = ROOT / "results" / "registered" / f"{name}.json"
    if not registered.exists():
        return "The plan was not registered."
    if json.loads(registered.read_text()) != json.loads((folder / "sweep.json").read_text()):
        raise SystemExit(f"{registered} is not the plan of {folder}")
    return f"[Registered](../results/registered/{name}.json)."


def design(sweep: Sweep) -> str:
    """Points, arms, seeds and what decides, in a paragraph."""
    names = "; ".join(each.name for each in sweep.points)
    if len(sweep.points) > MOST_NAMES:
        values = {key: dict.fromkeys(label(point.values.get(key)) for point in sweep.points) for key in sweep.axes}
        values = {key: found for key, found in values.items() if len(found) > 1}
        names = "; ".join(f"{key} {', '.join(found)}" for key, found in values.items()) or names
    points = f"{len(sweep.points)} points ({names})"
    points = f"{points} by " if len(sweep.points) > 1 else ""
    arms = f"{len(sweep.arms)} arms ({', '.join(arm.name for arm in sweep.arms)})"
    turns = f", which take turns with {', '.join(f'`{base}`' for base in sweep.bases)}" if sweep.bases else ""
    decides = f"accuracy on {sweep.analysis.group} tasks, {sweep.analysis.decoding}"
    tests = f"{sweep.analysis.comparisons} comparisons, {sweep.analysis.correction}"
    recipe = sweep.recipe
    training = (
        f"{recipe.ppo.steps} PPO steps of {recipe.rollout.batch}, lr {recipe.ppo.lr:g}, beta {recipe.reward.beta:g}"
    )
    training += f"; SFT at {recipe.sft.lr:g}"
    return (
        f"{points}{arms}; {len(sweep.seeds)} seeds{turns}; unless a point says otherwise {training}. "
        f"What decides: {decides}; {tests}; margin {sweep.analysis.margin:g}."
    )


def said(argument: str) -> tuple[str, str]:
    """(command, what the page says of a sweep); the argument is FOLDER or NAME=COMMAND=FOLDER."""
    rest, _, place = argument.rpartition("=")
    folder = Path(place)
    plan, ledger = load_sweep(folder)
    name, _, asked = rest.partition("=") if rest else (plan.sweep.name, "", plan.sweep.name)
    registered, stages = check_registered(folder, name), stages_of(plan, ledger)
    copy_results(folder, name, stages)
    result = analyse(plan, ledger)
    return f"srppo ablate {asked}", block(result, name, stages, registered)


def block(result: SweepResult, name: str, stages: Mapping[str, Stage], registered: str) -> str:
    """Question, design, figure and verdict."""
    sweep, where = result.plan.sweep, f"../results/sweeps/{name}"
    figure = "curves.png" if result.curves else "accuracy.png"
    words = "Accuracy over KL of every arm" if result.curves else f"Accuracy of every cell of {name}, with intervals"
    trends = "; ".join(line for line in trend_lines(result) if " minus " in line)
    slopes = [f"Slopes, neither tested nor corrected: {trends}."] if trends and sweep.name != "grid" else []
    forecasts = [f"{forecast_sentence(each)}." for each in result.forecasts]
    files = {
        "Cells": "cells.csv",
        "differences": "differences.csv",
        "at equal KL": "matched.csv",
        "slopes": "trends.csv",
    }
    links = [f"[{word}]({where}/{file})" for word, file in files.items() if (ROOT / "docs" / where / file).exists()]
    verdict = " ".join([answer(result), *slopes, *forecasts, spent_line(stages.values()), f"{', '.join(links)}."])
    return "\n\n".join(
        [
            f"**Question.** {sweep.question}",
            f"**Design.** {design(sweep)} {registered}",
            f"![{words}]({where}/{figure})",
            f"**Verdict.** {verdict}",
        ]
    )


def overview() -> str:
    """A line for every sweep on the page: SRPPO minus three arms, from least to greatest, and the planned verdicts."""
    page = (ROOT / "docs" / "sweeps.md").read_text()
    head = "| sweep | decided on unseen tasks | seeds | " + " | ".join(f"minus {arm}" for arm in AGAINST) + " |"
    lines = [head, re.sub(r"[^|]+", "---", head)]
    for section in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        title = section.partition("\n")[0]
        for name in re.findall(r"^!\[.*\]\(\.\./results/sweeps/([\w-]+)/", section, re.MULTILINE):
            rows = planned(name)
            anchor = re.sub(r"[^\w-]", "", title.lower().replace(" ", "-"))
            seeds = "/".join(dict.fromkeys(row["seeds"] for row in rows))
            cells = [summary([row for row in rows if row["baseline"] == arm]) for arm in AGAINST]
            lines.append(" | ".join([f"| [{title}](#{anchor}) (`{name}`)", rows[0]["decoding"], seeds, *cells]) + " |")
    return "\n".join(lines)


def planned(name: str) -> list[dict[str, str]]:
    """The committed rows of a sweep's planned comparisons of SRPPO; at equal KL where those were planned."""
    folder = ROOT / "results" / "sweeps" / name
    file = next(path for path in (folder / "matched.csv", folder / "differences.csv") if path.exists())
    with file.open(newline="") as lines:
        return [row for row in csv.DictReader(lines) if row["planned"] == "True" and row["model"] in SRPPO]


def summary(rows: list[dict[str, str]]) -> str:
    """`+0.01 to +0.06: 2 better, 6 cannot tell`"""
    if not rows:
        return ""
    verdicts = Counter(row["verdict"] for row in rows)
    counts = ", ".join(f"{verdicts[each]} {each}" for each in VERDICTS if verdicts[each])
    differences = [float(row.get("difference") or row["mean"]) for row in rows]
    ends = dict.fromkeys(number(each, "+") for each in (min(differences), max(differences)))
    return f"{' to '.join(ends)}: {counts}"


def main(arguments: list[str]) -> None:
    for command, text in map(said, arguments):
        write_block("docs/sweeps.md", command, text)
    write_block("docs/sweeps.md", "python tools/sweeps.py", overview())


if __name__ == "__main__":
    main(sys.argv[1:])
