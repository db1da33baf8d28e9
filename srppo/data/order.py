"""The order in which rows are seen: passes over all of them, each in a seeded order of its own.

A function of the step alone, so that a resumed run needs no cursor.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from srppo.config import derive_seed


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
