"""`srppo data`: what training will see, from a recipe or from one file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import worlds
from commands import Cli
from worlds import World, write_rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return worlds.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def cli(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cli]:
    found = Cli(tmp_path_factory.mktemp("cli"))
    yield found
    found.close()


def unwrapped(text: str) -> str:
    """Words in one line: a table of 80 columns wraps a long path."""
    return " ".join(text.split())


def test_a_recipe_is_shown_as_it_will_be_trained(cli: Cli, world: World, tmp_path: Path) -> None:
    recipe = world.recipe_file(tmp_path / "talks.toml", {"data.demonstrations": [world.talks], "data.turns": "all"})
    done = cli("data", recipe, "--set", f"model.chat_template={world.chat}", "--rows", 1)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    assert "demonstrations: 14 rows in" in done.out and "of which trained" in done.out and "overlap: of" in done.out
    trained = [line for line in lines if line.startswith(" T |")]
    assert len(trained) == 2 and all(line.endswith("「<eos>」") for line in trained)
    assert not (tmp_path / "runs").exists() and not list(cli.folder.glob("runs*"))


def test_one_file_with_a_model_is_read_as_demonstrations_and_as_prompts(cli: Cli, world: World, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "it's rows.jsonl", [{"prompt": "u <pad>", "completion": "a"}, {"prompt": ""}])
    done = cli("data", path, "--model", world.base)
    assert done.code == 0, done.err
    said = unwrapped(done.out)
    assert "1 of 1 prompts spell special tokens, which are read as such" in said and "1 empty prompt" in said
    assert " T | ·a「<eos>」" in done.out.splitlines() and "| Q:·u·「<pad>」⏎" in done.out
    asked = write_rows(tmp_path / "asked.jsonl", [{"prompt": "u"}])
    done = cli("data", asked, "--model", world.base)
    assert done.code == 0 and "demonstrations" not in done.out and "| Q:·u⏎" in done.out, done.err
    neither = write_rows(tmp_path / "neither.jsonl", [{"body": "u"}])
    done = cli("data", neither)
    assert (
        done.code == 2 and done.err.count("\n") == 1 and "no columns known for demonstrations: found body" in done.err
    )
