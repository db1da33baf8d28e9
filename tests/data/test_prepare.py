"""Rows, templates and token ids: what is read, what is left out and why, and where the loss begins."""

from __future__ import annotations

import gzip
import json
import re
import socket
from itertools import pairwise
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast

from srppo.config import DataConfig
from srppo.data import formats, hub, sources
from srppo.data.chat import (
    CHAT_TEMPLATE,
    encode_demonstration,
    encode_demonstrations,
    encode_prompt,
    encode_prompts,
    render,
)
from srppo.data.overlap import normalise
from srppo.data.prepare import (
    ensure_chat_template,
    load_demonstrations,
    load_prompts,
    measure_overlap,
    permute,
    prepare,
    prompt_text,
    row_id,
    split_held_out,
    stop_ids,
    without_overlap,
)
from srppo.data.rows import encoded
from srppo.data.types import Demonstration, EncodedDemonstration, Message, Prompt
from srppo.errors import ConfigError, DataError, ModelError

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
EXPLICIT_BOS = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


def real(path: str) -> str:
    if not (REAL / path).exists():
        pytest.skip(f"needs the public data file ../shared/data/{path}, which is not here")
    return str(REAL / path)


def make_tokenizer(*, bos: bool = False, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<pad>", "<bos>", "<|im_start|>", "<|im_end|>"]
    text = ["Q: reverse sun cat\nA: cat sun", "Q: what is it?\nA: it is a cat.", "\n\n the answer"] * 30
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 2)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        bos_token="<bos>" if bos else None,
        pad_token="<eos>" if pad_is_eos else "<pad>",
    )


@pytest.fixture(scope="module")
def plain() -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    assert ensure_chat_template(tokenizer)
    return tokenizer


def demo(prompt: str = "reverse sun cat", answer: str = "cat sun", source: str = "a:1") -> Demonstration:
    return Demonstration((Message("user", prompt),), answer, source)


def write(folder: Path, name: str, content: str | bytes | list) -> str:
    path = folder / name
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def encode(tokenizer, row: Demonstration, **options) -> EncodedDemonstration | str:
    return encode_demonstration(
        tokenizer, row, **{"system": None, "max_tokens": 512, "max_prompt_tokens": 256} | options
    )


def message_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- formats

ROWS = [{"prompt": "reverse sun cat", "completion": "cat sun"}, {"prompt": "zwei, ü", "completion": 'a "b"\nc'}]


def as_csv(separator: str) -> str:
    quoted = [[f'"{cell}"' for cell in (row["prompt"], row["completion"].replace('"', '""'))] for row in ROWS]
    return f"prompt{separator}completion\r\n" + "".join(separator.join(cells) + "\r\n" for cells in quoted)


@pytest.mark.parametrize(
    ("name", "content", "places"),
    [
        ("a.jsonl", ROWS, [":1", ":2"]),
        ("crlf.jsonl", "\ufeff" + "\r\n\r\n".join(json.dumps(row) for row in ROWS) + "\r\n", [":1", ":3"]),
        ("a.json", json.dumps(ROWS), ["#1", "#2"]),
        ("bom.json", "\ufeff" + json.dumps(ROWS, indent=2), ["#1", "#2"]),
        ("data.json", json.dumps({"version": 1, "data": ROWS}), ["#1", "#2"]),
        ("lines.json", "\n".join(json.dumps(row) for row in ROWS), [":1", ":2"]),
        ("a.csv", as_csv(","), [":2", ":3"]),
        ("a.tsv", "\ufeff" + as_csv("\t"), [":2", ":3"]),
        ("a.jsonl.gz", gzip.compress("\n".join(json.dumps(row) for row in ROWS).encode(), mtime=0), [":1", ":2"]),
        ("a.parquet", None, ["#1", "#2"]),
    ],
)
def test_every_format_reads_the_same_rows(tmp_path, name, content, places):
    if content is None:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / name)
        path = str(tmp_path / name)
    else:
        path = write(tmp_path, name, content)
    loaded = load_demonstrations([path], seed=0)
    assert [(prompt_text(row), row.answer) for row in loaded.rows] == [tuple(row.values()) for row in ROWS]
    assert [row.source for row in loaded.rows] == [path + place for place in places]
    assert (loaded.read, loaded.unused) == (2, {})
    assert loaded.sha == load_demonstrations([write(tmp_path, "other.jsonl", ROWS)], seed=0).sha  # content, not paths


USER = {"role": "user", "content": "u"}
ANSWER = {"role": "assistant", "content": "a"}
ONE_TURN = (Message("user", "u"),)


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
    ],
)
def test_prompt_columns(tmp_path, row, messages):
    (read,) = load_prompts([write(tmp_path, "a.jsonl", [row])], seed=0).rows
    assert read.messages == messages


