"""From tables, in the columns people have, to `Demonstration` and `Prompt`.

A line that does not parse ends the command. A row that parses and can't be used is counted under its reason, and the
first of each reason is remembered by its place: `file:line` (jsonl, csv, tsv), else `file#row`, counted from 1.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from srppo.config import canonical_json, is_embedded
from srppo.data.sources import Bad, Table, short, tables
from srppo.data.types import Demonstration, Message, Prompt
from srppo.errors import DataError

T = TypeVar("T", Demonstration, Prompt)
Row = dict[str, Any]
Turns = tuple[Message, ...]

_FIRST_ROWS = 100  # rows whose columns decide how a file is read
_CALL = "function_call"  # a turn whose text is the JSON of what the assistant calls
_ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "human": "user",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    _CALL: "assistant",
}


@dataclass(frozen=True)
class Unused:
    """Rows left out for one reason, and where the first of them stands."""

    count: int
    first_source: str


def one_more(found: dict[str, Unused], reason: str, source: str) -> None:
    """Count a row under a reason; the first one's place stays."""
    known = found.get(reason, Unused(0, source))
    found[reason] = Unused(known.count + 1, known.first_source)


@dataclass(frozen=True)
class Opened:
    """One file or hub split: its name, the columns read from it, how many rows it has (blank lines are none), and its
    licence where the hub names one."""

    name: str
    columns: str
    rows: int
    licence: str | None = None


@dataclass(frozen=True)
class Loaded(Generic[T]):
    """Usable rows in file order, the unused by reason, and the sha256 of the usable content (not of names or paths).

    `warnings` say what is suspicious, a line for each kind and file.
    """

    rows: tuple[T, ...] = ()
    unused: Mapping[str, Unused] = field(default_factory=dict)
    opened: tuple[Opened, ...] = ()
    sha: str = ""
    warnings: tuple[str, ...] = ()


class _Unusable(Exception):
    """A row that parses and can't be used; the message is the reason."""


def load_demonstrations(sources: Sequence[str], *, seed: int) -> Loaded[Demonstration]:
    """Read demonstrations from files, folders, hub sets (`org/name[/config][@split]`) or `embedded` (drawn by `seed`).

    Columns are the first of _DEMONSTRATION_COLUMNS that a file has. Of a conversation the last assistant turn is the
    answer; `chosen` stands beside its prompt, and `rejected` is not read; `text` has no prompt and is all answer. A
    column `task`, else `category`, names the row's task, which enters no hash; `tools` holds the tools on offer.

    Raises:
        DataError: a source that is missing or cannot be read or parsed, no known columns, or not one usable row.
    """
    return _load("demonstrations", sources, seed, _DEMONSTRATION_COLUMNS, _demonstration)


def load_prompts(sources: Sequence[str], *, seed: int) -> Loaded[Prompt]:
    """Read prompts from the same kinds of sources; answers are not read, and trailing assistant turns are dropped.

    `embedded:group` draws from one group of the embedded tasks, `embedded` from the demonstrated and the prompted.

    Columns are the first of _PROMPT_COLUMNS that a file has; of `turns` it is the first turn.

    Raises:
        DataError: as `load_demonstrations`.
    """
    return _load("prompts", sources, seed, _PROMPT_COLUMNS, _prompt)


# ---- cells to text and turns


def _text(row: Row, column: str) -> str:
    return _checked(row.get(column), column)


def _checked(value: Any, what: str) -> str:
    """A text: as it is, a number as it is written, or the parts of a list `{"type": "text", "text" | "value": ...}`."""
    if value is None or value != value:  # NaN is what tables have for nothing
        raise _Unusable(f"{what} is missing")
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return "".join(_checked(_part(part, what), what) for part in value)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _Unusable(f"{what} is not text")
    text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Unusable(f"{what} is not valid Unicode (half a surrogate pair)") from None
    return text


def _part(part: Row, what: str) -> Any:
    if part.get("type", "text") != "text":
        raise _Unusable(f"{what} has a part that is not text ({part['type']})")
    return part.get("text", part.get("value"))


def _turns(row: Row, column: str) -> Turns:
    value = row.get(column)
    if value is None:
        raise _Unusable(f"{column} is missing")
    if column in ("prompt", "chosen") and not _is_conversation(value):
        return (Message("user" if column == "prompt" else "assistant", _checked(value, column)),)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise _Unusable(f"{column} is not a list of messages")
    return tuple(_turn(turn, column) for turn in value)


def _is_conversation(value: Any) -> bool:
    turns = value if isinstance(value, list) else []
    return any(isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns)


