"""Files, folders and hub sets: what is read, and what is said of what cannot be."""

from __future__ import annotations

import gzip
import json
import re
import socket
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_cases import message_of, write

from srppo.data import hub, sources
from srppo.data.order import prompt_text
from srppo.data.rows import Unused, load_demonstrations, load_prompts
from srppo.errors import DataError

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
    assert (loaded.opened[0].rows, loaded.unused) == (2, {})
    assert loaded.sha == load_demonstrations([write(tmp_path, "other.jsonl", ROWS)], seed=0).sha  # content, not paths


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
    assert one.opened[0].rows == sources.EMBEDDED_ROWS["demonstrations"] == len(one.rows)
    assert load_prompts(["embedded"], seed=0).rows[0].source == "embedded#1"


def test_csv_rows_of_another_width_and_cells_of_many_lines(tmp_path):
    path = write(tmp_path, "a.csv", 'prompt,completion\n"two\nlines",a\nonly one\n\n"x","' + "y" * 200_000 + '"\n')
    loaded = load_demonstrations([path], seed=0)
    assert [row.source for row in loaded.rows] == [f"{path}:2", f"{path}:6"]
    assert loaded.unused == {"another number of cells than the header": Unused(1, f"{path}:4")}


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
            '{"prompt": "a", "completion": ""}\n{"prompt": "a", "completion": true}\n'
            '{"prompt": "", "completion": " "}\n[]',
            "none of the 4 rows of {path} can be used as demonstrations: 1 empty answer (first {path}:1), "
            "1 completion is not text (first {path}:2), 1 empty prompt (first {path}:3), "
            "1 not an object with named columns (first {path}:4); each needs a prompt and an answer that are not empty",
        ),
        (
            "a.jsonl",
            '{"id": 1, "body": "x"}\n{"id": 2, "extra\\nname": "x"}',
            "{path} has no columns known for demonstrations: found id, body, extra name; rename its columns to one of "
            "these: prompt + completion; prompt + response; messages; conversations + chosen; conversations; "
            "instruction + output; instruction + response; question + answer; prompt + chosen; query + response; text",
        ),
    ],
)
def test_files_that_cannot_be_used_say_so_in_one_line(tmp_path, name, content, expected):
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as error:
        load_demonstrations([path], seed=0)
    pattern = re.escape(expected.replace("{path}", path)).replace(r"\.\*", ".*")
    assert re.match(pattern, message_of(error))


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
