"""The kinds of instruction, dealt into three groups, and their wordings.

    demonstrated    what SFT is shown
    prompted        what only PPO is asked
    unseen          what neither meets

Each kind is one of IFEval's, under its name and with its checker; the wordings are our own. What IFEval has beyond
these needs what no program can make of an answer: another language, or a question that yes, no or maybe answers.

Kinds of which one's answers obey the other by the way stand in one group: quotation marks make a JSON string, capitals
are words in capitals, few words are few sentences. One near pair is left: words to be used, and one to be used often.
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
        return rng.choice(self.wordings).format(**{key: _said(value) for key, value in settings.items()})


_RELATIONS = {"at least": "no fewer than", "less than": "fewer than"}


def _said(value: Any) -> Any:
    if isinstance(value, list):
        return " and ".join(f'"{word}"' for word in value)
    return _RELATIONS.get(value, value)


KINDS = (
    Kind(
        "change_case:english_lowercase",
        "demonstrated",
        (
            "Answer in English without a single capital letter.",
            "Use small letters throughout, in English.",
            "Keep every letter of your English answer lowercase.",
        ),
        changes.lowercase,
    ),
    Kind(
        "punctuation:no_comma",
        "demonstrated",
        (
            "Write without commas.",
            "Leave out every comma.",
            "There must not be one comma in it.",
        ),
        changes.no_comma,
    ),
    Kind(
        "detectable_format:title",
        "demonstrated",
        (
            "Put a title above it, between << and >>.",
            "Give it a heading, set like this: <<heading>>.",
            "Begin with a title in angle brackets: <<the title>>.",
        ),
        changes.titled,
    ),
    Kind(
        "detectable_content:postscript",
        "demonstrated",
        (
            "Close with a postscript that begins with {postscript_marker}",
            "Add a last line that starts with {postscript_marker}",
            "After the answer, write a note marked {postscript_marker}",
        ),
        changes.postscript,
    ),
    Kind(
        "startend:end_checker",
        "demonstrated",
        (
            "Your last words must be: {end_phrase}",
            'Close with "{end_phrase}" and nothing after it.',
            "Let it end exactly like this: {end_phrase}",
        ),
        changes.ended_by,
    ),
    Kind(
        "detectable_format:number_bullet_lists",
        "demonstrated",
        (
            "Make it {num_bullets} points, each on a line that starts with *.",
            "Answer in {num_bullets} bullet points written with *.",
            "Use {num_bullets} lines, each of them like: * a point",
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
            "Write the whole answer in English capitals.",
            "Use English and nothing but upper case.",
            "No small letters: everything in capitals, and in English.",
        ),
        changes.uppercase,
    ),
    Kind(
        "change_case:capital_word_frequency",
        "prompted",
        (
            "Write {capital_relation} {capital_frequency} of the words in capitals.",
            "Stress {capital_relation} {capital_frequency} of your words by CAPITALS.",
            "Have {capital_relation} {capital_frequency} words of capitals only.",
        ),
        changes.capital_words,
    ),
    Kind(
        "startend:quotation",
        "prompted",
        (
            "Set all of it between double quotes.",
            'Start and end with a double quote (").',
            "Your text begins with a double quotation mark and closes with one.",
        ),
        changes.quotation,
    ),
    Kind(
        "detectable_format:json_format",
        "prompted",
        (
            "Answer with one JSON object and nothing else.",
            "Your output has to be valid JSON.",
            "Give all of it as JSON.",
        ),
        changes.as_json,
    ),
    Kind(
        "length_constraints:number_words",
        "prompted",
        (
            "Keep to {relation} {num_words} words.",
            "Let it have {relation} {num_words} words.",
            "Its length: {relation} {num_words} words.",
        ),
        changes.number_of_words,
    ),
    Kind(
        "length_constraints:number_sentences",
        "prompted",
        (
            "Keep to {relation} {num_sentences} sentences.",
            "Its length: {relation} {num_sentences} sentences.",
            "Let it have {relation} {num_sentences} sentences.",
        ),
        changes.number_of_sentences,
    ),
    Kind(
        "detectable_format:number_highlighted_sections",
        "prompted",
        (
            "Set {num_highlights} or more single words between stars, as in *so*.",
            "Mark {num_highlights} of your words or more, each like *this*.",
            "Put a star on either side of {num_highlights} or more words, as in *so*.",
        ),
        changes.highlights,
    ),
    Kind(
        "length_constraints:number_paragraphs",
        "unseen",
        (
            "Write {num_paragraphs} paragraphs with a line of three stars (***) between them.",
            "Divide the text into {num_paragraphs} parts by ***.",
            "It should have {num_paragraphs} paragraphs, each parted from the next by ***.",
        ),
        changes.divided,
    ),
    Kind(
        "length_constraints:nth_paragraph_first_word",
        "unseen",
        (
            'Write {num_paragraphs} paragraphs, an empty line between; number {nth_paragraph} begins "{first_word}".',
            'Part {num_paragraphs} paragraphs by empty lines. Paragraph {nth_paragraph} opens with "{first_word}".',
            'The word "{first_word}" opens paragraph {nth_paragraph} of {num_paragraphs}, which empty lines part.',
        ),
        changes.first_word,
    ),
    Kind(
        "detectable_format:multiple_sections",
        "unseen",
        (
            'Write {num_sections} parts with the headings "{section_spliter} 1", "{section_spliter} 2" and so on.',
            "Divide it into {num_sections}, headed {section_spliter} 1, {section_spliter} 2 and so on.",
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
            "Begin with the question above, copied word for word without quotation marks, then answer it.",
            "Your text starts with what stands above, copied exactly and without quotes; then comes the answer.",
            "Write the question above once more, unchanged and before anything else, and answer it below.",
        ),
        changes.repeat,
    ),
    Kind(
        "detectable_content:number_placeholders",
        "unseen",
        (
            "Leave {num_placeholders} or more blanks to be filled in, set in square brackets like [name].",
            "Use {num_placeholders} or more fields in square brackets, for example [date].",
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
        "keywords:forbidden_words",
        "unseen",
        (
            "Do not use the word {forbidden_words}.",
            "Find an answer in which {forbidden_words} does not occur.",
            "The word {forbidden_words} must not be in it.",
        ),
        changes.forbidden,
    ),
)
"""All kinds; a group's in a fixed order."""


def of_group(*groups: str) -> tuple[Kind, ...]:
    """The kinds of some groups."""
    return tuple(kind for kind in KINDS if kind.group in groups)
