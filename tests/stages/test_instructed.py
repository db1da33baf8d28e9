"""A run whose items are instructions: verdicts by IFEval's checkers, from development to the report's files."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from worlds import World, make_world, write_rows

from srppo.analysis.samples import load_questions
from srppo.config import build_recipe
from srppo.console import Console
from srppo.errors import DataError
from srppo.instructions.checkers import instructed_item
from srppo.models.pair import load_pair
from srppo.stages.run import PreparedRun, prepare_run, run_stages

LETTERS = [{"letter": "a", "let_frequency": n, "let_relation": "at least"} for n in (1, 2)]
KINDS = ["keywords:letter_frequency", "punctuation:no_comma"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("world"))


def items(folder: Path, letters: dict[str, Any]) -> Path:
    rows = [
        {"prompt": f"Name {word}", "instruction_id_list": [kind], "kwargs": [kwargs], "task": kind, "group": "unseen"}
        for word in ("abc", "bca", "cab", "bcc", "acb", "cba")
        for kind, kwargs in zip(KINDS, (letters, {}), strict=True)
    ]
    return write_rows(
        folder / "items.jsonl", [row | {"split": "dev" if i % 3 else "test"} for i, row in enumerate(rows)]
    )


def prepared(world: World, folder: Path, letters: dict[str, Any], **keys: object) -> PreparedRun:
    folder.mkdir(exist_ok=True)
    path = items(folder, letters)
    recipe = world.recipe({"eval.items": str(path), **{key.replace("__", "."): value for key, value in keys.items()}})
    return prepare_run(recipe, ["ppo"], folder / "run", Console(plain=True, file=io.StringIO()))


def test_answers_are_told_by_the_checkers(world: World, tmp_path: Path) -> None:
    run = prepared(world, tmp_path / "one", LETTERS[0])
    run_stages(run)
    found = [
        json.loads(line)
        for path in sorted((tmp_path / "one" / "run").glob("stages/*/eval/kept-*/samples.jsonl"))
        for line in path.read_text().splitlines()
    ]
    assert {row["task"] for row in found} == set(KINDS)
    told = set()
    for row in found:
        settings = LETTERS[0] if row["task"] == KINDS[0] else {}
        item = instructed_item(row["prompt"], [row["task"]], [settings], row["task"], "unseen")
        assert row["correct"] == [item.is_right(text) for text in row["responses"]] and row["answer"] == item.answer
        told |= set(row["correct"])
    assert told == {True, False}
    # the same questions, looked at afterwards
    pair = load_pair(tmp_path / "one" / "run")
    questions = load_questions(pair, None, None, Console(plain=True, file=io.StringIO()))
    assert len(questions) == 8
    assert {question.is_right("bcc") for question in questions} == {True, False}
    assert all(question.is_right("a") for question in questions)


def test_the_settings_of_a_checker_are_part_of_what_a_stage_is(world: World, tmp_path: Path) -> None:
    first, again, other = (
        prepared(world, tmp_path / str(i), letters).items_sha
        for i, letters in enumerate((LETTERS[0], LETTERS[0], LETTERS[1]))
    )
    assert first == again != other


def test_noise_has_nothing_to_change_in_them(world: World, tmp_path: Path) -> None:
    noisy = {"data__noise": "derangement", "data__noise_rate": 0.5, "data__noise_dev": True}
    with pytest.raises(DataError, match=r"data\.noise_dev changes answers, and items of instructions"):
        prepared(world, tmp_path / "noisy", LETTERS[0], **noisy)


def test_a_recipe_takes_ifevals_own_columns(tmp_path: Path) -> None:
    """Two instructions, both of which must be obeyed; without task and group each item is its own unit."""
    from srppo.evaluation.items import load_items

    row = {"key": 1000, "prompt": "p", "instruction_id_list": KINDS, "kwargs": [LETTERS[1], {}]}
    path = write_rows(tmp_path / "ifeval.jsonl", [row])
    (item,) = load_items(build_recipe({"eval": {"items": str(path)}}), "dev")
    assert [item.is_right(text) for text in ("a a", "a, a", "a", "")] == [True, False, False, False]
