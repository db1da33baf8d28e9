"""How an answer is changed by program so that it obeys an instruction.

Each function takes question, answer and a generator, and gives the settings of IFEval's checker with the answer that
obeys; None where this answer cannot be made to.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from random import Random
from typing import Any

Changed = tuple[Mapping[str, Any], str]  # settings of the checker, the answer that obeys


def sentences(text: str) -> list[str]:
    """Split after a full stop, question or exclamation mark; a line's end ends one too."""
    return [part.strip() for line in text.split("\n") for part in re.split(r"(?<=[.!?])\s+", line) if part.strip()]


def _parts(text: str, count: int) -> list[str] | None:
    """The sentences of a text in so many paragraphs of like length; None where they are too few."""
    found = sentences(text)
    if len(found) < count:
        return None
    cuts = [len(found) * i // count for i in range(count + 1)]
    return [" ".join(found[start:end]) for start, end in pairwise(cuts)]


def _words(text: str, shortest: int = 5) -> list[str]:
    """Distinct lower-case words that have no neighbour but spaces and punctuation, in their order."""
    return list(
        dict.fromkeys(word for word in re.findall(r"(?<![\w'-])[a-z]+(?![\w'-])", text) if len(word) >= shortest)
    )


# ---- demonstrated


def lowercase(question: str, answer: str, rng: Random) -> Changed:
    return {}, answer.lower()


def no_comma(question: str, answer: str, rng: Random) -> Changed:
    return {}, answer.replace(",", "")


def titled(question: str, answer: str, rng: Random) -> Changed:
    words = [word.capitalize() for word in re.findall(r"[\w'-]+", question)[1:] if len(word) > 3][:4]
    return {}, f"<<{' '.join(words) or 'My Answer'}>>\n\n{answer}"


_NOTES = (
    "Thank you for asking.",
    "There is more to say about this.",
    "Ask again at any time.",
    "I hope that this helps.",
)


def postscript(question: str, answer: str, rng: Random) -> Changed:
    marker = rng.choice(("P.S.", "P.P.S"))
    return {"postscript_marker": marker}, f"{answer}\n\n{marker} {rng.choice(_NOTES)}"


_ENDS = (
    "That is all.",
    "Does this help you?",
    "Have a good day!",
    "This is what I know.",
    "Please ask if anything is unclear.",
)


def ended_by(question: str, answer: str, rng: Random) -> Changed:
    phrase = rng.choice(_ENDS)
    return {"end_phrase": phrase}, f"{answer} {phrase}"


def bulleted(question: str, answer: str, rng: Random) -> Changed | None:
    found = [re.sub(r"^([-*•]|\d+[.)])\s*", "", line) for line in sentences(answer)][:5]
    found = [line for line in found if line]
    if len(found) < 2:
        return None
    return {"num_bullets": len(found)}, "\n".join(f"* {line}" for line in found)


def with_keywords(question: str, answer: str, rng: Random) -> Changed | None:
    words = [word for word in _words(answer, 6) if word not in question.lower()]
    return ({"keywords": rng.sample(words, 2)}, answer) if len(words) >= 2 else None


# ---- prompted


def uppercase(question: str, answer: str, rng: Random) -> Changed:
    return {}, answer.upper()


def quotation(question: str, answer: str, rng: Random) -> Changed:
    return {}, '"' + answer.replace('"', "'") + '"'


def divided(question: str, answer: str, rng: Random) -> Changed | None:
    parts = _parts(answer, rng.choice((2, 3)))
    return ({"num_paragraphs": len(parts)}, "\n\n***\n\n".join(parts)) if parts else None


def highlights(question: str, answer: str, rng: Random) -> Changed | None:
    words, count = _words(answer), rng.choice((1, 2, 3))
    if len(words) < count or "*" in answer:
        return None
    for word in rng.sample(words, count):
        answer = re.sub(rf"(?<![\w'*-]){word}(?![\w'*-])", f"*{word}*", answer, count=1)
    return {"num_highlights": count}, answer


def number_of_words(question: str, answer: str, rng: Random) -> Changed:
    count = len(re.findall(r"\w+", answer))
    if rng.random() < 0.5:
        return {"relation": "less than", "num_words": 10 * (count // 10 + rng.choice((1, 2)))}, answer
    return {"relation": "at least", "num_words": max(5, 5 * ((count * 3 // 4) // 5))}, answer


def forbidden(question: str, answer: str, rng: Random) -> Changed | None:
    """Words of the question, which lie near, that the answer can do without."""
    words = [word for word in _words(question) if word not in answer.lower()]
    return ({"forbidden_words": rng.sample(words, 2)}, answer) if len(words) >= 2 else None


def capital_words(question: str, answer: str, rng: Random) -> Changed | None:
    words, count = _words(answer), rng.choice((1, 2, 3))
    if len(words) < count:
        return None
    for word in rng.sample(words, count):
        answer = re.sub(rf"(?<![\w'-]){word}(?![\w'-])", word.upper(), answer, count=1)
    return {"capital_relation": "at least", "capital_frequency": count}, answer


# ---- unseen


def as_json(question: str, answer: str, rng: Random) -> Changed:
    return {}, json.dumps({"question": question, "answer": answer}, indent=2)


def sections(question: str, answer: str, rng: Random) -> Changed | None:
    mark = rng.choice(("SECTION", "Section", "PART"))
    parts = _parts(answer, rng.choice((2, 3)))
    if not parts:
        return None
    written = "\n\n".join(f"{mark} {number}\n{part}" for number, part in enumerate(parts, start=1))
    return {"section_spliter": mark, "num_sections": len(parts)}, written


def two_responses(question: str, answer: str, rng: Random) -> Changed | None:
    found = sentences(answer)
    return ({}, f"{answer}\n******\n{found[0]}") if len(found) >= 2 else None


def repeat(question: str, answer: str, rng: Random) -> Changed:
    return {"prompt_to_repeat": question}, f"{question}\n\n{answer}"


_BLANKS = ("[name]", "[date]", "[place]", "[address]")


def placeholders(question: str, answer: str, rng: Random) -> Changed:
    blanks = rng.sample(_BLANKS, rng.choice((1, 2, 3)))
    return {"num_placeholders": len(blanks)}, f"{answer} Written by {', '.join(blanks)}."


def keyword_often(question: str, answer: str, rng: Random) -> Changed | None:
    counts = {word: len(re.findall(word, answer, flags=re.IGNORECASE)) for word in _words(answer, 4)}
    words = [word for word, count in counts.items() if count >= 2]
    if not words:
        return None
    word = rng.choice(words)
    return {"relation": "at least", "keyword": word, "frequency": counts[word]}, answer


def letter_often(question: str, answer: str, rng: Random) -> Changed | None:
    counts = {letter: answer.lower().count(letter) for letter in "bcdfghklmpuvwy"}
    letters = [letter for letter, count in counts.items() if count >= 3]
    if not letters:
        return None
    letter = rng.choice(letters)
    return {"let_relation": "at least", "letter": letter, "let_frequency": counts[letter]}, answer


def number_of_sentences(question: str, answer: str, rng: Random) -> Changed | None:
    count = len(sentences(answer))
    if rng.random() < 0.5:
        return {"relation": "less than", "num_sentences": count + 1}, answer
    return ({"relation": "at least", "num_sentences": count - 1}, answer) if count > 2 else None


def first_word(question: str, answer: str, rng: Random) -> Changed | None:
    parts = _parts(answer, rng.choice((2, 3)))
    if not parts:
        return None
    place = rng.randrange(len(parts))
    word = re.match(r"[A-Za-z]+(?=[\s,.])", parts[place])
    if word is None:
        return None
    settings = {"num_paragraphs": len(parts), "nth_paragraph": place + 1, "first_word": word[0].lower()}
    return settings, "\n\n".join(parts)
