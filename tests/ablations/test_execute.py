"""A task in its own process; what a worker makes ready before changes no result and starts no thread."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from worlds import World, make_world

from srppo.ablations.execute import execute, make_ready
from srppo.ablations.ledger import Ledger
from srppo.ablations.options import build_sweep, read_options
from srppo.ablations.plan import Plan, Task
from srppo.ablations.run import load_sweep
from srppo.config import load_recipe
from srppo.errors import RecordError
from srppo.record.store import Run

WORKER = """
import os, sys
from functools import partial
from pathlib import Path
from srppo.ablations.execute import execute, make_ready
from srppo.ablations.ledger import Ledger
from srppo.ablations.local import Worker
from srppo.ablations.estimate import check_data
from srppo.record.store import Run
from test_execute import plan_of

def before(task):
    make_ready(task)
    print("threads", len(os.listdir("/proc/self/task")), file=open(sys.argv[2] + ".diary", "a"))

files = len(os.listdir("/proc/self/fd"))
tasks = plan_of(Path(sys.argv[1]))
check_data(tasks.values())
ledger = Ledger(Run.open(Path(sys.argv[2]), {"sweep": "warm"}), 1)
Worker(tasks, ledger, partial(execute, device="cpu"), before=before, on_event=print).run()
print(len(os.listdir("/proc/self/fd")) - files)
"""


def plan_of(recipe: Path) -> dict[str, Task]:
    """SFT and SRPPO, with and without noise."""
    axes = ["data.noise_rate=0,0.5"]
    return Plan(
        build_sweep("grid", read_options("grid", load_recipe(recipe), seeds=1, axes=axes, arms="SFT,SRPPO"))
    ).tasks


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def results(run: Run) -> dict[str, object]:
    """What each stage came to, by id: figures, and checksums of the exported model."""
    found = {stage.id: stage.result() or {} for stage in run.stages()}
    return {name: {key: each[key] for key in ("status", "figures", "files")} for name, each in found.items()}


def test_stages_of_a_worker_come_to_what_plain_ones_do_and_find_no_thread(world: World, tmp_path: Path) -> None:
    recipe = world.recipe_file(tmp_path / "recipe.toml", {"data.noise": "derangement"})
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([*map(str, Path(__file__).parents[:2]), *sys.path])
    argv = [sys.executable, "-c", WORKER, str(recipe), str(tmp_path / "warm")]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    (left_open,) = done.stdout.split()
    diary = [line.split() for line in (tmp_path / "warm.diary").read_text().splitlines()]
    tasks = plan_of(recipe)
    assert len(tasks) == 4 and [words for words in diary if words[0] == "threads"] == [["threads", "1"]] * 4
    assert left_open == "0"

    plain = Ledger(Run.open(tmp_path / "plain", {"sweep": "warm"}), 1)
    for task in tasks.values():
        execute(task, plain)
    assert results(Run.load(tmp_path / "warm")) == results(plain.run) and len(results(plain.run)) == 4
    assert not [*(tmp_path / "plain").rglob("checkpoints"), *(tmp_path / "warm").rglob("checkpoints")], "none is needed"
    task = next(task for task in tasks.values() if task.kind == "ppo")
    assert plain.run.path.joinpath("stages", plain.stage(task).id, "model").is_dir()  # type: ignore[union-attr]
    execute(task, plain)  # found committed


def test_what_cannot_be_made_ready_is_left_to_the_stage(world: World) -> None:
    for keys in ({"model.base": "org/model"}, {"model.base": "./missing"}, {"eval.items": "missing.jsonl"}):
        make_ready(Task("a", "sft", world.recipe(keys), ()))


def test_what_no_result_depends_on_reaches_workers_that_join_later(world: World, tmp_path: Path) -> None:
    """A sweep that is begun again with another micro-batch is the same sweep, with the same stages."""
    sweeps = [
        build_sweep(
            "grid", read_options("grid", world.recipe({"ppo.micro_tokens": rows}), seeds=1, axes=["ppo.lr=0.1"])
        )
        for rows in (8, 3)
    ]
    for sweep in sweeps:
        ledger = Ledger(Run.open(tmp_path / "sweep", sweep.as_spec()), 1)
        ledger.limit(60.0, sweep.recipe)
    plan, joined = load_sweep(tmp_path / "sweep")
    assert joined.limits["timeout_s"] == 60 and plan.sweep.recipe.ppo.micro_tokens == 3
    assert {task.recipe.ppo.micro_tokens for task in plan.tasks.values()} == {3}
    assert plan.tasks.keys() == Plan(sweeps[0]).tasks.keys()
    with pytest.raises(RecordError, match="made with other settings"):
        Run.open(tmp_path / "sweep", replace(sweeps[0], recipe=world.recipe({"ppo.lr": 0.2})).as_spec())


def test_a_sweep_of_other_code_is_not_read_as_an_empty_one(tmp_path: Path) -> None:
    """Its stages have other ids, so every cell would be waiting."""
    folder = tmp_path / "sweep"
    Run.open(folder, {"sweep": "kl", "code_epoch": 1})
    with pytest.raises(RecordError, match=r"was begun by code of epoch 1, this is \d+: results would not match"):
        load_sweep(folder)
