"""JSON on disk: what it can hold, how it is read back, and how two values differ."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srppo.config import canonical_json
from srppo.errors import RecordError

_NON_FINITE = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}


def plain(value: Any) -> Any:
    """What JSON can hold: numpy and torch scalars become numbers, paths strings, non-finite floats strings as above."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return _NON_FINITE.get(repr(float(value)), value)
    return str(value) if isinstance(value, Path) else value


def revive(value: Any) -> Any:
    """The inverse of `plain` for non-finite floats."""
    if isinstance(value, dict):
        return {key: revive(each) for key, each in value.items()}
    if isinstance(value, list):
        return [revive(each) for each in value]
    return float(value) if isinstance(value, str) and value in _NON_FINITE.values() else value


def read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except FileNotFoundError:
        raise RecordError(f"{path} does not exist, so {path.parent} is no record of a run") from None
    except (OSError, ValueError, TypeError) as error:
        raise RecordError(f"{path} cannot be read ({error}); copy it again, or give --out another folder") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file; a torn last line is silent, a torn line elsewhere is warned of."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            row = dict(json.loads(line))
            rows.append(revive(row) if b'NaN"' in line or b'Infinity"' in line else row)
        except (ValueError, TypeError):
            if number < len(lines):
                warnings.warn(f"{path}, line {number}, is torn and left out", stacklevel=3)
    return rows


def differences(old: Any, new: Any, limit: int = 3) -> str:
    """The first keys in which two JSON values differ, with both values; "" when they are equal."""
    before, after = _flatten(old), _flatten(new)
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    shown = [f"{key}: {before.get(key, 'absent')} there, {after.get(key, 'absent')} now" for key in keys[:limit]]
    return ", ".join(shown) + (f", and {len(keys) - limit} more" if len(keys) > limit else "")


def _flatten(value: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(value, Mapping) and value:
        return {k: v for key, each in value.items() for k, v in _flatten(each, f"{prefix}{key}.").items()}
    text = canonical_json(value)
    short = f"{text[:40]}... (sha256 {hashlib.sha256(text.encode()).hexdigest()[:8]})"
    return {prefix[:-1]: text if len(text) <= 60 else short}