def _turn(turn: Row, column: str) -> Message:
    said = turn.get("role", turn.get("from"))
    if not isinstance(said, str) or said not in _ROLES:
        raise _Unusable(f"{column} has a role other than {', '.join(_ROLES)}")
    role, content = _ROLES[said], turn.get("content", turn.get("value"))
    if said == _CALL:
        return Message(role, "", _calls(_json(content, _CALL)))
    calls = turn.get("tool_calls") or turn.get(_CALL)
    if role == "assistant" and calls:
        return Message(role, "" if content is None else _checked(content, f"content in {column}"), _calls(calls))
    name = turn.get("name") if role == "tool" else None
    return Message(role, _checked(content, f"content in {column}"), name=name if isinstance(name, str) else "")


def _calls(value: Any) -> str:
    """The JSON text of [{name, arguments}, ...], from one call or several; arguments may be JSON text themselves."""
    calls = []
    for call in value if isinstance(value, list) else [value]:
        call = call.get("function", call) if isinstance(call, dict) else {}
        arguments = call.get("arguments", call.get("parameters"))
        if not isinstance(call.get("name"), str) or not call["name"]:
            raise _Unusable("a function call has no name")
        calls.append({"name": call["name"], "arguments": _json(arguments or {}, "the arguments of a function call")})
    return canonical_json(calls)


