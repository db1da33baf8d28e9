"""What the test answers of a run say: accuracy by group and task, paired differences, lengths, samples to read."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from srppo.evaluation.results import answers_file, task_units
from srppo.record.arms import problem_of
from srppo.record.store import Run, Stage
from srppo.report.words import DECODINGS, GROUP_WORDS
from srppo.stages.arms import compute_of, figures_of, made_from, stages_by_arm
from srppo.stages.kinds import CHOSEN, EQUAL, KINDS
from srppo.statistics.intervals import Estimate, calibrated_interval, within

Verdicts = Sequence[Mapping[str, Any]]  # rows of samples.jsonl, an item each
SHARE, GAP = (0.0, 1.0), (-1.0, 1.0)  # what an accuracy and a difference of two cannot leave
SHORT = {EQUAL: "longer", CHOSEN: "chosen"}  # names of arms in the table of differences
FROM_CHOSEN = KINDS["ppo-chosen"].label
SAMPLES = 3  # of each group, to read


@dataclass(frozen=True)
class ArmRow:
    """A row of the tables: an arm at its kept or its last step, and its seeds that finished well.

    answers: by decoding and training seed, all of a decoding on the same items in the same order. problem: of the
    other seeds, None where there is none.
    """

    arm: str
    name: str
    which: str
    stages: tuple[Stage, ...]
    answers: Mapping[str, Mapping[int, Verdicts]]
    problem: str | None = None


@dataclass(frozen=True)
class ArmFigures:
    """What is known of one arm. A missing or failed arm has a `problem`, and whatever figures it got to.

    figures: accuracy by (group, decoding), decoding `greedy` or `sampled`. nll: held-out answers, nats a token.
    flops, seconds: everything trained for this arm, its SFT included; flops are counted. selection_flops: what chose
    its steps, its length and the like. kept_step of steps: the step whose weights were measured. mean_length (tokens)
    and ended_share: of the sampled answers to test items.
    seeds: training seeds behind the figures.
    """

    name: str
    figures: Mapping[tuple[str, str], Estimate] = field(default_factory=dict)
    flops: float | None = None
    selection_flops: float | None = None
    seconds: float | None = None
    kept_step: int | None = None
    steps: int | None = None
    mean_length: float | None = None
    ended_share: float | None = None
    nll: float | None = None
    note: str = ""
    problem: str | None = None
    seeds: int = 1


# ---- answers on disk


def seed_of(stage: Stage) -> int:
    return int(stage.identity["config"]["seed"])


def read_verdicts(path: Path) -> list[dict[str, Any]]:
    """Rows of a samples.jsonl; none where it is gone or cannot be read, which `history.missing_of` says."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


def arm_rows(run: Run) -> list[ArmRow]:
    """Rows in the order of the tables; an arm has one for its last step too where development items picked another."""
    rows = []
    for arm, stages in stages_by_arm(run).items():
        problems = {stage.id: problem_of(stage, stage.result()) for stage in stages}
        problem = "; ".join(text for text in problems.values() if text) or None
        good = tuple(stage for stage in stages if problems[stage.id] is None)
        picked = any("last" in figures_of(stage) for stage in good)
        names = {"last": f"{arm}, last step", "kept": f"{arm}, best on dev"} if picked else {"kept": arm}
        for which, name in names.items():
            answers = {decoding: _answers(good, which, decoding) for decoding in DECODINGS}
            rows.append(ArmRow(arm, name, which, good, answers, problem))
    return rows


def _answers(stages: Sequence[Stage], which: str, decoding: str) -> dict[int, Verdicts]:
    """By seed; a seed whose files are gone, or whose items are not those of the first, is left out."""
    found: dict[int, Verdicts] = {}
    for stage in stages:
        # A stage that kept its last step has no separate "last": its kept answers are both.
        folder = which if "last" in figures_of(stage) else "kept"
        verdicts = read_verdicts(answers_file(stage, folder, decoding))
        if verdicts and items_of(verdicts) == items_of(next(iter(found.values()), verdicts)):
            found[seed_of(stage)] = verdicts
    return found


