"""From a source (file, folder, hub set, or `embedded`, `embedded:group`) to tables of rows with their places.

A line that does not parse ends the command; a row that parses and can't be used is left to `rows.py`.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srppo.config import is_embedded
from srppo.data.hub import offline_when_unreachable
from srppo.errors import DataError

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
EMBEDDED_ROWS = {"demonstrations": 2000, "prompts": 4000}
"""Rows of each embedded source: a pool of fixed size, from which `data.size` takes its share as from any other set."""

_ALLOWED = f"{', '.join(KINDS)}, each also as .gz"
_GIVE = f"give a file ({_ALLOWED}), a folder of them, a hub set as org/name, or embedded"
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<split>[^@\s/]+))?")


@dataclass(frozen=True)
class Bad:
    """Stands for a row that its own file format already shows to be unusable."""

    reason: str


@dataclass(frozen=True)
class Table:
    name: str
    rows: list[tuple[str, Any]]  # (place, value)
    licence: str | None = None


def short(names: Iterable[Any], most: int = 12) -> str:
    listed = [" ".join(str(name).split())[:60] for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


def tables(source: str, what: str, seed: int) -> Iterator[Table]:
    if is_embedded(source):
        yield _embedded(source, what, seed)
        return
    path = Path(source).expanduser()
    hub = _HUB.fullmatch(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _kind(file))
        if not files:
            found = short(sorted(file.name for file in path.iterdir())) or "nothing"
            raise DataError(f"folder {source} holds no data file: found {found}; allowed are {_ALLOWED}")
        for file in files:
            yield _file(file, f"{source.rstrip('/')}/{file.name}")
    elif path.exists():
        yield _file(path, source)
    elif hub and not _kind(path) and not source.startswith(("./", "../")):
        yield _hub(source, hub["name"], hub["config"], hub["split"] or "train")
    else:
        raise DataError(_missing(path, source))


def _kind(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((kind for kind in KINDS if name.endswith(kind)), None)


def _missing(path: Path, source: str) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{source} does not exist, nor does the folder {folder}; {_GIVE}"
    here = [entry.name for entry in folder.iterdir() if entry.is_dir() or _kind(entry)]
    near = difflib.get_close_matches(path.name, here, n=3, cutoff=0.6)
    beside = (
        f"did you mean {' or '.join(near)}?" if near else f"{folder} has {short(sorted(here), 5) or 'no data file'};"
    )
    return f"{source} does not exist; {beside} {_GIVE}"


def _embedded(source: str, what: str, seed: int) -> Table:
    from srppo.world.items import PROMPT_GROUPS, demonstrations, prompts
    from srppo.world.styles import STYLES
    from srppo.world.tasks import GROUPS

    part, count = source.removeprefix("embedded").removeprefix(":"), EMBEDDED_ROWS[what]
    parts = GROUPS if what == "prompts" else STYLES
    if source != "embedded" and part not in parts:
        alone = " and ".join(PROMPT_GROUPS) if what == "prompts" else "short"
        named = ", ".join(f"embedded:{name}" for name in parts)
        raise DataError(f"there are no embedded {what} {source!r}; allowed are embedded ({alone}), {named}")
    if what == "prompts":
        rows = prompts(count, seed, (part,) if part else PROMPT_GROUPS)
    else:
        rows = demonstrations(count, seed, part or "short")
    return Table(source, [(f"{source}#{number}", row) for number, row in enumerate(rows, 1)])


def _file(path: Path, name: str) -> Table:
    kind = _kind(path)
    if kind is None:
        raise DataError(f"{name} is of no known kind; allowed are {_ALLOWED}, or a folder of them")
    try:
        data = path.read_bytes()
        if path.name.lower().endswith(".gz"):
            data = gzip.decompress(data)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name} is not a whole gzip file: {_line(error)}") from None
    except OSError as error:
        raise DataError(f"{name} cannot be read: {error.strerror or _line(error)}") from None
    if kind == ".parquet":
        return Table(name, _parquet(data, name))
    text = _decoded(data, name)
    if kind in (".csv", ".tsv"):
        return Table(name, list(_separated(text, name, "," if kind == ".csv" else "\t")))
    return Table(name, list((_json if kind == ".json" else _json_lines)(text, name)))


def _decoded(data: bytes, name: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x}); save the file as UTF-8"
        ) from None


def _parsed(text: str, name: str, line: int | None = None) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{name}:{line or error.lineno}: not JSON: {error.msg} (column {error.colno})") from None
    except (RecursionError, ValueError) as error:  # nested too deeply; an integer of thousands of digits
        raise DataError(f"{name}:{line or 1}: not JSON that can be read: {_line(error)}") from None


def _json_lines(text: str, name: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): U+2028 and the like may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{name}:{number}", _parsed(line.rstrip("\r"), name, number)


def _json(text: str, name: str) -> Iterator[tuple[str, Any]]:
    if not text.strip():
        return
    try:
        whole = _parsed(text, name)
    except DataError as error:
        if "Extra data" not in str(error) or not text.lstrip().startswith("{"):
            raise
        yield from _json_lines(text, name)  # JSON lines under the name of JSON
        return
    if isinstance(whole, dict):
        whole = whole["data"] if isinstance(whole.get("data"), list) else [whole]
    if not isinstance(whole, list):
        raise DataError(f'{name} holds one {type(whole).__name__}; give a list of rows or {{"data": [rows]}}')
    yield from ((f"{name}#{number}", row) for number, row in enumerate(whole, 1))


def _separated(text: str, name: str, separator: str) -> Iterator[tuple[str, Any]]:
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] | None = None
    limit = csv.field_size_limit(max(len(text), 1))
    line = 1
    try:
        for cells in lines:
            place, line = f"{name}:{line}", lines.line_num + 1
            if not "".join(cells).strip() and len(cells) < 2:
                continue  # a blank line
            if header is None:
                header = [cell.strip() for cell in cells]
            elif len(cells) != len(header):
                yield place, Bad("another number of cells than the header")
            else:
                yield place, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        kind = "CSV" if separator == "," else "TSV"
        raise DataError(f"{name}:{line}: not {kind}: {_line(error)} in the row that begins here") from None
    finally:
        csv.field_size_limit(limit)


def _parquet(data: bytes, name: str) -> list[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(data)).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{name} is not a whole parquet file: {_line(error)}") from None
    return [(f"{name}#{number}", row) for number, row in enumerate(rows, 1)]


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# ---- hub sets


def _hub(source: str, name: str, config: str | None, split: str) -> Table:
    import datasets
    import huggingface_hub.constants

    local = f"give a local file instead ({_ALLOWED}) or a folder of them"
    with offline_when_unreachable(datasets.config, huggingface_hub.constants):
        try:
            found = datasets.load_dataset(name, config, split=split)
        except ConnectionError:
            raise DataError(
                f"hub set {source} is neither a file here nor in the cache, and the hub cannot be reached; {local}"
            ) from None
        except (datasets.exceptions.DatasetNotFoundError, FileNotFoundError):
            raise DataError(
                f"hub set {source} does not exist on the hub, nor a file of that name here; {local}"
            ) from None
        except Exception as error:  # whatever else a hub set can be wrong about: its split, its config, its files
            raise DataError(f"hub set {source} cannot be loaded: {_line(error)}") from None
    rows = [(f"{name}@{split}#{number}", row) for number, row in enumerate(found, 1)]
    return Table(source, rows, found.info.license or None)
