"""Noise in demonstrations: which rows get a wrong answer, and which one (`data.noise`, `data.noise_rate`).

The rows used for training stand in one seeded order, by a hash of what each says. The first round(rate * n) of them
that the kind can change are noised. The wrong answer of a row follows from that order and the seed, never from the
rate: a row noised at 0.3 is noised at 0.5 too, with the same answer. The order knows no kind, so all kinds noise the
same rows, but for rows that a kind cannot change; those are passed over and counted.

The rates 0.3, 0.5 and 0.7 are those of RobustFT (arXiv 2412.14922). Noise that is easy to simulate harms less than
real mistakes do (NoiseBench, arXiv 2405.07609), hence kinds of both sorts.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import pairwise
from random import Random
from typing import Any, TypeVar

from srppo.config import derive_seed
from srppo.data.order import listed, prompt_text, row_id
from srppo.data.rows import file_of, row_content
from srppo.data.types import Demonstration, EncodedDemonstration
from srppo.errors import DataError
from srppo.world.items import answers_of_other_tasks

CORRUPTED = 0.5  # share of an answer's words that token-corruption replaces, at least one
_CHUNK = 32  # rows that the base is asked at once: always whole chunks, so that a row's sample knows no rate
_TRIES = 4  # samples of the base before a row whose samples are all right, or empty, is passed over
_SHORT = 200  # characters up to which the manifest holds an answer itself, beyond its sha256

Ask = Callable[[Sequence[Demonstration], int], Sequence[str | None]]
"""(rows, seed) to what the base says to the prompt of each; None where it cannot be asked."""
_T = TypeVar("_T")


@dataclass(frozen=True)
class Noise:
    """What was done to the `rows` used for training: by position, the wrong answer and the token ids with it.

    `passed_over` are the rows met that the kind cannot change.
    """

    kind: str
    rate: float
    rows: Sequence[Demonstration]
    changes: Mapping[int, tuple[str, EncodedDemonstration]] = field(default_factory=dict)
    passed_over: Sequence[Demonstration] = ()

    def applied(self, ids: Sequence[EncodedDemonstration]) -> list[EncodedDemonstration]:
        """The rows' token ids, those of noised rows replaced."""
        return [self.changes[i][1] if i in self.changes else right for i, right in enumerate(ids)]

    def lines(self) -> list[str]:
        """One line for the console, none without noise."""
        if not self.changes:
            return []
        past = f"; {len(self.passed_over):,} passed over ({_CANNOT[self.kind]})" if self.passed_over else ""
        return [f"noise: {len(self.changes):,} of {len(self.rows):,} demonstrations ({self.kind}){past}"]

    def as_dict(self) -> dict[str, Any] | None:
        """Kind, rate and the mask, with old and new answers, for the manifest; None without noise."""
        if not self.changes:
            return None
        noised = [(self.rows[i], answer) for i, (answer, _) in self.changes.items()]
        mask = [
            {"row": row_id(row), "source": row.source, "right": _said(row.answer), "noised": _said(answer)}
            for row, answer in noised
        ]
        counts = {"of": len(self.rows), "passed_over": len(self.passed_over)}
        return {"kind": self.kind, "rate": self.rate, **counts, "rows": listed(mask)}


