"""Rows of many lengths one behind the other, as one row: nothing is padded, and nothing is masked.

Linear layers, norms and heads see N tokens. Attention, registered with transformers under NAME, goes row by row: rows
of one length are one causal call without a mask, which is also the fast one. Where no `segments` are given it is
transformers' own `sdpa`.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "srppo_packed"
_UNKNOWN = ("softcap", "s_aux", "position_bias", "head_mask")  # what a model may ask of attention, and is not done here


class Asked(NamedTuple):
    """What a layer asks of attention. scaling: of the scores, None: by the root of the width. window: how many tokens
    one sees, itself counted, None: all before it. layer: its number."""

    scaling: float | None = None
    window: int | None = None
    layer: int | None = None


class Rows(Protocol):
    """What the tokens of a pass are to each other."""

    def attend(self, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, asked: Asked) -> Tensor:
        """Attention of N new tokens: (N, heads, value width), from queries, keys and values (heads, N, width)."""


@dataclass(frozen=True)
class Segments:
    """Rows one behind the other: their lengths, those of one length side by side."""

    lengths: tuple[int, ...]

    def attend(self, q_HND: Tensor, k_HND: Tensor, v_HND: Tensor, asked: Asked) -> Tensor:
        """Causal attention within each row."""
        scaling, window, _ = asked
        runs = [(length, sum(1 for _ in same)) for length, same in groupby(self.lengths)]
        sizes = [length * count for length, count in runs]
        parts = []
        for (length, count), *qkv in zip(runs, *(x.split(sizes, dim=1) for x in (q_HND, k_HND, v_HND)), strict=True):
            q, k, v = (x.unflatten(1, (count, length)).transpose(0, 1) for x in qkv)
            mask = _band(length, window, q.device) if window is not None and length > window else None
            out = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
            parts.append(out.transpose(1, 2).flatten(0, 1))
        return torch.cat(parts)


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """Each token sees itself and those up to `window - 1` before it."""
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (back >= 0) & (back < window)


def attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    segments: Rows | None = None,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: query, key and value are (1, heads, N, width). Raises ValueError for what it cannot."""
    if segments is None:
        more |= {"scaling": scaling, "sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    if unknown := [name for name in _UNKNOWN if more.get(name) is not None]:
        raise ValueError(f"packed attention knows nothing of {unknown[0]}")
    asked = Asked(scaling, sliding_window, getattr(module, "layer_idx", None))
    return segments.attend(query[0], key[0], value[0], asked)[None], None


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


@dataclass(frozen=True)
class Packing:
    """A padded batch's real tokens, rows in order of length.

    tokens_N, positions_N: of the packed row. place_BS: where each position of the batch is in it; of padding, anywhere.
    """

    tokens_N: Tensor
    positions_N: Tensor
    place_BS: Tensor
    segments: Segments

    @classmethod
    def of(cls, tokens_BS: Tensor, mask_BS: Tensor) -> Packing:
        """mask_BS: True on real tokens, wherever in its row they stand."""
        lengths_B = mask_BS.sum(dim=1)
        order_B = lengths_B.argsort(stable=True)
        within_BS = (mask_BS.cumsum(dim=1) - 1).clamp(min=0)
        ends_B = lengths_B[order_B].cumsum(dim=0)
        starts_B = torch.empty_like(ends_B)
        starts_B[order_B] = ends_B - lengths_B[order_B]
        sorted_BS = mask_BS[order_B]
        segments = Segments(tuple(lengths_B[order_B].tolist()))
        return cls(
            tokens_BS[order_B][sorted_BS], within_BS[order_B][sorted_BS], starts_B[:, None] + within_BS, segments
        )

    def inputs(self) -> dict[str, Any]:
        """What a body takes. A mask of four dimensions is passed through by transformers as it is; nothing reads it."""
        return {
            "input_ids": self.tokens_N[None],
            "position_ids": self.positions_N[None],
            "attention_mask": torch.zeros((1, 1, 1, 1), device=self.tokens_N.device),
            "segments": self.segments,
        }
