"""Whether a folder that was asked for can become a record: what stands in its place, and what the disk says of it."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from srppo.errors import RecordError
from srppo.record.files import storing

OTHER = "give --out another folder"


def check_place(folder: Path) -> None:
    """Try whether the folder can be made and written to; nothing of the trial stays.

    Raises RecordError where it cannot (a file or a broken link in the way, a name too long, no folders to be made
    there), and StorageError where the disk is full or read-only.
    """
    if reason := _blocked(folder):
        raise RecordError(f"{folder} {reason}; {OTHER}")
    nearest = _nearest(folder)
    trial = nearest / f".tmp-{uuid.uuid4().hex}x"
    with placing(folder):
        try:
            (trial / folder.absolute().relative_to(nearest.absolute())).mkdir(parents=True)
        finally:
            shutil.rmtree(trial, ignore_errors=True)


@contextmanager
def placing(folder: Path) -> Iterator[None]:
    """Turn what the disk says against a folder into RecordError in one line; StorageError where it refuses to write."""
    try:
        with storing(folder):
            yield
    except OSError as error:
        raise RecordError(f"{folder} cannot be made: {error.strerror or error}; {OTHER}") from error


def stranger(folder: Path) -> str:
    """What is in the place of a record; "" if there is a record, an empty folder or nothing yet."""
    if reason := _blocked(folder):
        return reason
    others = [name for name in os.listdir(folder) if not name.startswith(".tmp-")] if os.path.isdir(folder) else []
    return f"holds {min(others)!r} but no sweep.json" if others and not (folder / "sweep.json").exists() else ""


def _blocked(folder: Path) -> str:
    """Why no folder can be here; "" if there is one, or nothing."""
    nearest = _nearest(folder)
    if os.path.isdir(nearest):
        return ""
    what = "a file" if os.path.exists(nearest) else "a broken link"
    return f"is {what}, not a folder" if nearest == folder else f"lies below {nearest}, {what}"


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest of those it would lie in, that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
