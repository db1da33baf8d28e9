"""Reductions over the positions that count. A masked position never reaches a result, not even as NaN."""

from __future__ import annotations

from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of x where mask is True (same shape); over `dim`, or over everything."""
    kept = x.masked_fill(~mask, 0.0)
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x where mask is True; 0 where nothing counts."""
    count = mask.sum() if dim is None else mask.sum(dim=dim)
    return masked_sum(x, mask, dim) / count.clamp(min=1)


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance (divisor n) of x where mask is True; 0 where nothing counts."""
    mean = masked_mean(x, mask)
    return masked_mean((x - mean) ** 2, mask)
