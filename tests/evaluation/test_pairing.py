"""From `srppo eval` to `srppo compare`: results that were made otherwise are told by what their summaries hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness_cases import WORDS, choice_task, evaluate, samples, summary, tiny_model, write_task
from worlds import write_rows

from srppo.errors import DataError
from srppo.evaluation.comparison import Comparison, compare
from srppo.evaluation.harness.scores import figures
from srppo.report.comparison import arms_of

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


def compared(folder: Path) -> Comparison:
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
