"""What a comparison takes and pairs: results that were made otherwise are told, by what `srppo eval` writes of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from harness_cases import WORDS, choice_task, evaluate, samples, summary, tiny_model, write_task
from worlds import write_rows

from srppo.errors import DataError
from srppo.evaluation.comparison import ComparisonResult, compare
from srppo.evaluation.harness.scores import figures
from srppo.evaluation.pairing import made_alike
from srppo.evaluation.results import TaskResult, question_name, read_result, write_result
from srppo.report.comparison import arms_of
from srppo.world.items import items
from srppo.world.tasks import REPORTED

TEMPLATE = "{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"
EXAMPLES: dict[str, Any] = {"fewshot_config": {"samples": [{"q": f"Name {w}", "a": "a", "label": 0} for w in WORDS]}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models with a chat template."""
    folder = tmp_path_factory.mktemp("models")
    both = tiny_model(folder / "one"), tiny_model(folder / "two", seed=1)
    for model in both:
        (model / "chat_template.jinja").write_text(TEMPLATE)
    return both


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    return write_task(tmp_path / "tasks", "letters", num_fewshot=1, **EXAMPLES)


def compared(folder: Path) -> ComparisonResult:
    return compare(arms_of([folder / "one", folder / "two"])[0])


SAMPLED = {"samples": 2}
UNLIKE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "template": ({}, {"chat_template": False}, "chat template: yes and no"),
    "shots": ({}, {"num_fewshot": 2}, "few-shot examples: 1 and 2"),
    "shots drawn": ({}, {"seed": 1}, "seed of the few-shot examples: 1234 and 1235"),
    "length": ({}, {"max_new_tokens": 5}, "new tokens at most: 12 and 5"),
    "temperature": (SAMPLED, SAMPLED | {"temperature": 0.5}, "temperature: 1.0 and 0.5"),
}


@pytest.mark.parametrize("case", UNLIKE)
def test_options_that_ask_otherwise_are_refused(
    models: tuple[Path, Path], tasks: Path, tmp_path: Path, case: str
) -> None:
    first, second, words = UNLIKE[case]
    for model, options in zip(models, (first, second), strict=True):
        evaluate(model, tmp_path / model.name, "letters", include_path=[tasks], **options)
    with pytest.raises(DataError) as caught:
        compared(tmp_path)
    line = str(caught.value)
    assert words in line and line.count(": ") == 2 and "/one/letters@" in line and "/two/letters@" in line


