"""Questions with known answers: one reader of their files, and their splits. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from srppo.config import Recipe, world_style
from srppo.environment import way_to
from srppo.errors import DataError
from srppo.instructions.checkers import instructed_item, lacking, missing
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

    A row of the file holds prompt and answer, or prompt, instruction_id_list and kwargs as IFEval's do; and it may hold
    task, group and split (default: every second row, the first included, is dev). Raises DataError for a row that is no
    item, for a file without rows of the split, and for what IFEval's checkers need and is not here.
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
    prompt, split = row.get("prompt"), row.get("split", split)
    if not isinstance(prompt, str):
        raise _no_item(place, "it has no prompt that is text")
    if split not in ("dev", "test"):
        raise _no_item(place, f"it has split {split!r}, which is neither dev nor test")
    item = checked_item(row, prompt, place)
    if item is None:
        raise _no_item(place, "it has no answer")
    return item, split


def checked_item(row: Mapping[str, Any], prompt: str, place: str) -> Item | None:
    """What is right of the responses to a row's prompt: its answer, or what obeys its instructions; None where the row
    says neither. Raises DataError for instructions that no checker knows, or whose checker needs what is not here."""
    answer, kinds, settings = row.get("answer"), row.get("instruction_id_list"), row.get("kwargs")
    group = str(row.get("group", "items"))
    task = str(row.get("task", group))
    if kinds is None:
        return None if answer is None else Item(prompt, str(answer), task, group)
    if not (isinstance(settings, list) and _is_list_of(kinds, str) and _is_list_of(settings, dict)):
        raise _no_item(place, "instruction_id_list and kwargs are no lists of names and of objects")
    if lacks := lacking(kinds, missing()):
        ways = "; ".join(dict.fromkeys(way_to(each.split()[0]) for each in lacks))
        raise DataError(f"{place}: its checker needs {', '.join(lacks)}, not found here: {ways}")
    try:
        return instructed_item(prompt, kinds, settings, task, group)
    except ValueError as error:
        raise _no_item(place, str(error)) from error


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(each, kind) for each in value)


def _no_item(place: str, wrong: str) -> DataError:
    return DataError(
        f"{place}: not an item ({wrong}); a line is a JSON object with prompt and answer, or with prompt, "
        "instruction_id_list and kwargs as IFEval has them, and may have task, group and split"
    )


def spread(rows: Sequence[T], limit: int | None) -> list[T]:
    """At most `limit` rows, evenly over the list, so that every task keeps its share."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[i * len(rows) // limit] for i in range(limit)]
