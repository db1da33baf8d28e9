"""Noise in demonstrations: who is noised, with what, and that nothing else moves; shares of overlap; prompt groups."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import get_args

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from srppo.config import DataConfig, Recipe, canonical_json, recipe_warnings, with_overrides
from srppo.console import Console
from srppo.data.noise import Noise, add_noise, differs, near_miss, task_of, truncated
from srppo.data.order import prompt_text
from srppo.data.prepare import PreparedData, prepare
from srppo.data.rows import load_demonstrations, load_prompts
from srppo.data.sources import EMBEDDED_ROWS
from srppo.data.types import Demonstration, EncodedDemonstration, Message
from srppo.errors import ConfigError, DataError, UserError
from srppo.models.language_model import LanguageModel
from srppo.stages.kinds import stage_settings
from srppo.stages.run import prepare_run, sample_texts
from srppo.world import base_path
from srppo.world.items import answers_of_other_tasks, demonstrations, items, prompts, read_question
from srppo.world.tasks import GROUPS, TASKS, bucket
from srppo.world.tokenizer import load_tokenizer

KINDS = tuple(kind for kind in get_args(DataConfig.model_fields["noise"].annotation) if kind != "none")
ENCODED = EncodedDemonstration((1, 2), 1)
EMBEDDED = load_demonstrations(["embedded"], seed=0).rows
RATES = (0.0, 0.1, 0.3, 0.5, 0.7, 1.0)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(base_path("xs"))


def ask(rows: Sequence[Demonstration], seed: int) -> list[str | None]:
    """A base that is right now and then, says nothing now and then, and mostly talks."""
    random = Random(seed)
    return [random.choice([row.answer, " ", *[f"well , {random.random()}"] * 8]) for row in rows]


def noised(rows: list[Demonstration], kind: str, rate: float, seed: int = 0) -> Noise:
    return add_noise(rows, kind, rate, seed, encode=lambda row, answer: ENCODED, ask=ask)


def answers(noise: Noise) -> dict[int, str]:
    return {position: answer for position, (answer, _) in noise.changes.items()}


def row(answer: str, place: int = 1, task: str = "", prompt: str = "do it") -> Demonstration:
    return Demonstration((Message("user", prompt),), answer, f"a.jsonl:{place}", task)


def write(folder: Path, name: str, rows: Sequence[Mapping[str, object]]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- the mask


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), start=st.integers(0, 200), n=st.integers(12, 60))
def test_masks_are_exact_and_nested_with_the_same_answers(kind: str, seed: int, start: int, n: int) -> None:
    rows = list(EMBEDDED[start : start + n])
    assume(min(Counter(map(task_of, rows)).values()) > 1)
    runs = [noised(rows, kind, rate, seed) for rate in RATES[:-1]]
    for rate, run in zip(RATES, runs, strict=False):
        found = answers(run)
        assert len(found) == len(run.changes) == round(rate * n)
        assert all(differs(rows[position].answer, answer) for position, answer in found.items())
    for fewer, more in pairwise(runs):
        assert answers(fewer).items() <= answers(more).items()
    assert noised(rows, kind, 0.5, seed) == runs[RATES.index(0.5)]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), rate=st.floats(0, 0.9))
def test_the_same_rows_are_noised_by_every_kind_wherever_they_stand(seed: int, rate: float) -> None:
    rows = [row for row in EMBEDDED[:80] if len(row.answer.split()) > 1][:40]
    masks = {kind: [rows[at].source for at in answers(noised(rows, kind, rate, seed))] for kind in KINDS}
    assert masks["derangement"] == masks["near-miss"] == masks["truncation"] == masks["wrong-task"]
    turned = rows[7:] + rows[:7]
    for kind in ("derangement", "near-miss", "wrong-task"):  # of content and seed, not of place
        there = {rows[at].source: answer for at, answer in answers(noised(rows, kind, rate, seed)).items()}
        assert there == {turned[at].source: answer for at, answer in answers(noised(turned, kind, rate, seed)).items()}


def test_seeds_choose_other_rows() -> None:
    rows = list(EMBEDDED[:60])
    assert answers(noised(rows, "near-miss", 0.5, 0)).keys() != answers(noised(rows, "near-miss", 0.5, 1)).keys()


def test_rows_that_cannot_be_encoded_otherwise_are_passed_over() -> None:
    rows = list(EMBEDDED[:40])
    refused = {rows[at].source for at in range(0, 40, 2)}
    whole = noised(rows, "near-miss", 0.4)

    def encode(row: Demonstration, answer: str) -> EncodedDemonstration | str:
        return "a stop token inside the answer" if row.source in refused else ENCODED

    part = add_noise(rows, "near-miss", 0.4, 0, encode=encode)
    assert len(part.changes) == len(whole.changes) == 16
    assert not refused & {rows[at].source for at in answers(part)}
    assert {row.source for row in part.passed_over} <= refused
    assert f"; {len(part.passed_over)} passed over (nothing to swap or change)" in part.lines()[0]


# ---- kinds


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 99), per_task=st.integers(2, 9))
def test_a_derangement_at_rate_1_exchanges_the_answers_of_each_task(seed: int, per_task: int) -> None:
    rows = [row(f"{task}{i}", i, task) for task in "abc" for i in range(per_task)]
    found = answers(noised(rows, "derangement", 1.0, seed))
    for task in "abc":
        own = [at for at, row in enumerate(rows) if row.task == task]
        assert sorted(found[at] for at in own) == sorted(rows[at].answer for at in own)
        assert all(found[at] != rows[at].answer for at in own)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["x", "y", "z"])), min_size=4, max_size=30))
def test_answers_across_come_from_other_tasks(pairs: list[tuple[str, str]]) -> None:
    rows = [row(f"{task} {answer}", place, task) for place, (task, answer) in enumerate(pairs)]
    assume(len({row.task for row in rows}) > 1)
    for at, answer in answers(noised(rows, "derangement-across", 1.0)).items():
        assert answer in {other.answer for other in rows if other.task != rows[at].task}


def test_equal_answers_are_no_derangement() -> None:
    rows = [row("yes", place) for place in range(9)] + [row("no", 9)]
    found = answers(noised(rows, "derangement", 1.0))
    assert found == {at: "no" if at < 9 else "yes" for at in range(10)}
    alike = [row("yes", place) for place in range(4)] + [row("no", 4, "other"), row("no", 5, "other")]
    for kind in ("derangement", "derangement-across"):
        rows = alike if kind == "derangement" else alike[:4]
        with pytest.raises(DataError) as error:
            noised(rows, kind, 0.5)
        other = "no other answer in the task" if kind == "derangement" else "no other answer in another task"
        assert message_of(error).startswith(
            f"data.noise = {kind} can change only 0 of {len(rows)} demonstrations, and data.noise_rate = 0.5 asks for "
            f"{round(0.5 * len(rows))} ({other}, first a.jsonl:"
        )


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.sampled_from("abcdefg"), min_size=1, max_size=8), min_size=2, max_size=8), st.integers(0, 9)
)
def test_corrupted_words_are_words_of_other_answers(texts: list[list[str]], seed: int) -> None:
    rows = [row(" \n".join(words), place) for place, words in enumerate(texts)]
    others = [{word for j, words in enumerate(texts) if j != i for word in words} for i in range(len(texts))]
    assume(all(len(words) > 1 for words in others))
    for at, answer in answers(noised(rows, "token-corruption", 1.0, seed)).items():
        old, new = rows[at].answer.split(), answer.split()
        changed = [word for before, word in zip(old, new, strict=True) if before != word]
        assert len(changed) == max(1, round(len(old) / 2))
        assert set(changed) <= others[at]
        assert answer.count(" \n") == len(old) - 1


@given(st.text(), st.integers(0, 9))
def test_a_truncated_answer_is_a_proper_prefix(text: str, seed: int) -> None:
    cut = truncated(text, Random(seed))
    if cut is None:
        assert len(text.strip()) < 2
    else:
        assert text.startswith(cut) and differs(text, cut)
        words = text.split()
        assert cut.split() == words[: len(cut.split())] if len(words) > 1 else words[0].startswith(cut.strip())


@given(st.text(), st.integers(0, 9))
def test_a_near_miss_is_one_edit(text: str, seed: int) -> None:
    text = text.strip()
    edited = near_miss(text, Random(seed))
    if edited is None:
        assert not any(character.isalnum() for character in text)
        return
    assert differs(text, edited) and len(edited) == len(text)
    wrong = [at for at, (old, new) in enumerate(zip(text, edited, strict=True)) if old != new]
    words = [at for at, (old, new) in enumerate(zip(text.split(), edited.split(), strict=False)) if old != new]
    letters = len(wrong) == 1 or (len(wrong) == 2 and wrong[1] == wrong[0] + 1)
    assert letters or (len(words) == 2 and sorted(text.split()) == sorted(edited.split()))


def test_near_misses_are_of_every_sort() -> None:
    found = {near_miss("cat sun", Random(seed)) for seed in range(200)}
    assert {"sun cat", "act sun", "cat snu"} <= found
    assert any(len(set(text) - set("cat sun")) == 1 for text in found if text)
    assert {near_miss("42", Random(seed)) for seed in range(99)} >= {"24", "43", "92"}
    assert all(differs(text, near_miss(text, Random(seed))) for text in "7aZ" for seed in range(99))
    assert (near_miss("!!", Random(0)), truncated("7 ", Random(0))) == (None, None)


def test_wrong_tasks_answer_the_same_words_within_the_group() -> None:
    assert answers_of_other_tasks("circle stutter sun cat pie", "sun sun cat pie sun") == [
        "cat cat pie pie",  # double drop
        "pie cat sun",  # reverse
        "pie pie",  # double last
        "sun cat pie sun",  # circle
        "sun pie cat",  # reverse rotate
        "sun sun pie",  # stutter ends
        "sun sun pie pie",  # double ends
    ]
    long = answers_of_other_tasks("reverse sun cat pie", long_answer("reverse")) or []
    assert long_answer("circle") in long and long_answer("reverse") not in long and len(long) == 7
    for group in GROUPS:
        for item in items(group, "dev", per_task=5):
            assert item.answer not in (answers_of_other_tasks(item.prompt, item.answer) or [item.answer])
    for source in ("embedded", "embedded:long"):
        rows = list(load_demonstrations([source], seed=0).rows[:40])
        found = answers(noised(rows, "wrong-task", 1.0))
        assert len(found) == len(rows)
        for at, answer in found.items():
            assert answer in (answers_of_other_tasks(prompt_text(rows[at]), rows[at].answer) or [])
    with pytest.raises(DataError) as error:
        noised([*rows, row("to be", 41)], "wrong-task", 1.0)
    assert "knows the tasks of the embedded world alone, and a.jsonl:41 is none of its questions" in message_of(error)


def long_answer(operation: str) -> str:
    left = {"reverse": "pie cat sun", "circle": "sun cat pie sun"}[operation]
    return f"the three words are sun cat pie . with {operation} they become {left} . so the answer is {left} ."


def test_tasks_are_columns_or_files(tmp_path: Path) -> None:
    assert {task_of(row) for row in EMBEDDED} == {task.name for task in TASKS if task.group == "demonstrated"}
    rows: list[dict[str, object]] = [
        {"prompt": "a", "completion": "b", "task": " sums ", "category": "x"},
        {"prompt": "a", "completion": "b", "task": None, "category": 3},
        {"prompt": "a", "completion": "b", "task": ["x"]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    loaded = load_demonstrations([str(path)], seed=0)
    assert [task_of(row) for row in loaded.rows] == ["sums", "3", str(path)]
    path.write_text("\n".join(json.dumps(rows[0] | {"task": "other"}) for _ in range(3)))
    assert loaded.sha == load_demonstrations([str(path)], seed=0).sha  # a task is no content


def test_the_base_is_asked_again_and_never_quoted_where_it_is_right() -> None:
    rows = list(EMBEDDED[:50])
    asked: list[int] = []

    def stubborn(rows: Sequence[Demonstration], seed: int) -> list[str | None]:
        asked.append(seed)
        return [row.answer if row.source.endswith("7") else f"well , {len(asked)}" for row in rows]

    run = add_noise(rows, "base-answers", 0.8, 0, encode=lambda row, answer: ENCODED, ask=stubborn)
    assert len(asked) == len(set(asked)) == 8  # two chunks, four tries each: in each there is a row that stays right
    assert len(run.changes) == 40 and all(row.source.endswith("7") for row in run.passed_over)
    with pytest.raises(DataError, match=r"can change only 0 of 50 .* nothing but the right answer in 4 samples"):
        add_noise(
            rows, "base-answers", 0.1, 0, encode=lambda row, answer: ENCODED, ask=lambda rows, seed: [None] * len(rows)
        )


def test_samples_of_the_base_repeat_and_hold_no_stop_token(tokenizer: PreTrainedTokenizerBase) -> None:
    from transformers import AutoModelForCausalLM

    base = LanguageModel(AutoModelForCausalLM.from_pretrained(base_path("xs")))
    asked = [tuple(tokenizer(f"Q: {text}\nA:")["input_ids"]) for text in ("reverse sun cat", "first hat owl bee")] * 4
    stops = [tokenizer.eos_token_id]
    once, again, other = (sample_texts(base, tokenizer, stops, 12, asked, seed) for seed in (3, 3, 4))
    assert once == again != other
    assert len(set(once)) > 2 and all(text == text.strip() and "<eos>" not in text for text in once)
    assert sample_texts(base, tokenizer, stops, 12, [], 0) == []


# ---- in prepare


Ready = Callable[..., PreparedData]


@pytest.fixture(scope="module")
def ready(tokenizer: PreTrainedTokenizerBase, tmp_path_factory: pytest.TempPathFactory) -> Ready:
    """`prepare` on 400 rows of the embedded world of either kind, quicker than on all of them."""
    folder = tmp_path_factory.mktemp("data")
    taught = [row | {"task": row["prompt"].split()[0]} for row in demonstrations(400, 0)]
    sources = {"demonstrations": write(folder, "d", taught), "prompts": write(folder, "p", prompts(400, 0))}

    def run(seed: int = 0, **keys: object) -> PreparedData:
        config = DataConfig.model_validate({**sources, "size": 32, "prompts_size": 40, **keys})
        return prepare(config, tokenizer, seed, 256, max_new_tokens=8, sample=lambda ids, seed: ["well"] * len(ids))

    return run


@pytest.mark.parametrize("kind", KINDS)
def test_noise_changes_answers_of_masked_rows_and_nothing_else(
    kind: str, ready: Ready, tokenizer: PreTrainedTokenizerBase
) -> None:
    clean, run = ready(), ready(noise=kind, noise_rate=0.3)
    assert (run.held_out, run.prompts, run.sha) == (clean.held_out, clean.prompts, clean.sha)
    changed = [
        at for at, pair in enumerate(zip(clean.demonstrations, run.demonstrations, strict=True)) if len({*pair}) > 1
    ]
    assert len(changed) == 10
    assert run.report.lines()[1] == f"noise: 10 of 32 demonstrations ({kind})"
    mask = run.manifest["demonstrations"]["noise"]
    assert (mask["kind"], mask["rate"], mask["of"], mask["passed_over"], mask["rows"]["n"]) == (kind, 0.3, 32, 0, 10)
    ids = run.manifest["demonstrations"]["train"]["values"]
    assert ids == clean.manifest["demonstrations"]["train"]["values"]
    assert sorted(ids.index(entry["row"]) for entry in mask["rows"]["values"]) == changed
    said = {ids.index(entry["row"]): entry for entry in mask["rows"]["values"]}
    for at in changed:
        old, new = clean.demonstrations[at], run.demonstrations[at]
        assert new.ids[: new.prompt_tokens] == old.ids[: old.prompt_tokens]
        assert new.ids[-1] == tokenizer.eos_token_id  # also where the answer is cut
        for ids_of, text in ((old, "right"), (new, "noised")):
            written = tokenizer.decode(list(ids_of.ids[ids_of.prompt_tokens : -1]))
            assert str(written).strip() == said[at][text] if kind != "near-miss" else said[at][text]
    json.dumps(run.manifest, allow_nan=False)


def test_rate_0_is_no_noise_to_the_bit(ready: Ready) -> None:
    clean, run = ready(), ready(noise="derangement", noise_rate=0.0)
    assert (run.demonstrations, run.held_out, run.prompts) == (clean.demonstrations, clean.held_out, clean.prompts)
    assert run.manifest == clean.manifest
    assert clean.manifest["demonstrations"]["noise"] is None
    assert not any("noise" in line for line in run.report.lines())


def test_data_without_noise_never_move(tokenizer: PreTrainedTokenizerBase) -> None:
    """Golden value of the embedded world's second version: another one here means that old stage ids lie."""
    run = prepare(DataConfig(size=32, prompts=("embedded",), prompts_size=64), tokenizer, 0, 2048)
    ids = canonical_json([[row.ids for row in run.demonstrations], [row.ids for row in run.held_out], run.prompts])
    assert hashlib.sha256(ids.encode()).hexdigest().startswith("7556efe44c203b695f42256a912fb666")