def test_options_that_ask_the_same_are_compared(models: tuple[Path, Path], tasks: Path, tmp_path: Path) -> None:
    """A batch size, more samples, a limit that names the task's own, and fewer items: compared, and said."""
    one, two = models
    evaluate(one, tmp_path / "one", "letters", include_path=[tasks], batch_size=3, samples=2)
    evaluate(two, tmp_path / "two", "letters", include_path=[tasks], samples=3, limit=9, max_new_tokens=12)
    (found,) = compared(tmp_path).differences
    assert found.difference.n == 9 and [len(each) for each in found.left_out.values()] == [5]
    assert found.notes[0].startswith("results differ in samples a prompt (2, 3), batch size (3, ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"doc_to_text": "Q: {{q}}:"}, "the task's YAML or code"),
        ({"metadata": {"version": 2}}, "version of the task: 1 and 2"),
        (
            {"generation_kwargs": {"until": ["c"], "max_gen_toks": 12, "do_sample": False}},
            "stop texts: ['b'] and ['c']",
        ),
    ],
)
def test_a_task_that_was_edited_is_refused(
    models: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    for model, config in zip(models, ({}, change), strict=True):
        tasks = write_task(tmp_path / f"tasks-{model.name}", "letters", **config)
        evaluate(model, tmp_path / model.name, "letters", include_path=[tasks])
    with pytest.raises(DataError) as caught:
        compared(tmp_path)
    assert words in str(caught.value) and "; make both with one file of the task" in str(caught.value)


def test_the_same_task_from_another_folder_is_the_same(models: tuple[Path, Path], tmp_path: Path) -> None:
    for model in models:
        tasks = choice_task(tmp_path / f"tasks-{model.name}", "pick")
        (path,), _ = evaluate(model, tmp_path / model.name, "pick", include_path=[tasks])
        assert summary(path)["generation"] is None and summary(path)["fewshot_seed"] is None
    (found,) = compared(tmp_path).differences
    assert found.difference.n == 14 and found.notes == () and found.left_out == {}


@pytest.mark.parametrize("way", ["option", "metadata"])
def test_items_of_one_cluster_are_one_unit(models: tuple[Path, Path], tmp_path: Path, way: str) -> None:
    named = {"metadata": {"version": 1, "cluster": "passage"}} if way == "metadata" else {}
    options: dict[str, Any] = {"cluster": "passage"} if way == "option" else {}
    tasks = write_task(tmp_path / "tasks", "letters", doc_to_text="{{ q * 30 if n == 4 else q }}:", **named)
    rows = [{"q": f"Name {w}", "a": "a", "passage": f"p{i // 5}", "n": i} for i, w in enumerate(WORDS)]
    write_rows(tasks / "rows.jsonl", rows)
    for model in models:
        place = tmp_path / model.name
        (path,), _ = evaluate(model, place, "letters", include_path=[tasks], score_rest=True, samples=8, **options)
        by_item = {row["prompt"]: row["cluster"] for row in samples(path)}
        assert list(by_item.values()) == ["p0"] * 4 + ["p1"] * 5 + ["p2"] * 4 + ["p0"]  # the last: not scored
        assert summary(path)["cluster"] == "passage" and summary(path)["metrics"]["exact_match"]["n"] == 13
    (found,) = compared(tmp_path).differences
    assert found.clusters == 3 and found.difference.n == 13 and "clusters" in found.test
    if way == "option":
        (path,), _ = evaluate(models[0], tmp_path / "plain", "letters", include_path=[tasks], score_rest=True)
        assert "cluster" not in samples(path)[0], "and a result without clusters is another"
        with pytest.raises(DataError, match=r"14 of 14 items, the first 0, have no 'page' .* q, a, passage, n: name"):
            evaluate(models[0], tmp_path / "x", "letters", include_path=[tasks], score_rest=True, cluster="page")


def test_an_interval_is_over_clusters() -> None:
    """Ten clusters of five equal items know as much as ten items: the interval is wider by sqrt(5), and by what t of 9
    degrees of freedom is wider than a normal distribution (1.15)."""
    rows = [{"item": str(i), "acc": float(i // 5 % 2), "cluster": str(i // 5)} for i in range(50)]
    alone = [{key: value for key, value in row.items() if key != "cluster"} for row in rows]
    wide, narrow = (figures(each, [{"acc,none": 0.5}])["acc"] for each in (rows, alone))
    assert wide["n"] == narrow["n"] == 50 and wide["value"] == 0.5
    half = 2.262 * (0.25 / 9) ** 0.5  # t of 9 degrees, and the variance of ten clusters that are 0 or 1
    assert (wide["low"], wide["high"]) == pytest.approx((0.5 - half, 0.5 + half), abs=0.01)
    assert narrow["high"] - narrow["low"] < (wide["high"] - wide["low"]) / 5**0.5


def test_another_system_message_is_told(models: tuple[Path, Path], tasks: Path, tmp_path: Path) -> None:
    for model, system in zip(models, ("Be brief.", None), strict=True):
        evaluate(model, tmp_path / model.name, "letters", include_path=[tasks], system=system)
    with pytest.raises(DataError, match=r"system message: Be brief\. and none\); make both with the same --system"):
        compared(tmp_path)


# ---- which of several results a comparison takes: no question twice, and one way of asking for all

RNG = np.random.default_rng(0)


def of_task(task: str, model: str, names: Sequence[str], seed: int | None = 0, **more: Any) -> TaskResult:
    scores = tuple((RNG.random(len(names)) < (0.8 if model == "B" else 0.3)).astype(float))
    fields: dict[str, Any] = {"decoding": "greedy", "metric": "m", "clusters": None, "group": None, "path": Path(model)}
    return TaskResult(model=model, task=task, seed=seed, items=tuple(names), scores=scores, **(fields | more))


def own_and_suite(limit: int | None = None, models: str = "AB") -> dict[str, list[TaskResult]]:
    """Results as a run has them after `srppo eval RUN --suite embedded`."""
    arms: dict[str, list[TaskResult]] = {"A": [], "B": []}
    for group in REPORTED:
        asked = [question_name(each.task, each.prompt, each.answer) for each in items(group, "test")]
        hashes = [f"{i:064x}" for i in range(len(asked))][:limit]
        for name, results in arms.items():
            results.append(of_task(group, name, asked, group=group))
            if name in models:
                results.append(of_task(f"embedded_{group}", name, hashes, group="embedded"))
    return arms


def test_the_embedded_suite_and_a_runs_own_tests_count_once() -> None:
    found = compare(own_and_suite())
    assert [each.task for each in found.differences] == [f"embedded_{group}" for group in REPORTED]
    assert {each.comparisons for each in found.differences} == {4}, "Holm over four questions, not eight"
    assert [each.tasks for each in found.aggregates] == [tuple(f"embedded_{group}" for group in REPORTED)]
    assert "demonstrated (greedy) is left out: embedded_demonstrated asks the same questions, and each counts once" in (
        found.notes
    )


@pytest.mark.parametrize("arms", [own_and_suite(limit=10), own_and_suite(models="B")], ids=["limit", "one arm alone"])
def test_the_fuller_of_both_stays(arms: dict[str, list[TaskResult]]) -> None:
    assert [each.task for each in compare(arms).differences] == list(REPORTED)


def test_a_test_of_that_name_on_other_items_is_no_repeat() -> None:
    arms = {name: [of_task("unseen", name, ["mine"]), of_task("embedded_unseen", name, ["0"])] for name in "AB"}
    assert made_alike(arms) == (arms, [])


def sampled(model: str, seed: int, *, samples: int, eval_seed: int = 0, count: int = 20, **more: Any) -> TaskResult:
    settings = {"samples": samples, "eval_seed": eval_seed, "num_fewshot": 0} | more.pop("settings", {})
    names = [f"i{i}" for i in range(count)]
    return of_task("t", model, names, seed, decoding="sampled", settings=settings, **more)


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
    with pytest.raises(DataError, match=r"were made in ways that cannot be compared \(few-shot examples: [01] and 5\)"):
        compare(arms)