def _json(value: Any, what: str) -> Any:
    """What a text of JSON holds; what is no text, as it is."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        raise _Unusable(f"{what} is not JSON") from None


def _tools(row: Row) -> str:
    """The JSON text of the tools on offer, each as {type: function, function: {name, ...}}."""
    tools = _json(row.get("tools") or [], "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _Unusable("tools is not a list of objects")
    wrapped = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return canonical_json(wrapped) if wrapped else ""


# ---- columns


def _conversation(turns: Turns) -> tuple[Turns, Message]:
    if not turns or turns[-1].role != "assistant":
        raise _Unusable("the last message is not the assistant's")
    return turns[:-1], turns[-1]


def _asked_and(prompt: str, answer: str) -> Callable[[Row], tuple[Turns, Message]]:
    """A prompt in one column and its answer in another: text, a message, messages, or the whole conversation again."""

    def read(row: Row) -> tuple[Turns, Message]:
        asked, found = _turns(row, prompt), row.get(answer)
        found = [found] if isinstance(found, dict) else found
        if not _is_conversation(found):
            return asked, Message("assistant", _text(row, answer))
        turns = _turns({answer: found}, answer)
        return _conversation(turns if turns[0].role in ("system", "user") else asked + turns)

    return read


def _instruction(row: Row) -> Turns:
    """The instruction, and behind a blank line its `input`, its `context`, or the input of its first instance."""
    instances = row.get("instances")
    first = instances[0] if isinstance(instances, list) and instances and isinstance(instances[0], dict) else {}
    given = [(row, "input"), (row, "context"), (first, "input")]
    extra = next((text for part, key in given if part.get(key) is not None and (text := _text(part, key))), "")
    instruction = _text(row, "instruction")
    if not instruction.strip():
        raise _Unusable("empty prompt")
    return (Message("user", f"{instruction}\n\n{extra}" if extra.strip() else instruction),)


def _user(column: str) -> Callable[[Row], Turns]:
    return lambda row: (Message("user", _text(row, column)),)


def _and(asked: Callable[[Row], Turns | None], answer: str) -> Callable[[Row], tuple[Turns | None, Message]]:
    return lambda row: (asked(row), Message("assistant", _text(row, answer)))


def _first_turn(row: Row) -> Turns:
    turns = row.get("turns")
    if not isinstance(turns, list) or not turns:
        raise _Unusable("turns is not a list of texts")
    return (Message("user", _checked(turns[0], "the first of turns")),)


_Columns = dict[tuple[str, ...], Callable[[Row], Any]]
_DEMONSTRATION_COLUMNS: _Columns = {
    ("prompt", "completion"): _asked_and("prompt", "completion"),
    ("prompt", "response"): _asked_and("prompt", "response"),
    ("messages",): lambda row: _conversation(_turns(row, "messages")),
    ("conversations", "chosen"): _asked_and("conversations", "chosen"),
    ("conversations",): lambda row: _conversation(_turns(row, "conversations")),
    ("instruction", "output"): _and(_instruction, "output"),
    ("instruction", "response"): _and(_instruction, "response"),
    ("question", "answer"): _and(_user("question"), "answer"),
    ("prompt", "chosen"): _asked_and("prompt", "chosen"),
    ("query", "response"): _and(_user("query"), "response"),
    ("text",): _and(lambda row: None, "text"),
}
_PROMPT_COLUMNS: _Columns = {
    **{(column,): partial(_turns, column=column) for column in ("prompt", "messages", "conversations")},
    ("instruction",): _instruction,
    ("question",): _user("question"),
    ("query",): _user("query"),
    ("turns",): _first_turn,
}


def _demonstration(row: Row, read: Callable[[Row], tuple[Turns | None, Message]], place: str) -> Demonstration:
    prompt, answer = read(row)
    if prompt is not None and not any(turn.role == "user" and turn.content.strip() for turn in prompt):
        raise _Unusable("empty prompt")
    if not answer.content.strip() and not answer.calls:
        raise _Unusable("empty answer")
    task = next((row[key] for key in ("task", "category") if isinstance(row.get(key), str | int)), "")
    return Demonstration(prompt or (), answer.content, place, str(task).strip(), answer.calls, _tools(row))


def _prompt(row: Row, read: Callable[[Row], Turns], place: str) -> Prompt:
    turns = read(row)
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    if turns and turns[-1].role == "system":
        raise _Unusable("the last message is not the user's")
    if not turns or not turns[-1].content.strip():
        raise _Unusable("empty prompt")
    return Prompt(turns, place, _tools(row))


# ---- files


def _load(
    what: str, sources: Sequence[str], seed: int, columns: _Columns, build: Callable[[Row, Any, str], T]
) -> Loaded[T]:
    rows: list[T] = []
    unused: dict[str, Unused] = {}
    opened, warnings = [], []
    digest = hashlib.sha256()
    for table in (table for source in sources for table in tables(source, what, seed)):
        chosen = _choose(table, columns, what)
        opened.append(Opened(table.name, " + ".join(chosen), len(table.rows), table.licence))
        odd: dict[str, Unused] = {}
        seen: set[int] = set()
        for place, value in table.rows:
            try:
                if isinstance(value, Bad):
                    raise _Unusable(value.reason)
                if not isinstance(value, dict) or chosen not in columns:
                    raise _Unusable("not an object with named columns")
                row = build(value, columns[chosen], place)
            except _Unusable as reason:
                one_more(unused, str(reason), place)
                continue
            content = row_content(row)
            rows.append(row)
            digest.update(content.encode() + b"\n")
            for suspicion in _suspicions(value, content, hash(content) in seen, what):
                one_more(odd, suspicion, place)
            seen.add(hash(content))
        if not is_embedded(table.name):  # which is drawn with repeats on purpose
            warnings += warned(table.name, len(table.rows), odd)
    if not rows:
        where, count = ", ".join(sources) or "an empty list of sources", sum(part.rows for part in opened)
        needs = f"each needs a prompt {'and an answer that are' if what == 'demonstrations' else 'that is'} not empty"
        if not count:
            raise DataError(f"no {what} in {where}: there are no rows; {needs}")
        raise DataError(f"none of the {count} rows of {where} can be used as {what}: {reasons(unused)}; {needs}")
    return Loaded(tuple(rows), unused, tuple(opened), digest.hexdigest(), tuple(warnings))


def _suspicions(value: Row, content: str, repeats: bool, what: str) -> list[str]:
    """What is odd about a row that is used all the same."""
    found = [f"{what} repeat an earlier one"] if repeats else []
    if what == "demonstrations" and str(value.get("label")).lower() == "false":
        found.append("demonstrations have label = false and are trained on like any other; remove them if they are bad")
    if value.get("images") and "<image>" in content:
        found.append(f"{what} have images, of which nothing is read: <image> stays in the text as it is")
    return found


def warned(name: str, rows: int, odd: dict[str, Unused]) -> list[str]:
    """One line for each thing that is odd about the rows of a file."""
    return [f"{name}: {part.count:,} of {rows:,} {oddity} (first {part.first_source})" for oddity, part in odd.items()]


def file_of(row: Demonstration | Prompt) -> str:
    """The file or hub set that a row comes from."""
    return re.sub(r"[:#]\d+$", "", row.source)


def turn_content(turn: Message) -> list[str]:
    """What a turn says, for hashes."""
    return [turn.role, turn.content, *([turn.calls, turn.name] if turn.calls or turn.name else [])]


def row_content(row: Demonstration | Prompt) -> str:
    """Canonical text of what a row says, without where it came from; the input of every hash of rows."""
    turns = [turn_content(turn) for turn in row.prompt]
    if isinstance(row, Prompt):
        return canonical_json([turns, row.tools] if row.tools else [turns])
    more = [row.calls, row.tools] if row.calls or row.tools else []
    return canonical_json([turns, row.answer, *more])


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


def reasons(unused: Mapping[str, Unused]) -> str:
    """The reasons in one line: `3 empty answer (first a.jsonl:7), 1 prompt is not text (first a.jsonl:9)`."""
    ordered = sorted(unused.items(), key=lambda item: -item[1].count)
    return ", ".join(f"{part.count:,} {reason} (first {part.first_source})" for reason, part in ordered)
