"""The log-prob kernels of impl="torch": a compiled single pass on CPUs, and its twin of plain torch operations.

The twin serves machines without a C++ compiler, other devices and fp64. Neither builds a logits matrix: the compiled
pass holds a tile and a panel of weights a thread (1 MiB; beyond 16 threads less, at least 0.5 MiB for 16-bit weights),
the twin a chunk of the vocabulary.

Accuracy. Every product and sum is fp32. bf16 tensors are multiplied as they are where the CPU is faster at it
(`native.faster_bf16`): products are exact, sums fp32, and numbers below 1e-38 count as 0; elsewhere, and where D is
odd, they are widened. RMS error of the difference against fp64, hidden width 1024, vocabulary 32000: 1e-6 nats in each
mode (`srppo bench kernel`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from srppo.kernels import native, reference
from srppo.kernels.precision import fp32_products
from srppo.kernels.types import Gradients, Head, LogprobDiff, RowStats, Transform, accumulator, difference, one_head

CHUNK = 1024  # vocabulary entries, and rows, that torch multiplies at a time
STEP = 16  # rows and columns of a product by torch are multiples of it: BLAS may round what is left over otherwise
ONE_THREAD_FLOPS = 1e7  # below it, waking a second thread costs more than it saves


def logprob_diff(sft_logits_NV: Tensor, base_logits_NV: Tensor, tokens_N: Tensor, transform: Transform) -> LogprobDiff:
    """See srppo.kernels.logprob_diff; rows whose token is IGNORED give 0 throughout."""
    library = _compiled(sft_logits_NV, base_logits_NV)
    if library is None:
        size = max(reference.CHUNK_ELEMENTS // sft_logits_NV.shape[1], 1)
        chunks = zip(*(x.split(size) for x in (sft_logits_NV, base_logits_NV, tokens_N)), strict=True)
        parts = [reference.logprob_diff(sft, base, tokens, transform) for sft, base, tokens in chunks]
        return LogprobDiff(*(torch.cat(part) for part in zip(*parts, strict=True)))
    threads = _threads(32 * sft_logits_NV.numel())
    sft_NV, base_NV = _rows(sft_logits_NV), _rows(base_logits_NV)
    out_5N = native.logits_diff(library, sft_NV, base_NV, tokens_N.contiguous(), _numbers(transform), threads)
    return LogprobDiff(*out_5N.unbind())


def linear_logprob_diff(sft: Head, base: Head, tokens_N: Tensor, transform: Transform) -> LogprobDiff:
    """See srppo.kernels.linear_logprob_diff; no row is ignored."""
    if one_head(sft, base) and len(tokens_N) <= CHUNK:
        # At few rows the reading of the head is what costs, so both models' rows share one pass.
        both = sft._replace(hidden_ND=torch.cat([sft.hidden_ND, base.hidden_ND]))
        stats = forward(both, tokens_N.repeat(2), transform)
        halves = [x.chunk(2) if len(tokens_N) else (x, x) for x in stats]
        return difference(*(RowStats(*(half[i] for half in halves)) for i in (0, 1)))
    return difference(*(forward(head, tokens_N, transform) for head in (sft, base)))


def forward(head: Head, tokens_N: Tensor, transform: Transform) -> RowStats:
    """Row statistics of softmax(transform(hidden @ weight.T + bias)) at `tokens`."""
    library = _compiled(*head)
    if library is None:
        waves = zip(head.hidden_ND.split(CHUNK), tokens_N.split(CHUNK), strict=True)
        parts = [_wave_stats(head._replace(hidden_ND=h_ND), t_N, transform) for h_ND, t_N in waves]
        return RowStats(*map(torch.cat, zip(*parts, strict=True)))
    hidden_ND, weight_VD, bias_V = _rows(head.hidden_ND), _rows(head.weight_VD), head.bias_V
    out_3N = native.linear_stats(
        library,
        hidden_ND,
        weight_VD,
        None if bias_V is None else bias_V.float().contiguous(),
        tokens_N.contiguous(),
        _numbers(transform),
        _is_bf16(head) and native.load().bf16 and hidden_ND.shape[1] % 2 == 0,
        _threads(2 * hidden_ND.numel() * len(weight_VD)),
    )
    return RowStats(*out_3N)


def backward(
    head: Head, tokens_N: Tensor, transform: Transform, stats: RowStats, grad_N: Tensor, needs: tuple[bool, ...]
) -> Gradients:
    """Gradients of sum(grad * log-prob) in hidden, weight and bias, each in its input's dtype, None unless needed.

    The logits are computed again, a chunk of vocabulary and a wave of rows at a time; sums are fp32.
    """
    dtype, (rows, depth), columns = accumulator(*head), head.hidden_ND.shape, len(head.weight_VD)
    hidden_ND, weight_VD, bias_V = head
    wide_ND = padded(hidden_ND.to(dtype))  # in rows and columns of padding every product is 0
    d_hidden_ND = torch.zeros_like(wide_ND) if needs[0] else None
    d_weight_VD = torch.empty_like(weight_VD) if needs[1] else None
    d_bias_V = torch.empty_like(bias_V) if bias_V is not None and needs[2] else None
    vectors = [tokens_N, stats.max_N, stats.log_sum_N, grad_N.to(dtype)]
    with fp32_products():
        for start in range(0, columns, CHUNK):
            chunk = slice(start, min(start + CHUNK, columns))
            count = chunk.stop - start
            weight_CD = padded(weight_VD[chunk].to(dtype))
            bias_C = None if bias_V is None else bias_V[chunk].to(dtype)
            d_weight_CD, d_bias_C = torch.zeros_like(weight_CD), weight_CD.new_zeros(count)
            for first in range(0, rows, CHUNK):
                wave, size = slice(first, first + CHUNK), min(rows - first, CHUNK)
                terms = max(size, STEP)  # of sums over rows: with more zeros BLAS might cut them elsewhere
                d_raw_NC = wide_ND[wave] @ weight_CD.T
                _to_gradient(d_raw_NC[:size, :count], start, bias_C, [x[wave] for x in vectors], transform)
                if d_hidden_ND is not None:
                    d_hidden_ND[wave].addmm_(d_raw_NC, weight_CD)
                if d_weight_VD is not None:
                    d_weight_CD.addmm_(d_raw_NC[:terms].T, wide_ND[first : first + terms])
                if d_bias_V is not None:
                    d_bias_C += d_raw_NC[:terms, :count].sum(dim=0)
            if d_weight_VD is not None:
                d_weight_VD[chunk] = d_weight_CD[:count, :depth]
            if d_bias_V is not None:
                d_bias_V[chunk] = d_bias_C
    if d_hidden_ND is not None:
        d_hidden_ND = d_hidden_ND[:rows, :depth].to(hidden_ND.dtype)
    return d_hidden_ND, d_weight_VD, d_bias_V


def _to_gradient(
    raw_NC: Tensor, first: int, bias_C: Tensor | None, vectors: list[Tensor], transform: Transform
) -> None:
    """Raw logits of columns first.. become the gradient in them, in place."""
    tokens_N, max_N, log_sum_N, grad_N = vectors
    library = _compiled(raw_NC)
    if library is not None:
        numbers, threads = _numbers(transform), _threads(32 * raw_NC.numel())
        native.logits_gradient(library, raw_NC, first, bias_C, vectors, numbers, threads)
        return
    if bias_C is not None:
        raw_NC += bias_C
    slope = transform.logit_scale / transform.temperature
    bent_NC = None
    if transform.softcap is not None:
        bent_NC = torch.tanh(raw_NC * (transform.logit_scale / transform.softcap))
    z_NC = transform(raw_NC)
    raw_NC.copy_(z_NC.sub_(max_N[:, None]).sub_(log_sum_N[:, None]).exp_().neg_())
    at_N = tokens_N - first
    inside_N = ((at_N >= 0) & (at_N < raw_NC.shape[1])).nonzero().squeeze(-1)
    raw_NC[inside_N, at_N[inside_N]] += 1.0
    raw_NC *= grad_N[:, None] * slope
    if bent_NC is not None:
        raw_NC *= 1.0 - bent_NC.square()


def _wave_stats(head: Head, tokens_N: Tensor, transform: Transform) -> RowStats:
    """The twin of the compiled pass: chunks of the vocabulary, combined online in order."""
    dtype, rows, depth = accumulator(*head), len(tokens_N), head.hidden_ND.shape[1]
    wide_ND, targets_N = padded(head.hidden_ND.to(dtype)), padded(tokens_N)
    max_N = wide_ND.new_full((len(wide_ND),), -torch.inf)
    sum_N, target_N = torch.zeros_like(max_N), torch.zeros_like(max_N)
    # Used by every chunk: the allocator keeps nothing.
    z_buffer = wide_ND.new_empty(len(wide_ND) * min(CHUNK, len(head.weight_VD) + STEP))
    weight_buffer = wide_ND.new_empty(CHUNK * depth if head.weight_VD.dtype != dtype else 0)
    # torch leaves products of up to 16 x 16 x 16 in fp32: deeper than that, all chunks and rows are of one kind.
    with torch.no_grad(), fp32_products(bf16_inside=_in_tiles(head) and depth > STEP):
        for start, weight_CD in zip(range(0, len(head.weight_VD), CHUNK), head.weight_VD.split(CHUNK), strict=True):
            count = len(weight_CD)
            if weight_CD.dtype != dtype:
                weight_CD = weight_buffer[: weight_CD.numel()].view(weight_CD.shape).copy_(weight_CD)
            weight_CD = padded(weight_CD)
            z_NC = z_buffer[: len(wide_ND) * len(weight_CD)].view(len(wide_ND), len(weight_CD))
            z_NC = torch.mm(wide_ND, weight_CD.T, out=z_NC)[:, :count]
            if head.bias_V is not None:
                z_NC += head.bias_V[start : start + count].to(dtype)
            z_NC = z_NC if transform == Transform() else transform(z_NC)
            at_N = targets_N - start
            chosen_N = z_NC.gather(1, at_N.clamp(0, count - 1)[:, None])[:, 0]
            target_N = torch.where((at_N >= 0) & (at_N < count), chosen_N, target_N)
            next_N = torch.maximum(max_N, z_NC.amax(dim=1))
            shift_N = next_N.masked_fill(next_N == -torch.inf, 0.0)  # a row of -inf only, so far
            z_NC -= shift_N[:, None]
            sum_N = sum_N * (max_N - shift_N).exp() + z_NC.exp_().sum(dim=1)
            max_N = next_N
    return RowStats((target_N - max_N)[:rows], max_N[:rows], sum_N.log()[:rows])


def padded(x: Tensor) -> Tensor:
    """x with zeros up to multiples of STEP: a row's bits hang neither on its place nor on how many there are."""
    missing = [-size % STEP for size in reversed(x.shape)]
    return F.pad(x, [side for count in missing for side in (0, count)]) if any(missing) else x


def _compiled(*tensors: Tensor | None) -> native.ctypes.CDLL | None:
    """The compiled kernels where they can take these tensors."""
    present = [x for x in tensors if x is not None]
    if any(x.device.type != "cpu" or x.dtype not in native.DTYPES for x in present):
        return None
    return native.load().library


def _rows(x: Tensor) -> Tensor:
    """Rows may be strided; elements within a row may not."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _numbers(transform: Transform) -> tuple[float, float, float]:
    return transform.logit_scale, transform.softcap or 0.0, 1.0 / transform.temperature


def _threads(operations: float) -> int:
    return torch.get_num_threads() if operations > ONE_THREAD_FLOPS else 1


def _is_bf16(head: Head) -> bool:
    return head.hidden_ND.dtype == head.weight_VD.dtype == torch.bfloat16


def _in_tiles(head: Head) -> bool:
    """Whether torch is to multiply in bf16: the tensors hold nothing else, and this CPU has AMX."""
    return _is_bf16(head) and head.hidden_ND.device.type == "cpu" and native.has_bf16_tiles()
