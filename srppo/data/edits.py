"""Damage to a text that keeps most of it: its end cut off, or one small slip."""

from __future__ import annotations

import re
import string
from itertools import pairwise
from random import Random


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
        edited = edit(text, random)
        if edited is not None:
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
