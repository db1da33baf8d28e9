"""Which of several results a comparison takes: no question twice, and one way of asking for all."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from srppo.errors import DataError
from srppo.evaluation.choice import made_alike, without_repeats
from srppo.evaluation.comparison import compare
from srppo.evaluation.results import TaskResult, question_name, read_result, write_result
from srppo.world.items import items
from srppo.world.tasks import GROUPS

RNG = np.random.default_rng(0)


def result(task: str, model: str, names: Sequence[str], seed: int | None = 0, **more: Any) -> TaskResult:
    scores = tuple((RNG.random(len(names)) < (0.8 if model == "B" else 0.3)).astype(float))
    fields: dict[str, Any] = {"decoding": "greedy", "metric": "m", "clusters": None, "group": None, "path": Path(model)}
    return TaskResult(model=model, task=task, seed=seed, items=tuple(names), scores=scores, **(fields | more))


def own_and_suite(limit: int | None = None, models: str = "AB") -> dict[str, list[TaskResult]]:
    """Results as a run has them after `srppo eval RUN --suite embedded`."""
    arms: dict[str, list[TaskResult]] = {"A": [], "B": []}
    for group in GROUPS:
        asked = [question_name(each.task, each.prompt, each.answer) for each in items(group, "test")]
        hashes = [f"{i:064x}" for i in range(len(asked))][:limit]
        for name, results in arms.items():
            results.append(result(group, name, asked, group=group))
            if name in models:
                results.append(result(f"embedded_{group}", name, hashes, group="embedded"))
    return arms


def test_the_embedded_suite_and_a_runs_own_tests_count_once() -> None:
    found = compare(own_and_suite())
    assert [each.task for each in found.differences] == [f"embedded_{group}" for group in GROUPS]
    assert {each.comparisons for each in found.differences} == {3}, "Holm over three questions, not six"
    assert [each.tasks for each in found.aggregates] == [tuple(f"embedded_{group}" for group in GROUPS)]
    assert "demonstrated (greedy) is left out: embedded_demonstrated asks the same questions, and each counts once" in (
        found.notes
    )


@pytest.mark.parametrize("arms", [own_and_suite(limit=10), own_and_suite(models="B")], ids=["limit", "one arm alone"])
def test_the_fuller_of_both_stays(arms: dict[str, list[TaskResult]]) -> None:
    assert [each.task for each in compare(arms).differences] == list(GROUPS)


def test_a_test_of_that_name_on_other_items_is_no_repeat() -> None:
    arms = {name: [result("unseen", name, ["mine"]), result("embedded_unseen", name, ["0"])] for name in "AB"}
    assert without_repeats(arms) == (arms, [])


def sampled(model: str, seed: int, *, samples: int, eval_seed: int = 0, count: int = 20, **more: Any) -> TaskResult:
    settings = {"samples": samples, "eval_seed": eval_seed, "num_fewshot": 0} | more.pop("settings", {})
    names = [f"i{i}" for i in range(count)]
    return result("t", model, names, seed, decoding="sampled", settings=settings, **more)


def written(folder: Path, model: str, key: str, age: float, **settings: Any) -> TaskResult:
    """A result on disk that is so many seconds old."""
    summary = {
        "model": model,
        "task": "t",
        "decoding": "sampled",
        "metric": "acc",
        "seed": 0,
        "group": None,
        "key": key,
    }
    rows = [{"item": f"i{i}", "sample": 0, "acc": float(RNG.random() < 0.5)} for i in range(20)]
    path = write_result(folder / model, summary | {"samples": 2, "eval_seed": 0} | settings, rows)
    os.utime(path / "summary.json", (2e9 - age, 2e9 - age))
    return read_result(path)


def test_evaluating_again_with_another_seed_compares_the_newest_that_all_share(tmp_path: Path) -> None:
    arms = {
        model: [
            written(tmp_path, model, "old", 30, eval_seed=0),
            written(tmp_path, model, "new", 20, eval_seed=1),
            *([written(tmp_path, model, "alone", 10, eval_seed=2)] if model == "B" else []),
        ]
        for model in "AB"
    }
    kept, notes = made_alike(arms)
    assert {name: [each.path.name for each in own] for name, own in kept.items()} == {"A": ["t@new"], "B": ["t@new"]}
    assert notes == [
        "t (sampled) was evaluated in 3 ways; compared is the newest that all share (seed of the samples (--seed): "
        "1, not 0, 2)"
    ]
    found = compare(arms)
    assert found.notes == tuple(notes) and len(found.differences) == 1


def test_all_seeds_before_few_and_all_items_before_few() -> None:
    arms = {
        name: [sampled(name, 0, samples=2), sampled(name, 1, samples=2), sampled(name, 0, samples=4)] for name in "AB"
    }
    assert [each.settings["samples"] for each in made_alike(arms)[0]["A"]] == [2, 2]
    arms["B"] += [sampled("B", seed, samples=8) for seed in range(5)]
    assert [each.settings["samples"] for each in made_alike(arms)[0]["B"]] == [2, 2], "A has none of 8 samples"
    arms = {name: [sampled(name, 0, samples=2, count=9), sampled(name, 0, samples=4)] for name in "AB"}
    assert [each.settings["samples"] for each in made_alike(arms)[0]["B"]] == [4]


def test_what_only_sampling_parts_is_still_compared() -> None:
    """No number of samples is shared, but the questions are: the rest is as for single results."""
    arms = {"A": [sampled("A", 0, samples=2), sampled("A", 0, samples=3)], "B": [sampled("B", 0, samples=4)]}
    assert [len(own) for own in made_alike(arms)[0].values()] == [1, 1]
    assert compare(arms).differences[0].difference.n == 20


def test_where_nothing_is_shared_it_is_refused() -> None:
    arms = {
        "A": [sampled("A", 0, samples=2), sampled("A", 0, samples=2, settings={"num_fewshot": 1})],
        "B": [sampled("B", 0, samples=2, settings={"num_fewshot": 5})],
    }
    with pytest.raises(DataError, match="two results of A on t"):
        compare(arms)
