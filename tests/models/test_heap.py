"""Memory that is freed leaves the process, where it was asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama

from srppo.models import heap
from srppo.models.language_model import LanguageModel

HOLES = """
import torch
from srppo.models import heap
def mib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmRSS")).split()[1]) / 1024
torch.full((1 << 24,), 1.0)  # glibc has seen a large block freed: from now on those of 300 KiB lie in the heap
{how}
start, large, small = mib(), [], []
for _ in range(400):
    large.append(torch.full((75_000,), 1.0))
    small.append(torch.full((500,), 1.0))
full = mib() - start
del large
{then}
print(full, mib() - start)
"""


@pytest.mark.skipif(heap.glibc() is None or not Path("/proc/self/status").exists(), reason="needs glibc on Linux")
@pytest.mark.parametrize(("how", "then"), [("heap.map_large()", ""), ("", "heap.give_back()")])
def test_blocks_between_those_that_stay_return(how: str, then: str) -> None:
    """400 blocks of 300 KB and 400 of 2 KB in turn; the large ones go, and lie in the middle of the heap."""
    program = HOLES.format(how=how, then=then)
    clean = {key: value for key, value in os.environ.items() if key not in heap.VARIABLES}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=clean, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    full, left = map(float, done.stdout.split())
    assert full > 100 and left < 20, (full, left)


def test_what_the_environment_says_of_the_heap_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in heap.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert heap.ruled() == (heap.glibc() is not None)
    monkeypatch.setenv("MALLOC_TOP_PAD_", "0")
    assert not heap.ruled()


def test_who_recomputes_puts_memory_before_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    monkeypatch.setattr("srppo.models.language_model.map_large", lambda: asked.append(True))
    model = LanguageModel(tiny_llama())
    assert not asked
    model.recompute_activations()
    assert asked == [True] and torch.is_grad_enabled()