def test_folder_reads_its_files_in_order_each_by_its_own_columns(tmp_path):
    write(tmp_path, "b.jsonl", [{"question": "two", "answer": "2"}])
    write(tmp_path, "a.json", json.dumps([{"prompt": "one", "completion": "1"}]))
    write(tmp_path, "LICENSE", "free")
    loaded = load_demonstrations([str(tmp_path)], seed=0)
    assert [row.answer for row in loaded.rows] == ["1", "2"]
    assert [part.columns for part in loaded.opened] == ["prompt + completion", "question + answer"]


def test_embedded_is_a_fixed_pool_drawn_by_seed():
    one, again, other = (load_demonstrations(["embedded"], seed=seed) for seed in (0, 0, 1))
    assert one.sha == again.sha != other.sha
    assert one.read == sources.EMBEDDED_ROWS["demonstrations"] == len(one.rows)
    assert load_prompts(["embedded"], seed=0).rows[0].source == "embedded#1"


# ---- rows that can't be used, and files that can't


def test_unused_rows_are_counted_by_reason_with_the_first_line(tmp_path):
    def turn(role):
        return {"messages": [USER, {"role": role, "content": "a"}]}

    rows = [
        turn("assistant"),
        ["not", "an", "object"],
        turn("tool"),
        {"messages": [USER]},
        turn("tool"),
        {"messages": "text"},
        {"messages": [USER, {"role": "assistant", "content": " \n"}]},
        {"messages": [{"role": "user", "content": ""}, ANSWER]},
        {"messages": [ANSWER]},
        {"messages": [USER, {"role": "assistant", "content": 3}]},
        {},
    ]
    path = write(tmp_path, "a.jsonl", rows)
    loaded = load_demonstrations([path], seed=0)
    assert {reason: (part.count, part.first_source) for reason, part in loaded.unused.items()} == {
        "not an object with named columns": (1, f"{path}:2"),
        "messages has a role other than system, user, assistant, human, gpt": (2, f"{path}:3"),
        "the last message is not the assistant's": (1, f"{path}:4"),
        "messages is not a list of messages": (1, f"{path}:6"),
        "empty answer": (1, f"{path}:7"),
        "empty prompt": (2, f"{path}:8"),
        "content in messages is not text": (1, f"{path}:10"),
        "messages is missing": (1, f"{path}:11"),
    }
    assert loaded.read == len(rows) == len(loaded.rows) + sum(part.count for part in loaded.unused.values())


def test_half_a_surrogate_pair_is_a_reason_not_a_crash(tmp_path):
    path = write(tmp_path, "a.jsonl", '{"prompt": "a", "completion": "\\ud83d"}\n{"prompt": "a", "completion": "b"}\n')
    unused = load_demonstrations([path], seed=0).unused
    assert list(unused) == ["completion is not valid Unicode (half a surrogate pair)"]


def test_csv_rows_of_another_width_and_cells_of_many_lines(tmp_path):
    path = write(tmp_path, "a.csv", 'prompt,completion\n"two\nlines",a\nonly one\n\n"x","' + "y" * 200_000 + '"\n')
    loaded = load_demonstrations([path], seed=0)
    assert [row.source for row in loaded.rows] == [f"{path}:2", f"{path}:6"]
    assert loaded.unused == {"another number of cells than the header": formats.Unused(1, f"{path}:4")}


def test_line_separators_inside_a_json_string_do_not_split_the_line(tmp_path):
    path = write(tmp_path, "a.jsonl", [{"prompt": "a\u2028b\x85c", "completion": "x"}])
    assert prompt_text(load_demonstrations([path], seed=0).rows[0]) == "a\u2028b\x85c"