def left_out(rows: Sequence[ArmRow]) -> list[str]:
    """Seeds whose answers are there but to other items than the first seed's, so that no interval can hold both."""
    return [
        f"{row.name}, seed {seed_of(stage)}: its {decoding} answers are to other test items than those of seed {first} "
        "and are left out"
        for row in rows
        for decoding in DECODINGS
        for first in list(row.answers[decoding])[:1]
        for stage in row.stages
        if seed_of(stage) not in row.answers[decoding] and read_verdicts(answers_file(stage, row.which, decoding))
    ]


def items_of(verdicts: Verdicts) -> list[tuple[str, str, str]]:
    """What makes two lists of verdicts comparable item by item."""
    return [(row["group"], row["task"], row["prompt"]) for row in verdicts]


def right_share(row: Mapping[str, Any]) -> float:
    """The share of an item's samples that were right."""
    return sum(row["correct"]) / len(row["correct"])


def cells(
    by_seed: Mapping[int, Verdicts], *keys: str, value: Callable[[Mapping[str, Any]], float] = right_share
) -> dict[tuple[str, ...], NDArray[np.float64]]:
    """(seeds, items) values of the items that have the same values of `keys` (group, task), seeds as they are given."""
    found: dict[tuple[str, ...], list[list[float]]] = defaultdict(list)
    for verdicts in by_seed.values():
        one: dict[tuple[str, ...], list[float]] = defaultdict(list)
        for row in verdicts:
            one[tuple(str(row[key]) for key in keys)].append(value(row))
        for name, values in one.items():
            found[name].append(values)
    return {name: np.array(values) for name, values in found.items()}


def interval(
    values_by_seed_item: NDArray[np.float64],
    limits: tuple[float, float],
    draws: int = 4000,
    units: Sequence[str] | None = None,
) -> Estimate:
    """`calibrated_interval`, cut where no value can lie; `draws` decide its shape, not its width."""
    return within(calibrated_interval(values_by_seed_item, units, limits=limits, draws=draws), limits)


def _units(verdicts: Verdicts, group: str) -> tuple[str, ...] | None:
    """The task of each item of a group, where there are several."""
    rows = [row for row in verdicts if row["group"] == group]
    return task_units([row["prompt"] for row in rows], [row["task"] for row in rows], group)


# ---- accuracy


def arms_of(rows: Sequence[ArmRow]) -> list[ArmFigures]:
    """Figures of each row; its cost includes that of the stages it builds on, as SRPPO does on SFT."""
    return [_figures(row) for row in rows]


def _figures(row: ArmRow) -> ArmFigures:
    if not row.stages:
        return ArmFigures(row.name, problem=row.problem)
    accuracy = {
        (group, decoding): interval(values, SHARE)
        for decoding in DECODINGS
        for (group,), values in cells(row.answers[decoding], "group").items()
    }
    results = [figures_of(stage) for stage in row.stages]
    measured = [result.get("last", result) if row.which == "last" else result for result in results]

    def mean_of(key: str) -> float | None:
        values = [each[key] for each in measured if key in each]
        return mean(values) if values else None

    training, choosing = zip(*map(compute_of, row.stages), strict=True)
    steps = [result["steps"] for result in results]
    kept = [result["kept_step"] for result in results] if row.which == "kept" else steps
    spread = f"kept steps {min(kept)} to {max(kept)} over the seeds; the median is shown" if len(set(kept)) > 1 else ""
    return ArmFigures(
        row.name,
        accuracy,
        flops=mean(training),
        selection_flops=mean(choosing),
        seconds=mean(sum(map(seconds_of, made_from(stage))) for stage in row.stages),
        kept_step=int(median(kept)),
        steps=int(median(steps)),
        mean_length=mean_of("sampled_tokens"),
        ended_share=mean_of("sampled_ended"),
        nll=mean_of("held_out_nll"),
        problem=row.problem,
        note=spread,
        seeds=max(map(len, row.answers.values())) or len(row.stages),
    )


def seconds_of(stage: Stage) -> float:
    """Seconds of training, as logged."""
    laps = (row.get("timing", {}).items() for row in stage.metrics())
    return sum(v for timing in laps for k, v in timing if k.endswith("_s") and k != "tokens_per_s")


def groups_of(arms: Sequence[ArmFigures]) -> list[str]:
    """Group names of all arms: the embedded three in their order, then others as they come."""
    seen = {group: True for arm in arms for group, _ in arm.figures}
    return [group for group in dict.fromkeys((*GROUP_WORDS, *seen)) if group in seen]


