"""Data and checker of the embedded world's tasks, as lm-eval's YAML names them."""

from __future__ import annotations

from typing import Any

from srppo.world.items import items
from srppo.world.tasks import check


class Rows(list[dict[str, str]]):
    """A list with the one thing more that lm-eval asks of a data set; a Dataset would decode each row three times."""

    @property
    def features(self) -> dict[str, str]:
        """Column names, with their type."""
        return dict.fromkeys(self[0], "string")


def load(group: str, style: str, **_: Any) -> dict[str, Rows]:
    """Test items of a group of tasks, with answers in a style."""
    found = items(group, "test", style)
    return {"test": Rows({"prompt": item.prompt, "answer": item.answer, "task": item.task} for item in found)}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right means equal to the one answer after stripping outer white space, as in every table of this package."""
    return {"exact_match": float(check(doc["answer"], results[0]))}
