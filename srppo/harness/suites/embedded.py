"""Data and checker of the embedded world's tasks, as lm-eval's YAML names them."""

from __future__ import annotations

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


def _split(group: str) -> dict[str, Any]:
    from datasets import Dataset

    found = items(group, "test")
    return {"test": Dataset.from_list([{"prompt": i.prompt, "answer": i.answer, "kind": i.task} for i in found])}
