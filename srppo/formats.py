"""From what people have to `Demonstration` and `Prompt`: files, folders, hub sets, and the columns they come in.

A line that does not parse ends the command. A row that parses and can't be used is counted under its reason, and the
first of each reason is remembered by its place: `file:line` (jsonl, csv, tsv), else `file#row`, counted from 1.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import io
import json
import os
import re
import socket
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

from srppo.config import canonical_json
from srppo.errors import DataError
from srppo.types import Demonstration, Message, Prompt

T = TypeVar("T", Demonstration, Prompt)
Turns = tuple[Message, ...]

KINDS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
EMBEDDED_ROWS = {"demonstrations": 2000, "prompts": 4000}
"""Rows of the word `embedded`: a pool of fixed size, from which `data.size` takes its share as from any other set."""

_ALLOWED = f"{', '.join(KINDS)}, each also as .gz"
_GIVE = f"give a file ({_ALLOWED}), a folder of them, a hub set as org/name, or embedded"
_HUB = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(/(?P<config>[\w.-]+))?(@(?P<split>[^@\s/]+))?")
_FIRST_ROWS = 100  # rows whose columns decide how a file is read
_ROLES = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Unused:
    """Rows left out for one reason, and where the first of them stands."""

    count: int
    first_source: str

    def one_more(self) -> Unused:
        return Unused(self.count + 1, self.first_source)


@dataclass(frozen=True)
class Opened:
    """One file or hub split: its name, the columns read from it, its rows, and its licence where the hub names one."""

    name: str
    columns: str
    rows: int
    licence: str | None = None


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """Usable rows in file order, the unused by reason, and the sha256 of the usable content (not of names or paths)."""

    rows: tuple[T, ...]
    unused: dict[str, Unused]
    opened: tuple[Opened, ...]
    sha: str

    @property
    def read(self) -> int:
        """Rows found, usable or not; blank lines are none."""
        return sum(part.rows for part in self.opened)


class _Unusable(Exception):
    """A row that parses and can't be used; the message is the reason."""


@dataclass(frozen=True)
class _Bad:
    """Stands for a row that its own file format already shows to be unusable."""

    reason: str


@dataclass(frozen=True)
class _Table:
    name: str
    rows: list[tuple[str, Any]]  # (place, value)
    licence: str | None = None


def load_demonstrations(sources: Sequence[str], *, seed: int) -> Loaded[Demonstration]:
    """Read demonstrations from files, folders, hub sets (`org/name[/config][@split]`) or `embedded` (drawn by `seed`).

    Columns, the first that a file has: `prompt` with `completion` or `response` (text or messages); `messages` or
    `conversations` (the last assistant turn is the answer); `instruction` (with `input` or `context`) with `output` or
    `response`, where the prompt is instruction + blank line + input; `question` with `answer`; `text`, which has no
    prompt and is all answer.

    Raises:
        DataError: a source that is missing or cannot be read or parsed, no known columns, or not one usable row.
    """
    return _load("demonstrations", sources, seed, _DEMONSTRATION_COLUMNS, _demonstration)


def load_prompts(sources: Sequence[str], *, seed: int) -> Loaded[Prompt]:
    """Read prompts from the same kinds of sources; answers are not read, and trailing assistant turns are dropped.

    Columns, the first that a file has: `prompt`, `messages`, `conversations`, `instruction` (with `input`, `context`,
    or the input of the first of `instances`), `question`, `turns` (the first turn).

    Raises:
        DataError: as `load_demonstrations`.
    """
    return _load("prompts", sources, seed, _PROMPT_COLUMNS, _prompt)


# ---- rows to values


def _text(row: dict[str, Any], column: str, *, optional: bool = False) -> str:
    return _checked(row.get(column), column, optional=optional)


