"""The README's pictures from a finished run: `python tools/pictures.py runs/demo-... docs`.

terminal.svg is the command's own rendering of the record; accuracy.svg and curves.svg are the run's own plots.
"""

import io
import shutil
import sys
from pathlib import Path

from rich.console import Console

from srppo.console import Console as SrppoConsole
from srppo.console import StageView
from srppo.report.record import arms_of_run, differences_of_run, stages_by_arm
from srppo.report.terminal import arms_table, differences_table
from srppo.store import Run


def main(folder: Path, out: Path) -> None:
    run = Run.load(folder)
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    rows = stages_by_arm(run)["SRPPO"][0].metrics()
    view = StageView(SrppoConsole(plain=True, file=io.StringIO()), "SRPPO", rows[-1]["step"])
    for row in rows[:-6]:  # in mid-run, as a person sees it
        view.update(row)
    console.print("$ srppo demo --seeds 10", style="bold")
    console.print(view)
    console.print(arms_table(arms_of_run(run)))
    console.print(differences_table(differences_of_run(run)))
    out.mkdir(exist_ok=True)
    console.save_svg(str(out / "terminal.svg"), title="srppo")
    for name in ("accuracy.png", "curves.png"):
        shutil.copy(folder / "report" / name, out / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
