"""`srppo bench step`: rows that explain themselves, of a step that really is the trainer's."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from worlds import make_world

from srppo.bench import step
from srppo.bench.step import Shape, Work, ending, model_settings, run_step_bench
from srppo.bench.step_rows import PHASES, StepRow
from srppo.config import ModelConfig
from srppo.console import Console
from srppo.errors import ConfigError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    work = Work((2, 9), (2, 7), 12, 2, 2, 64, shape=Shape(16, 24, 1, 2, 40))
    monkeypatch.setitem(step.PRESETS, "small", work)


def run(out: Path, **model: object) -> tuple[list[StepRow], str]:
    text = io.StringIO()
    name = model.pop("base", None)
    config = model_settings("small", name, [f"model.{key}={value}" for key, value in model.items()])  # type: ignore[arg-type]
    rows = run_step_bench(
        "small", Console(plain=True, file=text), steps=2, model=config, threads=1, device="cpu", out=out / "step.jsonl"
    )
    return rows, text.getvalue()


def test_a_row_says_what_was_done_and_how_long_each_phase_took(tmp_path: Path) -> None:
    rows, text = run(tmp_path)
    assert [json.loads(line)["step"] for line in (tmp_path / "step.jsonl").read_text().splitlines()] == [1, 2]
    for row in rows:
        assert {*row.seconds} == {*row.cpu_s} == {*PHASES} and min(row.seconds.values()) > 0
        assert row.share == pytest.approx(row.flops / sum(row.seconds.values()) / row.gemm_gflops / 1e9)
        assert 24 <= row.answer_tokens <= 84 and row.answer_tokens < row.tokens < row.padded_tokens
        assert row.model == {"hidden": 16, "layers": 1, "vocabulary": 40, "precision": "fp32"} | {
            "scoring": None,
            "adapters": "none",
        }
    assert all(phase in text for phase in (*PHASES, "of the bare matrix rate", "written: "))
    run(tmp_path)
    assert len((tmp_path / "step.jsonl").read_text().splitlines()) == 4, "rows are appended"


def test_adapters_and_a_model_of_a_folder(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    rows, _ = run(tmp_path, base=world.base, adapters="lora")
    assert rows[0].model["adapters"] == "lora" and rows[0].model["vocabulary"] == 258


@pytest.mark.parametrize("key", ["ppo.lr", "model.sft", "model.kernels"])
def test_keys_that_would_do_nothing_are_refused(key: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{key} is said by the preset, or changes no cost; --set takes model.adapters"
    ):
        model_settings("small", None, [f"{key}=1"])


def test_lengths_are_mixed_and_a_function_of_the_first_tokens() -> None:
    until = ending(2, 9)
    ends = []
    for first in range(64):
        row = [first, 3 * first % 7]
        while not until([row])[0]:
            row.append(0)
        ends.append(len(row))
    assert {*ends} == {*range(2, 10)}


def test_a_file_that_cannot_be_written_is_said_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "step.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"out is '.*step\.jsonl', which cannot be written"):
        run(tmp_path)


def test_an_unknown_preset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="preset is 'huge'; the presets are tiny, mixed, smollm2, gpu"):
        run_step_bench(
            "huge", Console(plain=True), steps=1, model=ModelConfig(), threads=1, device="cpu", out=tmp_path / "x"
        )
