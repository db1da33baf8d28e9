"""Files of items: rows, not lines, decide the split; mistakes are one line; what the embedded world asks."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from srppo.ablations.options import test_items as items_of_a_sweep
from srppo.config import Recipe, build_recipe
from srppo.errors import DataError
from srppo.evaluation.items import load_items, read_rows, spread
from srppo.world.items import ITEM_GROUPS, items


def recipe_of(path: Path, text: str) -> Recipe:
    path.write_text(text, encoding="utf-8")
    return build_recipe({"eval": {"items": str(path)}})


def lines(count: int, **more: Any) -> list[str]:
    return [json.dumps({"prompt": f"q{i}", "answer": str(i), **more}) for i in range(count)]


@pytest.mark.parametrize("gap", ["\n", "\n\n", "\n  \n\n", "\r\n\r\n"], ids=["none", "one", "two", "windows"])
def test_the_split_counts_rows_not_lines(tmp_path: Path, gap: str) -> None:
    """With a blank line between rows every row had an odd line number, and all were dev."""
    recipe = recipe_of(tmp_path / "items.jsonl", "\ufeff\n\n" + gap.join(lines(5)) + "\n")
    assert [item.prompt for item in load_items(recipe, "dev")] == ["q0", "q2", "q4"]
    assert [item.prompt for item in load_items(recipe, "test")] == ["q1", "q3"]
    assert items_of_a_sweep(recipe) == {"items": 2}, "a sweep reads the same items"


def test_marks_decide_before_the_order_and_columns_have_defaults(tmp_path: Path) -> None:
    rows = [*lines(1, split="test", group="g"), *lines(1, split="dev"), *lines(1, split="test", task="t")]
    recipe = recipe_of(tmp_path / "items.jsonl", "\n".join(rows))
    found = load_items(recipe, "test")
    assert [(item.task, item.group) for item in found] == [("g", "g"), ("t", "items")]
    assert items_of_a_sweep(recipe) == {"g": 1, "items": 1}
    number = recipe_of(tmp_path / "number.jsonl", '{"prompt": "1+1?", "answer": 2}')
    assert [item.answer for item in load_items(number, "dev")] == ["2"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no rows"),
        ("\n \n", "has no rows"),
        ('{"prompt": "p", "answer": "a"}\n\n{"prompt": ', "items.jsonl:3 is no JSON object"),
        ("[1]", "items.jsonl:1 is no JSON object"),
        ('{"answer": "a"}', "items.jsonl:1: not an item (it has no prompt that is text)"),
        ('{"prompt": "p", "answer": null}', "items.jsonl:1: not an item (it has no answer)"),
        ('{"prompt": "p", "answer": "a", "split": "train"}', "split 'train', which is neither dev nor test"),
        ('{"prompt": "p", "answer": "a", "split": "test"}', "has no rows of split 'dev'"),
    ],
)
def test_what_is_no_file_of_items_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(DataError) as caught:
        load_items(recipe_of(tmp_path / "items.jsonl", text), "dev")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"--prompts .*none\.jsonl cannot be read"):
        read_rows(tmp_path / "none.jsonl", "--prompts")


def test_without_a_file_the_embedded_world_asks_and_only_with_its_data() -> None:
    recipe = build_recipe({})
    for base, source, style in (
        ("embedded:xs", "embedded", "short"),
        ("embedded:long-xs-1", "embedded", "long"),
        ("embedded:long-xs", "embedded:short", "short"),
        ("mine", "embedded:long", "long"),
    ):
        asked = build_recipe({"model": {"base": base}, "data": {"demonstrations": [source]}})
        for split, groups in ITEM_GROUPS.items():
            assert load_items(asked, split) == [item for group in groups for item in items(group, split, style)]
    assert items_of_a_sweep(recipe) == dict(Counter(item.group for item in load_items(recipe, "test")))
    assert load_items(build_recipe({"data": {"demonstrations": ["mine.jsonl"]}}), "dev") == []


def test_a_limit_takes_items_evenly() -> None:
    assert spread(range(10), 4) == [0, 2, 5, 7] and spread([1, 2], None) == spread([1, 2], 5) == [1, 2]
