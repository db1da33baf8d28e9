"""Whether results can be written where they are to go, found out before anything is loaded."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from srppo.errors import UserError


def check_destination(folder: Path, file: Path | None = None) -> None:
    """Make the folder, write a file in it, and leave all as it was. file: what is to be written in it, if known.

    Raises UserError where a file stands in the way, or where the place cannot be made or written.
    """
    made: list[Path] = []
    try:
        if file is not None and file.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        for place in (*reversed(folder.parents), folder):
            if not place.is_dir():
                place.mkdir(exist_ok=True)
                made.append(place)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = f"{error.filename} is a file" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(
            f"cannot write to {file or folder} ({reason}); give --out another place, where folders can be made and "
            "written"
        ) from None
    finally:
        for place in reversed(made):
            with suppress(OSError):  # another process has begun to write there
                place.rmdir()
