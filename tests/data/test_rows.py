"""Columns to demonstrations and prompts: what is read of a row, and what is left out and why."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from data_cases import message_of, write

from srppo.data.order import row_id
from srppo.data.rows import load_demonstrations, load_prompts
from srppo.data.types import Message
from srppo.errors import DataError

USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
ONE_TURN = (Message("user", "u"),)
SAID = [{"from": "human", "value": "u"}]
PARTS = [{"type": "text", "text": "one"}, {"type": "text", "value": " two"}]  # both keys are found
TWO_PARTS = (Message("user", "one two"),)


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "u", "response": "a"}, ONE_TURN, "a"),
        ({"prompt": [USER], "completion": [ANSWER]}, ONE_TURN, "a"),
        ({"prompt": [USER], "completion": "a"}, ONE_TURN, "a"),
        ({"prompt_id": "x", "messages": [USER, ANSWER]}, ONE_TURN, "a"),
        (
            {
                "messages": [
                    {"role": "system", "content": "s"},
                    USER,
                    ANSWER,
                    USER,
                    {"role": "assistant", "content": "b"},
                ]
            },
            (Message("system", "s"), *ONE_TURN, Message("assistant", "a"), *ONE_TURN),
            "b",
        ),
        ({"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]}, ONE_TURN, "a"),
        ({"instruction": "u", "input": "", "output": "a", "text": "all"}, ONE_TURN, "a"),
        ({"instruction": "u", "input": None, "output": "a"}, ONE_TURN, "a"),
        ({"instruction": "do", "input": "this", "output": "a"}, (Message("user", "do\n\nthis"),), "a"),
        ({"instruction": "do", "context": "this", "response": "a"}, (Message("user", "do\n\nthis"),), "a"),
        ({"question": "u", "answer": "a"}, ONE_TURN, "a"),
        ({"text": "whole"}, (), "whole"),
        ({"query": "u", "response": "a"}, ONE_TURN, "a"),
        ({"prompt": "u", "chosen": "a", "rejected": "b"}, ONE_TURN, "a"),
        (
            {"prompt": "u", "chosen": [USER, ANSWER], "rejected": [USER, {"role": "assistant", "content": "b"}]},
            ONE_TURN,
            "a",
        ),
        ({"prompt": [USER], "chosen": [ANSWER], "rejected": []}, ONE_TURN, "a"),
        ({"conversations": SAID, "chosen": {"from": "gpt", "value": "a"}, "rejected": None}, ONE_TURN, "a"),
        ({"prompt": "u", "completion": 4}, ONE_TURN, "4"),
        ({"question": 1.5, "answer": -0.25}, (Message("user", "1.5"),), "-0.25"),
        (
            {"messages": [{"role": "user", "content": PARTS}, {"role": "assistant", "content": PARTS[:1]}]},
            TWO_PARTS,
            "one",
        ),
        (
            {"conversations": [{"from": "human", "value": PARTS}, {"from": "gpt", "value": PARTS[1:]}]},
            TWO_PARTS,
            " two",
        ),
        ({"prompt": PARTS, "completion": PARTS[:1]}, TWO_PARTS, "one"),
    ],
)
def test_demonstration_columns(tmp_path, row, prompt, answer):
    (read,) = load_demonstrations([write(tmp_path, "a.jsonl", [row])], seed=0).rows
    assert (read.prompt, read.answer) == (prompt, answer)


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"prompt": "u", "messages": [USER, ANSWER]}, ONE_TURN),
        ({"prompt": [USER, ANSWER]}, ONE_TURN),
        ({"messages": [USER, ANSWER, USER, ANSWER]}, (*ONE_TURN, Message("assistant", "a"), *ONE_TURN)),
        ({"conversations": [{"from": "human", "value": "u"}]}, ONE_TURN),
        ({"instruction": "do", "input": "this", "output": ""}, (Message("user", "do\n\nthis"),)),
        ({"instruction": "do", "instances": [{"input": "this", "output": "x"}]}, (Message("user", "do\n\nthis"),)),
        ({"question": "u", "answer": "a"}, ONE_TURN),
        ({"turns": ["u", "second"]}, ONE_TURN),
        ({"query": "u", "response": "a"}, ONE_TURN),
        ({"prompt": PARTS}, TWO_PARTS),
    ],
)
def test_prompt_columns(tmp_path, row, messages):
    (read,) = load_prompts([write(tmp_path, "a.jsonl", [row])], seed=0).rows
    assert read.prompt == messages


def test_unused_rows_are_counted_by_reason_with_the_first_line(tmp_path):
    def turn(role):
        return {"messages": [USER, {"role": role, "content": "a"}]}

    rows = [
        turn("assistant"),
        ["not", "an", "object"],
        turn("critic"),
        {"messages": [USER]},
        turn("critic"),
        {"messages": "text"},
        {"messages": [USER, {"role": "assistant", "content": " \n"}]},
        {"messages": [{"role": "user", "content": ""}, ANSWER]},
        {"messages": [ANSWER]},
        {"messages": [USER, {"role": "assistant", "content": True}]},
        {},
    ]
    path = write(tmp_path, "a.jsonl", rows)
    loaded = load_demonstrations([path], seed=0)
    assert {reason: (part.count, part.first_source) for reason, part in loaded.unused.items()} == {
        "not an object with named columns": (1, f"{path}:2"),
        "messages has a role other than system, user, assistant, human, gpt, tool, observation, function_call": (
            2,
            f"{path}:3",
        ),
        "the last message is not the assistant's": (1, f"{path}:4"),
        "messages is not a list of messages": (1, f"{path}:6"),
        "empty answer": (1, f"{path}:7"),
        "empty prompt": (2, f"{path}:8"),
        "content in messages is not text": (1, f"{path}:10"),
        "messages is missing": (1, f"{path}:11"),
    }
    assert loaded.opened[0].rows == len(rows) == len(loaded.rows) + sum(part.count for part in loaded.unused.values())


CALL = '{"name": "look", "arguments": {"at": "sky"}}'
CALLS = '[{"arguments":{"at":"sky"},"name":"look"}]'
TOOL = {"name": "look", "parameters": {"type": "object"}}
WRAPPED = '[{"function":{"name":"look","parameters":{"type":"object"}},"type":"function"}]'


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [
                {"from": "human", "value": "u"},
                {"from": "function_call", "value": CALL},
                {"from": "observation", "value": "blue"},
                {"from": "gpt", "value": "a"},
            ],
            "tools": json.dumps([TOOL]),
        },
        {
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [{"id": "x", "function": json.loads(CALL)}]},
                {"role": "tool", "tool_call_id": "x", "content": "blue"},
                ANSWER,
            ],
            "tools": [{"type": "function", "function": TOOL}],
        },
        {
            "messages": [
                USER,
                {"role": "assistant", "function_call": {"name": "look", "arguments": '{"at": "sky"}'}},
                {"role": "tool", "content": [{"type": "text", "text": "blue"}]},
                ANSWER,
            ],
            "tools": [TOOL],
        },
    ],
)
def test_turns_of_tools_are_read_as_calls_and_what_came_back(tmp_path, row):
    path = write(tmp_path, "a.jsonl", [row])
    (read,) = load_demonstrations([path], seed=0).rows
    asked = (*ONE_TURN, Message("assistant", "", calls=CALLS), Message("tool", "blue"))
    assert (read.prompt, read.answer, read.calls, read.tools) == (asked, "a", "", WRAPPED)
    column = "messages" if "messages" in row else "conversations"
    ends = write(tmp_path, "b.jsonl", [row | {column: row[column][:2]}])
    (call,) = load_demonstrations([ends], seed=0).rows
    assert (call.prompt, call.answer, call.calls) == (ONE_TURN, "", CALLS)  # an answer that only calls is one
    waits = write(tmp_path, "c.jsonl", [row | {column: row[column][:3]}])
    (prompt,) = load_prompts([waits], seed=0).rows
    assert (prompt.prompt, prompt.tools) == (asked, WRAPPED)
    assert len({row_id(each) for each in (read, call, replace(read, tools=""), replace(call, calls=""))}) == 4


def test_calls_and_tools_that_are_none_are_reasons(tmp_path):
    def calling(value):
        return {"conversations": [*SAID, {"from": "function_call", "value": value}, {"from": "gpt", "value": "a"}]}

    answered = [*SAID, {"from": "gpt", "value": "a"}]
    rows = [
        calling("look!"),
        calling('{"arguments": {}}'),
        {"conversations": answered, "tools": "look"},
        {"conversations": answered, "tools": '["look"]'},
        {"conversations": [{"from": "human", "value": [{"type": "image", "image": "x"}]}, answered[1]]},
        {"conversations": answered, "tools": "[]"},
    ]
    loaded = load_demonstrations([write(tmp_path, "a.jsonl", rows)], seed=0)
    assert list(loaded.unused) == [
        "function_call is not JSON",
        "a function call has no name",
        "tools is not JSON",
        "tools is not a list of objects",
        "content in conversations has a part that is not text (image)",
    ]
    assert [(row.answer, row.tools) for row in loaded.rows] == [("a", "")]


def test_what_is_suspicious_is_said_once_a_file(tmp_path):
    rows = [
        {"prompt": "u", "completion": "a", "label": True},
        {"prompt": "v <image>", "completion": "a", "label": False, "images": ["x.png"]},
        {"prompt": "u", "completion": "a", "label": False},
        {"prompt": "u", "completion": "a", "label": None},
        {"prompt": "w <image>", "completion": "", "label": False, "images": ["x.png"]},
        {"prompt": "u", "completion": "b", "images": []},
    ]
    path, clean = write(tmp_path, "a.jsonl", rows), write(tmp_path, "b.jsonl", rows[:1])
    assert load_demonstrations([path, clean], seed=0).warnings == (
        f"{path}: 2 of 6 demonstrations have label = false and are trained on like any other; remove them if they are "
        f"bad (first {path}:2)",
        f"{path}: 1 of 6 demonstrations have images, of which nothing is read: <image> stays in the text as it is "
        f"(first {path}:2)",
        f"{path}: 2 of 6 demonstrations repeat an earlier one (first {path}:3)",
    )
    assert load_prompts([path, clean], seed=0).warnings == (
        f"{path}: 2 of 6 prompts have images, of which nothing is read: <image> stays in the text as it is "
        f"(first {path}:2)",
        f"{path}: 3 of 6 prompts repeat an earlier one (first {path}:3)",
    )
    table = write(tmp_path, "c.csv", "prompt,completion,label\nu,a,False\nv,b,True\n")  # where a truth is a word
    assert "1 of 2 demonstrations have label = false" in load_demonstrations([table], seed=0).warnings[0]
    assert load_demonstrations(["embedded"], seed=0).warnings == load_prompts(["embedded"], seed=0).warnings == ()


def test_half_a_surrogate_pair_is_a_reason_not_a_crash(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"prompt": "a", "completion": "\\ud83d"}\n{"prompt": "a", "completion": "b"}\n')
    unused = load_demonstrations([path], seed=0).unused
    assert list(unused) == ["completion is not valid Unicode (half a surrogate pair)"]


def test_plain_text_does_not_make_prompts(tmp_path):
    with pytest.raises(DataError) as error:
        load_prompts([write(tmp_path, "a.jsonl", [{"text": "whole"}])], seed=0)
    assert "no columns known for prompts: found text; rename its columns to one of these: prompt; " in message_of(error)
