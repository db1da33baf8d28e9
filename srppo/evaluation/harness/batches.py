"""Batches from lengths and memory: rows of like length together, the longest first, as many as fit.

Products of batches of another size are rounded otherwise, which may change a near tie and so a response. The size is
therefore a function of model, request and machine alone, never of the memory that happens to be free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch

MOST = 512  # rows; beyond it small models gain nothing
MOST_POSITIONS = 1 << 16  # in a batch on a CPU: larger ones are no faster and leave the caches
SHARE = 0.25  # of what the weights leave of the whole memory: well below what fits, even where others take theirs

T = TypeVar("T")


def batch_size(config: Any, positions: int, scored: int, device: torch.device, weights: int = 0) -> int:
    """Rows of `positions` tokens, `scored` of them with logits, for a quarter of the memory; a power of two.

    config: the model's (transformers). weights: bytes of the model, which that memory holds too.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * size * 4 * positions
    work = 4 * positions * (8 * config.hidden_size + 2 * getattr(config, "intermediate_size", 4 * config.hidden_size))
    most = int(max(total_bytes(device) - weights, 0) * SHARE) // (
        2 * cache + work + 16 * scored * config.vocab_size
    )  # generate() copies the cache
    if device.type == "cpu":
        most = min(most, MOST_POSITIONS // positions)
    return max(1, min(MOST, 1 << (most.bit_length() - 1) if most else 1))


def total_bytes(device: torch.device) -> int:
    """Memory in all where the model is, whoever holds it now."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    import psutil

    return int(psutil.virtual_memory().total)


def by_length(rows: Sequence[T], length: Callable[[T], int], size: int) -> Iterator[list[int]]:
    """Indices of `rows` in batches of at most `size`, longest first: time left is then an upper bound."""
    order = sorted(range(len(rows)), key=lambda i: -length(rows[i]))
    for start in range(0, len(order), size):
        yield order[start : start + size]
