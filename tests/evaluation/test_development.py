"""What a step is chosen by: items of the demonstrated and the development tasks, and of no task reported as new."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
from worlds import byte_tokenizer, write_rows

from srppo.config import build_recipe
from srppo.evaluation.development import Answer, Development, verdict_of


@pytest.mark.parametrize(
    ("groups", "score"),
    [
        ("demonstrated demonstrated development unseen prompted", 2 / 3),
        ("demonstrated unseen unseen unseen", 1.0),
        ("unseen mine mine mine mine", 1 / 5),  # no group has such a name: all count
    ],
)
def test_a_step_is_chosen_on_tasks_that_are_not_reported_as_new(tmp_path: Path, groups: str, score: float) -> None:
    """Demonstrated tasks, or where there are none unseen ones, are answered rightly, and no others."""
    rows = [
        {"prompt": f"p{i}", "answer": "a", "group": group, "split": "dev"} for i, group in enumerate(groups.split())
    ]
    path = write_rows(tmp_path / "items.jsonl", rows)
    recipe = build_recipe({"eval": {"items": str(path)}, "data": {"demonstrations": ["none.jsonl"]}})
    development = Development(recipe, byte_tokenizer(), [], [0])
    right = {"demonstrated"} if score > 0.5 else {"unseen"}
    verdicts = [verdict_of(item, [Answer("a" if item.group in right else "b", True, 1)]) for item in development.items]
    row, found = development.rated(cast(Any, None), verdicts)
    assert found == pytest.approx(score)
    assert row["dev/accuracy"] == pytest.approx(sum(v.correct[0] for v in verdicts) / len(verdicts))
