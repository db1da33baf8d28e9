"""Rows in order: one permutation a seed, the held-out ones, those that can be encoded, and their names by content; and
the passes over them in training."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from srppo.config import canonical_json, derive_seed
from srppo.data.rows import row_content, turn_content
from srppo.data.types import Demonstration, EncodedDemonstration, Prompt
from srppo.errors import DataError

_LISTED = 10_000  # rows up to which a manifest lists them; beyond, their sha256 stands for them
_LEAST, _MOST = 32, 1024  # rows encoded at once: of a million, few more than asked for

Row = TypeVar("Row", Demonstration, Prompt)
Ids = TypeVar("Ids", EncodedDemonstration, tuple[int, ...])
_T = TypeVar("_T")


def permute(rows: Sequence[_T], seed: int) -> list[_T]:
    """One permutation a seed; `size` rows are its first ones, so a larger size holds every smaller one."""
    ordered = list(rows)
    random.Random(derive_seed(seed, "data order")).shuffle(ordered)
    return ordered


def split_held_out(
    rows: Sequence[Demonstration], share: float, seed: int
) -> tuple[list[Demonstration], list[Demonstration]]:
    """(train, held out), each in the order of `rows`; about `share` of the rows are held out.

    A hash of the prompt (of the text where there is none) decides for each row alone, so rows that come or go move no
    other row, and rows of one prompt stay on one side.
    """

    def is_held_out(row: Demonstration) -> bool:
        asked = canonical_json([turn_content(turn) for turn in row.prompt]) if row.prompt else row.answer
        return derive_seed(seed, f"held out {asked}") < share * 2**63

    sides = [is_held_out(row) for row in rows]
    train = [row for row, held in zip(rows, sides, strict=True) if not held]
    if not train:
        raise DataError(f"data.held_out = {share} leaves none of {len(rows)} demonstrations to train on; lower it")
    return train, [row for row, held in zip(rows, sides, strict=True) if held]


def row_id(row: Demonstration | Prompt) -> str:
    """Hash of what a row says, the same wherever it stands."""
    return hashlib.sha256(row_content(row).encode()).hexdigest()[:16]


def prompt_text(row: Demonstration | Prompt) -> str:
    """What the user says, the text that overlap looks at: all user turns; of a plain text, the text."""
    asked = "\n".join(turn.content for turn in row.prompt if turn.role == "user")
    return asked if asked or isinstance(row, Prompt) else row.answer


@dataclass(frozen=True)
class Encoded(Generic[Row, Ids]):
    """Rows beside their token ids, and the (reason, source) of those that were passed over on the way."""

    rows: list[Row]
    ids: list[Ids]
    refused: list[tuple[str, str]]


def encoded(
    rows: Sequence[Row], encode: Callable[[Sequence[Row]], Sequence[Ids | str]], size: int | None
) -> Encoded[Row, Ids]:
    """The first `size` rows that can be encoded, in order; `encode` gives the ids of each row, or why it has none."""
    result: Encoded[Row, Ids] = Encoded([], [], [])
    start = 0
    while start < len(rows) and len(result.rows) != size:
        missing = _MOST if size is None else min(max(size - len(result.rows), _LEAST), _MOST)
        some = rows[start : start + missing]
        for row, ids in zip(some, encode(some), strict=True):
            if len(result.rows) == size:
                break
            if isinstance(ids, str):
                result.refused.append((ids, row.source))
            else:
                result.rows.append(row)
                result.ids.append(ids)
        start += len(some)
    return result


def listed(values: Sequence[Any]) -> dict[str, Any]:
    """A list for a manifest: its length and sha256, and whole when it is short."""
    sha = hashlib.sha256(canonical_json(values).encode()).hexdigest()
    return {"n": len(values), "sha256": sha, "values": list(values) if len(values) <= _LISTED else None}


# ---- passes over rows: functions of the step alone, so that a resumed run needs no cursor


@lru_cache(maxsize=4)
def pass_order(count: int, seed: int, epoch: int) -> Tensor:
    """The permutation of range(count) of one pass, 0, 1, ...; int64, not to be written to.

    Kept for the steps of a pass: at 326,000 rows it takes 5 ms to make, and as much again to list.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "prompt-order", epoch))
    return torch.randperm(count, generator=generator)


def scheduled(count: int, batch: int, step: int, seed: int, *, per_prompt: int = 1) -> list[int]:
    """Indices of the prompts of step 0, 1, ...

    A batch may span two passes; within a pass no prompt comes twice. With `per_prompt`, which divides the batch, each
    index stands that many times in a row.
    """
    distinct = batch // per_prompt
    places = (divmod(place, count) for place in range(step * distinct, (step + 1) * distinct))
    return [int(pass_order(count, seed, epoch)[offset]) for epoch, offset in places for _ in range(per_prompt)]
