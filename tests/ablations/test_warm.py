"""What a worker makes ready for its stages: used by them, changes no result, starts no thread, and is never stale."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from srppo.ablations.warm import Warm
from srppo.data.memo import Memo
from worlds import World, byte_tokenizer, make_world, write_rows

from srppo.ablations.execute import execute
from srppo.ablations.ledger import Ledger
from srppo.ablations.options import build_sweep, read_options
from srppo.ablations.plan import Plan, Task
from srppo.config import Recipe, load_recipe
from srppo.data.prepare import PreparedData, prepare
from srppo.record.store import Run

WORKER = """
import os, sys
from functools import partial
from pathlib import Path
import srppo.data.prepare
from srppo.ablations.execute import execute
from srppo.ablations.ledger import Ledger
from srppo.ablations.local import Worker
from srppo.ablations.warm import Warm
from srppo.record.store import Run
from tests.ablations.test_warm import plan_of

def noted(*args, made=srppo.data.prepare._prepare):
    print("prepared", os.getpid(), file=open(sys.argv[2] + ".diary", "a"))
    return made(*args)

srppo.data.prepare._prepare = noted
warm = Warm(1)

def before(task):
    warm.before(task)
    print("threads", len(os.listdir("/proc/self/task")), file=open(sys.argv[2] + ".diary", "a"))

files = len(os.listdir("/proc/self/fd"))
ledger = Ledger(Run.open(Path(sys.argv[2]), {"sweep": "warm"}), 1)
Worker(plan_of(Path(sys.argv[1])), ledger, partial(execute, warm=warm), before=before, on_event=print).run()
print(os.getpid(), len(os.listdir("/proc/self/fd")) - files)
"""


def plan_of(recipe: Path) -> dict[str, Task]:
    """SFT and SRPPO, with and without noise."""
    axes = ["data.noise_rate=0,0.5"]
    return Plan(build_sweep("grid", read_options("grid", load_recipe(recipe), seeds=1, axes=axes))).tasks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def results(run: Run) -> dict[str, object]:
    """What each stage came to, by id: figures, and checksums of the exported model."""
    found = {stage.id: stage.result() or {} for stage in run.stages()}
    return {name: {key: each[key] for key in ("status", "figures", "files")} for name, each in found.items()}


def test_stages_of_a_warm_worker_come_to_what_plain_ones_do(world: World, tmp_path: Path) -> None:
    recipe = world.recipe_file(tmp_path / "recipe.toml", {"data.noise": "derangement"})
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    argv = [sys.executable, "-c", WORKER, str(recipe), str(tmp_path / "warm")]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    worker, left_open = done.stdout.split()
    diary = [line.split() for line in (tmp_path / "warm.diary").read_text().splitlines()]
    tasks = plan_of(recipe)
    assert len(tasks) == 4 and [words for words in diary if words[0] == "threads"] == [["threads", "1"]] * 4
    # Once for each rate, all by the worker: its stages have found them.
    assert [words for words in diary if words[0] == "prepared"] == [["prepared", worker]] * 2
    assert left_open == "0"

    plain = Ledger(Run.open(tmp_path / "plain", {"sweep": "warm"}), 1)
    for task in tasks.values():
        execute(task, plain)
    assert results(Run.load(tmp_path / "warm")) == results(plain.run) and len(results(plain.run)) == 4


def prepared(recipe: Recipe, memo: Memo | None = None, tokenizer: object = None) -> PreparedData:
    return prepare(recipe.data, tokenizer or byte_tokenizer(), recipe.seed, 128, max_new_tokens=5, memo=memo)


def test_a_memo_gives_what_was_prepared_before_and_never_what_is_stale(world: World, tmp_path: Path) -> None:
    rows = [{"prompt": f"Name {i}", "completion": "a"} for i in range(9)]
    file = write_rows(tmp_path / "rows.jsonl", rows)
    recipe = world.recipe({"data.demonstrations": [str(file)]})
    memo, tokenizer = Memo(2), byte_tokenizer()
    prepared(recipe, None, tokenizer)  # gives it a template
    first = prepared(recipe, memo, tokenizer)
    assert prepared(recipe, memo, tokenizer) is first
    assert first == prepared(recipe, None, tokenizer)
    for keys in ({"data.size": 4}, {"data.system": "Be brief."}, {"data.held_out": 0.5}, {"seed": 1}):
        other = world.recipe({"data.demonstrations": [str(file)], **keys})
        assert prepared(other, memo, tokenizer) == prepared(other, None, tokenizer) != first
    tokenizer.chat_template = "{{ messages[0]['content'] }}: {{ messages[1]['content'] if messages[1] }}"
    assert prepared(recipe, memo, tokenizer) == prepared(recipe, None, tokenizer) != first
    assert prepared(recipe, memo) == prepared(recipe)  # another tokenizer
    write_rows(file, [{**row, "completion": "b"} for row in rows])  # as long as it was
    assert prepared(recipe, memo, tokenizer) == prepared(recipe, None, tokenizer) != first


def test_a_memo_drops_the_seeds_of_long_ago() -> None:
    memo, made = Memo(2), []
    for seed in (0, 1, 0, 2, 0, 1):
        memo.of(seed).value("key", lambda seed=seed: made.append(seed))
    assert made == [0, 1, 2, 1]


def test_what_the_base_says_is_never_kept(world: World) -> None:
    recipe = world.recipe({"data.noise": "base-answers", "data.noise_rate": 0.5})
    memo, asked = Memo(1), []

    def sample(prompts: object, seed: int) -> list[str]:
        asked.append(seed)
        return [f"wrong {seed}"] * len(prompts)

    data = [prepare(recipe.data, byte_tokenizer(), 0, 128, sample=sample, memo=memo) for _ in range(2)]
    assert len(asked) == 2 and data[0] == data[1]


def test_what_cannot_be_made_ready_is_left_to_the_stage(world: World, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    parquet = tmp_path / "rows.parquet"
    parquet.write_text("none")
    large = write_rows(tmp_path / "large.jsonl", [{"prompt": "p" * 1000, "completion": "a"}] * 17_000)
    made = Warm(1)
    for keys in (
        {"data.demonstrations": [str(tmp_path / "missing.jsonl")]},
        {"data.demonstrations": [str(parquet)]},
        {"data.demonstrations": [str(large)]},
        {"data.demonstrations": ["org/set"]},
        {"model.base": "org/model"},
        {"model.trust_remote_code": True},
    ):
        made.before(Task("a", "sft", world.recipe(keys), ()))
        assert not made.memo.of(0)._values, json.dumps(keys)
    made.before(Task("a", "sft", world.recipe(), ()))
    assert made.memo.of(0)._values
