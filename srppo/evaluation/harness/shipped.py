"""The suites that ship with the package, and IFEval and GSM8K from local files under lm-eval's own checkers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from srppo.errors import DataError

SUITES = {
    "embedded": ("embedded_demonstrated", "embedded_prompted", "embedded_unseen"),
    "ifeval": ("ifeval",),
    "gsm8k": ("gsm8k",),
    "paper": ("ifeval", "gsm8k", "gpqa_main_zeroshot"),
}
"""`paper`: the tasks that the paper names; which variant of GPQA it used could not be found, so this choice is ours."""

SHORTCUTS = {
    "ifeval": "ifeval/ifeval.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "gpqa_main_zeroshot": "gpqa/zeroshot/gpqa_main_zeroshot.yaml",
}
"""lm-eval's own files of the tasks above: reading its list of all tasks takes 8 s."""

FOLDER = Path(__file__).parent / "suites"
_FILES = {"ifeval": "input_data.jsonl", "gsm8k": "test.jsonl"}
_COLUMNS = {"ifeval": {"prompt", "instruction_id_list", "kwargs"}, "gsm8k": {"question", "answer"}}


def local_file(task: str, data: Path) -> Path | None:
    """The file of `task` in what --data names: a file with its columns, or a folder; None where it is of another task.

    Raises DataError where nothing there is usable.
    """
    if task not in _FILES:
        return None
    if data.is_dir():
        places = [data / _FILES[task], data / task / _FILES[task]]
        return next((place for place in places if place.is_file()), None)
    if not data.is_file():
        raise DataError(f"--data {data} does not exist; give a file such as {_FILES[task]}, or a folder that holds it")
    return data if _COLUMNS[task] <= _rows(data)[0].keys() else None


def local_config(task: str, config: dict[str, Any], file: Path) -> dict[str, Any]:
    """lm-eval's config of `task` on the rows of a local file; few-shot examples from train.jsonl beside it."""
    splits = {config["test_split"]: _rows(file)}
    if task == "gsm8k":
        beside = file.with_name("train.jsonl")
        if beside.is_file() and beside != file:
            splits["train"] = _rows(beside)
        else:
            config = {**config, "training_split": None, "fewshot_split": None}

    def load(**_: Any) -> dict[str, Any]:
        from datasets import Dataset

        return {name: Dataset.from_list(rows) for name, rows in splits.items()}

    return {**config, "custom_dataset": load}


def _rows(file: Path) -> list[dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--data {file} cannot be read: {error}") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict):
                    raise ValueError("not an object")
            except ValueError as error:
                raise DataError(f"--data {file}:{number} is not a JSON object ({error})") from None
    if not rows:
        raise DataError(f"--data {file} has no rows")
    return rows
