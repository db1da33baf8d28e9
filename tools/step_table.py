"""The table of docs/models.md beside TRL, from a file's last run: `python tools/step_table.py FILE.jsonl "COMMAND"`."""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from blocks import write_block

from srppo.bench.measure import quantiles
from srppo.bench.step_rows import NAMES, PHASES
from srppo.report.words import span


def table(rows: list[dict[str, Any]]) -> str:
    """One line for each of ours, and below it those of the same method: medians of CPU seconds, and of the ratios."""
    lines = ["| | rollout | score | update | step, CPU s | of that gc | CPU time over ours | time over ours |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    groups: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["method"], row.get("rival", "")].append(row)
    for (method, rival), steps in sorted(groups.items()):
        phases = [median(row["cpu_s"][phase] for row in steps) for phase in PHASES]
        cells = [*phases, median(sum(row["cpu_s"].values()) for row in steps)]
        beside = ["", "", ""]
        if rival:
            beside = [f"{median(row['gc_cpu_s'] for row in steps):.2f}"]
            for key in ("times_ours_cpu", "times_ours"):
                ratio = quantiles([row[key] for row in steps])
                beside.append(f"{ratio.median:.2f} [{ratio.q20:.2f}, {ratio.q80:.2f}]")
        name = rival or f"ours, {NAMES[method]}"
        lines.append(f"| {' | '.join([name, *(f'{cell:.2f}' for cell in cells), *beside])} |")
    first, steps, loads = rows[0], max(row["step"] for row in rows), [row["load"] for row in rows]
    cpu, commit = first["machine"], (first["machine"]["commit"] or "")[:7]
    return "\n".join(
        [
            *lines,
            "",
            f"{cpu['cpu']} ({cpu['cpu_flags']}), {span([first['threads']], 'thread')}, fp32, "
            f"torch {cpu['torch']}, commit {commit}, {first['date'][:10]}; "
            f"{span([steps], 'step')} each in turn, medians, in brackets 20% and 80% quantiles; load {min(loads):.1f} "
            f"to {max(loads):.1f}.",
        ]
    )


def main(file: Path, command: str) -> None:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows = [row for row in rows if "method" in row and row["machine"]["commit"] == rows[-1]["machine"]["commit"]]
    write_block("docs/models.md", command, table([row for row in rows if not row.get("missing")]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
