"""Batches by memory: a function of model, request and machine; and how it is noticed that they did not fit."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_llama

from srppo.models.language_model import LanguageModel
from srppo.models.memory import batch_size, is_out_of_memory, rows_that_fit, weight_bytes

TOTALS = (1 << 14, 1 << 24, 1 << 27, 1 << 40)


def of_total(monkeypatch: pytest.MonkeyPatch, total: int) -> None:
    monkeypatch.setattr("srppo.models.memory.total_bytes", lambda device: total)


def test_batches_fit_the_memory_in_powers_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = LanguageModel(tiny_llama()), []
    for total in TOTALS:
        of_total(monkeypatch, total)
        sizes.append(batch_size(model, 512))
        assert sizes[-1] <= rows_that_fit(model, 512)
    assert batch_size(model, 36) == 512, "more are of no use"
    assert sizes[0] == 1 and sizes[-1] == 128 and sizes == sorted(sizes) and len(set(sizes)) == 4
    assert all(size & (size - 1) == 0 for size in sizes)


def test_rows_are_what_a_quarter_of_the_memory_left_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer, width 32, two heads of 16, inner width 64, 5 tokens; fp32. The cache stands there twice, and logits as
    fp32 and as what sampling makes of them."""
    model = LanguageModel(tiny_llama())
    row = 10 * (2 * 2 * 2 * 16 * 4 + 4 * (8 * 32 + 2 * 64)) + 16 * 5
    of_total(monkeypatch, 4 * 64 * row + weight_bytes(model))
    assert rows_that_fit(model, 10) == 64
    of_total(monkeypatch, 4 * 64 * row + weight_bytes(model) - 1)
    assert rows_that_fit(model, 10) == 32, "63 do, and the next power of two below is taken"
    assert rows_that_fit(model, 10, scored=1000) == 8 and rows_that_fit(model, 10, held=1 << 40) == 1


def test_weights_are_counted_by_their_bytes() -> None:
    assert weight_bytes(torch.nn.Linear(3, 5)) == 80
    assert weight_bytes(torch.nn.Linear(3, 5).bfloat16(), torch.nn.Linear(1, 1, bias=False)) == 44


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (MemoryError(), True),
        (RuntimeError("shapes do not fit"), False),
    ],
)
def test_out_of_memory_is_known_on_every_device(error: Exception, is_one: bool) -> None:
    assert is_out_of_memory(error) == is_one
