"""What a worker makes ready for its stages: used by them, changes no result, starts no thread, and is never stale."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from worlds import World, make_world

from srppo.ablations.execute import execute
from srppo.ablations.ledger import Ledger
from srppo.ablations.options import build_sweep, read_options
from srppo.ablations.plan import Plan, Task
from srppo.config import load_recipe
from srppo.record.store import Run

WORKER = """
import os, sys
from functools import partial
from pathlib import Path
from srppo.ablations.execute import execute
from srppo.ablations.ledger import Ledger
from srppo.ablations.local import Worker
from srppo.ablations.warm import Warm
from srppo.record.store import Run
from tests.ablations.test_warm import plan_of

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
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1]), *sys.path])
    argv = [sys.executable, "-c", WORKER, str(recipe), str(tmp_path / "warm")]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    _, left_open = done.stdout.split()
    diary = [line.split() for line in (tmp_path / "warm.diary").read_text().splitlines()]
    tasks = plan_of(recipe)
    assert len(tasks) == 4 and [words for words in diary if words[0] == "threads"] == [["threads", "1"]] * 4
    assert left_open == "0"

    plain = Ledger(Run.open(tmp_path / "plain", {"sweep": "warm"}), 1)
    for task in tasks.values():
        execute(task, plain)
    assert results(Run.load(tmp_path / "warm")) == results(plain.run) and len(results(plain.run)) == 4
