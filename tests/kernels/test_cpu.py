"""What impl="torch" promises: a row's bits are its own in every batch, whatever the user has set; and memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import (
    BF16,
    INF,
    NAN,
    OFFSET,
    Allocations,
    Head,
    Problem,
    diff_of,
    dtype_pairs,
    fast,
    few,
    grads_of,
    make_head,
    make_tokens,
    one_of,
    problems,
    rng,
    same_bits,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from srppo.kernels import cpu, logprob_diff_parts, native


def bits_of(sft: Head, base: Head, logits: list[Tensor], tokens_N: Tensor, impl: Any) -> list[Tensor]:
    """Every N-sized result of the three operations."""
    options = {"impl": impl, "temperature": 0.9}
    return [
        *diff_of(sft, base, tokens_N, **options),
        *diff_of(sft, sft._replace(hidden_ND=base.hidden_ND), tokens_N, **options),  # one head
        one_of(sft, tokens_N, **options),
        *logprob_diff_parts(*logits, tokens_N, **options),
    ]


@fast
@dtype_pairs
@pytest.mark.parametrize(("width", "vocabulary"), [(64, 1000), (1, 33), (3, 17), (257, 4099), (1024, 515)])
def test_a_row_has_the_same_bits_in_every_batch(
    impl: Any, pair: tuple[torch.dtype, torch.dtype], width: int, vocabulary: int
) -> None:
    sft, base = (make_head(512, width, vocabulary, pair, seed=seed) for seed in (1, 2))
    logits, tokens_N = [head.exact().to(pair[0]) for head in (sft, base)], make_tokens(512, vocabulary)
    before = [x.clone() for x in (*sft, *base, *logits, tokens_N)]
    whole = bits_of(sft, base, logits, tokens_N, impl)
    assert all(map(torch.equal, (*sft, *base, *logits, tokens_N), before))  # no input is written to
    order = torch.randperm(512, generator=rng(3))
    batches = [torch.arange(512), order, *(order[:rows] for rows in (1, 2, 7, 15, 16, 17)), torch.arange(495, 512)]
    for picked in batches:
        heads = [head._replace(hidden_ND=head.hidden_ND[picked]) for head in (sft, base)]
        again = bits_of(*heads, [x_NV[picked] for x_NV in logits], tokens_N[picked], impl)
        for i, (row_bits, all_bits) in enumerate(zip(again, whole, strict=True)):
            assert same_bits(row_bits, all_bits[picked]), f"result {i} at N = {len(picked)}"


@fast
@few
@given(problem=problems(), junk=st.sampled_from([NAN, INF, -INF, 0.0, OFFSET]), data=st.data())
def test_rows_do_not_see_each_other(impl: Any, problem: Problem, junk: float, data: st.DataObject) -> None:
    sft, base, tokens_N = problem
    own = data.draw(st.integers(0, len(tokens_N) - 1))
    others_N = torch.arange(len(tokens_N)) != own
    logits = [head.exact().float() for head in (sft, base)]
    alone = bits_of(sft, base, logits, tokens_N, impl)
    sft, base = (head._replace(hidden_ND=head.hidden_ND.masked_fill(others_N[:, None], junk)) for head in (sft, base))
    logits = [x_NV.masked_fill(others_N[:, None], junk) for x_NV in logits]
    among = bits_of(sft, base, logits, torch.where(others_N, 0, tokens_N), impl)
    assert all(same_bits(a_N[own], b_N[own]) for a_N, b_N in zip(alone, among, strict=True))


@fast
def test_a_rows_hidden_gradient_has_the_same_bits_alone(impl: Any) -> None:
    head = make_head(1025, 16, 301)
    tokens_N = make_tokens(1025, 301)

    def gradient(rows: slice) -> Tensor:
        hidden_ND = head.hidden_ND[rows].clone().requires_grad_()
        one_of(head._replace(hidden_ND=hidden_ND), tokens_N[rows], impl).sum().backward()
        return hidden_ND.grad

    whole_ND = gradient(slice(None))
    for rows in (slice(0, 1), slice(0, 17), slice(1024, 1025)):
        assert torch.equal(gradient(rows), whole_ND[rows])


class Products(TorchDispatchMode):
    """(rows, columns, terms) of every product that torch makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[tuple[int, int, int]] = []
        self.modes: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in ("bmm", "baddbmm", "addmv", "mv", "dot", "addbmm", "linear"), f"{name} is not looked at here"
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[-2:]
            self.sizes.append((a.shape[0], b.shape[1], a.shape[1]))
            self.modes.add(torch.backends.mkldnn.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@fast
@dtype_pairs
def test_no_product_has_rows_or_columns_left_over(impl: Any, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """BLAS has kernels for few rows or columns, and for what larger ones leave over, that round otherwise.

    So it is with 2 to 8 columns on AMD's CPUs, and beyond a multiple of 4 rows with MKL_CBWR=COMPATIBLE.
    """
    native.load()  # which multiplies once, to see whether it agrees
    for rows, width, vocabulary in itertools.product((1, 17, 1025), (1, 24, 64), (1, 8, 1041, 2048)):
        sft, base = (make_head(rows, width, vocabulary, pair, seed=seed) for seed in (1, 2))
        tokens_N = make_tokens(rows, vocabulary)
        with Products() as seen:
            diff_of(sft, base, tokens_N, impl)
            diff_of(sft, sft._replace(hidden_ND=base.hidden_ND), tokens_N, impl)
            grads_of(sft, tokens_N, torch.ones(rows), impl)
        assert seen.sizes and not any(m % cpu.STEP or n % cpu.STEP for m, n, _ in seen.sizes), (rows, width, vocabulary)


@pytest.mark.parametrize("impl", ["plain"], indirect=True)
def test_products_in_bf16_are_of_a_size_that_torch_multiplies_so(impl: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU with AMX torch leaves products of up to 16 x 16 x 16 in fp32: a row alone must not be one of those."""
    monkeypatch.setattr(native, "has_bf16_tiles", lambda: True)
    for rows, width, vocabulary in itertools.product((1, 15, 1025), (1, 16, 17, 40), (1, 8, 1027, 2048)):
        head = make_head(rows, width, vocabulary, (BF16, BF16))
        with Products() as seen:
            one_of(head, make_tokens(rows, vocabulary), impl)
        assert seen.modes == {"bf16" if width > 16 else "ieee"}
        assert width <= 16 or all(m * n * k > 16**3 for m, n, k in seen.sizes), (rows, width, vocabulary)


@fast
@dtype_pairs
def test_bits_do_not_depend_on_threads(impl: Any, pair: tuple[torch.dtype, torch.dtype]) -> None:
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            bits = []
            for rows, width, vocabulary in ((1, 64, 4099), (70, 257, 4099), (300, 1024, 515)):
                sft, base = (make_head(rows, width, vocabulary, pair, seed=seed) for seed in (1, 2))
                logits = [x_NV.to(pair[0]) for x_NV in torch.randn(2, rows, vocabulary, generator=rng(3))]
                bits += bits_of(sft, base, logits, make_tokens(rows, vocabulary), impl)
            results.append(bits)
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(*each) for each in zip(results[0], results[1], strict=True)), "two threads"
    assert all(same_bits(*each) for each in zip(results[0], results[2], strict=True)), "the same call again"


@fast
@dtype_pairs
@pytest.mark.parametrize("shared", [False, True], ids=["two heads", "one head"])
def test_no_logits_matrix_is_allocated(impl: Any, pair: tuple[torch.dtype, torch.dtype], shared: bool) -> None:
    rows, vocabulary, width = 512, 8192, 32
    sft, base = (make_head(rows, width, vocabulary, pair, seed=seed) for seed in (1, 2))
    base = base._replace(weight_VD=sft.weight_VD, bias_V=sft.bias_V) if shared else base
    tokens_N = make_tokens(rows, vocabulary)
    leaves = Head(*(x.requires_grad_() for x in sft))

    def train() -> None:
        one_of(leaves, tokens_N, impl, softcap=30.0).sum().backward()

    calls: list[Callable[[], Any]] = [lambda: diff_of(sft, base, tokens_N, impl), train]
    tokens_N = tokens_N.clone()
    for call in calls:
        for ignored in (0, 1):
            tokens_N[:ignored] = -100
            with Allocations(*sft, *base) as allocations:
                call()
            assert 0 < allocations.largest <= rows * vocabulary // 2


PEAK = """
import sys, torch
from srppo.kernels import linear_logprob, linear_logprob_diff

torch.set_num_threads(int(sys.argv[2]))

def mib(name):
    with open("/proc/self/status") as file:
        return int(next(line for line in file if line.startswith(name)).split()[1]) / 1024

N, D, V = 1024, 1024, 128256
weight_VD = (torch.randn(V // 128, D) / 32).bfloat16().repeat(128, 1)
other_VD = weight_VD.flip(1)
hidden_ND, other_ND = torch.randn(2, N, D).bfloat16()
tokens_N = torch.randint(V, (N,))
def operation(h, v, g, w, t):
    if sys.argv[1] == "diff":
        return linear_logprob_diff(h, v, g, w, t)
    return linear_logprob(h, v, t)

operation(hidden_ND[:16], weight_VD[:4096], other_ND[:16], other_VD[:4096], tokens_N[:16] % 4096)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = mib("VmRSS")
out_N = operation(hidden_ND, weight_VD, other_ND, other_VD, tokens_N)
growth = mib("VmHWM") - before
assert out_N.isfinite().all() and out_N.any()
print(growth)
"""


@fast
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
@pytest.mark.parametrize(("operation", "threads"), [("diff", 2), ("diff", 16), ("one", 2)])
def test_extra_memory_at_a_vocabulary_of_128k_is_at_most_32_mb(impl: Any, operation: str, threads: int) -> None:
    """Peak resident memory of a fresh process beyond its inputs: N x V in bf16 alone would be 263 MB a model."""
    run = subprocess.run(
        [sys.executable, "-c", PEAK, operation, str(threads)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 32e6 / 2**20
