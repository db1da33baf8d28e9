"""One run in two processes, by a launcher: the figures of one, one record, and a line where a process dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import worlds
from torch import nn

from srppo.record.store import Run
from srppo.training import parallel

PATIENCE_S = 600
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
KEYS: dict[str, Any] = {"ppo.minibatches": 2, "rollout.batch": 7, "ppo.steps": 2, "ppo.micro_tokens": 40}


@pytest.fixture
def world(tmp_path: Path) -> worlds.World:
    (tmp_path / "world").mkdir()
    return worlds.make_world(tmp_path / "world")


def launch(recipe: Path, out: Path, *words: str, processes: int = 2) -> subprocess.Popen[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = ["-m", "srppo", "train", str(recipe), "--out", str(out), "--device", "cpu", "--plain", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(launcher + command, env={**os.environ, **ENVIRONMENT}, **pipes)


def wait_for_ppo(process: subprocess.Popen[str], folder: Path) -> psutil.Process:
    """Until PPO has logged its fifth step; the second process."""
    deadline = time.monotonic() + PATIENCE_S
    while not any(b'"step":5,' in path.read_bytes() for path in folder.glob("stages/*/attempts/*/metrics.jsonl")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (second,) = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    return second


def rows_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    (stage,) = [stage for stage in Run.load(folder).stages() if stage.identity["kind"] == kind]
    return stage.metrics()


def assert_alike(one: Path, two: Path, *kinds: str, tolerance: float = 1e-3) -> None:
    """Every figure of every step within what the order of a sum moves."""
    for kind in kinds:
        ours, theirs = rows_of(one, kind), rows_of(two, kind)
        assert [row["step"] for row in ours] == [row["step"] for row in theirs] and len(ours) > 2
        for row, twin in zip(ours, theirs, strict=True):
            row, twin = ({k: v for k, v in each.items() if k != "timing"} for each in (row, twin))
            assert row == pytest.approx(twin, rel=tolerance, abs=tolerance / 10)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        # one development item: the second process has none to answer
        {"model.adapters": "lora", "ppo.critic": "shared", "reward.at_limit": "drop", "eval.limit": 1},
        {"model.adapters": "lora", "model.sharding": "full"},
        {
            "ppo.advantage": "rloo",
            "rollout.per_prompt": 4,
            "rollout.batch": 8,
            "reward.kl": "k2",
            "ppo.target_kl": 0.01,
        },
    ],
)
def test_two_processes_give_the_figures_of_one(world: worlds.World, tmp_path: Path, keys: dict[str, Any]) -> None:
    settings = {**KEYS, **keys}
    distil = {"distil.steps": 2, "distil.lr": 0.01} if not keys else {}
    recipe = world.recipe_file(tmp_path / "recipe.toml", {**settings, **distil})
    process = launch(recipe, tmp_path / "two", *(["--distil"] if distil else []))
    out, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, told
    assert out.count("SRPPO") >= 1 and told.count("run folder:") == 1, "one process speaks"
    alone = subprocess.run(
        [sys.executable, "-m", "srppo", "train", str(recipe), "--out", str(tmp_path / "one"), "--device", "cpu"]
        + (["--distil"] if distil else []),
        env={**os.environ, **ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert alone.returncode == 0, alone.stderr
    assert_alike(tmp_path / "one", tmp_path / "two", "sft", "ppo", *(["distil"] if distil else []))
    attempts = [len(list(path.iterdir())) for path in (tmp_path / "two/stages").glob("*/attempts")]
    assert attempts == [1] * len(attempts), "one process writes"
    ids = [sorted(path.name for path in (tmp_path / name / "stages").iterdir()) for name in ("one", "two")]
    assert ids[0] == ids[1], "how many processes there are is in no id"


def test_a_process_that_is_killed_ends_the_run_with_a_line_and_any_number_goes_on(
    world: worlds.World, tmp_path: Path
) -> None:
    settings = {**KEYS, "ppo.steps": 30, "ppo.checkpoint_every": 1, "eval.every": 0}
    settings |= {"ppo.lr": 1e-3, "ppo.value_lr": 5e-3}  # slow, since rounding grows with every step
    recipe = world.recipe_file(tmp_path / "recipe.toml", settings)
    process = launch(recipe, tmp_path / "run")
    second = wait_for_ppo(process, tmp_path / "run")
    second.send_signal(signal.SIGKILL)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    assert "another process of this run has ended" in line and "the same command goes on" in line
    assert "/srppo/" not in told, "no traceback of ours"
    again = launch(recipe, tmp_path / "run", processes=1)
    _, resumed = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0 and "SRPPO: resumed from step" in resumed, resumed
    whole = launch(recipe, tmp_path / "whole")
    _, told = whole.communicate(timeout=PATIENCE_S)
    assert whole.returncode == 0, told
    first = int(re.search(r"SRPPO: resumed from step (\d+)", resumed)[1])  # type: ignore[index]
    ours, theirs = rows_of(tmp_path / "whole", "ppo"), rows_of(tmp_path / "run", "ppo")
    assert [row["step"] for row in ours] == [row["step"] for row in theirs] == list(range(31))
    for row, twin in zip(ours[: first + 3], theirs[: first + 3], strict=True):  # later, rounding has grown
        assert row["kl_sft"] == pytest.approx(twin["kl_sft"], rel=0.05, abs=0.01) if row["step"] else True


def test_a_stop_that_one_process_hears_stops_all_at_one_step(world: worlds.World, tmp_path: Path) -> None:
    """SIGTERM to the second process alone: both save at the end of a step, and a single one goes on from there."""
    settings = {**KEYS, "ppo.steps": 400, "ppo.checkpoint_every": 100, "eval.every": 0}
    recipe = world.recipe_file(tmp_path / "recipe.toml", settings)
    process = launch(recipe, tmp_path / "run")
    second = wait_for_ppo(process, tmp_path / "run")
    second.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    found = re.search(r"stopped at step (\d+) of 400; the state is saved", line)
    assert found, line
    (saved,) = (tmp_path / "run").glob(f"stages/*/checkpoints/step-{found[1]}")
    assert (saved / "policy.safetensors").is_file()


def test_more_processes_than_rows_are_refused(world: worlds.World, tmp_path: Path) -> None:
    recipe = world.recipe_file(tmp_path / "recipe.toml", {"rollout.batch": 2, "ppo.minibatches": 1})
    process = launch(recipe, tmp_path / "run", processes=3)
    _, told = process.communicate(timeout=PATIENCE_S)
    assert process.returncode != 0
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    assert line == ("error: 3 processes have only 2 rows to share in a pass (rollout.batch); start fewer, or raise it")


# ---- in this process, which is alone


def test_alone_nothing_is_done() -> None:
    weight = nn.Parameter(torch.ones(3))
    parallel.add_up_gradients([weight])
    assert weight.grad is None and parallel.size() == 1 and parallel.is_first()
    assert parallel.share([1, 2, 3]) == [1, 2, 3] and parallel.gather(4) == [4] and parallel.agreed(False) is False
    assert parallel.add_up_numbers({"a": 1.5}) == {"a": 1.5}


def test_gradients_are_added_up_in_buckets_of_one_type() -> None:
    kinds = [torch.float32, torch.float32, torch.bfloat16, torch.float32]
    weights = [nn.Parameter(torch.zeros(size, dtype=kind)) for size, kind in zip((3, 4, 5, 6), kinds, strict=True)]
    found = [[weight.numel() for weight in bucket] for bucket in parallel._buckets(weights)]
    assert found == [[3, 4], [5], [6]]
    assert [w.numel() for bucket in parallel._buckets([nn.Parameter(torch.zeros(parallel.BUCKET))] * 2) for w in bucket]
