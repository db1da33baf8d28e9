"""Tables and pictures of README.md and docs/ from a finished run: `python tools/pictures.py runs/demo-... "COMMAND"`.

Of a run of one seed the terminal, terminal.svg, rendered from its record; of several seeds the tables, and the run's
own plots accuracy.png and curves.png.
"""

import io
import shutil
import sys
from pathlib import Path

from blocks import ROOT, write_block
from rich.console import Console

from srppo.console import Console as SrppoConsole
from srppo.console import StageView
from srppo.record.store import Run
from srppo.report.answers import arm_rows, arms_of, differences_of, groups_of
from srppo.report.run import accuracy_table, cost_table, differences_table
from srppo.report.words import INTERVAL, estimate_text, group_words
from srppo.stages.arms import stages_by_arm


def terminal_picture(run: Run, command: str, path: Path) -> None:
    """The live panel three quarters through PPO, and the final tables."""
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    rows = stages_by_arm(run)["SRPPO"][0].metrics()
    seconds = [0.0]
    view = StageView(
        SrppoConsole(plain=True, file=io.StringIO(), clock=lambda: seconds[0]), "SRPPO", int(rows[-1]["step"])
    )
    for row in rows[: len(rows) * 3 // 4]:
        seconds[0] += sum(v for k, v in row.get("timing", {}).items() if k.endswith("_s") and k != "tokens_per_s")
        view.update(row)
    console.print(f"$ {command}", style="bold", highlight=False)
    console.print(view)
    rows_of_arms = arm_rows(run)
    arms = arms_of(rows_of_arms)
    for table in (accuracy_table(arms), cost_table(arms), differences_table(differences_of(rows_of_arms))):
        console.print(table)
    console.save_svg(str(path), title="srppo")


def markdown_table(run: Run, decoding: str) -> str:
    """Accuracy of every arm under one decoding, and the paired differences."""
    rows = arm_rows(run)
    arms, pairs = arms_of(rows), differences_of(rows)
    groups = groups_of(arms)
    lines = [f"| {decoding} | {' | '.join(map(group_words, groups))} |", "|---" * (len(groups) + 1) + "|"]
    for arm in arms:
        cells = [estimate_text(arm.figures.get((group, decoding))) for group in groups]
        lines.append(f"| {arm.name} | {' | '.join(cells)} |")
    for pair in pairs:
        cells = [estimate_text(pair.figures.get((group, decoding)), "+.2f") for group in groups]
        name = pair.name if " minus " in pair.name else f"SRPPO minus {pair.name}"
        lines.append(f"| *{name}* | {' | '.join(cells)} |")
    estimate = next(iter(arms[-1].figures.values()))
    n = f"n = {estimate.n} test items a group and {arms[-1].seeds} training seeds"
    return "\n".join([*lines, "", f"{n}; exact match, with 95% intervals over items and seeds: {INTERVAL}."])


def main(folder: Path, command: str) -> None:
    run, docs = Run.load(folder), ROOT / "docs"
    if len(run.spec["seeds"]) == 1:
        terminal_picture(run, command, docs / "terminal.svg")
        write_block("docs/sweeps.md", command, "![The terminal during and after the command](terminal.svg)")
        return
    for name in ("accuracy.png", "curves.png"):
        shutil.copy(folder / "report" / name, docs / name)
    picture = "![Test accuracy of every arm with intervals](docs/accuracy.png)"
    write_block("README.md", command, f"{markdown_table(run, 'greedy')}\n\n{picture}")
    write_block("docs/sweeps.md", command, f"{markdown_table(run, 'sampled')}\n\n![Training curves](curves.png)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
