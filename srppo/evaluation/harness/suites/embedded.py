"""Data and checker of the embedded world's tasks, as lm-eval's YAML names them."""

from __future__ import annotations

from functools import cache
from typing import Any

from srppo.world.items import items
from srppo.world.tasks import check


def demonstrated(**_: Any) -> dict[str, Any]:
    """Test items of the tasks in the demonstrations of SFT."""
    return _split("demonstrated")


def prompted(**_: Any) -> dict[str, Any]:
    """Test items of the tasks that PPO alone has seen."""
    return _split("prompted")


def unseen(**_: Any) -> dict[str, Any]:
    """Test items of the tasks that no stage has seen: out-of-domain."""
    return _split("unseen")


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Right means equal to the one answer after stripping outer white space, as in every table of this package."""
    return {"exact_match": float(check(doc["answer"], results[0]))}


class Rows(list[dict[str, str]]):
    """A list with the one thing more that lm-eval asks of a data set; a Dataset would decode each row three times."""

    @property
    def features(self) -> dict[str, str]:
        """Column names, with their type."""
        return dict.fromkeys(self[0], "string")


def _split(group: str) -> dict[str, Rows]:
    return {"test": Rows(_drawn(group))}


@cache
def _drawn(group: str) -> list[dict[str, str]]:
    """Drawn once a process: 900 items take 0.1 s, a tenth of what a small model takes to answer them."""
    return [{"prompt": i.prompt, "answer": i.answer, "kind": i.task} for i in items(group, "test")]