OPEN = '{"prompt": "a", "completion": "b"}\n'
TOO_DEEP = '{"prompt": ' + "[" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", OPEN + '\n{"prompt": "a", oops}\n', "{path}:3: not JSON: Expecting property name .* (column 17)"),
        ("a.jsonl", OPEN + TOO_DEEP, "{path}:2: not JSON that can be read: maximum recursion depth"),
        ("a.jsonl", OPEN + "1" * 5000, "{path}:2: not JSON that can be read: Exceeds the limit"),
        ("a.json", "[\n" + OPEN + ",\n{]", "{path}:4: not JSON: "),
        ("a.json", OPEN + "{oops}", "{path}:2: not JSON: "),
        ("a.json", '["x"]\n]', "{path}:2: not JSON: Extra data (column 1)"),
        ("a.json", "3", "{path} holds one int; give a list of rows or"),
        (
            "a.jsonl",
            OPEN.encode() + b'{"prompt": "caf\xe9"}\n',
            "{path}:2: not UTF-8 text (byte 0xe9); save the file as",
        ),
        ("a.csv", 'prompt,completion\na,b\n"open,c\n', "{path}:3: not CSV: unexpected end of data in the row that beg"),
        ("a.parquet", b"PAR1 nonsense", "{path} is not a whole parquet file: "),
        ("a.json.gz", gzip.compress(b"x" * 999, mtime=0)[:20], "{path} is not a whole gzip file: "),
        ("a.jsonl.gz", b"plain", "{path} is not a whole gzip file: Not a gzipped file"),
        ("a.txt", "words", "{path} is of no known kind; allowed are .jsonl, .json, .csv, .tsv, .parquet, each also"),
        ("a.jsonl", "\n \n", "no demonstrations in {path}: there are no rows; each needs a prompt and an answer that"),
        (
            "a.jsonl",
            '{"prompt": "a", "completion": ""}\n{"prompt": "a", "completion": 1}\n{"prompt": "", "completion": " "}\n'
            "[]",
            "none of the 4 rows of {path} can be used as demonstrations: 1 empty answer (first {path}:1), "
            "1 completion is not text (first {path}:2), 1 empty prompt (first {path}:3), "
            "1 not an object with named columns (first {path}:4); each needs a prompt and an answer that are not empty",
        ),
        (
            "a.jsonl",
            '{"id": 1, "body": "x"}\n{"id": 2, "extra\\nname": "x"}',
            "{path} has no columns known for demonstrations: found id, body, extra name; rename its columns to one of "
            "these: prompt + completion; prompt + response; messages; conversations; instruction + output; "
            "instruction + response; question + answer; text",
        ),
    ],
)
def test_files_that_cannot_be_used_say_so_in_one_line(tmp_path, name, content, expected):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as error:
        load_demonstrations([path], seed=0)
    pattern = re.escape(expected.replace("{path}", path)).replace(r"\.\*", ".*")
    assert re.match(pattern, message_of(error))


def test_plain_text_does_not_make_prompts(tmp_path):
    with pytest.raises(DataError) as error:
        load_prompts([write(tmp_path, "a.jsonl", [{"text": "whole"}])], seed=0)
    assert "no columns known for prompts: found text; rename its columns to one of these: prompt; " in message_of(error)


def test_missing_files_name_the_nearest(tmp_path):
    write(tmp_path, "train.jsonl", ROWS)
    for source, expected in [
        (tmp_path / "trian.jsonl", "trian.jsonl does not exist; did you mean train.jsonl? give a file ("),
        (tmp_path / "zzz.json", f"zzz.json does not exist; {tmp_path} has train.jsonl; give a file ("),
        (tmp_path / "no" / "a.json", f"a.json does not exist, nor does the folder {tmp_path / 'no'}; give a file ("),
    ]:
        with pytest.raises(DataError) as error:
            load_demonstrations([str(source)], seed=0)
        assert expected in message_of(error)


def test_folder_without_data_and_file_without_permission(tmp_path, monkeypatch):
    write(tmp_path, "notes.txt", "x")
    with pytest.raises(DataError) as error:
        load_demonstrations([str(tmp_path)], seed=0)
    assert f"folder {tmp_path} holds no data file: found notes.txt; allowed are .jsonl" in message_of(error)
    path = write(tmp_path, "a.jsonl", ROWS)

    def denied(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", denied)  # root, which runs tests in containers, may read everything
    with pytest.raises(DataError) as error:
        load_demonstrations([path], seed=0)
    assert message_of(error) == f"{path} cannot be read: Permission denied"


# ---- hub sets


def unreachable(*_, **__):
    raise socket.gaierror(-2, "Name or service not known")


def test_hub_set_while_offline_is_one_line_at_once(monkeypatch):
    monkeypatch.setattr(socket, "create_connection", unreachable)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    before = datasets.config.HF_HUB_OFFLINE
    load, offline = datasets.load_dataset, []

    def noted(*args, **kwargs):
        offline.append(datasets.config.HF_HUB_OFFLINE)  # else the library retries for 20 seconds
        return load(*args, **kwargs)

    monkeypatch.setattr(datasets, "load_dataset", noted)
    with pytest.raises(DataError) as error:
        load_demonstrations(["no-such-org/no-such-set@train"], seed=0)
    assert message_of(error) == (
        "hub set no-such-org/no-such-set@train is neither a file here nor in the cache, and the hub cannot be reached; "
        "give a local file instead (.jsonl, .json, .csv, .tsv, .parquet, each also as .gz) or a folder of them"
    )
    assert offline == [True]
    assert before == datasets.config.HF_HUB_OFFLINE


def test_hub_sets_by_config_and_split(monkeypatch):
    asked = []

    def load(name, config, split):
        asked.append((name, config, split))
        if split == "nope":
            raise ValueError('Unknown split "nope".\nShould be one of ["train"].')
        if name == "org/gone":
            raise datasets.exceptions.DatasetNotFoundError("gone")
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(hub, "reachable", lambda: True)
    loaded = load_demonstrations(["org/set", "org/set@test", "org/set/main@train[:10%]"], seed=0)
    assert asked == [("org/set", None, "train"), ("org/set", None, "test"), ("org/set", "main", "train[:10%]")]
    assert (loaded.rows[0].source, loaded.rows[3].source) == ("org/set@train#1", "org/set@test#2")
    with pytest.raises(DataError) as error:
        load_demonstrations(["org/set@nope"], seed=0)
    assert (
        message_of(error) == 'hub set org/set@nope cannot be loaded: Unknown split "nope". Should be one of ["train"].'
    )
    with pytest.raises(DataError) as error:
        load_demonstrations(["org/gone"], seed=0)
    assert message_of(error).startswith("hub set org/gone does not exist on the hub, nor a file of that name here; ")


# ---- templates and the loss boundary


def test_our_template_is_exact(plain):
    def text(*messages, generation=False):
        turns = [{"role": role, "content": content} for role, content in messages]
        return plain.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)

    ask, answer = ("user", "reverse sun cat"), ("assistant", "cat sun")
    assert text(ask, answer) == "Q: reverse sun cat\nA: cat sun<eos>"
    assert text(ask, generation=True) == "Q: reverse sun cat\nA:"
    assert text(("system", "Be brief."), ask, answer, ("user", "  again "), answer) == (
        "Be brief.\n\nQ: reverse sun cat\nA: cat sun\nQ:   again \nA: cat sun<eos>"
    )


