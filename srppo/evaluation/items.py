"""Questions with known answers: one reader of their files, and their splits. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from srppo.config import Recipe, world_style
from srppo.errors import DataError
from srppo.world.items import ITEM_GROUPS, Item
from srppo.world.items import items as embedded_items

T = TypeVar("T")


def read_rows(path: Path, name: str) -> list[tuple[str, dict[str, Any]]]:
    """(place `file:line`, row) of each JSON object in a JSONL file; blank lines are none.

    `name` is what the user knows the file by, such as --prompts. Raises DataError for the first line that is no object,
    and for a file without rows.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name} {path} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError(f'{name} {path}:{number} is no JSON object; a line is like {{"prompt": ..., ...}}')
            rows.append((f"{path}:{number}", row))
    if not rows:
        raise DataError(f"{name} {path} has no rows; a line is a JSON object")
    return rows


def load_items(recipe: Recipe, split: str) -> list[Item]:
    """Items of one split (`dev` or `test`): the user's file, or the embedded ones where the data are embedded, or none.

    A row of the file holds prompt and answer, and may hold task, group and split (default: every second row, the first
    included, is dev). Raises DataError for a row that is no item, and for a file without rows of the split.
    """
    if recipe.eval.items is None:
        style = world_style(recipe)
        return [item for group in ITEM_GROUPS[split] for item in embedded_items(group, split, style)] if style else []
    rows = read_rows(Path(recipe.eval.items), "eval.items")
    every = [_item_of(row, place, "test" if number % 2 else "dev") for number, (place, row) in enumerate(rows)]
    if found := [item for item, own in every if own == split]:
        return found
    raise DataError(f"eval.items {recipe.eval.items} has no rows of split {split!r}; mark rows with split: dev or test")


def _item_of(row: dict[str, Any], place: str, split: str) -> tuple[Item, str]:
    """A row's item and its split, by default `split`."""
    prompt, answer, split = row.get("prompt"), row.get("answer"), row.get("split", split)
    group = str(row.get("group", "items"))
    wrong = "no prompt that is text" if not isinstance(prompt, str) else "no answer" if answer is None else ""
    if split not in ("dev", "test"):
        wrong = f"split {split!r}, which is neither dev nor test"
    if wrong:
        raise DataError(
            f"{place}: not an item (it has {wrong}); a line is a JSON object with prompt and answer, and may "
            "have task, group and split"
        )
    return Item(str(prompt), str(answer), str(row.get("task", group)), group), split


def spread(rows: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` rows, evenly over the list, so that every task keeps its share."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]
