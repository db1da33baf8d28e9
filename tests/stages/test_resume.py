"""A run that is killed, interrupted or refused by the disk goes on, and ends with the bits of an undisturbed one.

Real processes and real kills; `tests/torture.py` has the machinery, and many more kills (`make torture`).
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
import torch
import torture
from torture import Life, Server

from srppo.errors import Interrupted
from srppo.models.language_model import LanguageModel
from srppo.record.store import Run, Stage
from srppo.training.ppo import train_ppo
from srppo.training.rollout import LocalSampler


@dataclass(frozen=True)
class Place:
    """A folder for runs, a server for lives, and what an undisturbed run ends with."""

    folder: Path
    server: Server
    expected: dict[str, str]
    points: list[str]

    def assert_ends_the_same(self, run: Path) -> None:
        """Run the same command to its end: equal to the bit."""
        assert torture.differences(self.expected, self.server.finish(run)) == []
        shutil.rmtree(run)

    def run_until(self, run: Path, kind: str, step: int) -> Life:
        """Start, and return once the row of a step is on disk: the next step is under way."""
        life = self.server.start(run)
        assert life.until(lambda: torture.logged(run, kind) >= step) and life.code is None, life.log.read_text()
        return life


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with torture.workplace() as (folder, server):
        life = server.start(folder / "reference", points=folder / "points")
        assert life.wait() == 0, life.log.read_text()
        points = torture.name_points(folder / "points", folder / "reference")
        yield Place(folder, server, torture.bits(folder / "reference"), points)


def stage_of(run: Path, kind: str) -> Stage:
    (found,) = [stage for stage in Run.load(run).stages() if stage.identity["kind"] == kind]
    return found


def last_line(life: Life) -> str:
    """The last line of a life that ended with an expected error: the one line that says so."""
    lines = life.log.read_text().splitlines()
    assert not any("Traceback" in line for line in lines), life.log.read_text()
    assert sum(line.startswith("error: ") for line in lines) == 1
    return lines[-1]


# ---- kills


@pytest.mark.parametrize(
    ("kind", "step"), [("sft", 0), ("sft", 4), ("ppo", 1), ("ppo", 5)], ids=["no-checkpoint", "sft", "ppo", "late-ppo"]
)
def test_killed_in_the_middle_of_a_step(place: Place, kind: str, step: int) -> None:
    run = place.folder / f"killed-{kind}-{step}"
    life = place.run_until(run, kind, step)
    time.sleep(0.03 * random.Random(step).random())  # a step takes 30 ms or more
    assert life.kill() == -signal.SIGKILL
    assert stage_of(run, kind).checkpoint_steps() or step < 4
    place.assert_ends_the_same(run)


@pytest.mark.parametrize(
    "point", ["before rename ppo/checkpoints/step-6", "after write ppo/checkpoints/.tmp-1-step-4/manifest.json"]
)
def test_killed_while_a_checkpoint_is_written(place: Place, point: str) -> None:
    run = place.folder / f"point-{point.split('/')[2]}"
    assert place.server.start(run, crash_at=place.points.index(point) + 1).wait() == -signal.SIGKILL
    steps = stage_of(run, "ppo").checkpoint_steps()
    assert steps and max(steps) < (6 if "step-6" in point else 4)  # an earlier one is there, this one is not
    place.assert_ends_the_same(run)


# ---- asked to stop


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_an_interrupted_run_saves_and_goes_on(place: Place, number: signal.Signals) -> None:
    run = place.folder / f"interrupted-{number}"
    life = place.run_until(run, "ppo", 1)
    life.signal(number)
    assert life.wait() == 130
    found = re.fullmatch(
        r"error: stopped at step (\d) of 8; the state is saved: run the same command to go on", last_line(life)
    )
    assert found, life.log.read_text()
    assert stage_of(run, "ppo").checkpoint_steps()[-1] == int(found[1])
    assert place.points and torture.place(run).startswith("ppo after step")
    place.assert_ends_the_same(run)


class StopsAtOne:
    """Asks for a stop while step 1 is measured."""

    def __init__(self) -> None:
        self.measured = 0

    def measure(self, model: LanguageModel) -> tuple[dict[str, float], None]:
        if self.measured == 1:
            os.kill(os.getpid(), signal.SIGINT)
        self.measured += 1
        return {}, None


def test_ctrl_c_in_the_last_step_does_not_let_the_next_stage_begin(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    recipe = tiny.tiny_recipe(rollout={"batch": 4}, ppo={"steps": 1, "epochs": 1})
    base, sft = tiny.base_and_sft()
    _, policy = tiny.base_and_sft()
    with tiny.Bench(tmp_path, recipe) as bench:
        with pytest.raises(Interrupted, match="stopped at step 1 of 1"):
            train_ppo(recipe, bench, policy, sft, base, tiny.PROMPTS, StopsAtOne(), LocalSampler([0], 0))
        assert bench.stage.checkpoint_steps() == [1]


# ---- damage and refusal


def test_a_torn_newest_checkpoint_is_named_and_the_one_before_is_used(place: Place) -> None:
    run = place.folder / "torn"
    assert place.run_until(run, "ppo", 6).kill() == -signal.SIGKILL
    stage = stage_of(run, "ppo")
    before, newest = stage.checkpoint_steps()[-2:]
    weights = stage.path / "checkpoints" / f"step-{newest}" / "policy.safetensors"
    with open(weights, "r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    life = place.server.start(run)
    assert life.wait() == 0, life.log.read_text()
    log = life.log.read_text()
    assert re.search(rf"checkpoint step-{newest} is damaged \(policy\.safetensors has \d+ bytes instead of \d+\)", log)
    assert f"SRPPO: resumed from step {before}" in log
    place.assert_ends_the_same(run)


def test_a_full_disk_ends_in_one_line_and_the_last_checkpoint_survives(place: Place) -> None:
    run = place.folder / "full"
    assert place.run_until(run, "ppo", 4).kill() == -signal.SIGKILL
    newest = stage_of(run, "ppo").checkpoint_steps()[-1]
    life = place.server.start(run, file_limit=20000)  # rows fit, weights do not
    assert life.wait() == 1, life.log.read_text()
    line = last_line(life)
    assert re.match(r"error: cannot write \S+/checkpoints/step-\d: ", line)
    assert f"checkpoint step-{newest} survives" in line and "run the same command again: it resumes" in line
    stage = stage_of(run, "ppo")
    assert stage.latest_checkpoint(lambda path, reason: pytest.fail(f"{path}: {reason}")) == (
        newest,
        stage.path / "checkpoints" / f"step-{newest}",
    )
    place.assert_ends_the_same(run)


def test_a_second_process_on_a_running_stage_is_told_so_in_one_line(place: Place) -> None:
    run = place.folder / "two"
    first = place.run_until(run, "ppo", 2)
    first.signal(signal.SIGSTOP)  # alive, but not done before the other has come
    try:
        kept = run.with_name("two.log").rename(run.with_name("first.log"))
        second = place.server.start(run)
        assert second.wait() == 2
        pattern = (
            rf"error: stage {stage_of(run, 'ppo').id} is being run by pid {first.pid} on \S+ since .*; wait for it"
        )
        assert re.match(pattern, last_line(second)), last_line(second)
    finally:
        first.signal(signal.SIGCONT)
    assert first.wait() == 0, kept.read_text()
    assert torture.differences(place.expected, torture.bits(run)) == []
    assert len(stage_of(run, "ppo").attempts()) == 1  # the second left no trace
    place.assert_ends_the_same(run)


# ---- the comparison itself


def test_the_comparison_sees_a_flipped_bit_anywhere(place: Place) -> None:
    """Or all of the above could pass for nothing."""
    names = {name.split(": ")[1] for name in place.expected if name.startswith("ppo: ")}
    assert names >= {
        "metrics",
        "result's figures",
        "model/model.safetensors",
        "policy at the last step",
        "value at the last step",
        "trainer's policy at the last step",
        "trainer's value at the last step",
        "trainer's counters at the last step",
        "trainer's torch_rng at the last step",
    }
    run = place.folder / "flipped"
    shutil.copytree(place.folder / "reference", run)
    (rows,) = stage_of(run, "ppo").path.glob("attempts/*/metrics.jsonl")
    lines = [json.loads(line) for line in rows.read_text().splitlines()]
    lines[3]["reward"] += 1e-15
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert torture.differences(place.expected, torture.bits(run)) == ["ppo: metrics"]
    shutil.rmtree(run)
    state = {"a": [torch.zeros(3), 1.0], "b": torch.zeros(2)}
    other = {"a": [torch.tensor([0.0, -0.0, 0.0]), 1.0], "b": torch.zeros(2)}
    assert torture.tree_digest(state) != torture.tree_digest(other)
    assert torture.tree_digest(state) == torture.tree_digest(dict(reversed(state.items())))
