"""The README's lines and `results/sweeps/` from finished sweeps: `python tools/sweeps.py runs/kl-... runs/...`.

Each sweep's plan, rows and figure are copied from its report (`srppo report DIR`), and the README says what that says.
"""

import re
import shutil
import sys
from pathlib import Path

from srppo.ablations.analysis import analyse
from srppo.ablations.run import load_sweep
from srppo.report.sweep import spent_line, stages_of
from srppo.report.sweep_answer import answer
from srppo.report.sweep_words import trend_lines

ROOT = Path(__file__).parent.parent
COPIED = ("rows.parquet", "cells.csv", "differences.csv", "accuracy.png")


def copy_results(folder: Path, name: str) -> None:
    """Plan, rows and figures of a sweep."""
    target = ROOT / "results" / "sweeps" / name
    target.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "sweep.json", target / "sweep.json")
    for file in COPIED:
        shutil.copy(folder / "report" / file, target / file)


def said(folder: Path) -> tuple[str, str]:
    """(name, what the README says of a sweep)."""
    plan, ledger = load_sweep(folder)
    copy_results(folder, plan.sweep.name)
    result = analyse(plan, ledger)
    trends = "; ".join(line for line in trend_lines(result) if " minus " in line)
    slopes = [f"Slopes, neither tested nor corrected: {trends}."] if trends else []
    lines = [answer(result), *slopes, spent_line(stages_of(plan, ledger))]
    name = plan.sweep.name
    where = f"results/sweeps/{name}"
    picture = f"[Cells]({where}/cells.csv), [differences]({where}/differences.csv), [figure]({where}/accuracy.png)."
    return name, f"**`srppo ablate {name}`**: {' '.join(lines)} {picture}"


def main(folders: list[Path]) -> None:
    readme = ROOT / "README.md"
    text = readme.read_text()
    for name, words in map(said, folders):
        block = f"<!-- sweep {name} -->\n- {words}\n<!-- end -->"
        text = re.sub(rf"<!-- sweep {name} -->.*?<!-- end -->", lambda _, b=block: b, text, flags=re.DOTALL)
    readme.write_text(text)


if __name__ == "__main__":
    main([Path(each) for each in sys.argv[1:]])