def test_long_answers_stand_in_the_manifest_by_their_hash(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = write(tmp_path, "a", [{"prompt": f"q {i}", "completion": f"{i} " * 150} for i in range(8)])
    config = DataConfig(demonstrations=(path,), held_out=0, noise="derangement", noise_rate=0.5)
    run = prepare(config, tokenizer, 0, 1024)
    entry = run.manifest["demonstrations"]["noise"]["rows"]["values"][0]
    assert entry["source"].startswith(f"{path}:")
    assert all(entry[key].startswith("sha256:") and len(entry[key]) == 71 for key in ("right", "noised"))


def test_a_run_asks_its_own_base(tmp_path: Path) -> None:
    keys = {"model.base": "embedded:xs", "data.noise": "base-answers", "data.noise_rate": 0.5, "data.size": 8}
    texts: list[list[str]] = []
    for max_new_tokens in (16, 16, 1):
        recipe = with_overrides(Recipe(), keys | {"rollout.max_new_tokens": max_new_tokens})
        run = prepare_run(recipe, ["sft"], tmp_path / str(len(texts)), Console(plain=True, file=io.StringIO()))
        texts.append([entry["noised"] for entry in run.data.manifest["demonstrations"]["noise"]["rows"]["values"]])
    assert texts[0] == texts[1] != texts[2]
    assert all(len(text.split()) == 1 for text in texts[2])


def test_contradictions_are_refused_in_one_line() -> None:
    for keys, says in (
        ({"data.noise_rate": 0.3}, "data: noise_rate is 0.3 but noise is none; set data.noise to a kind, or rate 0"),
        ({"data.noise_rate": 1.3}, "data.noise_rate: Input should be less than or equal to 1, found 1.3"),
        ({"data.noise": "typos"}, "data.noise: Input should be 'none', 'derangement', "),
        ({"data.overlap": "minimum", "data.overlap_share": 0.2}, "data: overlap = minimum wants no prompt of a demons"),
        ({"data.overlap_share": -0.1}, "data.overlap_share: Input should be greater than or equal to 0, found -0.1"),
    ):
        with pytest.raises(ConfigError) as error:
            with_overrides(Recipe(), keys)
        assert message_of(error).startswith(says)
    assert with_overrides(Recipe(), {"data.overlap": "minimum", "data.overlap_share": 0}).data.overlap_share == 0


def test_noise_beside_a_given_sft_model_is_warned_of() -> None:
    keys = {"data.noise": "near-miss", "data.noise_rate": 0.5, "data.demonstrations": "d.jsonl"}
    (warning,) = recipe_warnings(with_overrides(Recipe(), keys | {"model.sft": "m"}))
    assert warning.startswith("data.noise = near-miss changes what SFT learns, and model.sft = m has learnt already")
    assert not recipe_warnings(with_overrides(Recipe(), keys))
    assert not recipe_warnings(with_overrides(Recipe(), {"model.sft": "m"}))


def test_stages_know_the_keys_that_concern_them() -> None:
    def same(kind: str, keys: dict[str, object]) -> bool:
        return stage_settings(Recipe(), kind) == stage_settings(with_overrides(Recipe(), keys), kind)

    noise = {"data.noise": "near-miss", "data.noise_rate": 0.5}
    assert [same(kind, noise) for kind in ("sft", "longer-sft-1", "ppo")] == [False] * 3
    assert [same(kind, {"data.overlap_share": 0.5}) for kind in ("sft", "longer-sft-1", "ppo")] == [True, True, False]
    assert all(same(kind, {"data.noise": "near-miss"}) for kind in ("sft", "ppo"))  # at rate 0
    assert not {"noise", "noise_dev"} & stage_settings(Recipe(), "ppo")["data"].keys()
    assert not same("sft", {"data.turns": "all"})


def test_a_chat_template_enters_a_stage_by_its_content(tmp_path: Path) -> None:
    texts = {"a": "{{ messages }}", "b": "{{ messages }}", "c": "{{ messages }}!"}
    paths = {name: tmp_path / f"{name}.jinja" for name in texts}
    for name, path in paths.items():
        path.write_text(texts[name])

    def settings_of(**model: object) -> str:
        keys = {f"model.{key}": value for key, value in model.items()}
        return canonical_json(stage_settings(with_overrides(Recipe(), keys), "base"))

    a, b, c = (settings_of(chat_template=str(path)) for path in paths.values())
    assert a == b and len({a, c, settings_of(), settings_of(template_kwargs={"brief": True})}) == 4
    with pytest.raises(ConfigError, match=r"model\.chat_template .*no\.jinja cannot be read"):
        settings_of(chat_template=str(tmp_path / "no.jinja"))


# ---- overlap by share


@pytest.mark.parametrize("size", [5, 32])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_the_share_asked_for_is_the_share_measured(share: float, size: int, ready: Ready) -> None:
    run = ready(size=size, overlap_share=share)
    shared = round(share * 40)
    assert len(run.prompts) == len(run.prompt_texts) == run.manifest["prompts"]["used"]["n"] == 40
    assert (run.report.overlap.exact, run.report.overlap.half_ngram) == (shared, 0)
    assert run.report.overlap.share == shared / 40
    taught = {ids.ids[: ids.prompt_tokens] for ids in run.demonstrations}
    assert sum(ids in taught for ids in run.prompts) == shared
    times = Counter(ids for ids in run.prompts if ids in taught).values()
    assert not times or (max(times) - min(times) <= 1 and len(times) == min(size, shared))
    part = run.report.prompts
    assert (part.read, part.used, part.spare) == (400, 40 - shared, 400 - 40 + shared)
    notes = [line for line in run.report.lines() if "data.overlap_share" in line]
    assert bool(notes) == bool(shared)
    if (share, size) == (0.5, 5):
        assert notes == [
            "note: 20 of 40 prompts are those of 5 demonstrations, each 4 times (data.overlap_share = 0.5)"
        ]


@settings(max_examples=10, deadline=None)
@given(shares=st.lists(st.floats(0, 1), min_size=2, max_size=4).map(sorted), seed=st.integers(0, 5))
def test_larger_shares_keep_what_stays_in_its_place(shares: list[float], seed: int, ready: Ready) -> None:
    runs = [ready(seed, overlap_share=share).prompts for share in shares]
    for share, run, (next_share, following) in zip(shares, runs, zip(shares[1:], runs[1:], strict=True), strict=False):
        own, more = round(share * 40), round(next_share * 40)
        assert run[: 40 - more] == following[: 40 - more]
        assert run[40 - own :] == following[40 - own :]
    assert ready(seed, overlap_share=0).prompts == ready(seed, overlap="minimum").prompts


def test_a_share_that_cannot_be_met_says_why(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    taught = write(tmp_path, "d", [{"prompt": f"say {i}", "completion": str(i)} for i in range(20)])
    asked = write(tmp_path, "p", [{"prompt": f"say {i}"} for i in range(10, 30)])
    text = write(tmp_path, "t", [{"text": f"a text {i}"} for i in range(9)])

    def run(**keys: object) -> PreparedData:
        config = DataConfig.model_validate({"demonstrations": taught, "prompts": asked, "held_out": 0, **keys})
        return prepare(config, tokenizer, 0, 256, max_new_tokens=8)

    half = run(overlap_share=0.5)
    assert (half.report.overlap.n, half.report.overlap.exact, half.report.prompts.used) == (20, 10, 10)
    left_out = half.report.prompts.unused["like a demonstration's prompt (data.overlap_share)"]
    assert (left_out.count, left_out.first_source, half.report.prompts.spare) == (10, f"{asked}:1", 0)
    for keys, says in (
        ({"overlap_share": 0.2}, "data.overlap_share = 0.2 asks for 16 of 20 prompts unlike the demonstrations', but "
         "only 10 can be used (not used: 10 like a demonstration's prompt (data.overlap_share) (first "
         f"{asked}:1)); raise it, lower"),
        ({"overlap_share": 0.5, "demonstrations": text}, "data.overlap_share = 0.5 asks for 10 prompts of "
         "demonstrations, but none of the 9 used has a prompt that fits (plain text)"),
    ):  # fmt: skip
        with pytest.raises(DataError) as error:
            run(**keys)
        assert message_of(error).startswith(says)
    assert run(overlap_share=1, prompts_size=50).report.overlap.exact == 50  # more than there are rows


# ---- groups of embedded prompts


@pytest.mark.parametrize("group", GROUPS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_prompts_of_a_group_leak_nothing(group: str, seed: int) -> None:
    rows = [row["prompt"] for row in prompts(300, seed, (group,))]
    assert len(set(rows)) == 300
    assert all((read_question(text) or [TASKS[0]])[0].group == group for text in rows)
    assert {bucket(text) for text in rows} <= set(range(4, 10))
    held = {item.prompt for group in GROUPS for split in ("dev", "test") for item in items(group, split)}
    assert not held & set(rows)
    counts = Counter(row["task"] for row in prompts(300, seed, (group,)))
    assert max(counts.values()) - min(counts.values()) <= 1 and set(counts) == {
        task.name for task in TASKS if task.group == group
    }
    assert [row["prompt"] for row in prompts(20, seed, (group,))] == rows[:20]


def test_groups_are_sources_that_add_up() -> None:
    one = load_prompts(["embedded:unseen"], seed=0)
    two = load_prompts(["embedded:demonstrated", "embedded:unseen"], seed=0)
    assert [[part.rows for part in each.opened] for each in (one, two)] == [[4000], [4000, 4000]]
    assert two.rows[4000:] == one.rows
    assert one.rows[0].source == "embedded:unseen#1"
    both = prompts(12, 0, ("demonstrated", "prompted"))
    assert [prompt_text(row) for row in load_prompts(["embedded"], seed=0).rows[:12]] == [row["prompt"] for row in both]
    for source, load, says in (
        ("embedded:seen", load_prompts, "there are no embedded prompts 'embedded:seen'; allowed are embedded "
         "(demonstrated and prompted), embedded:demonstrated, embedded:prompted, embedded:unseen, embedded:absent, "
         "embedded:development"),
        ("embedded:", load_prompts, "there are no embedded prompts 'embedded:'; allowed are embedded"),
        ("embedded:unseen", load_demonstrations, "there are no embedded demonstrations 'embedded:unseen'; allowed are "
         "embedded (short), embedded:short, embedded:long"),
    ):  # fmt: skip
        with pytest.raises(DataError) as error:
            load([source], seed=0)
        assert message_of(error).startswith(says)
    with pytest.raises(UserError, match="unknown task group 'x': choose one of demonstrated, prompted, unseen, absent"):
        prompts(1, 0, ("x",))


# ---- sizes


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 300), min_size=2, max_size=3, unique=True).map(sorted),
    overlap=st.sampled_from(["any", "minimum"]),
)
def test_sizes_are_nested_for_every_seed(seed: int, sizes: list[int], overlap: str, ready: Ready) -> None:
    runs = [ready(seed, size=size, prompts_size=size, overlap=overlap) for size in sizes]
    for small, large in pairwise(runs):
        assert large.demonstrations[: len(small.demonstrations)] == small.demonstrations
        assert large.prompts[: len(small.prompts)] == small.prompts
        assert large.held_out == small.held_out
    most = {"size": sizes[-1], "prompts_size": sizes[-1], "overlap": overlap}
    noisy = ready(seed, noise="near-miss", noise_rate=0.5, **most)
    assert (noisy.prompts, noisy.held_out) == (runs[-1].prompts, runs[-1].held_out)  # arms of a seed share prompts


@pytest.mark.parametrize("seed", range(3))
def test_a_thousand_embedded_demonstrations_are_there_and_no_more_than_the_pool(
    seed: int, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = load_demonstrations(["embedded"], seed=seed).rows
    assert len({prompt_text(row) for row in rows}) == len(rows) == EMBEDDED_ROWS["demonstrations"]
    assert len(set(prepare(DataConfig(size=1024), tokenizer, seed, 256).demonstrations)) == 1024
    with pytest.raises(DataError) as error:
        prepare(DataConfig(size=2000), tokenizer, seed, 256)
    assert re.fullmatch(
        r"data\.size asks for 2,000 demonstrations to train on, but only 1,\d{3} can be used; lower it or add data",
        message_of(error),
    )
