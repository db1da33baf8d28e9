"""Accuracy of a run's arms by group and by task, paired differences, and the plain rows behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, median
from typing import Any

from srppo.record.store import Run
from srppo.report.answers import (
    GAP,
    SHARE,
    ArmRow,
    answers_file,
    arm_rows,
    cells,
    figures_of,
    group_of,
    interval,
    items_of,
    read_verdicts,
    right_share,
    seed_of,
    task_of,
)
from srppo.report.attempts import environment_of, seconds_of
from srppo.report.figures import DECODINGS, ArmFigures
from srppo.stages.arms import CHOSEN, EQUAL, stages_by_arm
from srppo.statistics.intervals import Estimate

PAIRS = (
    "Same items and seeds. SRPPO: its best step on development items; longer: longer SFT at equal compute; chosen: "
    "longer SFT, best on development items."
)
SHORT = {EQUAL: "longer", CHOSEN: "chosen"}  # names of arms in the paired table


def arms_of_run(run: Run) -> list[ArmFigures]:
    """A row for each arm; an arm has a second one for its last step where development items picked another."""
    return arms_of(arm_rows(run))


def arms_of(rows: Sequence[ArmRow]) -> list[ArmFigures]:
    """Figures of each row; its cost includes that of the stages it builds on, as SRPPO does on SFT."""
    costs = {stage.id: (figures_of(stage)["flops"], seconds_of(stage)) for row in rows for stage in row.stages}
    return [_figures(row, costs) for row in rows]


def _figures(row: ArmRow, costs: Mapping[str, tuple[float, float]]) -> ArmFigures:
    if not row.stages:
        return ArmFigures(row.name, problem=row.problem)
    accuracy = {
        (group, decoding): interval(values, SHARE)
        for decoding in DECODINGS
        for group, values in cells(row.answers[decoding], group_of).items()
    }
    results = [figures_of(stage) for stage in row.stages]
    measured = [result.get("last", result) if row.which == "last" else result for result in results]
    spent = [[costs[each] for each in (stage.id, *stage.identity["parents"]) if each in costs] for stage in row.stages]
    steps = [result["steps"] for result in results]
    kept = [result["kept_step"] for result in results] if row.which == "kept" else steps
    spread = f"kept steps {min(kept)} to {max(kept)} over the seeds; the median is shown" if len(set(kept)) > 1 else ""
    return ArmFigures(
        row.name,
        accuracy,
        flops=mean(sum(flops for flops, _ in one) for one in spent),
        seconds=mean(sum(seconds for _, seconds in one) for one in spent),
        kept_step=int(median(kept)),
        steps=int(median(steps)),
        mean_length=_mean_of(measured, "sampled_tokens"),
        ended_share=_mean_of(measured, "sampled_ended"),
        nll=_mean_of(measured, "held_out_nll"),
        problem=row.problem,
        note=spread,
        seeds=max([len(row.answers[decoding]) for decoding in DECODINGS] + [0]) or len(row.stages),
    )


def _mean_of(rows: Sequence[Mapping[str, Any]], key: str) -> float | None:
    values = [row[key] for row in rows if key in row]
    return mean(values) if values else None


def differences_of_run(run: Run) -> list[ArmFigures]:
    """SRPPO minus each other trained arm, kept steps, paired on items and seeds."""
    return differences_of(arm_rows(run))


def differences_of(rows: Sequence[ArmRow]) -> list[ArmFigures]:
    """`differences_of_run` of rows that are read already."""
    kept = {row.arm: row for row in rows if row.which == "kept"}
    found = []
    for other in (arm for arm in kept if "SRPPO" in kept and arm not in ("base", "SRPPO")):
        figures: dict[tuple[str, str], Estimate] = {}
        seeds: set[int] = set()
        for decoding in DECODINGS:
            ours, theirs = (kept[arm].answers[decoding] for arm in ("SRPPO", other))
            both = [s for s in ours if s in theirs and items_of(ours[s]) == items_of(theirs[s])]
            seeds |= set(both)
            before = cells({seed: theirs[seed] for seed in both}, group_of)
            for group, values in cells({seed: ours[seed] for seed in both}, group_of).items():
                figures[group, decoding] = interval(values - before[group], GAP)
        if figures:
            found.append(ArmFigures(SHORT.get(other, other), figures, seeds=len(seeds)))
    return found


def tasks_of(rows: Sequence[ArmRow]) -> dict[str, dict[tuple[str, str, str], Estimate]]:
    """By the row's name: accuracy by (group, task, decoding), intervals over seeds and the task's items."""
    return {
        row.name: {
            (group, task, decoding): interval(values, SHARE, draws=1000)
            for decoding in DECODINGS
            for (group, task), values in cells(row.answers[decoding], task_of).items()
        }
        for row in rows
    }


def rows_of_run(run: Run) -> list[dict[str, Any]]:
    """One plain row a seed, arm, kept or last step, group and decoding, with what made it: for results/*.jsonl."""
    rows = []
    for arm, stages in stages_by_arm(run).items():
        for stage in stages:
            environment, figures = environment_of(stage), figures_of(stage)
            made = {key: environment.get(key) for key in ("cpu", "cores", "commit")}
            made |= {name: environment.get("packages", {}).get(name) for name in ("torch", "transformers")}
            common = {"arm": arm, "seed": seed_of(stage), "flops": figures.get("flops"), **made}
            common |= {"kept_step": figures.get("kept_step"), "steps": figures.get("steps")}
            for which in ("kept", "last"):
                for decoding in DECODINGS:
                    verdicts = read_verdicts(answers_file(stage, which, decoding))
                    for group in dict.fromkeys(map(group_of, verdicts)):
                        shares = [right_share(each) for each in verdicts if each["group"] == group]
                        row = {"group": group, "decoding": decoding, "which": which, "items": len(shares)}
                        rows.append({**common, **row, "accuracy": sum(shares) / len(shares)})
    return rows
