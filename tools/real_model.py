"""The experiment of docs/real-model.md: `python tools/real_model.py FOLDER ...` puts the rows of sweeps, which may have
been run on several machines with a seed each, into results/real-model.jsonl; without folders it reads those alone.

Then it writes tables and figure. A row is an arm, seed, decoding and kind of instruction, or an arm, seed, decoding and
group of kinds. Kinds are the units: of a difference, each seed and kind counts once, however many items it has.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from blocks import ROOT, write_block
from numpy.typing import NDArray
from PIL import Image

from srppo.ablations.analysis import analyse
from srppo.ablations.run import load_sweep
from srppo.record.json import read_lines
from srppo.report.history import environment_of
from srppo.report.plots import arm_colours, save_figure
from srppo.report.style import INK
from srppo.report.sweep import stages_of
from srppo.report.words import estimate_text
from srppo.statistics.intervals import Estimate
from srppo.statistics.tests import sign_flip
from srppo.statistics.verdicts import Contrast, untested

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS = ROOT / "results" / "real-model.jsonl"
COMMAND = "python tools/real_model.py"
Row = dict[str, Any]
BACK = "SFT taken back by 0.3"  # weights at 0.7 of the way from the base to SFT
PAIRS = (
    ("SFT", "base"),
    ("SRPPO", "base"),
    ("by length", "base"),
    ("SRPPO", "SFT"),
    ("SRPPO", "longer SFT, equal compute"),
    ("SRPPO", "by length"),
    ("SRPPO", "beyond length"),
    ("SRPPO", "shuffled"),
    ("SRPPO", BACK),
    ("beyond length", "SFT"),
    ("by length", "SFT"),
    (BACK, "SFT"),
    ("longer SFT, equal compute", "SFT"),
)
GROUPS = {"unseen": "seen by neither", "prompted": "only prompted", "demonstrated": "demonstrated"}
DECODINGS = ("greedy", "sampled")
KEEP = ("flops", "seconds", "reward", "kl_sft", "kl_base", "length", "ended", "steps", "gain_at_lengths")
COLUMNS = [(group, decoding) for group in GROUPS for decoding in DECODINGS]
HEADS = " | ".join(f"{GROUPS[group]}, {decoding}" for group, decoding in COLUMNS)


# ---- rows


def rows_of(folder: Path) -> list[Row]:
    """Of every cell that is done: a row a kind, and one a group with what training was like."""
    plan, ledger = load_sweep(folder)
    result = analyse(plan, ledger)
    names = {"weight extrapolation": f"SFT taken back by {-plan.sweep.recipe.methods.alphas[0]:g}"}
    told = {stage.id: environment_of(stage) for stage in stages_of(plan, ledger).values()}
    made, by_cell = [], {}
    for row in result.rows:
        machine = {key: told.get(row["stage"], {}).get(key) for key in ("commit", "cpu")}
        cell = {"arm": names.get(row["arm"], row["arm"]), "seed": row["seed"], **machine}
        by_cell[row["arm"], row["seed"]] = cell
        numbers = {key: row[key] for key in ("group", "decoding", "items", "accuracy")}
        made.append({**cell, **numbers, **{key: row[key] for key in KEEP if row.get(key) is not None}})
    for row in result.tasks:
        keys = ("group", "task", "decoding", "items", "accuracy", "tokens", "ended")
        made.append({**by_cell[row["arm"], row["seed"]], **{key: row[key] for key in keys}})
    return made


def put(folders: Sequence[Path]) -> list[Row]:
    """All rows, those of the folders instead of what was there of the same arm and seed."""
    new = [row for folder in folders for row in rows_of(folder)]
    renewed = {(row["arm"], row["seed"]) for row in new}
    old = [row for row in read_lines(ROWS) if (row["arm"], row["seed"]) not in renewed] if ROWS.exists() else []
    rows = sorted(old + new, key=lambda row: (row["seed"], row["arm"], "task" in row))
    if new:
        ROWS.write_text("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows))
    return rows


# ---- figures


def by_kind(rows: Iterable[Row], arm: str, group: str, decoding: str) -> dict[int, list[float]]:
    """By seed, the accuracy on each kind, kinds in order of name."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if (row["arm"], row["group"], row["decoding"]) == (arm, group, decoding) and "task" in row:
            found.setdefault(row["seed"], {})[row["task"]] = row["accuracy"]
    return {seed: [values[task] for task in sorted(values)] for seed, values in found.items()}


def gaps(rows: Sequence[Row], pair: tuple[str, str], group: str, decoding: str) -> NDArray[np.float64] | None:
    """(seeds, kinds): the first arm of the pair minus the second, of the seeds that both have; None without any."""
    after, before = (by_kind(rows, arm, group, decoding) for arm in pair)
    seeds = [seed for seed in sorted(after) if seed in before]
    return np.array([after[seed] for seed in seeds]) - np.array([before[seed] for seed in seeds]) if seeds else None


