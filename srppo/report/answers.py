"""Test answers of a run's arms, read from the record: what every accuracy and length is computed from."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from srppo.record.arms import problem_of
from srppo.record.store import Run, Stage
from srppo.report.figures import DECODINGS
from srppo.stages.arms import stages_by_arm
from srppo.statistics.intervals import Estimate, calibrated_interval, within

Verdicts = Sequence[Mapping[str, Any]]  # rows of samples.jsonl, an item each: see evaluate.Verdict
Key = TypeVar("Key", bound=Hashable)
SHARE, GAP = (0.0, 1.0), (-1.0, 1.0)  # what an accuracy and a difference of two cannot leave


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


def seed_of(stage: Stage) -> int:
    return int(stage.identity["config"]["seed"])


def figures_of(stage: Stage) -> dict[str, Any]:
    """The committed figures; empty where nothing is committed."""
    return dict((stage.result() or {}).get("figures", {}))


def answers_file(stage: Stage, which: str, decoding: str) -> Path:
    return stage.path / "eval" / f"{which}-{decoding}" / "samples.jsonl"


def arm_rows(run: Run) -> list[ArmRow]:
    """Rows in the order of the tables; an arm has one for its last step too where development items picked another."""
    rows = []
    for arm, stages in stages_by_arm(run).items():
        problems = {stage.id: problem_of(stage, stage.result()) for stage in stages}
        problem = "; ".join(text for text in problems.values() if text) or None
        good = tuple(stage for stage in stages if problems[stage.id] is None)
        picked = any("last" in figures_of(stage) for stage in good)
        names = {"last": f"{arm}, last step"} if picked else {}
        names["kept"] = f"{arm}, best on dev" if picked else arm
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


def read_verdicts(path: Path) -> list[dict[str, Any]]:
    """Rows of a samples.jsonl; none where it is gone or cannot be read, which `missing_of_run` says."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


def items_of(verdicts: Verdicts) -> list[tuple[str, str, str]]:
    """What makes two lists of verdicts comparable item by item."""
    return [(row["group"], row["task"], row["prompt"]) for row in verdicts]


def group_of(row: Mapping[str, Any]) -> str:
    return str(row["group"])


def task_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """(group, task): two groups may have a task of the same name."""
    return str(row["group"]), str(row["task"])


def right_share(row: Mapping[str, Any]) -> float:
    """The share of an item's samples that were right."""
    return sum(row["correct"]) / len(row["correct"])


def cells(
    by_seed: Mapping[int, Verdicts],
    key: Callable[[Mapping[str, Any]], Key],
    value: Callable[[Mapping[str, Any]], float] = right_share,
) -> dict[Key, NDArray[np.float64]]:
    """(seeds, items) values of each group or task, seeds in the order given."""
    found: dict[Key, list[list[float]]] = defaultdict(list)
    for verdicts in by_seed.values():
        one: dict[Key, list[float]] = defaultdict(list)
        for row in verdicts:
            one[key(row)].append(value(row))
        for name, values in one.items():
            found[name].append(values)
    return {name: np.array(values) for name, values in found.items()}


def interval(values_by_seed_item: NDArray[np.float64], limits: tuple[float, float], draws: int = 4000) -> Estimate:
    """`calibrated_interval`, cut where no value can lie; `draws` decide its shape, not its width."""
    return within(calibrated_interval(values_by_seed_item, limits=limits, draws=draws), limits)
