"""Results written, read back, damaged, and read from runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from srppo.errors import DataError, RecordError
from srppo.evaluation.results import TaskResult, read_result, read_results, task_units, write_result
from srppo.record.store import Run
from srppo.stages.arms import stages_by_arm

SUMMARY = {"model": "m", "task": "t", "decoding": "greedy", "metric": "acc", "seed": 3, "key": "k", "group": None}


def row(item: str, value: float | None, sample: int = 0, **more: Any) -> dict[str, Any]:
    return {"item": item, "sample": sample, "prompt": "p", "response": "r", "acc": value, **more}


def test_round_trip(tmp_path: Path) -> None:
    rows = [
        row("b", 1.0, strict=0.5, cluster="x"),
        row("b", 0.0, 1, strict=0.5, cluster="x"),
        row("a", None, not_scored="no punkt", cluster="x"),
        row("c", math.nan, strict=1.0, cluster="y"),
    ]
    folder = write_result(tmp_path, {**SUMMARY, "group": "unseen", "metrics": {"acc": math.nan}}, rows)
    assert folder == tmp_path / "t@k"
    found = read_result(folder)
    assert (found.model, found.task, found.decoding, found.metric, found.seed) == ("m", "t", "greedy", "acc", 3)
    assert found.items == ("b", "a", "c") and found.scores[0] == 0.5 and math.isnan(found.scores[1])
    assert found.not_scored == {"a": "no punkt", "c": "no acc"}
    assert found.clusters == ("x", "x", "y") and found.group == "unseen" and found.higher_is_better
    assert read_result(folder, "strict").scores[::2] == (0.5, 1.0)
    assert [each.path for each in read_results(tmp_path)] == [folder] == [read_results(folder)[0].path]


def test_writing_again_replaces_and_names_are_made_fit(tmp_path: Path) -> None:
    named = {**SUMMARY, "task": "a/b c", "seed": None, "higher_is_better": False}
    write_result(tmp_path, named, [row("1", 0.0)])
    folder = write_result(tmp_path, named, [row("1", 1.0), row("2", 0.0, late=1.0)])
    assert folder.name == "a_b_c@k" and sorted(path.name for path in tmp_path.iterdir()) == ["a_b_c@k"]
    found = read_result(folder)
    assert found.scores == (1.0, 0.0) and found.task == "a/b c" and found.seed is None and not found.higher_is_better
    assert read_result(folder, "late").not_scored == {"1": "no late"}, "a column that the first row lacks"


@pytest.mark.parametrize(
    ("change", "rows", "message"),
    [
        ({"key": None, "metric": "f1"}, [row("1", 1.0)], "no sample has the metric 'f1'; there are: acc"),
        ({"decoding": "beam"}, [row("1", 1.0)], "it is greedy or sampled"),
        ({}, [], "no sample"),
        ({}, [row("1", 1.0, cluster="x"), row("2", 1.0)], "item '2' has no cluster"),
        ({}, [row("1", 1.0, cluster="x"), row("1", 1.0, 1, cluster="y")], "in clusters 'x' and 'y'"),
    ],
)
def test_what_cannot_be_read_is_not_written(
    tmp_path: Path, change: dict[str, Any], rows: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_result(tmp_path, {**SUMMARY, **change}, rows)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="no seed"):
        write_result(tmp_path, {key: value for key, value in SUMMARY.items() if key != "seed"}, [row("1", 1.0)])


def test_nothing_and_damage_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="does not exist"):
        read_results(tmp_path / "absent")
    with pytest.raises(RecordError, match="holds no evaluation result"):
        read_results(tmp_path)
    folder = write_result(tmp_path, SUMMARY, [row("1", 1.0)])
    (tmp_path / ".tmp-x-u@k").mkdir()
    (tmp_path / ".tmp-x-u@k" / "summary.json").write_text("{")
    assert len(read_results(tmp_path)) == 1, "unfinished work is not looked at"
    with pytest.raises(RecordError, match="no result with the metric 'f1'"):
        read_results(tmp_path, "f1")
    content = (folder / "samples.parquet").read_bytes()
    (folder / "samples.parquet").write_bytes(content[:-1] + b"!")
    with pytest.raises(RecordError, match="has another sha256"):
        read_results(tmp_path)
    (folder / "manifest.json").unlink()
    with pytest.raises(RecordError, match="cannot be read"):
        read_results(tmp_path)


def verdict(prompt: str, correct: list[bool], group: str = "unseen") -> dict[str, Any]:
    answers = {"responses": ["x"] * len(correct), "ended": correct, "tokens": [1] * len(correct)}
    return {"prompt": prompt, "answer": "x", "task": "copy", "group": group, "correct": correct, **answers}


def make_stage(run: Run, kind: str, seed: int, verdicts: list[dict[str, Any]], status: str = "ok", **more: Any) -> Path:
    """A stage as the pipeline leaves it, with the same answers greedily and sampled."""
    stage = run.stage(kind, {"seed": seed, **more})
    for decoding in ("greedy", "sampled"):
        folder = stage.path / "eval" / f"kept-{decoding}"
        folder.mkdir(parents=True)
        (folder / "samples.jsonl").write_text("".join(json.dumps(each) + "\n" for each in verdicts))
    with stage.attempt() as attempt:
        attempt.commit(status, {"score": more.get("score"), "reason": "loss is NaN"}, [])
    return stage.path


def test_a_run_reads_as_arms_seeds_and_groups(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", {})
    for seed in (0, 1):
        make_stage(run, "sft", seed, [verdict("a", [True, False]), verdict("a", [True]), verdict("b", [False], "own")])
        path = make_stage(run, "ppo", seed, [verdict("a", [True])], "ok" if seed else "diverged")
        write_result(path / "eval", {**SUMMARY, "model": "some path", "seed": None}, [row("1", 1.0)])
    found = read_results(tmp_path / "run", arms=stages_by_arm)
    assert {(each.model, each.seed) for each in found} == {("SFT", 0), ("SFT", 1), ("SRPPO", 1)}
    unseen = next(each for each in found if each.model == "SFT" and each.task == "unseen")
    assert unseen.metric == "accuracy" and unseen.group == "unseen" and unseen.scores == (0.5, 1.0)
    assert unseen.items[0].startswith("copy: a #") and unseen.items[1] == f"{unseen.items[0]} (2)"
    assert {each.task for each in found if each.model == "SRPPO"} == {"unseen", "t"}
    assert [each.metric for each in read_results(tmp_path / "run", "acc", stages_by_arm)] == ["acc"]


def test_tasks_are_the_units_of_a_group_of_several(tmp_path: Path) -> None:
    """Not where all items are of one task; an item whose task is but its group's name stands alone."""
    rows = [verdict(f"{name} {i}", [True]) | {"task": name} for name in ("copy", "sort", "unseen") for i in range(2)]
    run = Run.open(tmp_path / "run", {})
    make_stage(run, "sft", 0, [*rows, *(row | {"group": "own", "task": "copy"} for row in rows)])
    several, one = read_results(tmp_path / "run", arms=stages_by_arm)[:2]
    assert (several.task, several.unit, one.task, one.clusters) == ("unseen", "tasks", "own", None)
    assert several.clusters == ("copy", "copy", "sort", "sort", *several.items[4:])
    assert task_units(["a", "b"], ["t", "u"], "g") is None, "every item is its own task anyway"
    folder = write_result(tmp_path, {**SUMMARY, "cluster": "task"}, [row("1", 1.0, cluster="x")])
    assert read_result(folder).unit == "tasks", "of srppo eval too"


