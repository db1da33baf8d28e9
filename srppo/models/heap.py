"""What glibc's heap keeps of freed memory, on a CPU.

Tensors of all sizes come and go in it, and small ones that stay leave holes that no later one fills: a pass may take
twice what it holds, and where activations are recomputed nine times as much, so that nothing is saved. Blocks that are
mapped one by one return to the system as they are freed; each costs page faults anew, which make a pass half as long
again. Figures: docs/models.md. Other C libraries are left as they are.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

MAPPED = 1 << 17  # bytes from which a block is mapped: where glibc itself begins, before it sees such blocks freed
LARGEST = 1 << 25  # the most that glibc itself would raise that to
_TRIM, _MMAP = -1, -3  # of mallopt: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
"""Of the environment: where one is set, glibc goes by that alone, and so does this module."""

_for_good = False


@cache
def glibc() -> Any:
    """The C library where it is glibc, else None."""
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "gnu_get_libc_version") else None
    except OSError:
        return None


def ruled() -> bool:
    """Whether the heap is glibc's, and keeps what glibc's own rule says."""
    return glibc() is not None and not any(name in os.environ for name in VARIABLES)


def give_back() -> None:
    """Return freed pages, wherever in the heap they lie: some milliseconds."""
    if glibc() is not None:
        glibc().malloc_trim(0)


def map_large() -> None:
    """From now on, memory comes before time: blocks of MAPPED bytes return to the system as they are freed."""
    global _for_good
    if ruled():
        _for_good = True
        glibc().mallopt(_MMAP, MAPPED)


@contextmanager
def large_mapped() -> Iterator[None]:
    """Within, it is as after `map_large`; then as glibc has it where such blocks have been freed before."""
    if not ruled() or _for_good:
        yield
        return
    glibc().mallopt(_MMAP, MAPPED)
    try:
        yield
    finally:
        glibc().mallopt(_MMAP, LARGEST)
        glibc().mallopt(_TRIM, 2 * LARGEST)
