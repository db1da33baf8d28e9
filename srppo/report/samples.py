"""A few test items with what each arm answered, for reading: chosen by place, never by outcome."""

from __future__ import annotations

from collections.abc import Sequence

from srppo.report.answers import ArmRow, Verdicts, items_of
from srppo.report.figures import group_words
from srppo.report.run_page import Sample

SHOWN = 3  # of each group
CHOICE = (
    f"{SHOWN} test items of each group, spread evenly over it: chosen by place, not by outcome. Greedy answers of the "
    "first training seed, at the kept step; spaces at their ends are left out."
)


def samples_of(rows: Sequence[ArmRow]) -> list[Sample]:
    """The greedy answers of every arm's first seed, at its kept step, to SHOWN items of each group."""
    by_arm: dict[str, Verdicts] = {}
    for row in rows:
        first = next(iter(row.answers["greedy"].values()), None)
        if row.which == "kept" and first and items_of(first) == items_of(next(iter(by_arm.values()), first)):
            by_arm[row.arm] = first
    verdicts = next(iter(by_arm.values()), [])
    places: dict[str, list[int]] = {}
    for i, verdict in enumerate(verdicts):
        places.setdefault(verdict["group"], []).append(i)
    return [_sample(by_arm, i) for group in places.values() for i in _spread(group)]


def _spread(places: Sequence[int]) -> list[int]:
    """SHOWN of them at equal distances."""
    count = min(SHOWN, len(places))
    return [places[len(places) * i // count] for i in range(count)]


def _sample(by_arm: dict[str, Verdicts], i: int) -> Sample:
    verdict = next(iter(by_arm.values()))[i]
    group, task = group_words(verdict["group"]), verdict["task"]
    return Sample(
        verdict["prompt"],
        {arm: verdicts[i]["responses"][0].strip() for arm, verdicts in by_arm.items()},
        answer=verdict["answer"],
        group=group if task == verdict["group"] else f"{group}, task {task}",
        right={arm: verdicts[i]["correct"][0] for arm, verdicts in by_arm.items()},
    )
