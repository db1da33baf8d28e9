"""IFEval's own prompts, beside docs/real-model.md: `python tools/real_model_ifeval.py DATA ARM:SEED=FOLDER ...` takes
what `srppo eval --suite ifeval` wrote for arms into results/real-model-ifeval.jsonl; without words it reads its rows.

Then it writes the table. A row is an arm, seed and kind of instruction: of so many instructions in 540 prompts the
share that is obeyed, strictly; and one of whole prompts. Kinds are the units of a difference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from blocks import ROOT, write_block
from real_model import GROUPS

from srppo.evaluation.items import read_rows
from srppo.instructions.checkers import NEEDS, instructed_item, obeys
from srppo.instructions.kinds import KINDS
from srppo.record.json import read_lines
from srppo.report.words import estimate_text
from srppo.statistics.tests import sign_flip
from srppo.statistics.verdicts import Contrast, untested

ROWS = ROOT / "results" / "real-model-ifeval.jsonl"
COMMAND = "python tools/real_model_ifeval.py"
WHOLE = "whole prompts"
Row = dict[str, Any]
GROUP_OF = {kind.name: kind.group for kind in KINDS}


def rows_of(data: Path, arm: str, seed: int, folder: Path) -> list[Row]:
    """Of one result: a row a kind, and one of whole prompts, which is lm-eval's own prompt_level_strict_acc."""
    docs = [row for _, row in read_rows(data, "DATA")]
    (made,) = folder.glob("ifeval@*/samples.parquet")
    answers = pq.read_table(made).to_pylist()
    found: dict[str, list[bool]] = {}
    for doc, answer in zip(docs, answers, strict=True):
        assert doc["prompt"].strip() in answer["prompt"], "the results are of other prompts, or in another order"
        item = instructed_item(doc["prompt"], doc["instruction_id_list"], doc["kwargs"], "", "")
        right = [obeys([each], item.prompt, answer["response"]) for each in item.instructions]
        drawn = any(NEEDS.get(each.kind) == "langdetect" for each in item.instructions)  # which draws
        assert drawn or all(right) == bool(answer["prompt_level_strict_acc"]), "not what lm-eval said"
        found.setdefault(WHOLE, []).append(all(right))
        for each, obeyed in zip(item.instructions, right, strict=True):
            found.setdefault(each.kind, []).append(obeyed)
    return [
        {
            "arm": arm,
            "seed": seed,
            "kind": kind,
            "group": "all"
            if kind == WHOLE
            else GROUP_OF.get(kind, "unseen"),  # what our program has no answers for is seen by neither stage
            "items": len(values),
            "accuracy": float(np.mean(values)),
        }
        for kind, values in sorted(found.items())
    ]


def accuracies(rows: list[Row], arm: str, group: str) -> list[list[float]]:
    """By seed, the share of each kind of a group, kinds in order of name."""
    own = [row for row in rows if (row["arm"], row["group"]) == (arm, group) and row["kind"] != WHOLE]
    seeds = sorted({row["seed"] for row in own})
    return [[row["accuracy"] for row in own if row["seed"] == seed] for seed in seeds]


def table(rows: list[Row]) -> str:
    kinds = {group: len(accuracies(rows, "SFT", group)[0]) for group in GROUPS}
    heads = " | ".join(f"{GROUPS[group]}, {count} kinds" for group, count in kinds.items())
    lines = [f"| | seeds | whole prompts | {heads} |", "|---" * (len(GROUPS) + 3) + "|"]
    arms = [arm for arm in ("SFT", "by length", "SRPPO") if any(row["arm"] == arm for row in rows)]
    for arm in arms:
        whole = [row["accuracy"] for row in rows if row["arm"] == arm and row["kind"] == WHOLE]
        cells = [f"{np.mean(accuracies(rows, arm, group)):.3f}" for group in GROUPS]
        lines.append(f"| {arm} | {len(whole)} | {np.mean(whole):.3f} | {' | '.join(cells)} |")
    for arm in arms[1:]:
        cells = []
        for group in GROUPS:
            gap = np.array(accuracies(rows, arm, group)) - np.array(accuracies(rows, "SFT", group))
            cells.append(estimate_text(untested(Contrast(gap, sign_flip(gap.mean(axis=1)))).difference, "+.2f"))
        lines.append(f"| *{arm} minus SFT* | {len(gap)} |  | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: list[str]) -> None:
    rows = list(read_lines(ROWS)) if ROWS.exists() else []
    for word in words[1:]:
        name, _, folder = word.partition("=")
        arm, _, seed = name.rpartition(":")
        kept = [row for row in rows if (row["arm"], row["seed"]) != (arm, int(seed))]
        rows = kept + rows_of(Path(words[0]), arm, int(seed), Path(folder))
    rows.sort(key=lambda row: (row["arm"], row["seed"], row["kind"]))
    if words:
        ROWS.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    write_block("docs/real-model.md", COMMAND, table(rows))


if __name__ == "__main__":
    main(sys.argv[1:])