def test_a_template_that_is_there_stays():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    assert not ensure_chat_template(tokenizer)
    assert tokenizer.chat_template == CHATML


def test_loss_begins_where_the_answer_begins(plain):
    row = encode(plain, demo())
    assert plain.decode(row.ids[row.prompt_tokens :]) == " cat sun<eos>"
    assert plain.decode(row.ids[: row.prompt_tokens]) == "Q: reverse sun cat\nA:"


@settings(max_examples=60, deadline=None)
@given(prompt=st.text(min_size=1), answer=st.text(min_size=1), system=st.none() | st.text(max_size=20))
def test_prompt_ids_are_those_of_rollouts_and_nothing_is_lost(plain, prompt, answer, system):
    row = encode(plain, demo(prompt, answer), system=system, max_tokens=9999, max_prompt_tokens=9998)
    fed = encode_prompt(plain, Prompt((Message("user", prompt),), "p:1"), system=system, max_prompt_tokens=9998)
    assert row.ids[: row.prompt_tokens] == fed
    assert plain.decode(row.ids[row.prompt_tokens :]) == f" {answer}<eos>"
    turns = [{"role": "system", "content": system}] if system is not None else []
    turns.append({"role": "user", "content": prompt})
    assert list(fed) == plain.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)


def test_a_token_across_the_boundary_is_split_as_generation_would_see_it():
    tokenizer = make_tokenizer()
    # The generation prompt ends in half of what the tokenizer holds as one token (" cat").
    tokenizer.chat_template = (
        "{{ messages[0]['content'] }} {% if not add_generation_prompt %}{{ messages[1]['content'] }}{% endif %}"
    )
    assert len(tokenizer(" cat")["input_ids"]) == 1
    row = encode(tokenizer, demo("say", "cat"))
    fed = encode_prompt(tokenizer, Prompt((Message("user", "say"),), "p:1"), system=None, max_prompt_tokens=9)
    assert row.ids[: row.prompt_tokens] == fed
    assert tokenizer.decode(row.ids[row.prompt_tokens :]) == "cat<eos>"


def test_bos_is_there_once_where_the_tokenizer_adds_it():
    tokenizer = make_tokenizer(bos=True)
    bos = tokenizer.bos_token_id
    assert ensure_chat_template(tokenizer)
    text = Demonstration((), "plain text", "t:1")
    for row in (encode(tokenizer, demo()), encode(tokenizer, text)):
        assert row.ids[0] == bos
        assert row.ids.count(bos) == 1
    assert encode(tokenizer, text).prompt_tokens == 1
    tokenizer.chat_template = EXPLICIT_BOS  # a template that writes its own
    assert encode(tokenizer, demo()).ids.count(bos) == 1
    tokenizer.chat_template = CHATML  # a template that wants none
    assert encode(tokenizer, demo()).ids.count(bos) == 0


TURNS = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "user", "assistant", "tool"]),
        st.text() | st.sampled_from(["", " a ", "{{ eos_token }}", "{% raw %}", "<eos>", "two\n\nlines\n"]),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("bos", [False, True])
@given(turns=TURNS, generation=st.booleans())
@settings(max_examples=100, deadline=None)
def test_what_is_written_without_jinja_is_what_our_template_writes(bos, turns, generation):
    tokenizer = make_tokenizer(bos=bos)
    ensure_chat_template(tokenizer)
    written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation)
    assert render(tokenizer, turns, generation=generation) == written


@pytest.mark.parametrize("template", [CHATML, EXPLICIT_BOS, CHAT_TEMPLATE + "!", "!" + CHAT_TEMPLATE])
def test_any_other_template_is_rendered_by_jinja(template):
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = template
    turns = [{"role": "user", "content": "say"}]
    written = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert render(tokenizer, turns, generation=True) == written


