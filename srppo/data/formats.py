"""From what people have to `Demonstration` and `Prompt`: files, folders, hub sets, and the columns they come in.

A line that does not parse ends the command. A row that parses and can't be used is counted under its reason, and the
first of each reason is remembered by its place: `file:line` (jsonl, csv, tsv), else `file#row`, counted from 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from srppo.config import canonical_json
from srppo.data.sources import Bad, Table, short, tables
from srppo.data.types import Demonstration, Message, Prompt
from srppo.errors import DataError

T = TypeVar("T", Demonstration, Prompt)
Turns = tuple[Message, ...]

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


def load_demonstrations(sources: Sequence[str], *, seed: int) -> Loaded[Demonstration]:
    """Read demonstrations from files, folders, hub sets (`org/name[/config][@split]`) or `embedded` (drawn by `seed`).

    Columns, the first that a file has: `prompt` with `completion` or `response` (text or messages); `messages` or
    `conversations` (the last assistant turn is the answer); `instruction` (with `input` or `context`) with `output` or
    `response`, where the prompt is instruction + blank line + input; `question` with `answer`; `text`, which has no
    prompt and is all answer. A column `task`, else `category`, names the row's task, which enters no hash.

    Raises:
        DataError: a source that is missing or cannot be read or parsed, no known columns, or not one usable row.
    """
    columns = {names: _with_task(read) for names, read in _DEMONSTRATION_COLUMNS.items()}
    return _load("demonstrations", sources, seed, columns, _demonstration)


def load_prompts(sources: Sequence[str], *, seed: int) -> Loaded[Prompt]:
    """Read prompts from the same kinds of sources; answers are not read, and trailing assistant turns are dropped.

    `embedded:group` draws from one group of the embedded tasks, `embedded` from the demonstrated and the prompted.

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


def _with_task(read: Callable[[dict[str, Any]], tuple[Turns | None, str]]) -> Callable[[dict[str, Any]], Any]:
    def task(row: dict[str, Any]) -> str:
        named = next((row[key] for key in ("task", "category") if isinstance(row.get(key), str | int)), "")
        return str(named).strip()

    return lambda row: (*read(row), task(row))


def _demonstration(read: tuple[Turns | None, str, str], place: str) -> Demonstration:
    prompt, answer, task = read
    if prompt is not None and not any(turn.role == "user" and turn.content.strip() for turn in prompt):
        raise _Unusable("empty prompt")
    if not answer.strip():
        raise _Unusable("empty answer")
    return Demonstration(prompt or (), answer, place, task)


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
    for table in (table for source in sources for table in tables(source, what, seed)):
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
    if isinstance(value, Bad):
        raise _Unusable(value.reason)
    if not isinstance(value, dict) or reader is None:
        raise _Unusable("not an object with named columns")
    return reader(value)


def row_content(row: Demonstration | Prompt) -> str:
    """Canonical text of what a row says, without where it came from; the input of every hash of rows."""
    if isinstance(row, Demonstration):
        return canonical_json([[[turn.role, turn.content] for turn in row.prompt], row.answer])
    return canonical_json([[[turn.role, turn.content] for turn in row.messages]])


def _choose(table: Table, columns: _Columns, what: str) -> tuple[str, ...]:
    first = [value for _, value in table.rows if isinstance(value, dict)][:_FIRST_ROWS]
    found = list(dict.fromkeys(key for row in first for key in row))
    if not first:
        return ()
    for names in columns:
        if set(names) <= set(found):
            return names
    accepted = "; ".join(" + ".join(names) for names in columns)
    raise DataError(
        f"{table.name} has no columns known for {what}: found {short(found) or 'none'}; "
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