def arms_of(rows: Iterable[Row]) -> list[str]:
    order = ["base", BACK, "SFT", "longer SFT, equal compute", "by length", "beyond length", "shuffled", "SRPPO"]
    found = {row["arm"] for row in rows}
    return [arm for arm in order if arm in found] + sorted(found - set(order))


def figures_table(rows: Sequence[Row]) -> str:
    """An arm's accuracy by group and decoding, kinds of equal weight, and what its sampled answers are like."""
    lines = [f"| | seeds | {HEADS} | tokens | share ended | KL to SFT |", "|---" * (len(COLUMNS) + 5) + "|"]
    for arm in arms_of(rows):
        own = [row for row in rows if row["arm"] == arm]
        cells = [f"{np.mean([*by_kind(own, arm, group, decoding).values()]):.3f}" for group, decoding in COLUMNS]
        sampled = [row for row in own if "task" in row and row["decoding"] == "sampled"]
        weights = [row["items"] for row in sampled]
        tokens, ended = (np.average([row[key] for row in sampled], weights=weights) for key in ("tokens", "ended"))
        kl = {row["seed"]: row["kl_sft"] for row in own if "kl_sft" in row}
        told = f"{np.mean([*kl.values()]):.2f}" if kl else ""
        seeds = len({row["seed"] for row in own})
        lines.append(f"| {arm} | {seeds} | {' | '.join(cells)} | {tokens:.0f} | {ended:.2f} | {told} |")
    return "\n".join(lines)


def differences(rows: Sequence[Row]) -> list[tuple[tuple[str, str], dict[tuple[str, str], Estimate], int]]:
    """Each pair with its interval by group and decoding, untested, over seeds and kinds; and how many seeds it has."""
    found = []
    for pair in PAIRS:
        values = {column: each for column in COLUMNS if (each := gaps(rows, pair, *column)) is not None}
        if values:
            contrasts = {column: Contrast(each, sign_flip(each.mean(axis=1))) for column, each in values.items()}
            estimates = {column: untested(each).difference for column, each in contrasts.items()}
            found.append((pair, estimates, max(map(len, values.values()))))
    return found


def differences_table(rows: Sequence[Row]) -> str:
    lines = [f"| | seeds | {HEADS} |", "|---" * (len(COLUMNS) + 2) + "|"]
    for (after, before), estimates, seeds in differences(rows):
        cells = [estimate_text(estimates.get(column), "+.2f") for column in COLUMNS]
        lines.append(f"| *{after} minus {before}* | {seeds} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_kinds(rows: Sequence[Row], path: Path) -> None:
    """Every kind's difference from SFT of its seed: a dot a seed and arm, a panel a decoding."""
    arms = [arm for arm in arms_of(rows) if arm != "SFT"]
    colours = arm_colours(arms)
    kinds = [(g, t) for g in GROUPS for t in sorted({r["task"] for r in rows if r["group"] == g and "task" in r})]
    names = {group: len([kind for kind in kinds if kind[0] == group]) for group in GROUPS}

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(DECODINGS), sharey=True, sharex=True)
        for axis, decoding in zip(axes, DECODINGS, strict=True):
            axis.axvline(0.0, color=INK, lw=1)
            start = 0
            for group, count in names.items():
                for place, arm in enumerate(arms):
                    found = gaps(rows, (arm, "SFT"), group, decoding)
                    shift = (place + 0.5) / len(arms) * 0.7 - 0.35
                    for i, values in enumerate(() if found is None else found):
                        y, label = np.arange(start, start + count) + shift, arm if i == start == 0 else None
                        axis.plot(values, y, "o", ms=3.5, color=colours[arm], label=label)
                start += count
                axis.axhline(start - 0.5, color=INK, lw=0.7)
            axis.set_yticks(range(len(kinds)), [f"{task} ({GROUPS[group]})" for group, task in kinds])
            axis.set_ylim(len(kinds) - 0.5, -0.5)
            axis.tick_params(axis="y", length=0)
            axis.set_title(decoding)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=4)
        figure.supxlabel("share that obeys, minus the SFT model's of the same seed; a dot a seed", fontsize=10)

    with TemporaryDirectory() as folder:
        made = save_figure(draw, Path(folder) / path.name, height=1.2 + 0.3 * len(kinds))[0]
        Image.open(made).convert("RGB").quantize(64).save(path, optimize=True)


def main(words: list[str]) -> None:
    rows = put([Path(word) for word in words])
    draw_kinds(rows, ROOT / "docs" / "real-model.png")
    picture = "![Every kind of instruction: each arm minus the SFT model](real-model.png)"
    write_block("docs/real-model.md", COMMAND, f"{picture}\n\n{differences_table(rows)}\n\n{figures_table(rows)}")


if __name__ == "__main__":
    main(sys.argv[1:])