def test_pad_that_is_eos_changes_nothing(plain):
    same = make_tokenizer(pad_is_eos=True)
    ensure_chat_template(same)
    assert encode(same, demo()) == encode(plain, demo())


def test_answers_end_in_a_stop_token_whatever_the_template_puts_there():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    row = encode(tokenizer, demo(), stop=[tokenizer.eos_token_id, end])
    assert tokenizer.decode(row.ids[row.prompt_tokens :]) == "cat sun<|im_end|>"  # the newline after it is dropped
    row = encode(tokenizer, demo())  # <|im_end|> does not stop this model
    assert tokenizer.decode(row.ids[row.prompt_tokens :]) == "cat sun<|im_end|>\n<eos>"


def test_reasons_to_leave_a_row_out(plain):
    assert encode(plain, demo("x " * 300)) == "prompt longer than 256 tokens"
    assert encode(plain, demo("reverse sun cat"), max_tokens=4) == "prompt longer than 3 tokens"
    assert encode(plain, demo(answer="one<eos>two")) == "a stop token inside the answer"
    odd = make_tokenizer()
    odd.chat_template = "{{ raise_exception('System role\nnot supported') if messages[0]['role'] == 'system' }}x"
    assert encode(odd, demo(), system="Be brief.") == "the chat template refuses it: System role not supported"
    odd.chat_template = "{% if add_generation_prompt %}<think>{% endif %}{{ messages[-1]['content'] }}"
    reason = "the chat template writes the answer otherwise than after its generation prompt"
    assert encode(odd, demo()) == reason


SEVERAL = [
    demo(),
    demo("x " * 300, source="a:2"),
    Demonstration((), "plain text", "a:3"),
    demo(answer="one<eos>two", source="a:4"),
    Demonstration((Message("system", "mine"), Message("user", "u")), "ü 中", "a:5"),
    demo("say", "cat" * 400, source="a:6"),
    demo("again", "", source="a:7"),
]
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("template", [None, CHATML, EXPLICIT_BOS, NO_SYSTEM])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_rows_encoded_together_are_as_each_alone(template, bos, system):
    """Ids and reasons: neighbours that are refused or cut change nothing."""
    tokenizer = make_tokenizer(bos=bos)
    tokenizer.chat_template = template
    ensure_chat_template(tokenizer)
    limits = {"system": system, "max_tokens": 300, "max_prompt_tokens": 256}
    together = encode_demonstrations(tokenizer, SEVERAL, **limits)
    assert together == [encode_demonstration(tokenizer, row, **limits) for row in SEVERAL]
    assert {type(row) for row in together} == {str, EncodedDemonstration}
    prompts = [Prompt(row.prompt, row.source) for row in SEVERAL if row.prompt]
    found = encode_prompts(tokenizer, prompts, system=system, max_prompt_tokens=256)
    for prompt, ids in zip(prompts, found, strict=True):
        turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
        if system and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": system})
        if template == NO_SYSTEM and turns[0]["role"] == "system":
            assert ids == "the chat template refuses it: no system"
        else:
            alone = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
            assert ids == (tuple(alone) if len(alone) <= 256 else "prompt longer than 256 tokens")
    assert encode_demonstrations(tokenizer, [], **limits) == []


@given(st.lists(st.booleans(), max_size=3000), st.none() | st.integers(1, 2500))
@settings(max_examples=30, deadline=None)
def test_size_counts_rows_that_can_be_used_and_few_more_are_encoded(usable, size):
    rows = [Prompt((Message("user", str(i)),), f"a:{i}") for i in range(len(usable))]
    asked = []

    def encode(some):
        asked.extend(some)
        return [(i,) if usable[i := int(row.messages[0].content)] else "no" for row in some]

    found = encoded(rows, encode, size)
    right = [row for row, good in zip(rows, usable, strict=True) if good][:size]
    assert found.rows == right and found.ids == [(int(row.messages[0].content),) for row in right]
    read = rows.index(right[-1]) + 1 if size is not None and len(right) == size else len(rows)
    assert found.refused == [("no", row.source) for row, good in zip(rows[:read], usable, strict=False) if not good]
    assert asked == rows[: len(asked)] and read <= len(asked) <= min(read + 32 if size else read, len(rows))


def test_long_answers_are_cut_without_eos(plain):
    whole = encode(plain, demo())
    for length in range(whole.prompt_tokens + 1, len(whole.ids)):
        assert encode(plain, demo(), max_tokens=length) == EncodedDemonstration(whole.ids[:length], whole.prompt_tokens)
    assert encode(plain, demo(), max_tokens=len(whole.ids)) == whole


def test_a_rows_own_system_message_stays(plain):
    own = Prompt((Message("system", "mine"), Message("user", "u")), "p:1")
    fed = encode_prompt(plain, own, system="yours", max_prompt_tokens=99)
    assert plain.decode(fed) == "mine\n\nQ: u\nA:"


