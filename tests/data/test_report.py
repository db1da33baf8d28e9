"""What `srppo data` shows: lengths, and the tokens of a row, those that are trained set apart."""

from __future__ import annotations

import pytest
from data_cases import CHATML, encode, make_tokenizer, write
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from transformers import PreTrainedTokenizerFast

from srppo.config import DataConfig
from srppo.data.prepare import prepare
from srppo.data.report import length_lines, row_lines
from srppo.data.types import Demonstration, EncodedDemonstration, Message


@pytest.fixture(scope="module")
def chatml() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


def test_trained_tokens_stand_apart_and_nothing_is_invisible(chatml):
    asked = (Message("user", "one\ttwo \n\n"), Message("assistant", "a"), Message("user", "<|im_start|>?"))
    row = encode(chatml, Demonstration(asked, "b c", "a.jsonl:1"), stop=[4], turns="all")
    assert list(row_lines(row, "a.jsonl:1", chatml, 80)) == [
        (f"a.jsonl:1: {len(row.ids)} tokens, {row.trained} trained", False),
        ("   | 「<|im_start|>」user⏎", False),
        ("   | one→two·⏎", False),
        ("   | ⏎", False),
        ("   | 「<|im_end|>」⏎", False),
        ("   | 「<|im_start|>」assistant⏎", False),
        (" T | a「<|im_end|>」", True),
        ("   | ⏎", False),
        ("   | 「<|im_start|>」user⏎", False),
        ("   | 「<|im_start|>」?「<|im_end|>」⏎", False),  # a special token that the user spelt is one
        ("   | 「<|im_start|>」assistant⏎", False),
        (" T | b·c「<|im_end|>」", True),
    ]


@given(st.text(max_size=300), st.text(min_size=1, max_size=600), st.integers(24, 120))
@settings(max_examples=60, deadline=None)
def test_no_line_is_wider_than_the_terminal_and_long_texts_are_shortened(chatml, prompt, answer, width):
    row = encode(
        chatml, Demonstration((Message("user", prompt),), answer, "a:1"), max_tokens=9999, max_prompt_tokens=999
    )
    if isinstance(row, EncodedDemonstration):
        lines = list(row_lines(row, "folder/" * 9 + "a.jsonl:1", chatml, width))
        assert all(cell_len(line) <= width for line, _ in lines)
        assert len(lines) <= 30 and sum(trained for _, trained in lines) in range(1, 11)


def test_the_middle_of_a_long_text_is_left_out_and_counted(chatml):
    lines = [
        line
        for line, _ in row_lines(EncodedDemonstration(tuple(chatml("a\n" * 40)["input_ids"]), 80), "a:1", chatml, 80)
    ]
    assert lines[1:] == ["   | a⏎"] * 6 + ["   | ... 31 lines more ..."] + ["   | a⏎"] * 3


def test_lengths_are_counted_whole_and_trained():
    rows = [EncodedDemonstration(tuple(range(n)), 4, ((6, 8),)) for n in (10, 20, 1000)]
    assert length_lines(rows, []) == [
        "tokens                 rows  shortest    median       95%   longest          all",
        "demonstrations            3        10        20     1,000     1,000        1,030",
        "of which trained          3         4        14       994       994        1,012",
    ]
    assert length_lines([], [(1, 2)])[1:] == [
        "prompts                   1         2         2         2         2            2"
    ]


def test_special_tokens_in_prompts_are_said_once_a_file(tmp_path, chatml):
    rows = [{"prompt": f"w{i}{' <|im_end|>' if i % 3 == 1 else ''}", "completion": "<bos>"} for i in range(6)]
    path, clean = write(tmp_path, "a.jsonl", rows), write(tmp_path, "b.jsonl", rows[:1])
    config = DataConfig(demonstrations=(path, clean), prompts=(path, clean), held_out=0)
    report = prepare(config, chatml, 0, 128).report
    assert report.warnings == (f"{path}: 2 of 6 prompts spell special tokens, which are read as such (first {path}:2)",)
    assert f"warning: {report.warnings[0]}" in report.lines() and report.as_dict()["warnings"] == [*report.warnings]


def test_tools_that_a_template_does_not_write_are_said(tmp_path, chatml):
    path = write(tmp_path, "a.jsonl", [{"prompt": "u", "completion": "a", "tools": [{"name": "look"}]}])
    report = prepare(DataConfig(demonstrations=path, held_out=0), chatml, 0, 128).report
    assert report.warnings == (
        "1 rows have tools on offer, of which the chat template writes nothing; set model.chat_template",
    )
