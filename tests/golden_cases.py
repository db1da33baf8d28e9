"""Golden values of an independent plain-Python fp64 loop (tests/goldens/make.py), as test cases."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

GOLDENS = Path(__file__).parent / "goldens"
TOLERANCE = {torch.float32: (1e-5, 1e-6), torch.float64: (1e-12, 1e-12)}  # rtol, atol a unit of the case's scale
DTYPES = [torch.float32, torch.float64]
GARBAGE = {  # what masked positions hold, cycled along each row
    "zeros": [0.0],
    "nan": [math.nan],
    "mixed": [math.inf, 3e38, -math.inf, math.nan, -7.0],
}
kept_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp64"])
garbage = pytest.mark.parametrize("junk", GARBAGE.values(), ids=GARBAGE.keys())


def decode(x: Any) -> Any:
    if isinstance(x, list):
        return [decode(y) for y in x]
    if isinstance(x, dict):
        return {key: decode(y) if key != "name" else y for key, y in x.items()}
    return -math.inf if x == "-inf" else x


@functools.cache
def load(file: str) -> dict[str, Any]:
    return json.loads((GOLDENS / file).read_text())


def cases(file: str, function: str) -> Any:
    """Parametrize over the golden cases of one function."""
    found = [decode(case) for case in load(f"{file}.json")[function]["cases"]]
    assert found
    return pytest.mark.parametrize("case", found, ids=[case["name"] for case in found])


def pad(rows: list[list[float]], width: int, dtype: torch.dtype, junk: list[float]) -> Tensor:
    """Ragged rows side by side, garbage on their right."""
    return torch.tensor([row + [junk[t % len(junk)] for t in range(len(row), width)] for row in rows], dtype=dtype)


def mask_of(rows: list[list[float]], width: int) -> Tensor:
    return torch.tensor([[t < len(row) for t in range(width)] for row in rows])


def assert_golden(actual: Any, expected: Any, dtype: torch.dtype) -> None:
    """Close in shape, dtype and value; the absolute tolerance grows with the largest expected value."""
    assert isinstance(actual, Tensor)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    rtol, atol = TOLERANCE[dtype]
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(actual.detach().double(), expected, rtol=rtol, atol=atol * scale)


def assert_zero_padded(actual: Tensor, expected: list[list[float]], width: int, dtype: torch.dtype) -> None:
    """Close at counted positions, exactly 0 at masked ones."""
    assert_golden(actual, pad(expected, width, torch.float64, [0.0]), dtype)
    assert (actual[~mask_of(expected, width)] == 0).all()
