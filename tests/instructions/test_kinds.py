"""Kinds of instruction: what is asked can be done, and is what is checked."""

from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from srppo.data.instructed import DEV, TEST
from srppo.instructions import changes
from srppo.instructions.changes import sentences
from srppo.instructions.checkers import NEEDS, instructed_item
from srppo.instructions.kinds import GROUPS, KINDS, Kind, of_group

QUESTION = "Describe shortly what happens to the water of oceans when winter begins."
ANSWER = (
    "When winter begins, the water cools from above. Cold water is heavier than warm water, so it sinks, and warmer "
    "water rises. Fish swim deeper now. The water below the ice stays liquid, however cold the air becomes, which is "
    "why many animals survive, feeding on what falls down to them, until the surface warms up again."
)
ITS_OWN = {"keywords:existence", "keywords:frequency", "keywords:letter_frequency"}  # drawn from the answer as it is
ITS_LENGTH = {"length_constraints:number_words", "length_constraints:number_sentences"}  # at least: of a long answer


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_changed_answer_obeys_and_the_plain_one_does_not(kind: Kind) -> None:
    """Over many draws of settings: the checker accepts the change, and rejects the text as it was where that is another
    text. Where it is the same, its amounts are what this answer has."""
    made = 0
    for seed in range(60):
        changed = kind.change(QUESTION, ANSWER, Random(seed))
        if changed is None:
            continue
        made += 1
        settings, completion = changed
        item = instructed_item(QUESTION, [kind.name], [settings], kind.name, kind.group)
        assert item.is_right(completion), (settings, completion)
        assert item.is_right(ANSWER) == (completion == ANSWER), (settings, completion)
        assert kind.name in ITS_OWN | ITS_LENGTH or completion != ANSWER
    assert made >= 20


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_wordings_say_all_that_is_checked(kind: Kind) -> None:
    """Each setting's value stands in each wording, but for the question to be repeated, which stands before it."""
    for seed in range(60):
        changed = kind.change(QUESTION, ANSWER, Random(seed))
        for wording in kind.wordings if changed else ():
            assert changed is not None
            said = Kind(kind.name, kind.group, (wording,), kind.change).word(changed[0], Random(0))
            for key, value in changed[0].items():
                words = {"at least": ["no fewer than"], "less than": ["fewer than"]}.get(str(value), [value])
                words = value if isinstance(value, list) else words
                more = kind.group == "unseen" or "or more" in said or "no fewer" in said
                assert more or key not in ("num_highlights", "num_placeholders"), "the checker takes more than so many"
                assert key == "prompt_to_repeat" or all(str(word) in said for word in words), (key, said)
    assert len(set(kind.wordings)) == 3


def test_kinds_fall_into_groups() -> None:
    """Nine kinds that nothing shows, so that kinds can be units; names are lm-eval's, each once."""
    assert Counter(kind.group for kind in KINDS) == {"demonstrated": 7, "prompted": 7, "unseen": 9}
    assert tuple(TEST) == GROUPS and len({kind.name for kind in KINDS}) == len(KINDS)
    assert len(of_group("unseen")) * TEST["unseen"] >= 1000 and DEV * len(of_group("demonstrated")) == 140
    wordings = [wording for kind in KINDS for wording in kind.wordings]
    assert len(set(wordings)) == len(wordings)
    assert {kind for kind in NEEDS if kind not in {each.name for each in KINDS}} == {"language:response_language"}


@given(st.text(alphabet="aB c.!?\n", max_size=60))
@settings(max_examples=200, deadline=None)
def test_sentences_lose_nothing_but_space(text: str) -> None:
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())
    assert all(sentences(text))


def test_answers_that_do_not_lend_themselves_are_none() -> None:
    rng = Random(0)
    for change in (
        *(changes.bulleted, changes.divided, changes.sections, changes.two_responses, changes.first_word),
        *(changes.with_keywords, changes.keyword_often, changes.letter_often, changes.no_comma, changes.capital_words),
    ):
        assert change(QUESTION, "Yes.", rng) is None
    for _ in range(20):
        assert changes.number_of_words(QUESTION, "Yes, it is so.", rng) is None
        assert changes.number_of_sentences(QUESTION, "Yes. It is so.", rng) in (
            None,
            ({"relation": "less than", "num_sentences": 2}, "Yes."),
        )
    assert changes.forbidden("Why?", ANSWER, rng) is None, "no word of the question is in the answer"
    assert changes.forbidden("Describe water.", "Water is wet.", rng) is None, "nothing would be left"
    assert changes.highlights(QUESTION, "2 * 3 *" + ANSWER, rng) is None
    assert changes.bulleted("Name two fish.", "Carps are one. Pikes are another. So are eels.", rng) is None
    assert changes.bulleted(QUESTION, "One. Two. Three. Four. Five. Six.", rng) is None, "an answer is not cut"


def test_sentences_end_where_they_end() -> None:
    text = "Tools (e.g. a saw) help. Y.N. Manin said so, i.e. wrote it! Who? 5 of them."
    assert sentences(text) == ["Tools (e.g. a saw) help.", "Y.N. Manin said so, i.e. wrote it!", "Who?", "5 of them."]


def test_a_letter_is_asked_for_where_the_answer_is_rich_in_it() -> None:
    for seed in range(20):
        changed = changes.letter_often(QUESTION, ANSWER, Random(seed))
        assert changed is not None
        letter, count = changed[0]["letter"], changed[0]["let_frequency"]
        assert count == ANSWER.lower().count(letter) >= 3 and letter in "vw"
