"""Evaluation: the same scores as lm-eval's own call, results that are never stale, samples that repeat."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from harness_cases import (
    WORDS,
    choice_task,
    evaluate,
    reference,
    rolling_task,
    samples,
    summary,
    tiny_model,
    write_task,
)
from safetensors.torch import load_file, save_file
from worlds import byte_llama, save_model, write_rows

from srppo.config import ModelConfig, load_recipe, resolved
from srppo.errors import OutOfMemory
from srppo.evaluation.development import answer_items
from srppo.evaluation.harness import answering
from srppo.evaluation.harness.answering import Decoding, decode
from srppo.evaluation.harness.model import how_asked
from srppo.evaluation.items import load_items
from srppo.evaluation.results import read_result
from srppo.models.loading import load_model, load_tokenizer
from srppo.models.memory import MOST
from srppo.world.tasks import REPORTED

SHOTS = {"fewshot_split": "test", "num_fewshot": 2}
PLAIN: dict[str, Any] = {"chat_template": False}
TEMPLATE = (
    "{% for m in messages %}{% if loop.index0 % 2 != (m['role'] == 'assistant') %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<' + m['role'] + '> ' + m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}a{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    write_task(tmp_path / "tasks", "letters")
    write_task(tmp_path / "tasks", "shots", **SHOTS)
    rolling_task(tmp_path / "tasks")
    choice_task(tmp_path / "tasks", "long", doc_to_choice=["a" * 20, "b" * 110, "c a " * 8], **SHOTS)  # context: 128
    return choice_task(tmp_path / "tasks", "pick")


@pytest.mark.parametrize("templated", [False, True], ids=["plain", "template"])
@pytest.mark.parametrize("task", ["letters", "shots", "pick", "long", "rolling"])
def test_scores_are_those_of_lm_evals_own_call(
    model: Path, tasks: Path, tmp_path: Path, task: str, templated: bool
) -> None:
    if templated:
        model = _copy_with_template(model, tmp_path / "templated", TEMPLATE)
    theirs = reference(model, tasks, task, apply_chat_template=templated)
    options: dict[str, Any] = {"include_path": [tasks], "batch_size": 3, "chat_template": templated}
    (path,), _ = evaluate(model, tmp_path / "out", task, **options)
    ours = summary(path)["metrics"]
    compared = [name for name in theirs["results"][task] if "," in name and "stderr" not in name]
    assert compared
    for name in compared:
        assert ours[name.partition(",")[0]]["value"] == pytest.approx(theirs["results"][task][name], rel=1e-5)
    logged = theirs["samples"][task]
    assert [row["item"] for row in samples(path)] == [each["doc_hash"] for each in logged]
    if task in ("letters", "shots"):
        responses = [each["resps"][0][0] for each in logged]
        assert len(set(responses)) > 1
        assert task == "shots" or templated or theirs["results"][task]["exact_match,none"] > 0
        assert [row["response"] for row in samples(path)] == responses
        assert [row["prompt"] for row in samples(path)] == [each["arguments"][0][0] for each in logged]
    assert read_result(path).items == tuple(each["doc_hash"] for each in logged)


@pytest.mark.parametrize(("base", "suite"), [("embedded:xs", "embedded"), ("embedded:long-xs", "embedded_long")])
def test_the_embedded_suites_are_what_training_measures(base: str, suite: str, tmp_path: Path) -> None:
    recipe = resolved(load_recipe(None, [f"model.base={base}"]))
    lm, tokenizer = load_model(base, ModelConfig()), load_tokenizer(base, ModelConfig())
    tokenizer.chat_template = "{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"
    verdicts = answer_items(lm, tokenizer, load_items(recipe, "test"), recipe, samples=None, stops=[0])
    paths, said = evaluate(base, tmp_path, suite=suite)
    assert f"{suite}_unseen" in said
    for path, group in zip(paths, REPORTED, strict=True):
        own = [v for v in verdicts if v.group == group]
        rows = samples(path)
        assert [row["exact_match"] for row in rows] == [float(v.correct[0]) for v in own]
        assert [row["response"] for row in rows] == [v.responses[0] for v in own]
        assert summary(path)["metrics"]["exact_match"]["value"] == pytest.approx(np.mean([v.correct[0] for v in own]))
        assert summary(path)["group"] == suite


def test_samples_repeat_and_depend_on_the_seed_and_the_prompt_alone(model: Path, tasks: Path, tmp_path: Path) -> None:
    def drawn(name: str, **options: Any) -> dict[tuple[str, int], str]:
        torch.manual_seed(len(name))  # no global state may matter
        (path,), _ = evaluate(model, tmp_path / name, "letters", include_path=[tasks], samples=3, **options, **PLAIN)
        return {(row["item"], row["sample"]): row["response"] for row in samples(path)}

    first = drawn("a")
    assert len(first) == 3 * 14
    assert first == drawn("bb", batch_size=4)
    part = drawn("ccc", limit=5)
    assert len(part) == 15 and part.items() <= first.items()
    other = drawn("dddd", seed=1)
    assert sum(first[key] != other[key] for key in first) > 5
    by_draw = [[first[key] for key in first if key[1] == draw] for draw in range(3)]
    assert by_draw[0] != by_draw[1] != by_draw[2]


def test_samples_do_not_depend_on_the_prompts_before(model: Path, tmp_path: Path) -> None:
    drawn = []
    for words in (WORDS, WORDS[5:]):
        rows = [{"q": f"Name {word}", "a": "a"} for word in words]
        tasks = write_task(tmp_path / str(len(words)), "letters")
        write_rows(tasks / "rows.jsonl", rows)
        (path,), _ = evaluate(model, tmp_path / "out", "letters", include_path=[tasks], samples=4, **PLAIN)
        drawn.append({(row["item"], row["sample"]): row["response"] for row in samples(path)})
    whole, part = drawn
    assert len(part) == 4 * 9 and part.items() <= whole.items() and len(set(part.values())) > 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampled_tokens_have_the_models_distribution(tmp_path: Path, temperature: float) -> None:
    model = str(save_model(tmp_path, byte_llama(0)))
    lm, tokenizer = load_model(model, ModelConfig()), load_tokenizer(model, ModelConfig())
    prompt = tokenizer("Name bac:")["input_ids"]
    how, count = Decoding(1, temperature=temperature), 4000
    rows = decode(lm, tokenizer, [prompt] * count, range(count), how, stop_ids=[300])
    logits_V = lm.model(input_ids=torch.tensor([prompt])).logits[0, -1].detach()
    expected = (logits_V.double() / temperature).softmax(-1) * count
    found = Counter(row[0] for row in rows)
    likely = [token for token in range(len(expected)) if expected[token] >= 10]
    assert len(likely) >= 3
    for token in likely:
        assert abs(found[token] - float(expected[token])) < 5 * float(expected[token]) ** 0.5


def test_greedy_decoding_stops_at_texts_and_leaves_the_global_state(model: Path) -> None:
    lm, tokenizer = load_model(str(model), ModelConfig()), load_tokenizer(str(model), ModelConfig())
    prompts = [tokenizer(text)["input_ids"] for text in ("Name aca:", "Name cab:", "b")]
    before = torch.random.get_rng_state()
    whole = [tokenizer.decode(row) for row in decode(lm, tokenizer, prompts, [0] * 3, Decoding(20), stop_ids=[256])]
    cut = decode(lm, tokenizer, prompts, [0] * 3, Decoding(20, until=("b c",)), stop_ids=[256])
    assert any("b c" in text for text in whole)
    for text, row in zip(whole, cut, strict=True):
        assert tokenizer.decode(row).split("b c")[0] == text.split("b c")[0]
    assert len(tokenizer.decode(cut[1])) < len(whole[1]) or "b c" not in whole[1]
    assert torch.equal(before, torch.random.get_rng_state())


def _no_model(*_: Any, **__: Any) -> Any:
    raise AssertionError("a model was loaded")


def test_a_known_result_is_found_without_loading_the_model(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"include_path": [tasks], **PLAIN}
    paths, _ = evaluate(model, tmp_path / "out", "letters", "pick", **options)
    monkeypatch.setattr(answering, "load_model", _no_model)
    again, said = evaluate(model, tmp_path / "out", "letters,pick", seed=7, **options)  # greedy: no seed enters
    assert again == paths and said.count(": known, ") == 2
    monkeypatch.setattr(answering, "load_model", load_model)
    changed = {
        "limit": {"limit": 3},
        "new tokens": {"max_new_tokens": 3},
        "template": {"chat_template": True},
        "samples": {"samples": 1},
        "seed": {"samples": 1, "seed": 1},
        "temperature": {"samples": 1, "temperature": 0.5},
    }
    model_with_template = _copy_with_template(model, tmp_path / "templated")
    plain, _ = evaluate(model_with_template, tmp_path / "out", "letters", **options)
    keys = {paths[0].name, plain[0].name}
    for change in changed.values():
        found, _ = evaluate(model_with_template, tmp_path / "out", "letters", **(options | change))
        keys.add(found[0].name)
    assert len(keys) == 2 + len(changed)


QUESTION = "{% for m in messages %}Q: {{ m['content'] }}\nA:{% endfor %}"


def _copy_with_template(model: Path, to: Path, template: str = QUESTION) -> Path:
    import shutil

    shutil.copytree(model, to)
    (to / "chat_template.jinja").write_text(template)
    return to


def test_changing_one_weight_the_data_or_the_checker_changes_the_key(tmp_path: Path) -> None:
    model, tasks = tiny_model(tmp_path / "m"), write_task(tmp_path / "tasks", "letters")
    (tasks / "check.py").write_text("HELP = 1\n\ndef score(doc, results):\n    return {'exact_match': HELP}\n")
    text = (tasks / "letters.yaml").read_text()
    (tasks / "letters.yaml").write_text(text + "process_results: !function check.score\n")

    def key() -> str:
        (path,), _ = evaluate(model, tmp_path / "out", "letters", include_path=[tasks], limit=4, **PLAIN)
        return path.name

    keys = [key(), key()]
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    keys.append(key())
    (tasks / "check.py").write_text((tasks / "check.py").read_text().replace("HELP = 1", "HELP = 0"))
    keys.append(key())  # the function itself did not change
    rows = (tasks / "rows.jsonl").read_text()
    (tasks / "rows.jsonl").write_text(rows.replace('"Name cab", "a": "a"', '"Name cab", "a": "x"'))
    keys.append(key())
    assert keys[0] == keys[1] and len(set(keys)) == 4


def test_another_process_writes_the_same_file(model: Path, tasks: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path;"
        "from srppo.evaluation.harness.run import EvalOptions, evaluate_command as e;"
        "e(sys.argv[1], EvalOptions(samples=2, chat_template=False), tasks=['letters'],"
        "  include_path=[Path(sys.argv[2])], out=Path(sys.argv[3]))"
    )
    command = [sys.executable, "-c", code, str(model), str(tasks), str(tmp_path / "theirs")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr + done.stdout and "letters" in done.stderr and done.stdout.startswith("results: ")
    (ours,), _ = evaluate(model, tmp_path / "ours", "letters", include_path=[tasks], samples=2, **PLAIN)
    theirs = tmp_path / "theirs" / ours.name
    assert (ours / "samples.parquet").read_bytes() == (theirs / "samples.parquet").read_bytes()


def test_batches_are_the_same_whatever_memory_is_free_and_are_recorded(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import psutil

    recorded = []
    for free in (1 << 10, 1 << 22, 1 << 29):
        memory = SimpleNamespace(total=1 << 20, available=free, free=free)
        monkeypatch.setattr(psutil, "virtual_memory", lambda memory=memory: memory)
        (path,), _ = evaluate(model, tmp_path / str(free), "letters", include_path=[tasks], samples=1, **PLAIN)
        recorded.append(summary(path)["batch_size"])
    assert len(set(recorded)) == 1 and 1 < recorded[0] < MOST
    (path,), _ = evaluate(model, tmp_path / "own", "letters", include_path=[tasks], batch_size=3, samples=1, **PLAIN)
    assert summary(path)["batch_size"] == 3


def test_an_interval_goes_with_lm_evals_own_score(model: Path, tasks: Path, tmp_path: Path) -> None:
    (path,), said = evaluate(model, tmp_path / "out", "letters", include_path=[tasks], samples=4, **PLAIN)
    figure = summary(path)["metrics"]["exact_match"]
    rows = samples(path)
    assert 0 < figure["value"] < 1
    assert figure["n"] == 14 and figure["value"] == pytest.approx(np.mean([row["exact_match"] for row in rows]))
    assert figure["low"] < figure["value"] < figure["high"]
    assert f"{4 * 14} requests in" in said
    assert summary(path)["decoding"] == "sampled" and summary(path)["samples"] == 4


def test_a_batch_that_does_not_fit_is_halved(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (whole,), _ = evaluate(model, tmp_path / "a", "letters", include_path=[tasks], samples=1, **PLAIN)
    sizes = []

    def decode_small(lm: Any, tokenizer: Any, prompts: list[list[int]], *rest: Any, **options: Any) -> list[list[int]]:
        sizes.append(options["rows"])
        if options["rows"] > 4:
            raise OutOfMemory("full")
        return decode(lm, tokenizer, prompts, *rest, **options)

    monkeypatch.setattr("srppo.evaluation.harness.answering.decode", decode_small)
    (halved,), _ = evaluate(model, tmp_path / "b", "letters", include_path=[tasks], samples=1, **PLAIN)
    assert sizes == [14, 7, 3]
    assert samples(whole) == samples(halved)


def test_progress_counts_rows_and_parts_of_rows(model: Path) -> None:
    lm, tokenizer = load_model(str(model), ModelConfig()), load_tokenizer(str(model), ModelConfig())
    prompts = [tokenizer(f"Name {word}:")["input_ids"] for word in WORDS * 4]
    for packs in (True, False):  # all rows in turn, or a padded batch after another
        lm.packs, told = packs, list[float]()
        how = Decoding(20, temperature=1.0)
        rows = decode(lm, tokenizer, prompts, range(len(prompts)), how, stop_ids=[256, 97], rows=16, reach=told.append)
        assert all(0 < before < after for before, after in pairwise(told)) and told[-1] <= len(prompts)
        assert min(map(len, rows)) < 10 and told[-1] > len(prompts) - 16


def test_what_a_task_asks_of_decoding() -> None:
    plain = how_asked({"until": "b", "max_gen_toks": 3}, None, None)
    assert plain == Decoding(3, ("b",)) and plain.temperature is None
    own = how_asked({"do_sample": True, "temperature": 0.2, "top_k": 5, "repetition_penalty": 1.2}, None, None)
    assert own == Decoding(256, (), 0.2, top_k=5, extra={"repetition_penalty": 1.2})
    assert how_asked({"do_sample": False, "temperature": 0.0, "until": []}, 1.0, 7) == Decoding(7, (), 1.0)
