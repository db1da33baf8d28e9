"""Log-probs from hidden states and heads: the logits live in registers, a tile at a time.

Two launches for one or two models: the GEMM of triton_tiles leaves the statistics of each tile, and one program a row
folds those of its row in fixed order and takes the target logit as a dot product of its own (4 D bytes a row in 16
bits). No locks, no atomics: the same bits every time, whatever the other rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from srppo.kernels.triton_backward import backward
from srppo.kernels.triton_common import INTERPRETED, blocks, exp, launch, scalars, transformed
from srppo.kernels.triton_logits import logprob_diff
from srppo.kernels.triton_tiles import fold, named, operands, tiles_of
from srppo.kernels.types import Head, LogprobDiff, RowStats, Transform, one_head

__all__ = ["backward", "forward", "linear_logprob_diff", "logprob_diff"]  # what the dispatch point calls

PARTIAL_BYTES = 1 << 27  # tile statistics held at once; more rows are taken in slabs
SLAB = 2048  # rows by which slabs grow: whole groups of row blocks
DOT = 64 if INTERPRETED else 1024  # elements a step of the target's dot product


def linear_logprob_diff(sft: Head, base: Head, tokens_N: Tensor, transform: Transform) -> LogprobDiff:
    """See srppo.kernels.linear_logprob_diff. One head for both models is read once, its rows stacked."""
    count, tokens_N = len(tokens_N), tokens_N.contiguous()
    results_5N = torch.empty(5, count, dtype=torch.float32, device=tokens_N.device)
    heads = [operands(sft), operands(base)]
    for slab in _slabs(heads, count):
        pair = [head._replace(hidden_ND=head.hidden_ND[slab]) for head in heads]
        size = len(pair[0].hidden_ND)
        both = pair[0]._replace(hidden_ND=_stacked([head.hidden_ND for head in pair])) if one_head(sft, base) else None
        # Tiles of another size would give a row other bits than it has beside a model with a head of its own.
        if both is not None and all(tiles_of(both) == tiles_of(head) for head in pair):
            partials = fold([both], transform)[0].split(size)
        else:
            partials = fold(pair, transform)
        arguments: dict[str, Any] = {"tokens": tokens_N[slab], "results": results_5N[:, slab], "plane": count}
        for name, head, partial in zip(("sft", "base"), pair, partials, strict=True):
            arguments |= _folded(name, head, partial)
        arguments |= {**scalars(transform), "DOT": DOT}
        launch(_diff_kernel, size, arguments, warps=4)
    return LogprobDiff(*results_5N.unbind())


def forward(head: Head, tokens_N: Tensor, transform: Transform) -> RowStats:
    """Statistics of every row, from which log-probs follow; keeps nothing else."""
    count, tokens_N = len(tokens_N), tokens_N.contiguous()
    results_3N = torch.empty(3, count, dtype=torch.float32, device=tokens_N.device)
    head = operands(head)
    for slab in _slabs([head], count):
        part = head._replace(hidden_ND=head.hidden_ND[slab])
        (partial,) = fold([part], transform)
        arguments = {
            "tokens": tokens_N[slab],
            "results": results_3N[:, slab],
            "plane": count,
            **_folded("head", part, partial),
            **scalars(transform),
            "DOT": DOT,
        }
        launch(_stats_row_kernel, len(part.hidden_ND), arguments, warps=4)
    return RowStats(*results_3N.unbind())


def _stacked(parts: list[Tensor]) -> Tensor:
    """One matrix of the rows of all, which begin on 16 bytes if the first one's do."""
    first_ND, depth = parts[0], parts[0].shape[1]
    lanes = 16 // first_ND.element_size()
    width = blocks(depth, lanes) * lanes if first_ND.stride(0) % lanes == 0 else depth
    stack_RD = first_ND.new_empty(sum(map(len, parts)), width)[:, :depth]
    return torch.cat(parts, out=stack_RD)


