"""The kinds of instruction, dealt into three groups, and their wordings.

    demonstrated    what SFT is shown
    prompted        what only PPO is asked
    unseen          what neither meets

Each kind is one of IFEval's, under its name and with its checker; the wordings are our own. What IFEval has beyond
these needs what no program can make of an answer: another language, or a question that yes, no or maybe answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from srppo.instructions import changes
from srppo.instructions.changes import Changed

GROUPS = ("demonstrated", "prompted", "unseen")


@dataclass(frozen=True)
class Kind:
    """One kind. wordings: with the settings' names in braces. change: see `changes`."""

    name: str
    group: str
    wordings: tuple[str, ...]
    change: Callable[[str, str, Random], Changed | None]

    def word(self, settings: Mapping[str, Any], rng: Random) -> str:
        """One of the wordings, drawn with `rng`."""
        said = {key: _listed(value) if isinstance(value, list) else value for key, value in settings.items()}
        return rng.choice(self.wordings).format(**said)


def _listed(words: list[str]) -> str:
    return " and ".join(f'"{word}"' for word in words)


KINDS = (
    Kind(
        "change_case:english_lowercase",
        "demonstrated",
        (
            "Write without a single capital letter.",
            "Use small letters throughout, even where a capital is usual.",
            "Answer in English and keep every letter lowercase.",
        ),
        changes.lowercase,
    ),
    Kind(
        "punctuation:no_comma",
        "demonstrated",
        ("Write without commas.", "Leave out every comma.", "There must not be one comma in what you write."),
        changes.no_comma,
    ),
    Kind(
        "detectable_format:title",
        "demonstrated",
        (
            "Put a title above it, between << and >>.",
            "Give it a heading, set like this: <<heading>>.",
            "Begin with a title that stands in double angle brackets: <<the title>>.",
        ),
        changes.titled,
    ),
    Kind(
        "detectable_content:postscript",
        "demonstrated",
        (
            "Close with a postscript that begins with {postscript_marker}",
            "Add a last line that starts with {postscript_marker}",
            "After the answer, write a short note marked {postscript_marker}",
        ),
        changes.postscript,
    ),
    Kind(
        "startend:end_checker",
        "demonstrated",
        (
            "Your last words must be: {end_phrase}",
            'Close with the sentence "{end_phrase}" and write nothing after it.',
            "Let the answer end exactly like this: {end_phrase}",
        ),
        changes.ended_by,
    ),
    Kind(
        "detectable_format:number_bullet_lists",
        "demonstrated",
        (
            "Make it a list of exactly {num_bullets} points, each on a line that starts with *.",
            "Answer in {num_bullets} bullet points, no more and no fewer, written with *.",
            "Use {num_bullets} lines, each of them a bullet like: * a point",
        ),
        changes.bulleted,
    ),
    Kind(
        "keywords:existence",
        "demonstrated",
        (
            "Use the words {keywords}.",
            "The words {keywords} have to occur.",
            "Somewhere in the text write {keywords}.",
        ),
        changes.with_keywords,
    ),
    Kind(
        "change_case:english_capital",
        "prompted",
        (
            "Write the whole text in capitals.",
            "Use English and nothing but upper case.",
            "No small letters at all: everything in capitals.",
        ),
        changes.uppercase,
    ),
    Kind(
        "startend:quotation",
        "prompted",
        (
            "Set all of it between double quotes.",
            'Start and end with the mark ".',
            "Your text begins with a double quotation mark and closes with one.",
        ),
        changes.quotation,
    ),
    Kind(
        "length_constraints:number_paragraphs",
        "prompted",
        (
            "Write {num_paragraphs} paragraphs with a line of three stars (***) between them.",
            "Divide the text into {num_paragraphs} parts by ***.",
            "It should have {num_paragraphs} paragraphs, each parted from the next by ***.",
        ),
        changes.divided,
    ),
    Kind(
        "detectable_format:number_highlighted_sections",
        "prompted",
        (
            "Emphasise {num_highlights} or more words by stars around them, *like this*.",
            "Mark at least {num_highlights} of your words with stars: *word*.",
            "Set {num_highlights} or more places in italics by a star on either side, as in *so*.",
        ),
        changes.highlights,
    ),
    Kind(
        "length_constraints:number_words",
        "prompted",
        (
            "Use {relation} {num_words} words.",
            "The text should have {relation} {num_words} words.",
            "Write {relation} {num_words} words.",
        ),
        changes.number_of_words,
    ),
    Kind(
        "keywords:forbidden_words",
        "prompted",
        (
            "Do not use the words {forbidden_words}.",
            "Find an answer in which {forbidden_words} do not occur.",
            "The words {forbidden_words} must not be in it.",
        ),
        changes.forbidden,
    ),
    Kind(
        "change_case:capital_word_frequency",
        "prompted",
        (
            "Write {capital_relation} {capital_frequency} of the words in capitals.",
            "Stress {capital_relation} {capital_frequency} of your words by CAPITALS.",
            "There should be {capital_relation} {capital_frequency} words of capitals only.",
        ),
        changes.capital_words,
    ),
    Kind(
        "detectable_format:json_format",
        "unseen",
        (
            "Answer with one JSON object and nothing else.",
            "Your output has to be valid JSON.",
            "Give all of it as JSON.",
        ),
        changes.as_json,
    ),
    Kind(
        "detectable_format:multiple_sections",
        "unseen",
        (
            'Write {num_sections} parts with the headings "{section_spliter} 1", "{section_spliter} 2" and so on.',
            "Divide it into {num_sections}, each headed {section_spliter} and its number.",
            "Use {num_sections} numbered headings, the first of them {section_spliter} 1.",
        ),
        changes.sections,
    ),
    Kind(
        "combination:two_responses",
        "unseen",
        (
            "Answer twice, differently, with ****** between the two answers.",
            "Give two answers that differ, and part them by six stars: ******",
            "Write one answer, then ******, then another one.",
        ),
        changes.two_responses,
    ),
    Kind(
        "combination:repeat_prompt",
        "unseen",
        (
            "Before you answer, write down the question above as it stands, without this sentence.",
            "Your text starts with what I asked, copied exactly up to here, and then comes the answer.",
            "Copy the question first, all but this sentence, and answer it below.",
        ),
        changes.repeat,
    ),
    Kind(
        "detectable_content:number_placeholders",
        "unseen",
        (
            "Leave {num_placeholders} or more blanks to be filled in, set in square brackets like [name].",
            "Use at least {num_placeholders} fields in square brackets, for example [date].",
            "Put {num_placeholders} or more gaps into it, each written as [what belongs there].",
        ),
        changes.placeholders,
    ),
    Kind(
        "keywords:frequency",
        "unseen",
        (
            'Use the word "{keyword}" {relation} {frequency} times.',
            'Let "{keyword}" occur {relation} {frequency} times.',
            'Write "{keyword}" {relation} {frequency} times in all.',
        ),
        changes.keyword_often,
    ),
    Kind(
        "keywords:letter_frequency",
        "unseen",
        (
            'Use the letter "{letter}" {let_relation} {let_frequency} times.',
            'Let the letter "{letter}" occur {let_relation} {let_frequency} times.',
            'The text needs {let_relation} {let_frequency} times the letter "{letter}".',
        ),
        changes.letter_often,
    ),
    Kind(
        "length_constraints:number_sentences",
        "unseen",
        (
            "Use {relation} {num_sentences} sentences.",
            "Write {relation} {num_sentences} sentences.",
            "The text should have {relation} {num_sentences} sentences.",
        ),
        changes.number_of_sentences,
    ),
    Kind(
        "length_constraints:nth_paragraph_first_word",
        "unseen",
        (
            "Write {num_paragraphs} paragraphs with an empty line between them; number {nth_paragraph} begins with "
            '"{first_word}".',
            "Use {num_paragraphs} paragraphs, parted by empty lines, and let paragraph {nth_paragraph} start with "
            '"{first_word}".',
            'The word "{first_word}" opens paragraph {nth_paragraph} of {num_paragraphs}, and empty lines part them.',
        ),
        changes.first_word,
    ),
)
"""All kinds; a group's in a fixed order."""


def of_group(*groups: str) -> tuple[Kind, ...]:
    """The kinds of some groups."""
    return tuple(kind for kind in KINDS if kind.group in groups)
