"""log pi_sft - log pi_base from two logits matrices: one kernel, one pass, every logit read once.

Cost: N x V x (bytes of both models), and 1 + 1/GROUP exponentials an element. A maximum that runs for every element
would cost a second exponential for each and make the special-function units the limit; here each thread first takes
the maximum of the GROUP logits of one 16-byte load.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from srppo.kernels.triton_common import INTERPRETED, exp, launch, scalars, transformed, unit_stride
from srppo.kernels.types import LogprobDiff, Transform

BLOCK = (
    256 if INTERPRETED else 4096
)  # columns a step; half of it where loads are single elements, each with its pointer
WARPS = 8


def logprob_diff(sft_logits_NV: Tensor, base_logits_NV: Tensor, tokens_N: Tensor, transform: Transform) -> LogprobDiff:
    """See srppo.kernels.logprob_diff; rows whose token is IGNORED give 0 throughout and are not read."""
    rows, columns = sft_logits_NV.shape
    results_5N = torch.empty(5, rows, dtype=torch.float32, device=tokens_N.device)
    if rows:
        sft_NV, base_NV = unit_stride(sft_logits_NV), unit_stride(base_logits_NV)
        aligned = _aligned(sft_NV) and _aligned(base_NV)
        arguments = {
            "sft": sft_NV,
            "base": base_NV,
            "tokens": tokens_N.contiguous(),
            "results": results_5N,
            "rows": rows,
            "columns": columns,
            "sft_stride": sft_NV.stride(0),
            "base_stride": base_NV.stride(0),
            **scalars(transform),
            "SFT_GROUP": 16 // sft_NV.element_size() if aligned else 4,
            "BASE_GROUP": 16 // base_NV.element_size() if aligned else 4,
            "ALIGNED": aligned,
            "BLOCK": BLOCK if aligned and columns % 16 == 0 else BLOCK // 2,
        }
        launch(_diff_kernel, rows, arguments, warps=WARPS)
    return LogprobDiff(*results_5N.unbind())


def _aligned(logits_NV: Tensor) -> bool:
    """Whether every row begins on 16 bytes."""
    return (logits_NV.data_ptr() | logits_NV.stride(0) * logits_NV.element_size()) % 16 == 0


@triton.jit
def _columns(start, BLOCK: tl.constexpr, GROUP: tl.constexpr, ALIGNED: tl.constexpr):
    """(lanes, GROUP) columns of a block. A lane's group is one 16-byte load where rows are aligned.

    Elsewhere loads are single elements, and neighbouring threads take neighbouring columns, so that a warp still reads
    whole sectors.
    """
    LANES: tl.constexpr = BLOCK // GROUP
    lane, member = tl.arange(0, LANES)[:, None], tl.arange(0, GROUP)[None, :]
    return start + (lane * GROUP + member if ALIGNED else lane + member * LANES)


@triton.jit
def _fold(raw, top, total, inside, inner, outer, CAPPED: tl.constexpr, MASKED: tl.constexpr):
    """Take one block of a row into the running maximum and sum of each lane."""
    logits = transformed(raw.to(tl.float32), inner, outer, CAPPED)
    if MASKED:  # after the transform: a cap would make -inf finite
        logits = tl.where(inside, logits, float("-inf"))
    higher = tl.maximum(top, tl.max(logits, 1))
    centre = tl.where(higher == float("-inf"), 0.0, higher)  # a lane that has met nothing but -inf
    return higher, total * exp(top - centre) + tl.sum(exp(logits - centre[:, None]), 1)


@triton.jit
def _row(raw, top, total, inner, outer, CAPPED: tl.constexpr):
    """(target logit - maximum, maximum, log sum) of a row from its raw target logit; NaN where all is -inf."""
    highest = tl.max(top, 0)
    log_sum = tl.log(tl.sum(total * exp(top - highest), 0))
    target = transformed(raw.to(tl.float32), inner, outer, CAPPED)
    return target - highest, highest, log_sum


@triton.jit(do_not_specialize=["rows"])
def _diff_kernel(
    sft, base, tokens, results, rows, columns, sft_stride, base_stride, inner, outer,
    CAPPED: tl.constexpr, SFT_GROUP: tl.constexpr, BASE_GROUP: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a row: both models' maxima and sums lane by lane, then the five results of the row."""
    number = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens + number)
    out = results + number
    if token < 0:
        for field in tl.static_range(5):
            tl.store(out + field * rows.to(tl.int64), 0.0)
    else:
        sft_row, base_row = sft + number * sft_stride, base + number * base_stride
        if ALIGNED:  # in bytes, what a stride that is no multiple of 16 elements hides from the compiler
            sft_row, base_row = tl.multiple_of(sft_row, 16), tl.multiple_of(base_row, 16)
        sft_target, base_target = tl.load(sft_row + token), tl.load(base_row + token)
        sft_top = tl.full((BLOCK // SFT_GROUP,), float("-inf"), tl.float32)
        base_top = tl.full((BLOCK // BASE_GROUP,), float("-inf"), tl.float32)
        sft_total, base_total = tl.zeros_like(sft_top), tl.zeros_like(base_top)
        whole = columns // BLOCK * BLOCK
        for start in range(0, whole, BLOCK):
            sft_at = _columns(start, BLOCK, SFT_GROUP, ALIGNED)
            base_at = _columns(start, BLOCK, BASE_GROUP, ALIGNED)
            # Both models' loads are under way before either is used.
            sft_raw = tl.load(sft_row + sft_at, eviction_policy="evict_first")
            base_raw = tl.load(base_row + base_at, eviction_policy="evict_first")
            sft_top, sft_total = _fold(sft_raw, sft_top, sft_total, None, inner, outer, CAPPED, False)
            base_top, base_total = _fold(base_raw, base_top, base_total, None, inner, outer, CAPPED, False)
        if whole < columns:
            sft_at = _columns(whole, BLOCK, SFT_GROUP, ALIGNED)
            base_at = _columns(whole, BLOCK, BASE_GROUP, ALIGNED)
            sft_in, base_in = sft_at < columns, base_at < columns
            sft_raw = tl.load(sft_row + sft_at, mask=sft_in, other=0.0, eviction_policy="evict_first")
            base_raw = tl.load(base_row + base_at, mask=base_in, other=0.0, eviction_policy="evict_first")
            sft_top, sft_total = _fold(sft_raw, sft_top, sft_total, sft_in, inner, outer, CAPPED, True)
            base_top, base_total = _fold(base_raw, base_top, base_total, base_in, inner, outer, CAPPED, True)
        sft_gap, sft_max, sft_log = _row(sft_target, sft_top, sft_total, inner, outer, CAPPED)
        base_gap, base_max, base_log = _row(base_target, base_top, base_total, inner, outer, CAPPED)
        plane = rows.to(tl.int64)
        tl.store(out, (sft_gap - base_gap) - (sft_log - base_log))
        tl.store(out + plane, sft_gap - sft_log)
        tl.store(out + 2 * plane, base_gap - base_log)
        tl.store(out + 3 * plane, sft_max + sft_log)
        tl.store(out + 4 * plane, base_max + base_log)