def _slabs(heads: list[Head], count: int) -> list[slice]:
    """Row ranges whose partials stay within PARTIAL_BYTES; no row's result hangs on where they are cut."""
    bytes_per_row = sum(8 * blocks(len(head.weight_VD), tiles_of(head).columns) for head in heads)
    size = max(PARTIAL_BYTES // bytes_per_row // SLAB * SLAB, SLAB)
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _folded(name: str, head: Head, partial: Tensor) -> dict[str, Any]:
    """The arguments by which a row's kernel reads the partials of a head."""
    width = partial.shape[-1]
    arguments = {
        f"{name}_partials": partial,
        f"{name}_width": width,
        f"{name.upper()}_WIDTH": triton.next_power_of_2(width),
    }
    return named(name, head) | arguments


@triton.jit
def _row(
    hidden, weight, bias, depth, hidden_stride, weight_stride, partials, row, token, width, inner, outer,
    CAPPED: tl.constexpr, WIDTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """(target logit - maximum, maximum, log sum) of a row; NaN where all of it is -inf."""
    tile = tl.arange(0, WIDTH)
    at = partials + row * (2 * width) + tile
    tops = tl.load(at, mask=tile < width, other=float("-inf"))
    totals = tl.load(at + width, mask=tile < width, other=0.0)
    highest = tl.max(tops, 0)
    log_sum = tl.log(tl.sum(totals * exp(tops - highest), 0))
    k = tl.arange(0, DOT)
    sums = tl.zeros((DOT,), tl.float32)
    h_at = hidden + row * hidden_stride + k
    w_at = weight + token * weight_stride + k
    for start in range(0, depth, DOT):
        h = tl.load(h_at + start, mask=k < depth - start, other=0.0).to(tl.float32)
        sums += h * tl.load(w_at + start, mask=k < depth - start, other=0.0).to(tl.float32)
    raw = tl.sum(sums, 0)
    if bias is not None:
        raw += tl.load(bias + token).to(tl.float32)
    gap = transformed(raw, inner, outer, CAPPED) - highest
    # The tile summed the target's logit in another order: as the maximum itself it may lie an ulp below this one, and
    # no log-prob is above 0.
    return tl.where(gap > 0, 0.0, gap), highest, log_sum


# Of a shared head the base rows' partials begin wherever the SFT rows' end.
@triton.jit(do_not_specialize=["plane"], do_not_specialize_on_alignment=["sft_partials", "base_partials"])
def _diff_kernel(
    tokens, results, plane,
    sft_hidden, sft_weight, sft_bias, sft_depth, sft_hidden_stride, sft_weight_stride, sft_partials, sft_width,
    base_hidden, base_weight, base_bias, base_depth, base_hidden_stride, base_weight_stride, base_partials, base_width,
    inner, outer,
    CAPPED: tl.constexpr, SFT_WIDTH: tl.constexpr, BASE_WIDTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program a row: the five results from both models' partials."""
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + row)
    sft_gap, sft_max, sft_log = _row(
        sft_hidden, sft_weight, sft_bias, sft_depth, sft_hidden_stride, sft_weight_stride, sft_partials,
        row, token, sft_width, inner, outer, CAPPED, SFT_WIDTH, DOT,
    )  # fmt: skip
    base_gap, base_max, base_log = _row(
        base_hidden, base_weight, base_bias, base_depth, base_hidden_stride, base_weight_stride, base_partials,
        row, token, base_width, inner, outer, CAPPED, BASE_WIDTH, DOT,
    )  # fmt: skip
    out, plane = results + row, plane.to(tl.int64)
    tl.store(out, (sft_gap - base_gap) - (sft_log - base_log))
    tl.store(out + plane, sft_gap - sft_log)
    tl.store(out + 2 * plane, base_gap - base_log)
    tl.store(out + 3 * plane, sft_max + sft_log)
    tl.store(out + 4 * plane, base_max + base_log)


@triton.jit(do_not_specialize=["plane"])
def _stats_row_kernel(
    tokens, results, plane,
    head_hidden, head_weight, head_bias, head_depth, head_hidden_stride, head_weight_stride, head_partials, head_width,
    inner, outer,
    CAPPED: tl.constexpr, HEAD_WIDTH: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One program a row: the statistics of RowStats from one model's partials."""
    row = tl.program_id(0).to(tl.int64)
    gap, highest, log_sum = _row(
        head_hidden, head_weight, head_bias, head_depth, head_hidden_stride, head_weight_stride, head_partials,
        row, tl.load(tokens + row), head_width, inner, outer, CAPPED, HEAD_WIDTH, DOT,
    )  # fmt: skip
    out, plane = results + row, plane.to(tl.int64)
    tl.store(out, gap)
    tl.store(out + plane, highest)
    tl.store(out + 2 * plane, log_sum)
