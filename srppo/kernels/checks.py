"""What callers may give the log-prob kernels: each check is one line of ConfigError or DataError."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from srppo.errors import ConfigError, DataError
from srppo.kernels.types import IGNORED, Head, Transform


def transform_of(temperature: float, logit_scale: float, softcap: float | None) -> Transform:
    """The transform. Raises ConfigError for a number that fp32 or its inverse cannot hold."""
    for name, value in (("temperature", temperature), ("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None and not 1e-30 <= value <= 1e30:  # fp32 holds these and their inverses
            raise ConfigError(f"{name} is {value}; it must be a finite number above 0 (1e-30 to 1e30)")
    return Transform(temperature, logit_scale, softcap)


def columns_of(columns: int, vocabulary: int | None) -> int:
    """How many of the columns are no padding. Raises ConfigError."""
    if vocabulary is None:
        vocabulary = columns
    if not 0 < vocabulary <= columns:
        raise ConfigError(f"vocabulary is {vocabulary}; it must lie in 1..{columns}, the number of columns")
    return vocabulary


def checked_head(head: Head, vocabulary: int | None) -> Head:
    """The head without its padding rows. Raises ConfigError where shapes do not fit."""
    hidden, weight, bias = (None if x is None else tuple(x.shape) for x in head)
    if hidden is None or weight is None or len(hidden) != 2 or len(weight) != 2 or hidden[1] != weight[1]:
        raise ConfigError(f"hidden states are {hidden} and the weight is {weight}; they must be (N, D) and (V, D)")
    if 0 in weight:
        raise ConfigError(f"the weight is {weight}; a head needs a vocabulary and a hidden width of at least 1")
    if bias is not None and bias != weight[:1]:
        raise ConfigError(f"the bias is {bias}, the weight {weight}; the bias must be (V,)")
    columns = columns_of(weight[0], vocabulary)
    if columns == weight[0]:
        return head
    return Head(head.hidden_ND, head.weight_VD[:columns], None if head.bias_V is None else head.bias_V[:columns])


class Tokens(NamedTuple):
    """Tokens with what is wrong with them; on a GPU nothing has been waited for yet.

    safe_N      the tokens, IGNORED where they are ignored or wrong
    ignored_N   bool
    wrong_N     bool, outside the vocabulary and not ignored
    """

    tokens_N: Tensor
    safe_N: Tensor
    ignored_N: Tensor
    wrong_N: Tensor
    columns: int
    ignore_index: int | None

    def kept(self) -> Tensor | None:
        """Rows that are not ignored; None: all. Without an ignore_index nothing is waited for."""
        if self.ignore_index is None:
            return None
        kept_K = (~self.ignored_N).nonzero().squeeze(-1)
        return None if len(kept_K) == len(self.ignored_N) else kept_K

    def check(self) -> None:
        """Raise DataError where a token is wrong; waits for the GPU, so call it after the launch."""
        wrong = int(self.wrong_N.sum())
        if wrong:
            allowed = "" if self.ignore_index is None else f", or ignore_index = {self.ignore_index}"
            raise DataError(
                f"{wrong} of {len(self.tokens_N)} tokens lie outside the vocabulary, the first is "
                f"{int(self.tokens_N[self.wrong_N][0])}; allowed: 0..{self.columns - 1}{allowed}"
            )


def look_at(tokens_N: Tensor, rows: int, columns: int, ignore_index: int | None) -> Tokens:
    """Find what is ignored and what is wrong. Raises ConfigError unless tokens are (rows,) of int64."""
    if tokens_N.shape != (rows,) or tokens_N.dtype != torch.int64:
        raise ConfigError(
            f"tokens are {tuple(tokens_N.shape)} of {str(tokens_N.dtype).removeprefix('torch.')}; they must be "
            f"({rows},) of int64, one a row"
        )
    outside_N = (tokens_N < 0) | (tokens_N >= columns)
    ignored_N = torch.zeros_like(outside_N) if ignore_index is None else tokens_N == ignore_index
    wrong_N = outside_N & ~ignored_N
    return Tokens(
        tokens_N, tokens_N.masked_fill(ignored_N | wrong_N, IGNORED), ignored_N, wrong_N, columns, ignore_index
    )
