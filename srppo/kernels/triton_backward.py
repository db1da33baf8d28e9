"""The gradient of linear_logprob: logits are recomputed a block at a time, the products for dH and dW are cuBLAS's.

Cost: the forward GEMM again, then one GEMM each for dH and dW (6 N V D operations in all) and d logits written and
read WAVE x CHUNK at a time, so that no N x V matrix exists. The vocabulary is the outer loop: a chunk's dW is complete
after all waves of rows, and only that chunk is held in fp32.

The same input gives the same bits every time. Of dH, unlike of what the forward pass gives, a row may have other bits
in another batch: cuBLAS picks its kernels by the sizes of the matrices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from srppo.kernels.precision import fp32_products
from srppo.kernels.triton_common import INTERPRETED, TILES, blocks, launch, programs, scalars, tanh
from srppo.kernels.triton_tiles import operands, placed, product, tiled, tiles_of
from srppo.kernels.types import Gradients, Head, RowStats, Transform

WAVE = 4096  # rows and
CHUNK = 8192  # columns of d logits held at once: 64 MiB in bf16, 128 MiB in fp32
WIDEST = max(cut.columns for cut in TILES.values())


@fp32_products()
def backward(
    head: Head, tokens_N: Tensor, transform: Transform, stats: RowStats, grad_N: Tensor, needs: tuple[bool, bool, bool]
) -> Gradients:
    """Gradients of hidden (N, D), weight (V, D) and bias (V) that are needed, each in its input's dtype.

    Sums are fp32. d logits are bf16 where both operands are, so that the GEMMs run on the matrix units; with fp16,
    which has no room for small probabilities, and with mixed dtypes they are fp32.
    """
    rows, (columns, depth), device = len(tokens_N), head.weight_VD.shape, head.weight_VD.device
    need_hidden, need_weight, need_bias = needs
    need_bias = need_bias and head.bias_V is not None
    d_hidden_ND = torch.zeros(rows, depth, dtype=torch.float32, device=device) if need_hidden else None
    # Without rows nothing is written.
    fresh = torch.empty_like if rows else torch.zeros_like
    d_weight_VD = fresh(head.weight_VD, memory_format=torch.contiguous_format) if need_weight else None
    d_bias_V = torch.zeros(columns, dtype=torch.float32, device=device) if need_bias else None
    dense, vectors = operands(head), (tokens_N, stats.max_N, stats.log_sum_N, grad_N)
    bias_V = None if dense.bias_V is None else F.pad(dense.bias_V, (0, WIDEST))  # read a tile at a time, as below
    dtype = torch.bfloat16 if dense.hidden_ND.dtype == torch.bfloat16 else torch.float32
    # Whole tiles wide: a mask for the ragged last column would cost every store a predicate, and registers spill.
    buffer = torch.empty(min(rows, WAVE), blocks(min(CHUNK, columns), WIDEST) * WIDEST, dtype=dtype, device=device)
    for start in range(0, columns if rows and any(needs) else 0, CHUNK):
        chunk = slice(start, min(start + CHUNK, columns))
        part = Head(dense.hidden_ND, dense.weight_VD[chunk], None if bias_V is None else bias_V[start:])
        d_chunk_CD: Tensor | None = None
        for begin in range(0, rows, WAVE):
            wave = slice(begin, min(begin + WAVE, rows))
            d_logits_WC = buffer[: wave.stop - begin, : chunk.stop - start]
            piece = part._replace(hidden_ND=part.hidden_ND[wave])
            _d_logits(piece, [x[wave].contiguous() for x in vectors], transform, start, d_logits_WC)
            if d_hidden_ND is not None:
                _add_product(d_hidden_ND[wave], d_logits_WC, piece.weight_VD)
            if d_weight_VD is not None and rows <= WAVE:
                _product_into(d_weight_VD[chunk], d_logits_WC.T, piece.hidden_ND)
            elif d_weight_VD is not None:
                if d_chunk_CD is None:
                    d_chunk_CD = torch.zeros(chunk.stop - start, depth, dtype=torch.float32, device=device)
                _add_product(d_chunk_CD, d_logits_WC.T, piece.hidden_ND)
            if d_bias_V is not None:
                d_bias_V[chunk] += d_logits_WC.sum(0, dtype=torch.float32)
        if d_weight_VD is not None and d_chunk_CD is not None:
            d_weight_VD[chunk] = d_chunk_CD
    return (
        None if d_hidden_ND is None else d_hidden_ND.to(head.hidden_ND.dtype),
        d_weight_VD,
        None if d_bias_V is None or head.bias_V is None else d_bias_V.to(head.bias_V.dtype),
    )


def _product_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, accumulated in fp32 and rounded to out's dtype once."""
    if a.dtype == b.dtype == out.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a.float(), b.float()))


