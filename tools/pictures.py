"""The README's table and pictures from a finished run: `python tools/pictures.py runs/demo-...`.

terminal.svg is the command's own rendering of the record; accuracy.png and curves.png are the run's own plots.
"""

import io
import re
import shutil
import sys
from pathlib import Path

from rich.console import Console

from srppo.console import Console as SrppoConsole
from srppo.console import StageView
from srppo.record.arms import stages_by_arm
from srppo.record.store import Run
from srppo.report.answers import arm_rows, arms_of, differences_of
from srppo.report.run import accuracy_table, cost_table, differences_table
from srppo.report.table import to_markdown
from srppo.report.words import INTERVAL

ROOT = Path(__file__).parent.parent


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


def markdown_table(run: Run) -> str:
    """Accuracy of every arm, and the paired differences."""
    rows = arm_rows(run)
    arms = arms_of(rows)
    estimate = next(iter(arms[-1].figures.values()))
    n = f"n = {estimate.n} test items a group and {arms[-1].seeds} training seeds"
    tables = [accuracy_table(arms), differences_table(differences_of(rows))]
    lines = [f"{n}; exact match, with 95% intervals over items and seeds: {INTERVAL}. Differences: SRPPO minus."]
    return "\n".join([*map(to_markdown, tables), *lines])


def main(folder: Path, command: str) -> None:
    run, docs = Run.load(folder), ROOT / "docs"
    docs.mkdir(exist_ok=True)
    terminal_picture(run, command, docs / "terminal.svg")
    for name in ("accuracy.png", "curves.png"):
        shutil.copy(folder / "report" / name, docs / name)
    readme = ROOT / "README.md"
    block = f"<!-- table: {command} -->\n{markdown_table(run)}\n<!-- end -->"
    text = re.sub(r"<!-- table:.*?<!-- end -->", lambda _: block, readme.read_text(), flags=re.DOTALL)
    readme.write_text(text)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
