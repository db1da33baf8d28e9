"""The GEMM whose product never leaves the chip: each tile of rows x columns logits leaves its statistics.

Cost: 2 N V D operations a model, and 8 bytes a row and tile written. One persistent launch covers
(model, row block, vocabulary block).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from srppo.kernels.triton_common import (
    INTERPRETED,
    Tiles,
    blocks,
    exp,
    launch,
    programs,
    scalars,
    tiles,
    transformed,
    unit_stride,
)
from srppo.kernels.types import Head, Transform


def operands(head: Head) -> Head:
    """The head as the kernels take it: rows contiguous, hidden states in the dtype of the product.

    That dtype holds both operands exactly; a kernel raises its tile of the weight to it, so that no second weight
    exists. The interpreter multiplies 16-bit numbers wrongly and gets fp32.
    """
    dtype = torch.promote_types(head.hidden_ND.dtype, head.weight_VD.dtype)
    hidden_ND = head.hidden_ND.to(torch.float32 if INTERPRETED else dtype)
    bias_V = None if head.bias_V is None else head.bias_V.contiguous()
    return Head(unit_stride(hidden_ND), unit_stride(head.weight_VD), bias_V)


def named(name: str, head: Head) -> dict[str, Any]:
    """The kernel arguments of a head, as pointers."""
    hidden_ND, weight_VD, bias_V = head
    return {
        f"{name}_hidden": hidden_ND,
        f"{name}_weight": weight_VD,
        f"{name}_bias": bias_V,
        f"{name}_depth": hidden_ND.shape[1],
        f"{name}_hidden_stride": hidden_ND.stride(0),
        f"{name}_weight_stride": weight_VD.stride(0),
    }


def tiles_of(head: Head) -> Tiles:
    """The tile sizes of a head as `operands` returns it."""
    matrices = (head.hidden_ND, head.weight_VD)
    aligned = all((x.data_ptr() | x.stride(0) * x.element_size()) % 16 == 0 < x.stride(0) for x in matrices)
    return tiles(head.hidden_ND, aligned)


def tiled(name: str, head: Head, cut: Tiles) -> dict[str, Any]:
    """The kernel arguments of a head for a GEMM: matrices as TMA descriptors where its tiles are for them."""
    arguments = named(name, head)
    if cut.descriptors:
        for key, x, height in (("hidden", head.hidden_ND, cut.rows), ("weight", head.weight_VD, cut.columns)):
            strides = [x.stride(0), 1]  # of a single column torch may name any stride
            arguments[f"{name}_{key}"] = TensorDescriptor(x, list(x.shape), strides, [height, cut.depth])
    return arguments | {f"{name.upper()}_EVEN": head.hidden_ND.shape[1] % cut.depth == 0}


def fold(heads: list[Head], transform: Transform) -> list[Tensor]:
    """Per head the tiles' statistics, (rows, 2, tiles) fp32; heads share a vocabulary, not N or D."""
    columns = len(heads[0].weight_VD)
    cuts = [tiles_of(head) for head in heads]
    partials = [
        torch.empty(len(h.hidden_ND), 2, blocks(columns, cut.columns), dtype=torch.float32, device=h.hidden_ND.device)
        for h, cut in zip(heads, cuts, strict=True)
    ]
    # One launch for both models, so that the second fills the programs that the first leaves idle at its end; where
    # they differ in the dtype of the product they need tiles of different sizes, and a launch each.
    batches = [[0, 1]] if len(heads) == 2 and cuts[0] == cuts[1] else [[i] for i in range(len(heads))]
    for batch in batches:
        cut = cuts[batch[0]]
        arguments: dict[str, Any] = {}
        for name, i in zip(("first", "second"), (batch[0], batch[-1]), strict=True):
            arguments |= tiled(name, heads[i], cut)
            arguments |= {f"{name}_partials": partials[i], f"{name}_rows": len(heads[i].hidden_ND)}
        total = sum(blocks(len(heads[i].hidden_ND), cut.rows) * blocks(columns, cut.columns) for i in batch)
        persistent = cut.descriptors or INTERPRETED
        grid = min(total, programs(heads[0].hidden_ND)) if persistent else total
        arguments |= {"columns": columns, "programs": grid, **scalars(transform)}
        arguments |= {"TWO": len(batch) == 2, "ROWS": cut.rows, "COLUMNS": cut.columns, "DEPTH": cut.depth}
        arguments |= {"GROUP": cut.group, "PRECISION": cut.precision, "DESCRIPTORS": cut.descriptors}
        launch(_stats_kernel, grid, arguments, warps=cut.warps, stages=cut.stages)
    return partials


@triton.jit
def placed(item, row_blocks, column_blocks, GROUP: tl.constexpr):
    """(row block, column block) of a work item: GROUP row blocks pass over all columns, rows fastest."""
    group = item // (GROUP * column_blocks)
    size = tl.minimum(row_blocks - group * GROUP, GROUP)
    within = item % (GROUP * column_blocks)
    return group * GROUP + within % size, within // size


