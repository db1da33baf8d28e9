"""The one call: every row accounted for, sizes nested, the account in words."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path

import pytest
from data_cases import make_tokenizer, message_of, real, write

from srppo.config import DataConfig
from srppo.data.prepare import prepare
from srppo.data.rows import Unused, load_demonstrations, load_prompts
from srppo.errors import ConfigError, DataError


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
            assert part.unused == {"prompt longer than 40 tokens": Unused(20, f"{path}:2")}


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
