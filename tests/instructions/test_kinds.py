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

QUESTION = "Describe shortly what happens to the water of the oceans when winter comes."
ANSWER = (
    "When winter comes, the water cools from above. Cold water is heavier than warm water, so it sinks, and warmer "
    "water rises. At last ice forms on the surface. The water below the ice stays liquid."
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_the_changed_answer_obeys_and_the_plain_one_does_not_always(kind: Kind) -> None:
    """Over many draws of settings: the checker accepts the change. Where the change is one of the text, it rejects the
    text as it was: the instruction asks for something."""
    plain = 0
    for seed in range(40):
        changed = kind.change(QUESTION, ANSWER, Random(seed))
        if changed is None:
            continue
        settings, completion = changed
        item = instructed_item(QUESTION, [kind.name], [settings], kind.name, kind.group)
        assert item.is_right(completion), (settings, completion)
        plain += item.is_right(ANSWER)
        if completion != ANSWER:
            assert not item.is_right(ANSWER), (settings, completion)
    unchanged = {"keywords:existence", "keywords:forbidden_words", "keywords:frequency", "keywords:letter_frequency"}
    unchanged |= {"length_constraints:number_words", "length_constraints:number_sentences"}
    assert (plain > 0) == (kind.name in unchanged)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_wordings_say_all_that_is_checked(kind: Kind) -> None:
    """Each setting's value stands in each wording, but the question that is to be repeated, which stands before it."""
    changed = next(filter(None, (kind.change(QUESTION, ANSWER, Random(seed)) for seed in range(40))))
    assert len(set(kind.wordings)) == 3
    for wording in kind.wordings:
        said = Kind(kind.name, kind.group, (wording,), kind.change).word(changed[0], Random(0))
        assert "{" not in said.replace("{{", "")
        for key, value in changed[0].items():
            if key not in ("prompt_to_repeat", "num_placeholders", "postscript_marker") or key in wording:
                words = value if isinstance(value, list) else [value]
                implied = key == "relation" and "or more" in said
                assert implied or all(str(word) in said for word in words) or key == "prompt_to_repeat", (key, said)


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
    short = "Yes."
    for change in (changes.bulleted, changes.divided, changes.sections, changes.two_responses, changes.with_keywords):
        assert change(QUESTION, short, Random(0)) is None
    assert changes.forbidden("Why?", ANSWER, Random(0)) is None
    assert changes.highlights(QUESTION, "2 * 3 *" + ANSWER, Random(0)) is None