@triton.jit
def product(
    hidden, weight, row, column, rows, columns, depth, hidden_stride, weight_stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """hidden[row:row + ROWS] @ weight[column:column + COLUMNS].T in fp32.

    Past the last row or column: zeros from TMA, repetitions from pointers; callers mask them.
    """
    logits = tl.zeros((ROWS, COLUMNS), tl.float32)
    if DESCRIPTORS:
        for start in range(0, depth, DEPTH):
            h = hidden.load([row, start])
            w = weight.load([column, start])
            logits = tl.dot(h, w.to(h.dtype).T, logits, input_precision=PRECISION)
    else:
        k = tl.arange(0, DEPTH)[None, :]
        h_row = tl.minimum(row + tl.arange(0, ROWS), rows - 1).to(tl.int64)[:, None]
        w_row = tl.minimum(column + tl.arange(0, COLUMNS), columns - 1).to(tl.int64)[:, None]
        h_at = hidden + h_row * hidden_stride + k
        w_at = weight + w_row * weight_stride + k
        for start in range(0, depth, DEPTH):
            if EVEN:
                h = tl.load(h_at + start)
                w = tl.load(w_at + start)
            else:
                h = tl.load(h_at + start, mask=k < depth - start, other=0.0)
                w = tl.load(w_at + start, mask=k < depth - start, other=0.0)
            logits = tl.dot(h, w.to(h.dtype).T, logits, input_precision=PRECISION)
    return logits


@triton.jit
def _model(
    hidden, weight, bias, partials, rows, columns, depth, hidden_stride, weight_stride, begin, programs, inner, outer,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """This program's tiles of one model: every `programs`-th from `begin`."""
    row_blocks, column_blocks = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    # Flattened into the loop over depth: the next tile's loads are under way while this one's statistics are taken.
    for item in tl.range(begin, row_blocks * column_blocks, programs, flatten=DESCRIPTORS):
        row_block, column_block = placed(item, row_blocks, column_blocks, GROUP)
        row, column = row_block * ROWS, column_block * COLUMNS
        raw = product(
            hidden, weight, row, column, rows, columns, depth, hidden_stride, weight_stride,
            ROWS, COLUMNS, DEPTH, PRECISION, DESCRIPTORS, EVEN,
        )  # fmt: skip
        c = column + tl.arange(0, COLUMNS)
        if bias is not None:
            raw += tl.load(bias + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
        # This product, also where outer is 1, comes before the branch: Triton waits for the matrix unit just before the
        # first use of its result, and where that lies inside a branch, ptxas serialises every matrix instruction.
        logits = transformed(raw, inner, outer, CAPPED)
        if column + COLUMNS > columns:  # only the last tile pays for its mask
            # Added, not selected by: a mask for each column takes more scalar registers than AMD's chips have.
            logits += tl.where(c < columns, 0.0, float("-inf"))[None, :]
        top = tl.max(logits, 1)
        weights = exp(logits - tl.where(top == float("-inf"), 0.0, top)[:, None])
        r = row + tl.arange(0, ROWS)
        out = partials + r.to(tl.int64) * (2 * column_blocks) + column_block
        tl.store(out, top, mask=r < rows)
        tl.store(out + column_blocks, tl.sum(weights, 1), mask=r < rows)


@triton.jit(do_not_specialize=["first_rows", "second_rows", "programs"])
def _stats_kernel(
    first_hidden, first_weight, first_bias, first_depth, first_hidden_stride, first_weight_stride,
    first_partials, first_rows,
    second_hidden, second_weight, second_bias, second_depth, second_hidden_stride, second_weight_stride,
    second_partials, second_rows,
    columns, programs, inner, outer,
    CAPPED: tl.constexpr, TWO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    FIRST_EVEN: tl.constexpr, SECOND_EVEN: tl.constexpr,
):  # fmt: skip
    """Tile statistics of one model or, in one numbering of work items, of two."""
    begin = tl.program_id(0)
    _model(
        first_hidden, first_weight, first_bias, first_partials, first_rows, columns, first_depth,
        first_hidden_stride, first_weight_stride, begin, programs, inner, outer, CAPPED,
        ROWS, COLUMNS, DEPTH, GROUP, PRECISION, DESCRIPTORS, FIRST_EVEN,
    )  # fmt: skip
    if TWO:
        # The second model's items are numbered on from the first's: this program's next one is congruent to its own id.
        done = tl.cdiv(first_rows, ROWS) * tl.cdiv(columns, COLUMNS)
        begin = (begin + programs - done % programs) % programs
        _model(
            second_hidden, second_weight, second_bias, second_partials, second_rows, columns, second_depth,
            second_hidden_stride, second_weight_stride, begin, programs, inner, outer, CAPPED,
            ROWS, COLUMNS, DEPTH, GROUP, PRECISION, DESCRIPTORS, SECOND_EVEN,
        )  # fmt: skip
