"""The table of docs/length.md from finished sweeps `length`: `python tools/length.py "COMMAND" FOLDER`."""

import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from blocks import write_block

from srppo.ablations.analysis import analyse
from srppo.ablations.run import load_sweep
from srppo.statistics.intervals import Estimate, item_interval

COLUMNS = ("length", "ended")


def change(rows: Sequence[Mapping[str, Any]], key: str) -> Estimate:
    """By how much a figure of the rollouts moved from the first step to the last, with its interval over seeds."""
    return item_interval([row[key] - row[f"{key}_start"] for row in rows], limits=None)


def main(command: str, folder: Path) -> None:
    result = analyse(*load_sweep(folder))
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in result.rows:
        if "length_start" in row:
            found[row["point"], row["arm"]][row["seed"]] = row
    seeds = len(result.plan.sweep.seeds)
    lines = [
        "| advantages | reward | tokens at the start | change | share ended, change | reward, last step | KL to SFT |",
        "|---|---|---|---|---|---|---|",
    ]
    for (point, arm), by_seed in found.items():
        rows = list(by_seed.values())
        start, reward, kl = (float(np.mean([row[key] for row in rows])) for key in ("length_start", "reward", "kl_sft"))
        moved = [change(rows, key) for key in COLUMNS]
        texts = ["0" if isnan(x.low) and not x.mean else f"{x.mean:+.2f} [{x.low:+.2f}, {x.high:+.2f}]" for x in moved]
        name = "coherent" if arm == "SRPPO" else arm
        lines.append(f"| {point} | {name} | {start:.1f} | {' | '.join(texts)} | {reward:.2f} | {kl:.2f} |")
    write_block("docs/length.md", command, "\n".join(lines) + f"\n\n{seeds} seeds; intervals over seeds.")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
