"""The table of docs/length.md from finished sweeps `length`: `python tools/length.py "COMMAND" FOLDER`.

Lengths are those of sampled answers to test items, each arm's minus the SFT model's of the same seed: the rollouts of a
first and a last step are to other prompts, whose answers differ in length by more than what is asked.
"""

import sys
from collections import defaultdict
from collections.abc import Mapping
from math import isnan
from pathlib import Path
from typing import Any

import numpy as np
from blocks import write_block

from srppo.ablations.analysis import analyse
from srppo.ablations.run import load_sweep
from srppo.statistics.intervals import item_interval

COLUMNS = ("sampled_tokens", "sampled_ended")


def main(command: str, folder: Path) -> None:
    result = analyse(*load_sweep(folder))
    found: dict[tuple[str, str], dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for row in result.rows:
        found[row["point"], row["arm"]][row["seed"]] = row
    lines = [
        "| advantages | reward | tokens, SFT | change | share ended, change | reward, last step | KL to SFT |",
        "|---|---|---|---|---|---|---|",
    ]
    for (point, arm), by_seed in found.items():
        if arm == "SFT":
            continue
        starts = found[point, "SFT"]
        moved = [
            item_interval([row[key] - starts[seed][key] for seed, row in by_seed.items()], limits=None)
            for key in COLUMNS
        ]
        texts = ["0" if isnan(x.low) and not x.mean else f"{x.mean:+.2f} [{x.low:+.2f}, {x.high:+.2f}]" for x in moved]
        start = float(np.mean([starts[seed]["sampled_tokens"] for seed in by_seed]))
        reward, kl = (float(np.mean([row[key] for row in by_seed.values()])) for key in ("reward", "kl_sft"))
        name = "coherent" if arm == "SRPPO" else arm
        lines.append(f"| {point} | {name} | {start:.1f} | {' | '.join(texts)} | {reward:.2f} | {kl:.2f} |")
    seeds = len(result.plan.sweep.seeds)
    items = "sampled answers to test items, paired by seed and item with the SFT model's"
    write_block("docs/length.md", command, "\n".join(lines) + f"\n\n{items}; {seeds} seeds, intervals over seeds.")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