def _checked(value: Any, what: str, *, optional: bool = False) -> str:
    if value is None:
        if optional:
            return ""
        raise _Unusable(f"{what} is missing")
    if not isinstance(value, str):
        raise _Unusable(f"{what} is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise _Unusable(f"{what} is not valid Unicode (half a surrogate pair)") from None
    return value


def _turns(value: Any, column: str) -> Turns:
    if isinstance(value, str) and column == "prompt":
        return (Message("user", _checked(value, column)),)
    if value is None:
        raise _Unusable(f"{column} is missing")
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise _Unusable(f"{column} is not {'text or ' if column == 'prompt' else ''}a list of messages")
    turns = []
    for turn in value:
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in _ROLES:
            raise _Unusable(f"{column} has a role other than {', '.join(_ROLES)}")
        turns.append(Message(_ROLES[role], _checked(turn.get("content", turn.get("value")), f"content in {column}")))
    return tuple(turns)


def _split_answer(turns: Turns) -> tuple[Turns, str]:
    if not turns or turns[-1].role != "assistant":
        raise _Unusable("the last message is not the assistant's")
    return turns[:-1], turns[-1].content


def _prompt_and(answer: str) -> Callable[[dict[str, Any]], tuple[Turns, str]]:
    def read(row: dict[str, Any]) -> tuple[Turns, str]:
        prompt = _turns(row.get("prompt"), "prompt")
        if isinstance(row.get(answer), list):
            return _split_answer(prompt + _turns(row[answer], answer))
        return prompt, _text(row, answer)

    return read


def _instruction(row: dict[str, Any]) -> Turns:
    extra = _text(row, "input", optional=True) or _text(row, "context", optional=True)
    instances = row.get("instances")
    if not extra and isinstance(instances, list) and instances and isinstance(instances[0], dict):
        extra = _text(instances[0], "input", optional=True)
    instruction = _text(row, "instruction")
    if not instruction.strip():
        raise _Unusable("empty prompt")
    return (Message("user", f"{instruction}\n\n{extra}" if extra.strip() else instruction),)


def _question(row: dict[str, Any]) -> Turns:
    return (Message("user", _text(row, "question")),)


def _first_turn(row: dict[str, Any]) -> Turns:
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        raise _Unusable("turns is not a list of texts")
    return (Message("user", _checked(turns[0], "the first of turns")),)


_Columns = dict[tuple[str, ...], Callable[[dict[str, Any]], Any]]
_DEMONSTRATION_COLUMNS: _Columns = {
    ("prompt", "completion"): _prompt_and("completion"),
    ("prompt", "response"): _prompt_and("response"),
    ("messages",): lambda row: _split_answer(_turns(row.get("messages"), "messages")),
    ("conversations",): lambda row: _split_answer(_turns(row.get("conversations"), "conversations")),
    ("instruction", "output"): lambda row: (_instruction(row), _text(row, "output")),
    ("instruction", "response"): lambda row: (_instruction(row), _text(row, "response")),
    ("question", "answer"): lambda row: (_question(row), _text(row, "answer")),
    ("text",): lambda row: (None, _text(row, "text")),
}
_PROMPT_COLUMNS: _Columns = {
    ("prompt",): lambda row: _turns(row.get("prompt"), "prompt"),
    ("messages",): lambda row: _turns(row.get("messages"), "messages"),
    ("conversations",): lambda row: _turns(row.get("conversations"), "conversations"),
    ("instruction",): _instruction,
    ("question",): _question,
    ("turns",): _first_turn,
}


def _demonstration(read: tuple[Turns | None, str], place: str) -> Demonstration:
    prompt, answer = read
    if prompt is not None and not any(turn.role == "user" and turn.content.strip() for turn in prompt):
        raise _Unusable("empty prompt")
    if not answer.strip():
        raise _Unusable("empty answer")
    return Demonstration(prompt or (), answer, place)


def _prompt(turns: Turns, place: str) -> Prompt:
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if turns and turns[-1].role != "user":
        raise _Unusable("the last message is not the user's")
    if not turns or not turns[-1].content.strip():
        raise _Unusable("empty prompt")
    return Prompt(turns, place)


def _load(what: str, sources: Sequence[str], seed: int, columns: _Columns, build: Callable[[Any, str], T]) -> Loaded[T]:
    rows: list[T] = []
    unused: dict[str, Unused] = {}
    opened = []
    digest = hashlib.sha256()
    for table in (table for source in sources for table in _tables(source, what, seed)):
        chosen = _choose(table, columns, what)
        opened.append(Opened(table.name, " + ".join(chosen), len(table.rows), table.licence))
        for place, value in table.rows:
            try:
                row = build(_as_read(value, columns.get(chosen)), place)
            except _Unusable as reason:
                known = unused.get(str(reason), Unused(0, place))
                unused[str(reason)] = known.one_more()
            else:
                rows.append(row)
                digest.update(row_content(row).encode() + b"\n")
    if not rows:
        raise DataError(_nothing_usable(what, sources, opened, unused))
    return Loaded(tuple(rows), unused, tuple(opened), digest.hexdigest())


def _as_read(value: Any, reader: Callable[[dict[str, Any]], Any] | None) -> Any:
    if isinstance(value, _Bad):
        raise _Unusable(value.reason)
    if not isinstance(value, dict) or reader is None:
        raise _Unusable("not an object with named columns")
    return reader(value)


def row_content(row: Demonstration | Prompt) -> str:
    """Canonical text of what a row says, without where it came from; the input of every hash of rows."""
    if isinstance(row, Demonstration):
        return canonical_json([[[turn.role, turn.content] for turn in row.prompt], row.answer])
    return canonical_json([[[turn.role, turn.content] for turn in row.messages]])


def _choose(table: _Table, columns: _Columns, what: str) -> tuple[str, ...]:
    first = [value for _, value in table.rows if isinstance(value, dict)][:_FIRST_ROWS]
    found = list(dict.fromkeys(key for row in first for key in row))
    if not first:
        return ()
    for names in columns:
        if set(names) <= set(found):
            return names
    accepted = "; ".join(" + ".join(names) for names in columns)
    raise DataError(
        f"{table.name} has no columns known for {what}: found {_short(found) or 'none'}; "
        f"rename its columns to one of these: {accepted}"
    )


def _nothing_usable(what: str, sources: Sequence[str], opened: list[Opened], unused: dict[str, Unused]) -> str:
    where = ", ".join(sources) or "an empty list of sources"
    count = sum(part.rows for part in opened)
    if not count:
        return f"no {what} in {where}: there are no rows; each needs {_NEEDS[what]}"
    return f"none of the {count} rows of {where} can be used as {what}: {reasons(unused)}; each needs {_NEEDS[what]}"


_NEEDS = {"demonstrations": "a prompt and an answer that are not empty", "prompts": "a prompt that is not empty"}


def reasons(unused: dict[str, Unused]) -> str:
    """The reasons in one line: `3 empty answer (first a.jsonl:7), 1 prompt is not text (first a.jsonl:9)`."""
    ordered = sorted(unused.items(), key=lambda item: -item[1].count)
    return ", ".join(f"{part.count:,} {reason} (first {part.first_source})" for reason, part in ordered)


def _short(names: Iterable[Any], most: int = 12) -> str:
    listed = [" ".join(str(name).split())[:60] for name in names]
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")


# ---- sources to tables


def _tables(source: str, what: str, seed: int) -> Iterator[_Table]:
    if source == "embedded":
        yield _embedded(what, seed)
        return
    path = Path(source).expanduser()
    hub = _HUB.fullmatch(source)
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file() and _kind(file))
        if not files:
            found = _short(sorted(file.name for file in path.iterdir())) or "nothing"
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
        f"did you mean {' or '.join(near)}?" if near else f"{folder} has {_short(sorted(here), 5) or 'no data file'};"
    )
    return f"{source} does not exist; {beside} {_GIVE}"


