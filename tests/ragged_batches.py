"""Random ragged batches for what must hold for any input."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

settings.register_profile("maths", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("maths")

seeds = st.integers(0, 2**32 - 1)
discounts = st.floats(0.0, 1.0)


class Batch(NamedTuple):
    """A ragged batch: mask, and a generator for what goes into it."""

    mask_BT: Tensor
    generator: torch.Generator

    def normal(self, scale: float = 1.0) -> Tensor:
        """fp64 normals, NaN where masked."""
        x_BT = scale * torch.randn(self.mask_BT.shape, generator=self.generator, dtype=torch.float64)
        return x_BT.masked_fill(~self.mask_BT, math.nan)

    def logprobs(self) -> Tensor:
        return -self.normal(2.0).abs()


@st.composite
def batches(draw: st.DrawFn, min_tokens: int = 1) -> Batch:
    """Rows of length 0..T, with at least `min_tokens` counted tokens in all."""
    width = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(0, width), min_size=1, max_size=6).filter(lambda ns: sum(ns) >= min_tokens))
    mask_BT = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Batch(mask_BT, torch.Generator().manual_seed(draw(seeds)))


def assert_close(actual: Tensor | float, expected: Tensor | float, tolerance: float = 1e-11) -> None:
    actual, expected = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def zeroed(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return torch.where(mask_BT, x_BT, torch.zeros_like(x_BT))


def reward_to_go(rewards_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return zeroed(zeroed(rewards_BT, mask_BT).flip(1).cumsum(1).flip(1), mask_BT)
