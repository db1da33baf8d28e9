"""Time, memory and ceilings of a device, measured. Rivals take turns, so that drift of the machine hits all alike."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srppo.models.heap import give_back

MIN_ROUNDS = 3
FLUSH_BYTES = 256 << 20  # more than the L2 of any GPU; what triton.testing.do_bench clears
CEILING_TRIES = 8

Call = Callable[[], Any]


@dataclass(frozen=True)
class Quantiles:
    """20%, 50% and 80% of a sample."""

    q20: float
    median: float
    q80: float


def quantiles(sample: list[float]) -> Quantiles:
    """Linear interpolation between order statistics."""
    q20, median, q80 = torch.tensor(sample, dtype=torch.float64).quantile(
        torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    )
    return Quantiles(float(q20), float(median), float(q80))


class Timer:
    """Milliseconds of one call: perf_counter on a CPU; on a GPU events around it, after the L2 has been overwritten."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None

    def __call__(self, call: Call) -> float:
        if self._flush is None:
            began = time.perf_counter()
            result = call()
            latency_ms = (time.perf_counter() - began) * 1e3
            del result  # after the clock: giving memory back is the caller's time
            return latency_ms
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def round_robin(
    calls: Mapping[str, Call], timer: Timer, rounds: int, seconds: float, seed: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Latencies in ms: each rival once a round, in an order drawn anew each round.

    Stops after `rounds`, or after `seconds` once there are MIN_ROUNDS. A rival that raises drops out. Returns the
    samples, equally many for each rival left, and why others dropped out.
    """
    order, draw = list(calls), random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    failed: dict[str, str] = {}
    gc.collect()
    gc.disable()
    began = time.perf_counter()
    try:
        for done in range(rounds):
            if done >= MIN_ROUNDS and time.perf_counter() - began > seconds:
                break
            draw.shuffle(order)
            for name in list(order):
                try:
                    samples[name].append(timer(calls[name]))
                except Exception as error:  # another package's; its row then says why it has no figures
                    failed[name] = failure(error)
                    order.remove(name)
    finally:
        gc.enable()
    return {name: sample for name, sample in samples.items() if name not in failed}, failed


def failure(error: Exception) -> str:
    """One short line of what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def peak_extra_bytes(call: Call, device: str) -> int | None:
    """Growth of memory during one call, above what stood before it; None where the system does not say.

    A GPU: max_memory_allocated. A CPU: the high-water mark of resident memory (VmHWM, reset through clear_refs), after
    freed memory has been given back to the system; pages touched for the first time count, whoever allocates them.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before_bytes = _status("VmRSS")
        call()
        return max(_status("VmHWM") - before_bytes, 0)
    except (OSError, KeyError):
        return None


def tensor_storages() -> dict[int, int]:
    """Address and bytes of every tensor's memory that Python can reach: what a rival keeps between calls shows here."""
    found = {}
    for each in gc.get_objects():
        if issubclass(type(each), torch.Tensor) and each.layout == torch.strided:
            try:
                storage = each.untyped_storage()
                found[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # a tensor without memory of its own, of torch.compile
                continue
    return found


def copy_gb_s(device: str) -> float:
    """Best rate of copying a large buffer, bytes read and written, 10^9 a second."""
    size = (1 << 30) if device == "cuda" else (1 << 28)  # two of them lie beyond the caches
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best_seconds(lambda: target.copy_(source), device) / 1e9


def gemm_gflops(device: str, dtype: str) -> float:
    """Best rate of a large square product in a dtype, 10^9 operations a second."""
    size = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _best_seconds(lambda: torch.mm(a, b, out=out), device) / 1e9


def _best_seconds(call: Call, device: str) -> float:
    timer = Timer(device)
    return min(timer(call) for _ in range(CEILING_TRIES + 1)) / 1e3


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024
    raise KeyError(key)
