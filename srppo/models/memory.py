"""How many rows fit the memory, and how it is noticed that they did not.

Products of batches of another size are rounded otherwise, which may change a near tie and so a response. A size is
therefore a function of model, request and machine alone, never of the memory that happens to be free.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from srppo.models.language_model import LanguageModel

MOST = 512  # rows; beyond it small models gain nothing
MOST_POSITIONS = 1 << 16  # in a batch on a CPU: larger ones are no faster and leave the caches
SHARE = 0.25  # of what the weights leave of the whole memory: well below what fits, even where others take theirs

T = TypeVar("T")


def rows_that_fit(
    model: LanguageModel, positions: int, *, scored: int = 1, held: int | None = None, total: int | None = None
) -> int:
    """Rows of `positions` tokens, `scored` of them with logits, for a quarter of the memory; a power of two, 1 or more.

    held: bytes that the memory holds besides, None: the model's weights. total: bytes of memory, None: of the device.
    """
    config = model.config
    cache = 4 * cache_numbers(config) * positions
    work = 4 * positions * (8 * config.hidden_size + 2 * getattr(config, "intermediate_size", 4 * config.hidden_size))
    row = 2 * cache + work + 16 * scored * config.vocab_size  # generate() copies the cache
    total = total_bytes(model.device) if total is None else total
    held = (weight_bytes(model) if held is None else held) + gathered_bytes(model)
    left = total - held
    return _power_of_two(int(max(left, 0) * SHARE) // row)


def cache_numbers(config: Any) -> int:
    """Numbers of the keys and values of one position, in all layers."""
    queries = getattr(config, "num_attention_heads", None) or 1
    heads = getattr(config, "num_key_value_heads", None) or queries
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    return int(2 * config.num_hidden_layers * heads * size)


def batch_size(model: LanguageModel, positions: int, *, scored: int = 1) -> int:
    """Rows of a batch where any number will do: as many as fit, and no more than are of use."""
    useful = MOST_POSITIONS // positions if model.device.type == "cpu" else MOST
    return min(MOST, _power_of_two(useful), rows_that_fit(model, positions, scored=scored))


def _power_of_two(number: int) -> int:
    """The largest that is not above it; 1 for less."""
    return 1 << max(number.bit_length() - 1, 0)


def weight_bytes(*models: nn.Module) -> int:
    """Bytes of the models' weights in this process; what several share counts once."""
    weights = {id(weight): weight for model in models for weight in model.parameters()}
    return sum(map(bytes_here, weights.values()))


def bytes_here(weight: Tensor) -> int:
    """Of a weight, or of this process's part of it: the same in all processes, rounded up."""
    return part_bytes(weight, weight.device_mesh.size() if isinstance(weight, DTensor) else 1)


def part_bytes(weight: Tensor, processes: int) -> int:
    """Of the part that each of several processes holds of a weight: of its rows, the last parts filled up as FSDP2
    does."""
    rows = weight.shape[0] if weight.dim() else 1
    return -(-rows // processes) * (weight.numel() // max(rows, 1)) * weight.element_size()


def gathered_bytes(model: nn.Module) -> int:
    """Bytes that weights which are spread over processes take while they are gathered."""
    spread = [weight for weight in model.parameters() if isinstance(weight, DTensor)]
    return sum(weight.numel() * weight.element_size() for weight in spread)


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


def is_out_of_memory(error: BaseException) -> bool:
    """On a GPU, in Python, or where torch's allocator of the CPU refuses."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