def test_a_runs_own_answers_say_how_they_were_asked(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", {})
    make_stage(run, "sft", 0, [verdict("a", [True])], max_new_tokens=8, data={"system": "Be brief.", "size": 3})
    assert {tuple(each.settings.items()) for each in read_results(tmp_path / "run", arms=stages_by_arm)} == {
        (("rollout.max_new_tokens", 8), ("data.system", "Be brief."))
    }
    folder = write_result(
        tmp_path, {**SUMMARY, "generation": {"until": ["Q:"]}, "metrics": {"acc": 1.0}}, [row("1", 1.0)]
    )
    settings = read_result(folder).settings
    assert settings["generation.until"] == ["Q:"] and not any("metrics" in name for name in settings)


def test_an_empty_run_says_so(tmp_path: Path) -> None:
    Run.open(tmp_path / "run", {}).stage("sft", {"seed": 0})
    with pytest.raises(RecordError, match="no evaluated stage yet"):
        read_results(tmp_path / "run", arms=stages_by_arm)


def test_three_equal_questions_have_three_names(tmp_path: Path) -> None:
    run = Run.open(tmp_path / "run", {})
    make_stage(run, "sft", 0, [verdict("a", [True])] * 3)
    (greedy, sampled) = read_results(tmp_path / "run", arms=stages_by_arm)
    assert isinstance(greedy, TaskResult) and len(set(greedy.items)) == 3 and greedy.items == sampled.items