def add_noise(
    rows: Sequence[Demonstration],
    kind: str,
    rate: float,
    seed: int,
    *,
    encode: Callable[[Demonstration, str], EncodedDemonstration | str],
    ask: Ask | None = None,
) -> Noise:
    """Wrong answers for round(rate * n) of the rows, the same rows and answers for the same (seed, content of rows).

    `encode` gives the token ids of a row with another answer, or the reason why there are none; `ask` is needed by
    base-answers alone.

    Raises:
        DataError: fewer rows than asked for can be changed, or wrong-task meets a row that is not of the embedded
            world.
    """
    count = 0 if kind == "none" else round(rate * len(rows))
    if not count:
        return Noise(kind, rate, rows)
    order = sorted(range(len(rows)), key=lambda i: (derive_seed(seed, f"noise order {row_content(rows[i])}"), i))
    changes: dict[int, tuple[str, EncodedDemonstration]] = {}
    passed_over = []
    for position, answer in zip(order, _answers(kind, [rows[i] for i in order], seed, ask), strict=True):
        row = rows[position]
        ids = encode(row, answer) if answer is not None and differs(row.answer, answer) else None
        if answer is not None and isinstance(ids, EncodedDemonstration):
            changes[position] = (answer, ids)
        else:
            passed_over.append(row)
        if len(changes) == count:
            return Noise(kind, rate, rows, changes, passed_over)
    raise DataError(
        f"data.noise = {kind} can change only {len(changes):,} of {len(rows):,} demonstrations, and data.noise_rate = "
        f"{rate:g} asks for {count:,} ({_CANNOT[kind]}, first {passed_over[0].source}); lower the rate, add data or "
        "choose another kind"
    )


def differs(right: str, answer: str | None) -> bool:
    """Whether `answer` says something, and something else than `right`, outer white space aside."""
    return answer is not None and answer.strip() not in ("", right.strip())


def task_of(row: Demonstration) -> str:
    """The task that a row belongs to: what its column `task` or `category` says, else the file it comes from."""
    return row.task or file_of(row)


def _said(answer: str) -> str:
    return answer if len(answer) <= _SHORT else f"sha256:{sha256(answer.encode()).hexdigest()}"


# ---- kinds: the wrong answer of each row in order, or None where the kind has none


def _answers(kind: str, rows: Sequence[Demonstration], seed: int, ask: Ask | None) -> Iterator[str | None]:
    if kind in _OF_ONE:
        return (_OF_ONE[kind](row.answer, _random(row, seed, kind)) for row in rows)
    if kind == "base-answers":
        if ask is None:
            raise ValueError("base-answers need `ask`, which samples from the base")
        return _base_answers(rows, seed, ask)
    return _OF_ALL[kind](rows, seed)


def _random(row: Demonstration, seed: int, kind: str) -> Random:
    return Random(derive_seed(seed, f"noise {kind} {row_content(row)}"))


def _round(items: Sequence[_T], start: int) -> Iterator[_T]:
    """All items, from `start` round to the one before it."""
    return (items[(start + step) % len(items)] for step in range(len(items)))


def _derangement(rows: Sequence[Demonstration], seed: int) -> Iterator[str | None]:
    """The answer of the next row of the task that has another one; at rate 1, where all differ, one cycle a task."""
    pools: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        pools[task_of(row)].append(row.answer)
    place: Counter[str] = Counter()
    for row in rows:
        task = task_of(row)
        place[task] += 1
        yield next((answer for answer in _round(pools[task], place[task]) if differs(row.answer, answer)), None)


def _derangement_across(rows: Sequence[Demonstration], seed: int) -> Iterator[str | None]:
    """The answer of the next row of another task that has another answer."""
    tasked = [(task_of(row), row.answer) for row in rows]
    for place, (own, right) in enumerate(tasked, 1):
        following = _round(tasked, place)
        yield next((answer for task, answer in following if task != own and differs(right, answer)), None)


def _token_corruption(rows: Sequence[Demonstration], seed: int) -> Iterator[str | None]:
    """CORRUPTED of the words (split at white space) become words of other answers, as frequent as they are there."""
    words = [(place, word) for place, row in enumerate(rows) for word in row.answer.split()]
    for place, row in enumerate(rows):
        random = _random(row, seed, "token-corruption")
        pieces = parts(row.answer)
        spots = range(0, len(pieces), 2)
        for spot in sorted(random.sample(spots, max(1, round(CORRUPTED * len(spots))))):
            others = _round(words, random.randrange(len(words)))
            pieces[spot] = next((w for at, w in others if at != place and w != pieces[spot]), "")
        yield "".join(pieces) if all(pieces) else None


