"""What was read, encoded and prepared before, for stages of a sweep that share a seed: values by all that decides them.

Nothing here can be stale: a key holds everything its value is a function of, files by inode, size and times, and no
value is ever changed. A memo belongs to whoever made it; there is none that all share.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from srppo.data.sources import files_of

T = TypeVar("T")
Row = TypeVar("Row", bound=Hashable)


class Kept:
    """The values of one seed."""

    def __init__(self) -> None:
        self._values: dict[Hashable, Any] = {}

    def value(self, key: Hashable | None, make: Callable[[], T]) -> T:
        """The value of a key, made where it is not known. Under None nothing is kept."""
        if key is None:
            return make()
        if key not in self._values:
            self._values[key] = make()
        return self._values[key]

    def rows(self, key: Hashable, encode: Callable[[Sequence[Row]], Sequence[T]]) -> Callable[[Sequence[Row]], list[T]]:
        """`encode`, which makes something of each row alone, for rows that it has not been asked for under this key."""
        known: dict[Row, T] = self.value(key, dict)

        def remembered(rows: Sequence[Row]) -> list[T]:
            new = [row for row in rows if row not in known]
            known.update(zip(new, encode(new), strict=True))
            return [known[row] for row in rows]

        return remembered


class Memo:
    """What is kept of the `seeds` root seeds that were asked for last; older ones are dropped."""

    def __init__(self, seeds: int) -> None:
        self._seeds, self._kept = seeds, dict[int, Kept]()

    def of(self, seed: int) -> Kept:
        """What is kept of a seed, which is now the last that was asked for."""
        kept = self._kept[seed] = self._kept.pop(seed, Kept())
        for old in list(self._kept)[: -self._seeds]:
            del self._kept[old]
        return kept


def stamps(files: Iterable[Path]) -> Hashable:
    """What tells one content of some files from another without reading them. Raises OSError for one that is gone."""
    found = ((file, file.stat()) for file in files)
    return tuple((str(file), s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for file, s in found)


def stamps_of(sources: Sequence[str]) -> Hashable | None:
    """The same of sources of data; None where one is a hub set or cannot be read."""
    found: list[Hashable] = []
    for source in sources:
        with suppress(OSError):
            if (files := files_of(source)) is not None:
                found.append((source, stamps(files)))
    return tuple(found) if len(found) == len(sources) else None
