"""Tables and pictures of README.md and docs/ from a finished run: `python tools/pictures.py runs/demo-... "COMMAND"`.

Of a run of one seed the terminal, terminal.svg, rendered from its record; of several seeds the tables, and the run's
own plots accuracy.png and curves.png.
"""

import io
import shutil
import sys
from collections.abc import Sequence
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


SHORT = (("demonstrated", "greedy"), ("unseen", "greedy"), ("unseen", "sampled"))
"""What the README shows."""


def markdown_table(run: Run, columns: Sequence[tuple[str, str]], *, last: bool = True) -> str:
    """Accuracy of every arm by (group, decoding), and the paired differences; without `last` at the kept step alone."""
    rows = arm_rows(run)
    arms, pairs = arms_of(rows), differences_of(rows)
    decodings = dict.fromkeys(decoding for _, decoding in columns)
    alone = next(iter(decodings)) if len(decodings) == 1 else ""
    heads = [group_words(group) + ("" if alone else f", {decoding}") for group, decoding in columns]
    lines = [f"| {alone} | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for arm in arms:
        if last or not arm.name.endswith(", last step"):
            cells = [estimate_text(arm.figures.get(column)) for column in columns]
            lines.append(f"| {arm.name} | {' | '.join(cells)} |")
    for pair in pairs:
        if not last and pair.name in ("longer", "SRPPO from chosen SFT"):
            continue  # the README has the nearest of each
        cells = [estimate_text(pair.figures.get(column), "+.2f") for column in columns]
        name = pair.name if pair.name.endswith(" minus chosen") else f"SRPPO minus {pair.name}"
        lines.append(f"| *{name}* | {' | '.join(cells)} |")
    return "\n".join(lines)


def caption(run: Run) -> str:
    """What the intervals are over."""
    arm = arms_of(arm_rows(run))[-1]
    items = {group: estimate.n for (group, _), estimate in arm.figures.items()}
    n = ", ".join(f"{count} {group}" for group, count in items.items())
    over = "over items and seeds, those of differences over tasks and seeds"
    return f"n = {n} test items and {arm.seeds} training seeds; exact match, with 95% intervals {over}: {INTERVAL}."


def main(folder: Path, command: str) -> None:
    run, docs = Run.load(folder), ROOT / "docs"
    if len(run.spec["seeds"]) == 1:
        terminal_picture(run, command, docs / "terminal.svg")
        write_block("docs/sweeps.md", command, "![The terminal during and after the command](terminal.svg)")
        return
    for name in ("accuracy.png", "curves.png"):
        shutil.copy(folder / "report" / name, docs / name)
    picture = "![Test accuracy of every arm with intervals](docs/accuracy.png)"
    short, full = markdown_table(run, SHORT, last=False), []
    for decoding in ("greedy", "sampled"):
        groups = groups_of(arms_of(arm_rows(run)))
        full.append(markdown_table(run, [(group, decoding) for group in groups]))
    write_block("README.md", command, f"{short}\n\n{caption(run)}\n\n{picture}")
    tables = "\n\n".join([*full, caption(run)])
    write_block("docs/sweeps.md", command, f"{tables}\n\n![Training curves](curves.png)")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
