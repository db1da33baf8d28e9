"""The files of golden values are what `make.py` writes, and say where they come from."""

from __future__ import annotations

import json
import math
import runpy
from typing import Any

from golden_cases import (
    GOLDENS,
    load,
)


def same(a: Any, b: Any) -> bool:
    """Equal but for the last digits of floats, which may differ between maths libraries."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-12, abs_tol=1e-14)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def test_files_are_what_make_writes() -> None:
    made = runpy.run_path(str(GOLDENS / "make.py"))["build"]()
    assert {path.name for path in GOLDENS.glob("*.json")} == made.keys()
    for file, content in made.items():
        assert same(load(file), json.loads(json.dumps(content))), f"{file} is stale: python tests/goldens/make.py"


def test_files_state_their_provenance() -> None:
    for path in GOLDENS.glob("*.json"):
        for function, body in load(path.name).items():
            provenance = body["provenance"]
            assert provenance.keys() == {"what", "formula", "source", "made_by", "seed"}, (path.name, function)
            assert all(provenance.values())
