"""The mutants of each package, one module a package; tests/mutants.py runs them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutant:
    """`old` (found exactly once in `file`) becomes `new`; `tests` (nodes in tests/, by spaces) must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: str
