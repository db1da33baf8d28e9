"""What is refused, mended or said before the first token: metrics, places, weights, arms, sweeps, damage, versions."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest
from harness_cases import WORDS, choice_task, evaluate, samples, summary, tiny_model, write_task
from typer.testing import CliRunner
from worlds import make_world, run_world, write_rows

from srppo.ablations.spec import Ablation, Analysis, Arm, Sweep
from srppo.analysis import score
from srppo.cli import app as cli
from srppo.config import build_recipe
from srppo.errors import UserError
from srppo.evaluation.harness import answering
from srppo.evaluation.harness.guards import restate
from srppo.evaluation.results import read_results
from srppo.models import pair
from srppo.record.store import Run

ALTERNATING = (
    "{% for m in messages %}{% if loop.index0 % 2 != (m['role'] == 'assistant') %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def _no_model(*_: Any, **__: Any) -> Any:
    raise AssertionError("a model was loaded")


@pytest.fixture
def no_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (answering, pair):
        monkeypatch.setattr(module, "load_model", _no_model)
    monkeypatch.setattr("srppo.data.hub.reachable", lambda: False)


def refused(*args: Any, **options: Any) -> str:
    """The one line with which an evaluation is refused."""
    with pytest.raises(UserError) as caught:
        evaluate(*args, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("no_generation")
@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        (["mcc"], ["mcc (its metrics) have a value for the whole set alone", "add one such as acc"]),
        (["acc", "f1"], ["its metric f1 cannot be summed up", "multiclass", "take it out"]),
    ],
)
def test_metrics_that_cannot_be_used(model: Path, tmp_path: Path, metrics: list[str], words: list[str]) -> None:
    named = [{"metric": metric} for metric in metrics]
    tasks = choice_task(
        tmp_path / "tasks", metric_list=named, doc_to_target="{{label % 2}}"
    )  # the third is never right
    line = refused(model, tmp_path / "out", "pick", include_path=[tasks])
    assert all(word in line for word in words)


def test_a_metric_of_the_whole_set_beside_one_of_items(model: Path, tmp_path: Path) -> None:
    metrics = [{"metric": metric} for metric in ("f1", "acc")]
    choices = {"doc_to_choice": ["a", "bb"], "doc_to_target": "{{label % 2}}"}
    tasks = choice_task(tmp_path / "tasks", metric_list=metrics, **choices)
    (path,), _ = evaluate(model, tmp_path / "out", "pick", include_path=[tasks])
    assert summary(path)["metric"] == "acc" and set(summary(path)["metrics"]) == {"f1", "acc"}
    assert summary(path)["metrics"]["f1"]["low"] is None


def test_a_checker_that_fails_late_is_one_line(model: Path, tmp_path: Path) -> None:
    tasks = write_task(tmp_path / "tasks", "letters")
    (tasks / "late.py").write_text(
        "def score(doc, results):\n"
        "    if doc['q'].endswith('bab'):\n        raise RuntimeError('no verdict')\n"
        "    return {'exact_match': 1.0}\n"
    )
    with (tasks / "letters.yaml").open("a") as file:
        file.write("process_results: !function late.score\n")
    line = refused(model, tmp_path / "out", "letters", include_path=[tasks])
    assert line == "task letters cannot be scored: RuntimeError: no verdict"


@pytest.mark.usefixtures("no_generation")
def test_a_template_that_refuses_the_turns_of_examples(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny")
    (model / "chat_template.jinja").write_text(ALTERNATING)
    examples = {"samples": [{"q": f"Name {word}", "a": ""} for word in WORDS]}  # no answer, no turn of the assistant
    tasks = write_task(tmp_path / "tasks", "letters", num_fewshot=2, fewshot_config=examples)
    line = refused(model, tmp_path / "out", "letters", include_path=[tasks])
    assert line.startswith("task letters: the chat template refuses a prompt (roles must alternate)")
    assert "--no-chat-template, or --num-fewshot 0" in line


@pytest.mark.usefixtures("no_generation")
@pytest.mark.parametrize("command", ["eval", "compare", "score", "forecast"])
def test_a_place_that_cannot_be_written(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score, "load_pair", _no_model)
    monkeypatch.setattr("srppo.report.comparison.read_results", _no_model)
    (tmp_path / "afile").touch()
    closed = tmp_path / "closed"
    closed.mkdir()
    argument = {"eval": ["embedded:xs"], "compare": [str(tmp_path)]}.get(command, [])
    places = [tmp_path / "afile/x", tmp_path / "afile", closed / "x"]
    closed.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        can_all = _writable(closed)  # as root
        for place in places[: 2 if can_all else 3]:
            done = CliRunner().invoke(cli.app, [command, *argument, "--out", str(place)])
            assert isinstance(done.exception, UserError), done.exception
            assert str(place) in str(done.exception) and "give --out another folder" in str(done.exception)
    finally:
        closed.chmod(stat.S_IRWXU)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["afile", "closed"], "nothing is left behind"


def _writable(folder: Path) -> bool:
    try:
        (folder / "try").touch()
        (folder / "try").unlink()
    except OSError:
        return False
    return True


def a_run(folder: Path, base: Path, *kinds: str, seeds: tuple[int, ...] = (0,), **recipe: Any) -> Run:
    """A finished run with a model for each kind but base and those that decode; only "ppo" of seed 1 is unfinished."""
    run = Run.open(folder, {"recipe": {"model": {"base": str(base)}} | recipe, "seeds": list(seeds)})
    for kind in kinds:
        for seed in seeds:
            with run.stage(kind, {"seed": seed}).attempt({}) as attempt:
                if kind in ("sft", "ppo"):
                    attempt.publish("model", lambda to, seed=seed: tiny_model(to, seed + 1))  # type: ignore[misc]
                if (kind, seed) != ("ppo", 1):
                    attempt.commit("ok", {"score": None})
    return run


@pytest.mark.usefixtures("no_generation")
def test_weights_of_the_last_arm_are_checked_first(model: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", model, "base", "sft", "ppo")
    tasks = write_task(tmp_path / "tasks", "letters")
    (weights,) = next(s for s in run.stages() if s.identity["kind"] == "ppo").path.glob("model/*.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-100])
    line = refused(run.path, None, "letters", include_path=[tasks])
    assert str(weights.parent) in line and "is damaged: model.safetensors" in line
    weights.with_name("model.safetensors.index.json").write_text('{"weight_map": {"a": "part-2.safetensors"}}')
    weights.write_bytes(content)
    assert "part-2.safetensors is missing" in refused(run.path, None, "letters", include_path=[tasks])


def test_a_given_sft_model_is_an_arm_and_arms_left_out_are_named(model: Path, tmp_path: Path) -> None:
    sft = tiny_model(tmp_path / "sft", seed=5)
    recipe = {"model": {"base": str(model), "sft": str(sft)}}
    run = a_run(tmp_path / "run", model, "base", "given-sft", "ppo", "best-of-n", seeds=(0, 1), **recipe)
    tasks = write_task(tmp_path / "tasks", "letters")
    paths, said = evaluate(run.path, tmp_path / "out", "letters", include_path=[tasks], limit=2)
    assert [(summary(path)["model"], summary(path)["seed"]) for path in paths] == [
        ("base", 0), ("base", 1), ("SFT", 0), ("SFT", 1), ("SRPPO", 0),
    ]  # fmt: skip
    assert summary(paths[2])["spec"] == str(sft) and summary(paths[2])["weights"] == summary(paths[3])["weights"]
    assert "not evaluated, SRPPO: seed 1 is not finished" in said
    assert said.count("not evaluated, best-of-n: it has no model of its own") == 1


@pytest.mark.parametrize("file", ["samples.parquet", "summary.json", "manifest.json"])
def test_a_damaged_result_is_made_again(model: Path, tmp_path: Path, file: str) -> None:
    tasks = write_task(tmp_path / "tasks", "letters")
    options: dict[str, Any] = {"include_path": [tasks], "limit": 3}
    (path,), _ = evaluate(model, tmp_path / "out", "letters", **options)
    before = samples(path)
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError):
        read_results(tmp_path / "out")
    (again,), said = evaluate(model, tmp_path / "out", "letters", **options)
    assert again == path and "; it is evaluated again" in said and ": known" not in said
    assert samples(path) == before and len(read_results(tmp_path / "out")) == 1


@pytest.mark.usefixtures("no_generation")
@pytest.mark.parametrize("command", ["eval", "compare", "score", "forecast"])
def test_a_sweep_is_refused(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    sweep = Sweep(
        "s",
        "?",
        build_recipe({}),
        (),
        (Ablation("p", {}),),
        (Arm("SFT", "sft"),),
        (0,),
        Analysis("unseen", "greedy", ()),
    )
    Run.open(Path("runs/swept"), sweep.as_spec())
    done = CliRunner().invoke(cli.app, [command, "runs/swept"])
    assert isinstance(done.exception, UserError), done.exception
    assert "runs/swept is a sweep" in str(done.exception) and "srppo report runs/swept" in str(done.exception)
    assert "runs/swept/stages/<id>/model" in str(done.exception)
    if command != "compare":  # nor is it taken for the newest run
        done = CliRunner().invoke(cli.app, [command, *(["--include-path", "none"] if command == "eval" else [])])
        assert isinstance(done.exception, UserError) and "is a sweep" not in str(done.exception), done.exception


def test_prompts_not_scored_are_all_in_a_file(model: Path, tmp_path: Path) -> None:
    lengthened = "{{ q * 25 ~ ' ' * label if label else q }}"
    tasks = write_task(tmp_path / "tasks", "letters", doc_to_text=lengthened)
    (path,), said = evaluate(model, tmp_path / "out", "letters", include_path=[tasks], score_rest=True)
    listed = path.with_name(f"{path.name}.not-scored.jsonl")
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    left_out = [row for row in samples(path) if row["not_scored"]]
    assert rows == [{"item": r["item"], "reason": r["not_scored"], "prompt": r["prompt"]} for r in left_out]
    assert len(rows) == 9 and len({row["reason"] for row in rows}) == 2
    assert listed.name in "".join(said.split()) and len(read_results(tmp_path / "out")) == 1


@pytest.mark.usefixtures("no_generation")
def test_all_problems_of_all_tasks_are_said_together(model: Path, tmp_path: Path) -> None:
    write_task(tmp_path / "tasks", "away", dataset_path="nobody/nothing", dataset_kwargs=None)
    write_task(tmp_path / "tasks", "split", test_split="exam")
    tasks = write_task(tmp_path / "tasks", "good")
    write_task(tmp_path / "tasks", "long", doc_to_text="{{q}}" * 20)
    (tmp_path / "afile").touch()
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"none")
    line = refused(broken, tmp_path / "afile", "away,good,long,split", include_path=[tasks])
    begins = (
        f"5 problems: (1) {tmp_path / 'afile'} is a file",
        "(2) model",
        "(3) task away",
        "(4) task split",
        "(5) task long: 14 prompts",
    )
    assert line.startswith(begins[0]) and all(f"; {each}" in line for each in begins[1:])


@pytest.mark.usefixtures("no_generation")
def test_how_many_prompts_fit_with_fewer_examples(model: Path, tmp_path: Path) -> None:
    examples = {"samples": [{"q": "Name this word, please: " + word, "a": word} for word in WORDS]}
    config = {"fewshot_config": examples, "num_fewshot": 4}
    tasks = write_task(tmp_path / "tasks", "letters", **config)
    line = refused(model, tmp_path / "out", "letters", include_path=[tasks], chat_template=False)
    assert "14 prompts do not fit" in line and "--num-fewshot 3 (then all 14 fit), or --score-rest" in line
    tasks = write_task(tmp_path / "tasks", "letters", **config, doc_to_text="{{ q * 20 if q[-1] == 'b' else q }}")
    line = refused(model, tmp_path / "out", "letters", include_path=[tasks], chat_template=False)
    assert "--num-fewshot 0 (then 9 of 14 fit)" in line


def test_what_is_said_of_packages() -> None:
    def said(statement: str) -> str:
        try:
            exec(statement)
        except ImportError as error:
            return restate("t", error, {})
        raise AssertionError(statement)

    import transformers

    there = f"task t does not go with the installed transformers {transformers.__version__} "
    assert said("import transformers.data.no_such").startswith(there)
    assert said("from transformers import no_such").startswith(there)
    assert said("import no_such.part") == "task t needs the package no_such: pip install no_such"
    hint = RuntimeError("`lm_eval[math]` is missing: pip install lm_eval[math]")
    assert restate("t", hint, {}).endswith("pip install lm_eval[math]")


def test_a_run_is_asked_with_the_system_message_it_was_trained_with(tmp_path: Path) -> None:
    (tmp_path / "world").mkdir()
    world = make_world(tmp_path / "world")
    run_world(world.recipe({"data.system": "Be brief."}), tmp_path / "run", ppo=False)
    rows = [
        {"q": row["prompt"], "a": row["answer"]} for row in map(json.loads, Path(world.items).read_text().splitlines())
    ]
    tasks = write_task(tmp_path / "tasks", "letters", doc_to_text="{{q}}")
    write_rows(tasks / "rows.jsonl", rows)

    def asked(**options: Any) -> tuple[Path, set[str]]:
        paths, _ = evaluate(tmp_path / "run", tmp_path / "out", "letters", include_path=[tasks], **options)
        assert len(paths) == 2
        return paths[1], {row["prompt"].partition("Name")[0] for row in samples(paths[1])}

    path, begins = asked()
    assert begins == {"Be brief.\n\nQ: "} and summary(path)["system"] == "Be brief."
    bare, begins = asked(system="")
    assert begins == {"Q: "} and summary(bare)["system"] is None and bare.name != path.name
    other, begins = asked(system="Take care.")
    assert begins == {"Take care.\n\nQ: "} and len({path.name, bare.name, other.name}) == 3
    plain, begins = asked(chat_template=False)
    assert begins == {""} and summary(plain)["system"] is None
