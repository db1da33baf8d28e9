"""`srppo plan`: what it says of a model of which there is nothing but config.json, and its errors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import Cli
from transformers import LlamaConfig

RECIPE = """
[model]
base = "{base}"
[data]
demonstrations = ["nobody/has-this"]
prompts = ["nobody/has-this"]
size = 640
[sft]
lr = 1e-5
[ppo]
lr = 1e-6
value_lr = 1e-6
"""


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    folder = tmp_path_factory.mktemp("plan")
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4}
    LlamaConfig(**shape, vocab_size=8000, dtype="bfloat16").save_pretrained(folder / "model")
    (folder / "recipe.toml").write_text(RECIPE.format(base=folder / "model"))
    found = Cli(folder)
    yield found
    found.close()


def test_a_plan_of_config_json_alone(cli: Cli) -> None:
    done = cli("plan", "recipe.toml", "--memory", 16, "--rate", 100, "--device", "cpu")
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    assert "of 16.00 GB, which fits" in text and "What to change" not in text and "assumed, on average 256" in text
    assert "SFT: 80 steps" in text and "PPO: 20 steps" in text and "60% of 100 GF/s (as given)" in text
    assert max(map(len, done.out.splitlines())) <= 80


def test_where_it_does_not_fit_it_says_what_to_change(cli: Cli) -> None:
    done = cli("plan", "recipe.toml", "--memory", 0.45, "--device", "cuda")
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    assert "which does not fit" in text and "What to change" in text and "model.adapters=lora" in text
    assert "Fits, with" in text and "--set " in text and max(map(len, done.out.splitlines())) <= 80


def test_of_several_processes_it_says_what_one_holds(cli: Cli) -> None:
    command = ["plan", "recipe.toml", "--memory", 16, "--rate", 100, "--device", "cpu", "--processes", 4]
    done = cli(*command, "--set", "model.sharding=full")
    assert done.code == 0, done.err
    text = " ".join(done.out.split())
    assert "in each of 4 processes" in text and "gathered" in text and "operations in each process" in text
    assert "GB, " in text and "in all of 16.00 GB, which fits" in text and max(map(len, done.out.splitlines())) <= 80
    measured = cli("plan", "recipe.toml", "--memory", 16, "--device", "cpu", "--processes", 4)
    assert "measured here, shared by 4 processes" in " ".join(measured.out.split()), measured.err
    assert "9 processes have only 8 rows" in cli("plan", "recipe.toml", "--memory", 16, "--processes", 9).error()


def test_what_cannot_be_planned_is_one_line(cli: Cli, tmp_path: Path) -> None:
    assert "give --memory GB" in cli("plan", "recipe.toml", "--device", "cuda").error()
    assert "neither a folder here nor a hub name" in cli("plan", "recipe.toml", "--set", "model.base=/nowhere").error()
