"""Of several results of one thing those that a comparison takes: each question once, asked of all in one way. No torch.

A run's own test items are also the embedded suite of `srppo eval`; and a task may have been evaluated several times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from srppo.evaluation.pairing import DECISIVE, HARMLESS, comparable, said
from srppo.evaluation.results import SUMMARY, TaskResult, question_name
from srppo.world.items import items
from srppo.world.tasks import GROUPS

Arms = Mapping[str, Sequence[TaskResult]]
Cell = tuple[str, int | None]  # an arm and a training seed
SUITE = "embedded_"  # before the name of a group: its task in the embedded suite
_OF_SAMPLING = {"samples": HARMLESS["samples"], "eval_seed": "seed of the samples (--seed)"}


def without_repeats(arms: Arms) -> tuple[dict[str, list[TaskResult]], list[str]]:
    """The arms with each question once, and notes on what was dropped.

    Where a run's own test of a group and the embedded suite's both have results, the one with more scores stays, the
    suite's where they have equally many. A test of that name on other items is no repeat.
    """
    kept, notes = {name: list(results) for name, results in arms.items()}, []
    for decoding in dict.fromkeys(result.decoding for results in arms.values() for result in results):
        for group in GROUPS:
            own, suite = (
                {
                    name: [r for r in results if (r.task, r.decoding) == (task, decoding)]
                    for name, results in arms.items()
                }
                for task in (group, SUITE + group)
            )
            if not any(suite.values()) or not any(own.values()) or not _is_of_world(own, group):
                continue
            less, more = (suite, own) if _scores_of(suite) < _scores_of(own) else (own, suite)
            gone, stays = (next(r.task for each in side.values() for r in each) for side in (less, more))
            kept = {name: [r for r in each if r not in less[name]] for name, each in kept.items()}
            notes.append(f"{gone} ({decoding}) is left out: {stays} asks the same questions, and each counts once")
    return kept, notes


def _is_of_world(arms: Arms, group: str) -> bool:
    """Whether every result is on test items of that group of the embedded world."""
    known = {question_name(item.task, item.prompt, item.answer) for item in items(group, "test")}
    return all(known.issuperset(result.items) for results in arms.values() for result in results)


def _scores_of(arms: Arms) -> int:
    return sum(len(_fullest(cell).items) for cell in _cells(arms).values())


def made_alike(arms: Arms) -> tuple[dict[str, list[TaskResult]], list[str]]:
    """Where a task was evaluated in several ways, the one that all arms share; and notes that say which.

    A way: the settings that decide what is asked (`matching.DECISIVE`), samples and their seed included, or, where arms
    share none of those, without these two. Of several shared ways the one with the most arms and training seeds, then
    items, then the newest. Where nothing is shared all results stay, and pairing says what differs.
    """
    tasks = dict.fromkeys((r.task, r.decoding) for results in arms.values() for r in results)
    kept: dict[str, list[TaskResult]] = {name: [] for name in arms}
    notes: list[str] = []
    for task, decoding in tasks:
        on = {name: [r for r in results if (r.task, r.decoding) == (task, decoding)] for name, results in arms.items()}
        on = {name: results for name, results in on.items() if results}
        chosen = _shared(on, notes) if any(len(cell) > 1 for cell in _cells(on).values()) else on
        for name, results in chosen.items():
            kept[name] += results
    return kept, notes


def _shared(on: Arms, notes: list[str]) -> Arms:
    """The results of one task and decoding, one an arm and seed, all made alike; all results where that cannot be."""
    for further in (_OF_SAMPLING, {}):
        ways: dict[str, list[tuple[str, TaskResult]]] = {}
        for name, results in on.items():
            for result in results:
                ways.setdefault(str(_way(result, further)), []).append((name, result))
        shared = {way: found for way, found in ways.items() if {name for name, _ in found} == on.keys()}
        if not shared:
            continue
        best = max(shared.values(), key=_rank)
        first = best[0][1]
        others = [result for results in on.values() for result in results if result not in [r for _, r in best]]
        if others:
            notes.append(
                f"{first.task} ({first.decoding}) was evaluated in {len(ways)} ways; compared is the newest that all "
                f"share{_words(first, others)}"
            )
        cells = _cells({name: [r for own, r in best if own == name] for name in on})
        if max(map(len, cells.values())) > 1:
            notes.append(f"{first.task} ({first.decoding}): of several results of a model, that with most items counts")
        return {name: [_fullest(cell) for (own, _), cell in cells.items() if own == name] for name in on}
    return on


def _way(result: TaskResult, further: Mapping[str, str]) -> dict[str, Any]:
    settings = comparable(result)
    wanted = [*DECISIVE, *(further if result.decoding == "sampled" else ())]
    return {"metric": result.metric} | {key: settings[key] for key in wanted if key in settings}


def _rank(found: Sequence[tuple[str, TaskResult]]) -> tuple[int, int, float]:
    cells: dict[Cell, list[TaskResult]] = {}
    for name, result in found:
        cells.setdefault((name, result.seed), []).append(result)
    return len(cells), sum(len(_fullest(cell).items) for cell in cells.values()), max(_time(r) for _, r in found)


def _words(first: TaskResult, others: Sequence[TaskResult]) -> str:
    """` (samples a prompt 2, not 4; ...)`: where the chosen way differs from the others."""
    names = {key: words for key, (words, _) in DECISIVE.items()} | (_OF_SAMPLING if first.decoding == "sampled" else {})
    own, every = comparable(first), [comparable(result) for result in others]
    parts = []
    for key, words in names.items():
        unlike = dict.fromkeys(said(each[key]) for each in every if key in each and each[key] != own.get(key))
        parts += [f"{words}: {said(own.get(key))}, not {', '.join(unlike)}"] if unlike else []
    return f" ({'; '.join(parts)})" if parts else ""


def _cells(arms: Arms) -> dict[Cell, list[TaskResult]]:
    found: dict[Cell, list[TaskResult]] = {}
    for name, results in arms.items():
        for result in results:
            found.setdefault((name, result.seed), []).append(result)
    return found


def _fullest(cell: Sequence[TaskResult]) -> TaskResult:
    """The result with most items, the newest of several."""
    return max(cell, key=lambda result: (len(result.items), _time(result)))


def _time(result: TaskResult) -> float:
    """When a result was written, as its file says; 0 where there is none."""
    file = Path(result.path) / SUMMARY
    return file.stat().st_mtime if file.is_file() else 0.0