def test_plain_text_is_all_answer_and_its_first_token_has_no_predictor(plain):
    text = Demonstration((), "the answer", "t:1")
    assert prompt_text(text) == "the answer"  # what overlap looks at
    row = encode(plain, text, system="ignored")
    assert plain.decode(row.ids) == "the answer<eos>"
    assert row.prompt_tokens == 1


def test_stop_ids_unite_tokenizer_and_generation_config(plain):
    eos = plain.eos_token_id
    assert stop_ids(plain) == [eos]
    assert stop_ids(plain, GenerationConfig(eos_token_id=7)) == [eos, 7]
    assert stop_ids(plain, GenerationConfig(eos_token_id=[7, eos, 7])) == [eos, 7]
    assert stop_ids(plain, GenerationConfig()) == [eos]
    mute = make_tokenizer()
    mute.eos_token = None
    assert stop_ids(mute, GenerationConfig(eos_token_id=7)) == [7]
    for call in (stop_ids, ensure_chat_template):
        with pytest.raises(ModelError) as error:
            call(mute)
        assert "EOS token" in message_of(error)


# ---- order and held-out rows


@given(st.integers(0, 10**9), st.integers(0, 60))
def test_permutation_is_one_per_seed(seed, n):
    ordered = permute(range(n), seed)
    assert sorted(ordered) == list(range(n))
    assert ordered == permute(range(n), seed)


def test_permutation_is_pinned():
    assert permute(range(8), 0) == [6, 5, 4, 3, 7, 1, 0, 2]  # another order would train other runs under old ids
    assert permute(range(8), 1) != permute(range(8), 0)


@settings(max_examples=40)
@given(st.lists(st.integers(0, 40), min_size=5, max_size=60), st.integers(0, 99), st.integers(1, 59))
def test_held_out_rows_never_move(numbers, seed, cut):
    rows = [demo(f"task {number}", f"answer {place}", f"a:{place}") for place, number in enumerate(numbers)]
    try:
        train, held = split_held_out(rows, 0.3, seed)
        fewer_train, fewer_held = split_held_out(rows[:cut], 0.3, seed)
    except DataError:
        return
    assert sorted(row.source for row in train + held) == sorted(row.source for row in rows)
    assert fewer_held == [row for row in rows[:cut] if row in held]
    assert fewer_train == [row for row in rows[:cut] if row in train]
    assert not {prompt_text(row) for row in train} & {prompt_text(row) for row in held}


def test_held_out_share_and_its_edges():
    rows = [demo(f"task {number}") for number in range(4000)]
    held = split_held_out(rows, 0.1, 3)[1]
    assert 320 < len(held) < 480  # four standard deviations
    assert split_held_out(rows, 0.1, 4)[1] != held
    assert split_held_out(rows, 0.0, 3) == (rows, [])
    with pytest.raises(DataError) as error:
        split_held_out(rows[:3], 0.9999, 3)
    assert message_of(error) == "data.held_out = 0.9999 leaves none of 3 demonstrations to train on; lower it"


def test_row_ids_name_content():
    assert row_id(demo(source="x:1")) == row_id(demo(source="y:2")) != row_id(demo(answer="sun cat"))


# ---- overlap

WORD = st.sampled_from(["sun", "cat", "moon", "tree", "red", "blue"])


@given(st.text())
def test_normalising_twice_is_normalising_once(text):
    assert normalise(normalise(text)) == normalise(text)


@given(st.lists(WORD, min_size=1, max_size=12), st.lists(st.sampled_from([" ", ", ", "  \n", "! ", "-"]), min_size=12))
def test_case_space_and_punctuation_do_not_matter(words, gaps):
    odd = "".join(word.upper() + gap for word, gap in zip(words, gaps, strict=False))
    assert normalise(odd) == " ".join(words)


def test_normalising_keeps_what_carries_meaning():
    assert normalise("What's 2 + 2?") == "whats 2 + 2" != normalise("What's 2 = 2?")
    assert normalise("?!") == "?!"
    assert normalise("Ｆｕｌｌ ﬁt STRASSE") == "full fit strasse" == normalise("full fit straße")


def test_overlap_by_hand():
    def words(*numbers):
        return " ".join(f"w{number}" for number in numbers)

    sft = ["Reverse sun cat!", words(*range(20)), words(*range(100, 109)), words(*range(109, 118))]
    ppo = [
        "reverse cat sun",  # other order, no 8-grams
        "reverse  SUN, cat",  # equal
        words(*range(5, 13)),  # its one 8-gram is there
        words(*range(5, 13), 50),  # 1 of 2: half, not more
        words(*range(5, 14), 50),  # 2 of 3
        words(*range(100, 118)),  # 2 + 2 of 11, and never more than half
        words(*range(5, 12)),  # 7 words: no 8-grams
        words(*range(10, 19), *range(102, 109)),
    ]
    found = measure_overlap(sft, ppo)
    assert (found.n, found.exact, found.half_ngram, found.kept) == (8, 1, 2, (0, 3, 5, 6, 7))
    assert found.first == (1, 0)
    assert found.share == 3 / 8
    kept, again = without_overlap(sft, ppo)
    assert (kept, again) == ([ppo[0], ppo[3], ppo[5], ppo[6], ppo[7]], found)