def _add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in fp32."""
    if a.dtype == b.dtype == torch.bfloat16:
        _bf16_adder(out.device)(out, a, b)
    else:
        out.addmm_(a.float(), b.float())


@functools.cache
def _bf16_adder(device: torch.device) -> Callable[[Tensor, Tensor, Tensor], object]:
    """The fastest way to add a bf16 product to an fp32 matrix on the device; not all builds of torch have all."""
    ways: list[Callable[[Tensor, Tensor, Tensor], object]] = [
        lambda out, a, b: torch.addmm(out, a, b, out_dtype=torch.float32, out=out),
        lambda out, a, b: out.add_(torch.mm(a, b, out_dtype=torch.float32)),
    ]
    for add in ways:
        a, out = torch.ones(16, 16, dtype=torch.bfloat16, device=device), torch.ones(16, 16, device=device)
        try:
            add(out, a, a)
        except (RuntimeError, NotImplementedError):
            continue
        if (out == 17).all():
            return add
    return lambda out, a, b: out.addmm_(a.float(), b.float())


def _d_logits(head: Head, vectors: list[Tensor], transform: Transform, first: int, d_logits_WC: Tensor) -> None:
    """Write d loss / d raw logits of a wave of rows and a chunk of columns that begins at token `first`.

    vectors: tokens, row maxima, log sums and upstream gradients, W each.
    The tiles of the last columns are written whole, past those of d_logits_WC, and the bias is read so: both must have
    the room.
    """
    cut = tiles_of(head)
    if d_logits_WC.element_size() > head.hidden_ND.element_size():  # fp32 on its way out takes more shared memory
        cut = replace(cut, columns=cut.columns // 2)
    rows, columns = d_logits_WC.shape
    total = blocks(rows, cut.rows) * blocks(columns, cut.columns)
    grid = min(total, programs(head.hidden_ND)) if cut.descriptors or INTERPRETED else total
    arguments = tiled("head", head, cut) | dict(zip(("tokens", "maxima", "log_sums", "grads"), vectors, strict=True))
    arguments |= {
        "d_logits": d_logits_WC,
        "rows": rows,
        "columns": columns,
        "first": first,
        "out_stride": d_logits_WC.stride(0),
        "programs": grid,
        **scalars(transform),
        "ROWS": cut.rows,
        "COLUMNS": cut.columns,
        "DEPTH": cut.depth,
        "GROUP": cut.group,
        "PRECISION": cut.precision,
        "DESCRIPTORS": cut.descriptors,
    }
    launch(_d_logits_kernel, grid, arguments, warps=cut.warps, stages=cut.stages)


@triton.jit
def _store_half(
    raw, bias, tokens, maxima, log_sums, grads, d_logits, row, column, rows, first, out_stride, inner, outer,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Turn a tile of raw logits into d logits and write it."""
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    inside = r < rows
    if bias is not None:
        raw += tl.load(bias + c).to(tl.float32)[None, :]
    slopes = tl.load(grads + r, mask=inside, other=0.0)[:, None] * (inner * outer)  # inner is 1 without a cap
    bent = tanh(inner * raw) if CAPPED else raw
    logits = outer * bent
    top = tl.load(maxima + r, mask=inside, other=0.0)[:, None]
    log_sum = tl.load(log_sums + r, mask=inside, other=0.0)[:, None]
    # Centred before the log sum is taken away: their sum would lose digits where logits share a large offset.
    # tl.exp, slower than `exp`: around that one ptxas moves so much of both halves together that registers spill.
    probabilities = tl.exp((logits - top) - log_sum)
    target = (tl.load(tokens + r, mask=inside, other=-1) - first).to(tl.int32)[:, None]
    result = (tl.where(c[None, :] == target, 1.0, 0.0) - probabilities) * slopes
    if CAPPED:
        result *= 1.0 - bent * bent
    at = d_logits + r[:, None] * out_stride + c[None, :]  # below WAVE x CHUNK: 32 bits hold it
    tl.store(at, result.to(d_logits.dtype.element_ty), mask=inside[:, None])


# The rows of RowStats lie N apart: on 16 bytes or not, as N falls.
@triton.jit(
    do_not_specialize=["rows", "first", "programs"],
    do_not_specialize_on_alignment=["tokens", "maxima", "log_sums", "grads"],
)
def _d_logits_kernel(
    head_hidden, head_weight, head_bias, head_depth, head_hidden_stride, head_weight_stride,
    tokens, maxima, log_sums, grads, d_logits, rows, columns, first, out_stride, programs, inner, outer,
    CAPPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, HEAD_EVEN: tl.constexpr,
):  # fmt: skip
    """(onehot(token) - softmax) * upstream gradient * d logits / d raw, tile by tile."""
    row_blocks, column_blocks = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    for item in tl.range(tl.program_id(0), row_blocks * column_blocks, programs, flatten=DESCRIPTORS):
        row_block, column_block = placed(item, row_blocks, column_blocks, GROUP)
        row, column = row_block * ROWS, column_block * COLUMNS
        raw = product(
            head_hidden, head_weight, row, column, rows, columns, head_depth, head_hidden_stride, head_weight_stride,
            ROWS, COLUMNS, DEPTH, PRECISION, DESCRIPTORS, HEAD_EVEN,
        )  # fmt: skip
        # In halves: a tile as wide as the accumulator and the probabilities beside it do not fit in registers.
        left, right = raw.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()
        for half in tl.static_range(2):
            _store_half(
                right if half else left, head_bias, tokens, maxima, log_sums, grads, d_logits, row,
                column + half * (COLUMNS // 2), rows, first, out_stride, inner, outer, CAPPED,
                ROWS, COLUMNS // 2,
            )  # fmt: skip
