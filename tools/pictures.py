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
from srppo.record.store import Run
from srppo.report.accuracy import PAIRS, arms_of_run, differences_of_run
from srppo.report.figures import INTERVAL, estimate_text, group_words, groups_of
from srppo.report.terminal import arms_table, differences_table
from srppo.stages.arms import stages_by_arm

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
    console.print(arms_table(arms_of_run(run)))
    console.print(differences_table(differences_of_run(run), caption=PAIRS))
    console.save_svg(str(path), title="srppo")


def markdown_table(run: Run) -> str:
    """Accuracy of every arm, and the paired differences."""
    arms, pairs = arms_of_run(run), differences_of_run(run)
    groups = groups_of(arms)
    lines = []
    for decoding in ("greedy", "sampled"):
        lines += [f"| {decoding} | {' | '.join(map(group_words, groups))} |", "|---" * (len(groups) + 1) + "|"]
        for arm in arms:
            cells = [estimate_text(arm.figures.get((group, decoding))) for group in groups]
            lines.append(f"| {arm.name} | {' | '.join(cells)} |")
        for pair in pairs:
            cells = [estimate_text(pair.figures.get((group, decoding)), "+") for group in groups]
            lines.append(f"| *SRPPO minus {pair.name}* | {' | '.join(cells)} |")
        lines.append("")
    estimate = next(iter(arms[-1].figures.values()))
    n = f"n = {estimate.n} test items a group and {arms[-1].seeds} training seeds"
    lines.append(f"{n}; exact match, with 95% intervals over items and seeds: {INTERVAL}.")
    return "\n".join(lines)


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