def _embedded(what: str, seed: int) -> _Table:
    from srppo.world.items import demonstrations, prompts

    made = {"demonstrations": demonstrations, "prompts": prompts}[what](EMBEDDED_ROWS[what], seed)
    return _Table("embedded", [(f"embedded#{number}", row) for number, row in enumerate(made, 1)])


def _file(path: Path, name: str) -> _Table:
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
        return _Table(name, _parquet(data, name))
    read = {".jsonl": _json_lines, ".json": _json, ".csv": _separated(","), ".tsv": _separated("\t")}[kind]
    return _Table(name, list(read(_decoded(data, name), name)))


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


def _separated(separator: str) -> Callable[[str, str], Iterator[tuple[str, Any]]]:
    def read(text: str, name: str) -> Iterator[tuple[str, Any]]:
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
                    yield place, _Bad("another number of cells than the header")
                else:
                    yield place, dict(zip(header, cells, strict=True))
        except csv.Error as error:
            kind = "CSV" if separator == "," else "TSV"
            raise DataError(f"{name}:{line}: not {kind}: {_line(error)} in the row that begins here") from None
        finally:
            csv.field_size_limit(limit)

    return read


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


def _hub(source: str, name: str, config: str | None, split: str) -> _Table:
    import datasets

    local = f"give a local file instead ({_ALLOWED}) or a folder of them"
    with _offline_when_unreachable():
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
    return _Table(source, rows, found.info.license or None)


@contextmanager
def _offline_when_unreachable() -> Iterator[None]:
    """Without a route to the hub, go to the local cache at once: the libraries retry for 20 seconds and print each."""
    import datasets.config
    import huggingface_hub.constants

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    if not any(before) and not _reachable():
        for module in modules:
            module.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _reachable() -> bool:
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # the proxy resolves names; let the library try
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=5).close()
    except (OSError, UnicodeError):
        return False
    return True
