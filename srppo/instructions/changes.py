"""How an answer is changed by program so that it obeys an instruction.

Each function takes question, answer and a generator, and gives the settings of IFEval's checker with the answer that
obeys; None where this answer cannot be made to, or where the instruction would ask for nothing: amounts are such that
answers by and large do not have them already.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from random import Random
from typing import Any

Changed = tuple[Mapping[str, Any], str]  # settings of the checker, the answer that obeys
_STOP = re.compile(r"(?<=[.!?])(?<![A-Z]\.)\s+(?=[\"'(*\-A-Z0-9])")  # not within `e.g. this`, nor after initials


def sentences(text: str) -> list[str]:
    """Split after a full stop, question or exclamation mark; a line's end ends one too."""
    return [part.strip() for line in text.split("\n") for part in _STOP.split(line) if part.strip()]


def _parts(text: str, count: int) -> list[str] | None:
    """The sentences of a text in so many paragraphs of like length; None where they are too few."""
    found = sentences(text)
    if len(found) < count:
        return None
    cuts = [len(found) * i // count for i in range(count + 1)]
    return [" ".join(found[start:end]) for start, end in pairwise(cuts)]


def _words(text: str, shortest: int = 5) -> list[str]:
    """Distinct lower-case words that have no neighbour but spaces and punctuation, in their order."""
    found = re.findall(r"(?<![\w'*-])[a-z]+(?![\w'*-])", text)
    return list(dict.fromkeys(word for word in found if len(word) >= shortest))


def _count(word: str, text: str) -> int:
    return len(re.findall(rf"\b{word}\b", text, flags=re.IGNORECASE))


# ---- letters and marks


def lowercase(question: str, answer: str, rng: Random) -> Changed:
    return {}, answer.lower()


def uppercase(question: str, answer: str, rng: Random) -> Changed:
    return {}, answer.upper()


def capital_words(question: str, answer: str, rng: Random) -> Changed | None:
    words, count = _words(answer), rng.choice((2, 3, 4))
    if len(words) < count:
        return None
    for word in rng.sample(words, count):
        answer = re.sub(rf"(?<![\w'*-]){word}(?![\w'*-])", word.upper(), answer, count=1)
    return {"capital_relation": "at least", "capital_frequency": count}, answer


def no_comma(question: str, answer: str, rng: Random) -> Changed | None:
    return ({}, answer.replace(",", "")) if "," in answer else None


def quotation(question: str, answer: str, rng: Random) -> Changed:
    return {}, '"' + answer.replace('"', "'") + '"'


def letter_often(question: str, answer: str, rng: Random) -> Changed | None:
    """A letter of which this answer has clearly more than English text of its length would."""
    share = {"b": 15, "d": 43, "f": 22, "g": 20, "k": 8, "m": 24, "p": 19, "v": 10, "w": 24, "y": 20}  # of 1000 letters
    letters = sum(each.isalpha() for each in answer)
    counts = {letter: answer.lower().count(letter) for letter in share}
    rich = [letter for letter, count in counts.items() if count >= max(3, 1.5 * share[letter] / 1000 * letters)]
    if not rich:
        return None
    letter = rng.choice(rich)
    return {"let_relation": "at least", "letter": letter, "let_frequency": counts[letter]}, answer


# ---- words


def with_keywords(question: str, answer: str, rng: Random) -> Changed | None:
    words = [word for word in _words(answer, 6) if word not in question.lower()]
    return ({"keywords": rng.sample(words, 2)}, answer) if len(words) >= 2 else None


def keyword_often(question: str, answer: str, rng: Random) -> Changed | None:
    counts = {word: _count(word, answer) for word in _words(answer, 4)}
    words = [word for word, count in counts.items() if count >= 2]
    if not words:
        return None
    word = rng.choice(words)
    return {"relation": "at least", "keyword": word, "frequency": counts[word]}, answer


def forbidden(question: str, answer: str, rng: Random) -> Changed | None:
    """A word of the question that the answer takes up, and does without in a sentence that stays."""
    found = sentences(answer)
    for word in rng.sample(words := _words(question), len(words)):
        rest = [each for each in found if not re.search(word, each, flags=re.IGNORECASE)]
        if rest and len(rest) < len(found):
            return {"forbidden_words": [word]}, " ".join(rest)
    return None


def number_of_words(question: str, answer: str, rng: Random) -> Changed | None:
    """Few: what the first sentences of a longer answer have. Many: what a long answer has."""
    found, count = sentences(answer), len(re.findall(r"\w+", answer))
    if rng.random() < 0.5:
        return ({"relation": "at least", "num_words": 5 * (count // 5)}, answer) if count >= 50 else None
    kept = " ".join(found[: rng.randint(1, max(len(found) - 1, 1))])
    most = 5 * (len(re.findall(r"\w+", kept)) // 5 + 1)
    return ({"relation": "less than", "num_words": most}, kept) if most <= count else None


def number_of_sentences(question: str, answer: str, rng: Random) -> Changed | None:
    found = sentences(answer)
    if rng.random() < 0.5:
        return ({"relation": "at least", "num_sentences": len(found)}, answer) if len(found) >= 4 else None
    kept = found[: rng.randint(1, max(len(found) - 1, 1))]
    settings = {"relation": "less than", "num_sentences": len(kept) + 1}
    return (settings, " ".join(kept)) if 1 < len(kept) + 1 <= len(found) else None


# ---- form


def bulleted(question: str, answer: str, rng: Random) -> Changed | None:
    """All of an answer of two to five sentences, unless the question asks for another number of things."""
    found = [re.sub(r"^([-*•]|\d+[.)])\s*", "", line) for line in sentences(answer)]
    found = [line for line in found if line]
    said = re.findall(r"\b(\d+|two|three|four|five|six|seven|eight|nine|ten)\b", question.lower())
    if said or not 2 <= len(found) <= 5:
        return None
    return {"num_bullets": len(found)}, "\n".join(f"* {line}" for line in found)


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


def as_json(question: str, answer: str, rng: Random) -> Changed:
    return {}, json.dumps({"answer": answer}, indent=1)


def highlights(question: str, answer: str, rng: Random) -> Changed | None:
    words, count = _words(answer), rng.choice((1, 2, 3))
    if len(words) < count or "*" in answer:
        return None
    for word in rng.sample(words, count):
        answer = re.sub(rf"(?<![\w'*-]){word}(?![\w'*-])", f"*{word}*", answer, count=1)
    return {"num_highlights": count}, answer


def divided(question: str, answer: str, rng: Random) -> Changed | None:
    parts = _parts(answer, rng.choice((2, 3)))
    return ({"num_paragraphs": len(parts)}, "\n\n***\n\n".join(parts)) if parts else None


def sections(question: str, answer: str, rng: Random) -> Changed | None:
    mark = rng.choice(("SECTION", "Section", "PART"))
    parts = _parts(answer, rng.choice((2, 3)))
    if not parts:
        return None
    written = "\n\n".join(f"{mark} {number}\n{part}" for number, part in enumerate(parts, start=1))
    return {"section_spliter": mark, "num_sections": len(parts)}, written


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


def two_responses(question: str, answer: str, rng: Random) -> Changed | None:
    found = sentences(answer)
    return ({}, f"{answer}\n******\n{found[0]}") if len(found) >= 2 else None


def repeat(question: str, answer: str, rng: Random) -> Changed:
    return {"prompt_to_repeat": question}, f"{question}\n\n{answer}"


_BLANKS = ("[name]", "[date]", "[place]", "[address]")


def placeholders(question: str, answer: str, rng: Random) -> Changed:
    blanks = rng.sample(_BLANKS, rng.choice((1, 2, 3)))
    return {"num_placeholders": len(blanks)}, f"{answer} Written by {', '.join(blanks)}."
