"""results/real-model-pilot.jsonl and tables of docs/real-model.md, from runs: `python tools/pilot.py NAME=FOLDER ...`.

A row of answers for each run, arm, decoding and kind of instruction, and a row for each PPO step. The items are
development items: a pilot says how to train, not what training is worth. Without runs, the tables of the rows again.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from blocks import ROOT, write_block

from srppo.evaluation.results import answers_file, means_by_task
from srppo.record.json import read_lines
from srppo.record.store import Run
from srppo.report.history import environment_of
from srppo.stages.arms import stages_by_arm

ROWS = ROOT / "results" / "real-model-pilot.jsonl"
OF_STEP = ("reward", "reward_std", "length_correlation", "kl_sft", "length", "ended", "dev/accuracy")
COMMAND = "python tools/pilot.py"


def rows_of(name: str, folder: Path) -> list[dict[str, Any]]:
    rows = []
    for arm, stages in stages_by_arm(Run.load(folder)).items():
        for stage in stages:
            if stage.identity["kind"] == "given-sft":  # of another run
                continue
            told = environment_of(stage) or {}
            common = {"run": name, "arm": arm, "commit": told.get("commit"), "cpu": told.get("cpu")}
            for decoding in ("greedy", "sampled"):
                for row in means_by_task(read_lines(answers_file(stage, "kept", decoding))):
                    rows.append({**common, "decoding": decoding, **row})
            for row in stage.metrics():
                if found := {key: row[key] for key in OF_STEP if key in row}:
                    rows.append({**common, "step": row["step"], **found})
    return rows


def answers_table(rows: list[dict[str, Any]]) -> str:
    found = defaultdict(list)
    for row in rows:
        if "task" in row:
            found[row["run"], row["arm"], row["decoding"]].append(row)
    lines = ["| run | arm | decoding | right | tokens | share ended |", "|---|---|---|---|---|---|"]
    seen_base = set()
    for (run, arm, decoding), each in found.items():
        if arm == "base" and decoding in seen_base:  # the same model in every run
            continue
        seen_base |= {decoding} if arm == "base" else set()
        weights = [row["items"] for row in each]
        right, tokens, ended = (
            np.average([row[k] for row in each], weights=weights) for k in ("accuracy", "tokens", "ended")
        )
        lines.append(
            f"| {'' if arm == 'base' else run} | {arm} | {decoding} | {right:.2f} | {tokens:.0f} | {ended:.2f} |"
        )
    return "\n".join(lines)


def steps_table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| run | step | reward | its deviation | its correlation with length | KL to SFT | tokens | share ended |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "reward" in row:
            numbers = (f"{row[key]:.2f}" for key in ("reward", "reward_std", "length_correlation", "kl_sft"))
            lines.append(
                f"| {row['run']} | {row['step']} | {' | '.join(numbers)} | {row['length']:.1f} | {row['ended']:.2f} |"
            )
    return "\n".join(lines)


def main(words: list[str]) -> None:
    named = [word.rpartition("=")[::2] for word in words]
    if named:
        rows = [row for name, folder in named for row in rows_of(name, Path(folder))]
        ROWS.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    rows = read_lines(ROWS)
    write_block("docs/real-model.md", COMMAND, f"{answers_table(rows)}\n\n{steps_table(rows)}")


if __name__ == "__main__":
    main(sys.argv[1:])
