"""How matrices are multiplied while a kernel runs, whatever the user has set."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_LOCK = threading.RLock()  # the settings are global: of two threads the later must not restore the earlier's


@contextmanager
def fp32_products(*, bf16_inside: bool = False) -> Iterator[None]:
    """Products of fp32 matrices in fp32: no TF32, no autocast; products of bf16 matrices with fp32 sums throughout.

    bf16_inside: on a CPU, rounded to bf16 with fp32 sums. That is exact, and at AMX speed, where the matrices hold bf16
    values.
    """
    backends: list[Any] = [torch.backends.mkldnn.matmul, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    cublas = torch.backends.cuda.matmul
    with _LOCK, torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        before = [backend.fp32_precision for backend in backends]
        reduced = cublas.allow_bf16_reduced_precision_reduction  # partial sums of a split product rounded to bf16
        if reduced:
            cublas.allow_bf16_reduced_precision_reduction = False
        for backend, precision in zip(backends, ("bf16" if bf16_inside else "ieee", "ieee"), strict=True):
            backend.fp32_precision = precision
        try:
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
            if reduced:
                cublas.allow_bf16_reduced_precision_reduction = True
