"""PPO from an SFT model that the recipe names: its template, its stop tokens, and what must be refused."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from worlds import World, make_world

from srppo.console import Console
from srppo.errors import ConfigError, DataError, ModelError
from srppo.evaluation.items import load_items
from srppo.models.loading import resolve
from srppo.stages.run import PreparedRun, prepare_run, run_stages

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("world"))


def prepared(world: World, folder: Path, overrides: dict[str, object], *kinds: str) -> PreparedRun:
    console = Console(plain=True, file=io.StringIO())
    return prepare_run(world.recipe(overrides), kinds or ["ppo"], folder, console)


def chat_model(world: World, folder: Path) -> Path:
    """The SFT model with a chat template and a second stop token of its own."""
    shutil.copytree(world.sft, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": [256, 7]}))
    return folder


def test_its_template_and_stop_tokens_are_used(world: World, tmp_path: Path) -> None:
    sft = chat_model(world, tmp_path / "chat")
    run = prepared(world, tmp_path / "run", {"model.sft": str(sft)})
    assert run.stops == [256, 7]
    texts = [run.tokenizer.decode(ids) for ids in run.data.prompts]
    assert all(text.startswith("<u>") and text.endswith("<a>") for text in texts)
    assert run.development.stops == run.stops


def test_other_tokens_of_the_same_number_are_refused(world: World, tmp_path: Path) -> None:
    folder = tmp_path / "swapped"
    shutil.copytree(world.sft, folder)
    text = (folder / "tokenizer.json").read_text()
    tree = json.loads(text)
    vocab = tree["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(ModelError, match=r"number their tokens differently .* '[ab]'"):
        prepared(world, tmp_path / "run", {"model.sft": str(folder)})
    assert not (tmp_path / "run").exists()


def test_the_base_as_sft_model_and_baselines_without_sft_are_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.sft is the base itself"):
        prepared(world, tmp_path / "run", {"model.sft": world.base})
    with pytest.raises(ConfigError, match="--baselines compares"):
        prepared(world, tmp_path / "run", {"model.sft": world.sft}, "ppo", "chosen-sft")
    assert not (tmp_path / "run").exists()


def test_only_embedded_and_embedded_size_name_the_embedded_bases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedded-sft").mkdir()
    assert resolve("embedded-sft") == "embedded-sft"
    assert resolve("embedded") == resolve("embedded:xs") != resolve("embedded:l")


@pytest.mark.parametrize("row", [{"prompt": 5, "answer": "x"}, {"prompt": "p", "answer": "x", "split": "validation"}])
def test_items_that_cannot_be_used_end_the_command(world: World, tmp_path: Path, row: dict[str, object]) -> None:
    file = tmp_path / "items.jsonl"
    file.write_text('\ufeff{"prompt": "p", "answer": "q"}\n\n' + json.dumps(row) + "\n")
    recipe = world.recipe({"eval.items": str(file)})
    with pytest.raises(DataError, match=r"items\.jsonl:3: not an item"):
        load_items(recipe, "dev")


def test_kl_early_stop_acts_within_a_pass(world: World, tmp_path: Path) -> None:
    """With one pass of four minibatches and a tiny target, only the first minibatch moves the policy."""

    def last(folder: str, target: float | None) -> dict[str, float]:
        overrides = {"ppo.epochs": 1, "ppo.minibatches": 4, "ppo.target_kl": target, "ppo.steps": 1}
        return run_stages(prepared(world, tmp_path / folder, overrides))["ppo"].metrics()[-1]

    free, stopped = last("free", None), last("stopped", 1e-9)
    assert stopped["flops"] < free["flops"], "the minibatches left out are not counted"
    assert stopped["grad_norm"] != free["grad_norm"]