def test_half_must_stand_in_one_prompt_not_in_their_union():
    words = [f"w{number}" for number in range(21)]  # 14 8-grams
    halves = [" ".join(words[:14]), " ".join(words[7:])]  # 7 of them each, all together
    assert measure_overlap(halves, [" ".join(words)]).dropped == 0
    assert measure_overlap([*halves, " ".join(words[:15])], [" ".join(words)]).first == (0, 2)


def brute_force(sft, ppo):
    def grams(text):
        words = normalise(text).split()
        return {tuple(words[i : i + 8]) for i in range(len(words) - 7)}

    held = [grams(text) for text in sft]
    same = {normalise(text) for text in sft}
    kept = []
    for place, text in enumerate(ppo):
        own = grams(text)
        half = any(2 * len(own & other) > len(own) for other in held)
        if normalise(text) not in same and not half:
            kept.append(place)
    return tuple(kept)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_overlap_agrees_with_the_definition(data):
    piece = st.sampled_from(
        [" ".join(f"{k}{i}" for i in range(n)) for k, n in zip("abcdef", (3, 5, 8, 9, 4, 12), strict=True)]
    )
    text = st.lists(piece, max_size=5).map(" ".join)
    sft, ppo = data.draw(st.lists(text, max_size=8)), data.draw(st.lists(text, max_size=8))
    assert measure_overlap(sft, ppo).kept == brute_force(sft, ppo)


# ---- the one call


def make_files(folder: Path, n: int = 60) -> DataConfig:
    demonstrations = [{"prompt": f"reverse w{i} cat", "completion": f"cat w{i}"} for i in range(n)]
    demonstrations[3]["completion"] = ""
    prompts = [{"prompt": f"reverse w{i} {'CAT!' if i % 2 else 'sun'}"} for i in range(n)]
    return DataConfig(
        demonstrations=write(folder, "d.jsonl", demonstrations), prompts=write(folder, "p.jsonl", prompts), held_out=0.2
    )


def test_prepare_accounts_for_every_row_and_repeats(tmp_path):
    config = make_files(tmp_path).model_copy(update={"size": 20, "prompts_size": 30})
    got = prepare(config, make_tokenizer(), 5, 128)
    again = prepare(config, make_tokenizer(), 5, 128)
    assert (got.demonstrations, got.held_out, got.prompts, got.sha, got.manifest) == (
        again.demonstrations,
        again.held_out,
        again.prompts,
        again.sha,
        again.manifest,
    )
    part = got.report.demonstrations
    assert (part.read, part.used, len(got.demonstrations)) == (60, 20, 20)
    assert part.held_out == len(got.held_out) > 0
    assert part.spare == 60 - 1 - 20 - part.held_out
    assert len(got.prompts) == len(got.prompt_texts) == 30
    assert got.prompts != prepare(config, make_tokenizer(), 6, 128).prompts
    json.dumps(got.manifest, allow_nan=False)
    assert got.manifest["demonstrations"]["train"]["n"] == 20
    assert sorted(got.manifest["demonstrations"]["permutation"]["values"]) == list(range(59))
    assert got.manifest["demonstrations"]["sources"][0]["licence"] is None


def test_sizes_are_nested_and_leave_held_out_rows_and_prompts_alone(tmp_path):
    config = make_files(tmp_path).model_copy(update={"overlap": "minimum"})
    runs = [
        prepare(config.model_copy(update={"size": size, "prompts_size": asked}), make_tokenizer(), 5, 128)
        for size, asked in ((5, 4), (17, 12), (None, None))
    ]
    for small, large in pairwise(runs):
        assert large.demonstrations[: len(small.demonstrations)] == small.demonstrations
        assert large.prompts[: len(small.prompts)] == small.prompts
        assert large.held_out == small.held_out
        assert large.sha == small.sha


def test_minimum_overlap_is_measured_dropped_and_said(tmp_path):
    config = make_files(tmp_path)
    anyhow = prepare(config, make_tokenizer(), 0, 128)
    assert anyhow.report.overlap.exact > 0
    minimum = prepare(config.model_copy(update={"overlap": "minimum"}), make_tokenizer(), 0, 128)
    assert minimum.report.overlap.dropped == 0
    unused = minimum.report.prompts.unused["like a demonstration's prompt (data.overlap)"]
    assert (unused.count, unused.first_source) == (29, f"{config.prompts[0]}:2")  # row 4 equals only an unusable row
    assert minimum.prompts == [ids for ids in anyhow.prompts if ids in set(minimum.prompts)]  # the order stays
    same = write(tmp_path, "same.jsonl", [{"prompt": "reverse W1, cat."}, {"prompt": "reverse  w2 cat"}])
    with pytest.raises(DataError) as error:
        prepare(config.model_copy(update={"overlap": "minimum", "prompts": (same,)}), make_tokenizer(), 0, 128)
    assert message_of(error) == (
        f"no prompts can be used (not used: 2 like a demonstration's prompt (data.overlap) (first {same}:1))"
    )