def decodings_of(arms: Sequence[ArmFigures]) -> list[str]:
    """Decodings that any arm has, greedy first."""
    return [each for each in DECODINGS if any(decoding == each for arm in arms for _, decoding in arm.figures)]


def differences_of(rows: Sequence[ArmRow]) -> list[ArmFigures]:
    """SRPPO minus each other trained arm, and SRPPO from chosen SFT minus its start; kept steps, paired on items and
    seeds; intervals over tasks where a group has several."""
    kept = {row.arm: row for row in rows if row.which == "kept"}
    pairs = {SHORT.get(arm, arm): ("SRPPO", arm) for arm in kept if "SRPPO" in kept and arm not in ("base", "SRPPO")}
    if FROM_CHOSEN in pairs and CHOSEN in kept:
        pairs[f"{FROM_CHOSEN} minus chosen"] = (FROM_CHOSEN, CHOSEN)
    found = []
    for name, (model, other) in pairs.items():
        figures: dict[tuple[str, str], Estimate] = {}
        seeds: set[int] = set()
        for decoding in DECODINGS:
            ours, theirs = (kept[arm].answers[decoding] for arm in (model, other))
            both = [s for s in ours if s in theirs and items_of(ours[s]) == items_of(theirs[s])]
            seeds |= set(both)
            before = cells({seed: theirs[seed] for seed in both}, "group")
            for group, values in cells({seed: ours[seed] for seed in both}, "group").items():
                figures[group[0], decoding] = interval(values - before[group], GAP, units=_units(ours[both[0]], *group))
        if figures:
            found.append(ArmFigures(name, figures, seeds=len(seeds)))
    return found


def tasks_of(rows: Sequence[ArmRow]) -> dict[str, dict[tuple[str, str, str], Estimate]]:
    """By the row's name: accuracy by (group, task, decoding), intervals over seeds and the task's items."""
    return {
        row.name: {
            (group, task, decoding): interval(values, SHARE, draws=1000)
            for decoding in DECODINGS
            for (group, task), values in cells(row.answers[decoding], "group", "task").items()
        }
        for row in rows
    }


# ---- lengths


@dataclass(frozen=True)
class Lengths:
    """Lengths of one arm's sampled answers over all seeds: how many answers have so many tokens, EOS included.

    ended: by EOS; cut: by the limit. cut_share: of all answers, with its 95% interval over items and seeds.
    """

    name: str
    ended: Counter[int]
    cut: Counter[int]
    cut_share: Estimate


def lengths_of(rows: Sequence[ArmRow]) -> list[Lengths]:
    """Of every row that has sampled answers."""
    found = []
    for row in rows:
        by_seed = row.answers["sampled"]
        ended, cut = Counter[int](), Counter[int]()
        for verdict in (each for verdicts in by_seed.values() for each in verdicts):
            for tokens, whole in zip(verdict["tokens"], verdict["ended"], strict=True):
                (ended if whole else cut)[tokens] += 1
        if by_seed:
            shares = cells(by_seed, value=lambda verdict: 1 - sum(verdict["ended"]) / len(verdict["ended"]))[()]
            found.append(Lengths(row.name, ended, cut, interval(shares, SHARE)))
    return found


def samples_of(rows: Sequence[ArmRow]) -> list[dict[str, Mapping[str, Any]]]:
    """By arm, the verdicts on the greedy answers of its first seed, at its kept step, to each of SAMPLES items of each
    group: chosen by place, never by outcome."""
    by_arm: dict[str, Verdicts] = {}
    for row in rows:
        first = next(iter(row.answers["greedy"].values()), None)
        if row.which == "kept" and first and items_of(first) == items_of(next(iter(by_arm.values()), first)):
            by_arm[row.arm] = first
    places: dict[str, list[int]] = defaultdict(list)
    for i, verdict in enumerate(next(iter(by_arm.values()), [])):
        places[verdict["group"]].append(i)
    counts = {group: min(SAMPLES, len(found)) for group, found in places.items()}
    chosen = [found[len(found) * i // counts[group]] for group, found in places.items() for i in range(counts[group])]
    return [{arm: verdicts[i] for arm, verdicts in by_arm.items()} for i in chosen]