def _wrong_task(rows: Sequence[Demonstration], seed: int) -> Iterator[str | None]:
    """What another task of the same group answers to the same words: nothing of unseen tasks comes in with it."""
    for row in rows:
        others = answers_of_other_tasks(prompt_text(row), like=row.answer)
        if others is None:
            kinds = ", ".join(kind for kind in _CANNOT if kind != "wrong-task")
            raise DataError(
                f"data.noise = wrong-task knows the tasks of the embedded world alone, and {row.source} is none of its "
                f"questions; choose one of {kinds}, or data.demonstrations = embedded"
            )
        wrong = [answer for answer in others if differs(row.answer, answer)]
        yield _random(row, seed, "wrong-task").choice(wrong) if wrong else None


def _base_answers(rows: Sequence[Demonstration], seed: int, ask: Ask) -> Iterator[str | None]:
    """What the base samples at temperature 1: the first of a few samples that is not the right answer."""
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        found: list[str | None] = [None] * len(chunk)
        for attempt in range(_TRIES):
            if None not in found:
                break
            said = ask(chunk, derive_seed(seed, "noise base-answers", start * _TRIES + attempt))
            for i, (row, answer) in enumerate(zip(chunk, said, strict=True)):
                if found[i] is None and differs(row.answer, answer):
                    found[i] = answer
        yield from found


# ---- damage to one text that keeps most of it: its end cut off, or one small slip


def parts(text: str) -> list[str]:
    """Words, and the white space between them in turn; a word first and last."""
    return re.split(r"(\s+)", text.strip())


def truncated(text: str, random: Random) -> str | None:
    """A proper prefix that ends with a word; of one word, with a character. None for one character."""
    text = text.rstrip()
    ends = [word.end() for word in re.finditer(r"\S+", text)][:-1]
    ends = ends or list(range(len(text) - len(text.lstrip()) + 1, len(text)))
    return text[: random.choice(ends)] if ends else None


def near_miss(text: str, random: Random) -> str | None:
    """One small edit: two neighbouring words or characters swapped, or one letter or digit changed. None: no room."""
    for edit in random.sample(_EDITS, len(_EDITS)):
        if (edited := edit(text, random)) is not None:
            return edited
    return None


def _swapped_words(text: str, random: Random) -> str | None:
    pieces = parts(text)
    places = [i for i in range(0, len(pieces) - 2, 2) if pieces[i] != pieces[i + 2]]
    if not places:
        return None
    at = random.choice(places)
    pieces[at], pieces[at + 2] = pieces[at + 2], pieces[at]
    return "".join(pieces)


def _swapped_characters(text: str, random: Random) -> str | None:
    places = [i for i, (one, other) in enumerate(pairwise(text)) if one != other and not re.search(r"\s", one + other)]
    if not places:
        return None
    at = random.choice(places)
    return text[:at] + text[at + 1] + text[at] + text[at + 2 :]


def _changed_letter(text: str, random: Random) -> str | None:
    places = [i for i, character in enumerate(text) if character.isalnum()]
    if not places:
        return None
    at = random.choice(places)
    own = text[at]
    letters = string.digits if own.isdigit() else string.ascii_uppercase if own.isupper() else string.ascii_lowercase
    return text[:at] + random.choice(letters.replace(own, "")) + text[at + 1 :]


_EDITS = (_swapped_words, _swapped_characters, _changed_letter)


_OF_ONE = {"truncation": truncated, "near-miss": near_miss}
_OF_ALL = {
    "derangement": _derangement,
    "derangement-across": _derangement_across,
    "token-corruption": _token_corruption,
    "wrong-task": _wrong_task,
}
_CANNOT = {
    "derangement": "no other answer in the task",
    "derangement-across": "no other answer in another task",
    "token-corruption": "no other word in another answer",
    "truncation": "nothing to cut",
    "wrong-task": "no other task answers otherwise",
    "near-miss": "nothing to swap or change",
    "base-answers": f"no prompt that fits, or nothing but the right answer in {_TRIES} samples",
}
"""Why a kind passes a row over."""