def test_report_says_it_in_words(tmp_path):
    rows = [{"prompt": "reverse a b", "completion": "b a"}, {"prompt": "say", "completion": "word " * 90}]
    rows += [{"prompt": "x" * 300, "completion": "y"}, {"prompt": "", "completion": "z"}]
    path = write(tmp_path, "d.jsonl", rows)
    config = DataConfig(demonstrations=path, prompts=path, held_out=0, max_prompt_tokens=70)
    report = prepare(config, make_tokenizer(), 0, 64, max_new_tokens=4).report
    assert report.lines() == [
        f"demonstrations: 4 rows in {path} (prompt + completion); 2 used",
        f"  not used: 1 empty prompt (first {path}:4), 1 prompt longer than 63 tokens (first {path}:3)",
        f"  cut at data.max_tokens, so without EOS: 1 (first {path}:2)",
        f"prompts: 4 rows in {path} (prompt); 2 used",
        f"  not used: 1 empty prompt (first {path}:4), 1 prompt longer than 60 tokens (first {path}:3)",
        "overlap: of 2 prompts used 2 equal a demonstration's prompt, 0 more share over half of their 8-grams with one "
        f"(first {report.overlap_first})",
        "note: data.max_tokens lowered from 1,024 to 64, the model's context",
        "note: data.max_prompt_tokens lowered from 70 to 60 for PPO prompts, so that 4 new tokens fit the model's "
        "context of 64",
        "note: the tokenizer has no chat template and was given ours, Q: ... A: ...",
    ]
    assert report.overlap_first in (f"{path}:1 and {path}:1", f"{path}:2 and {path}:2")
    assert report.as_dict()["demonstrations"]["cut"] == {"count": 1, "first_source": f"{path}:2"}


def test_the_first_of_a_reason_is_the_first_in_the_file(tmp_path):
    rows = [{"prompt": "w" * (300 if i % 2 else 3), "completion": str(i)} for i in range(40)]
    path = write(tmp_path, "d.jsonl", rows)
    for seed in range(3):
        got = prepare(DataConfig(demonstrations=path, prompts=path, max_prompt_tokens=40), make_tokenizer(), seed, 128)
        for part in (got.report.demonstrations, got.report.prompts):
            assert part.unused == {"prompt longer than 40 tokens": formats.Unused(20, f"{path}:2")}


def test_prepare_refuses_what_cannot_be_met(tmp_path):
    config = make_files(tmp_path)
    cases = [
        ({"size": 1000}, r"data.size asks for 1,000 demonstrations to train on, but only \d+ can be used "
         r"\(not used: 1 empty answer \(first .*:4\)\); lower it or add data"),
        ({"prompts_size": 61}, "data.prompts_size asks for 61 prompts, but only 60 can be used; lower it or add data"),
        ({"max_prompt_tokens": 1}, r"no demonstrations to train on can be used \(not used: \d+ prompt longer than 1 "),
    ]  # fmt: skip
    for update, expected in cases:
        with pytest.raises(DataError) as error:
            prepare(config.model_copy(update=update), make_tokenizer(), 0, 128)
        assert re.match(expected, message_of(error))
    with pytest.raises(ConfigError) as error:
        prepare(config, make_tokenizer(), 0, 128, max_new_tokens=128)
    assert "lower it to at most 127" in message_of(error)


# ---- real data


def test_alpagasus_is_used_nearly_whole():
    got = prepare(
        DataConfig(
            demonstrations=real("alpaca/alpagasus_random_9k.json"),
            prompts=(real("self_instruct/user_oriented_instructions.jsonl"), real("mt_bench/question.jsonl")),
            max_tokens=2048,
            max_prompt_tokens=1536,
        ),
        make_tokenizer(),
        0,
        2048,
    )
    part = got.report.demonstrations
    assert part.read == 9229
    assert part.used + part.held_out >= 0.95 * part.read
    assert got.report.prompts.read == 332
    assert got.report.prompts.used >= 0.95 * 332
    assert got.report.overlap.n == got.report.prompts.used


@pytest.mark.parametrize(("path", "rows"), [("gsm8k/train.jsonl", 7473), ("gsm8k/test.jsonl", 1319)])
def test_gsm8k_is_read_whole(path, rows):
    loaded = load_demonstrations([real(path)], seed=0)
    assert (len(loaded.rows), loaded.unused) == (rows, {})


def test_ifeval_prompts_are_read_whole():
    loaded = load_prompts([real("ifeval/input_data.jsonl")], seed=0)
    assert (len(loaded.rows), loaded.unused) == (540, {})
