"""What is tried before a sweep: data are checked in this process and leave nothing; steps are measured in a new one."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from worlds import World, make_world

from srppo.ablations import estimate
from srppo.ablations import run as sweeps
from srppo.ablations.estimate import Pace, check_data, measure_pace
from srppo.ablations.options import build_sweep, read_options
from srppo.ablations.plan import Plan, Task
from srppo.ablations.run import Launch, ablate_command, plan_lines
from srppo.console import Console
from srppo.errors import ConfigError, DataError, ModelError, UserError
from srppo.record.store import Stage
from srppo.training import ppo


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    return make_world(tmp_path_factory.mktemp("world"))


def task(world: World, kind: str = "ppo", **keys: Any) -> Task:
    recipe = world.recipe({name.replace("__", "."): value for name, value in keys.items()})
    return Task(kind, kind, recipe, ())


def test_data_are_checked_without_a_process_a_folder_or_a_model(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **more: Any) -> Any:
        raise AssertionError("the data alone are to be read")

    for module, name in ((os, "fork"), (multiprocessing, "get_context"), (tempfile, "mkdtemp")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr("srppo.models.loading.load_model", refuse)
    monkeypatch.chdir(tmp_path)
    given = task(world, model__sft=world.sft)
    noisy = task(world, data__noise="base-answers", data__noise_rate=0.5)
    check_data([task(world), task(world, "best-of-n"), given, noisy])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "keys", "error", "words"),
    [
        ("sft", {"data__size": 99}, DataError, "data.size asks for 99 demonstrations"),
        ("ppo", {"data__prompts": []}, ConfigError, "PPO needs prompts"),
        ("longer-sft-1/4", {"data__prompts": []}, ConfigError, "PPO needs prompts"),
        ("rejection-ft", {"data__prompts": []}, ConfigError, "PPO needs prompts"),
        ("rejection-ft", {"reward__kind": "shuffled"}, ConfigError, "reward.kind = shuffled pays by other rollouts"),
        ("decoded", {"eval__items": None}, ConfigError, "no test items to answer"),
        ("decoded", {"reward__kind": "shuffled"}, ConfigError, "reward.kind = shuffled is about whole responses"),
        ("best-of-n", {"reward__kind": "shuffled"}, ConfigError, "reward.kind = shuffled pays by other rollouts"),
        ("resampled", {"reward__beta": 0.0}, ConfigError, "reward.beta = 0 has no closed-form optimum"),
        ("chosen-sft", {"model__sft": "some"}, ConfigError, "--baselines compares"),
        ("sft", {"model__base": "./missing"}, ModelError, "is neither a folder here nor a hub name"),
        ("sft", {"data__demonstrations": ["missing.jsonl"]}, DataError, "missing.jsonl"),
    ],
)
def test_what_would_fail_every_stage_is_said_before(
    kind: str, keys: dict[str, Any], error: type[UserError], words: str, world: World
) -> None:
    with pytest.raises(error) as caught:
        check_data([task(world), task(world, kind, **keys)])
    assert words in str(caught.value)


def test_weights_that_are_not_whole_are_said_before(world: World, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for file in Path(world.base).iterdir():
        content = file.read_bytes()
        (tmp_path / "model" / file.name).write_bytes(content[:-9] if file.suffix == ".safetensors" else content)
    with pytest.raises(ModelError, match=r"is damaged: model\.safetensors"):
        check_data([task(world, model__base=str(tmp_path / "model"))])


def test_steps_are_measured_from_a_process_whose_threads_have_run(world: World) -> None:
    """A fork of it would fail or hang in torch's thread pool; errors come back as the kind they were."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.ones(512, 512).matmul(torch.ones(512, 512)).sum() == 512**3
        pace = measure_pace(world.recipe(), "cpu")
        with pytest.raises(UserError, match=r"data\.size asks for 99"):
            measure_pace(world.recipe({"data.size": 99}), "cpu")
    finally:
        torch.set_num_threads(before)
    assert isinstance(pace, Pace) and min(pace.start_s, pace.sft_step_s, pace.ppo_step_s, pace.answer_s) > 0
    assert (pace.dev_items, pace.test_items, pace.rows) == (4, 4, 13)


@pytest.mark.parametrize(("limit", "steps"), [(0.0, 1), (1e9, 3)])
def test_a_slow_model_is_asked_for_one_step_of_ppo(
    limit: float, steps: int, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = Mock(side_effect=ppo.train_ppo)
    monkeypatch.setattr(ppo, "train_ppo", taken)
    monkeypatch.setattr(estimate, "SLOW_S", limit)
    assert estimate._measure(world.recipe(), "cpu").ppo_step_s > 0
    assert taken.call_args.args[0].ppo.steps == steps


@pytest.mark.parametrize(
    ("batch", "per_prompt", "minibatches", "measured", "share"),
    [
        (48, 1, 4, 12, 4),
        (48, 4, 4, 12, 4),
        (8, 1, 1, 8, 1),
        (10, 1, 4, 10, 1),
        (8, 4, 4, 8, 1),
        (4, 1, 4, 4, 1),
        (8, 2, 2, 4, 2),
    ],
)
def test_a_slow_model_is_asked_for_one_minibatch(
    batch: int, per_prompt: int, minibatches: int, measured: int, share: int, world: World
) -> None:
    """Of whole prompts, and of two at least: a reward's mean is taken of the others."""
    keys = {"rollout.batch": batch, "rollout.per_prompt": per_prompt, "ppo.minibatches": minibatches}
    small, found = estimate._one_minibatch(world.recipe(keys))
    assert (small.rollout.batch, small.ppo.minibatches, small.ppo.steps, found) == (measured, 1, 1, share)


def test_a_minibatch_counts_as_often_as_a_step_has_it(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that a step reports are replaced: timing decides no test."""
    monkeypatch.setattr(estimate, "SLOW_S", 0.0)
    rows = [{"step": step, "timing": {"update_s": 2.0, "tokens_per_s": 9.0}} for step in range(2)]
    monkeypatch.setattr(Stage, "metrics", lambda _: rows)
    recipe = world.recipe({"rollout.batch": 8, "ppo.minibatches": 2})
    pace = estimate._measure(recipe, "cpu")
    assert (pace.sft_step_s, pace.ppo_step_s) == (2.0, 4.0)


def test_processes_share_a_stage_s_time(world: World) -> None:
    plan = Plan(build_sweep("grid", read_options("grid", world.recipe(), seeds=1, axes=["ppo.lr=0.01"], arms="SFT")))
    found = estimate.Estimate({"a": 7200.0}, (), {})
    alone, two = (plan_lines(plan, found, Path("runs"), 1, processes) for processes in (1, 2))
    assert any("2.00 core-hours, 2:00 h with 1 at once" in line for line in alone), alone
    assert any("2.00 core-hours, 1:00 h with 1 at once, each of 2 processes" in line for line in two), two


def test_a_sweep_that_goes_on_is_not_measured_again(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the machine that began it; another has another pace."""
    measured = Mock(return_value=Pace(0.1, 0.2, 0.3, 0.01, 4, 4, 10))
    monkeypatch.setattr(estimate, "measure_pace", measured)
    options = read_options("grid", world.recipe(), seeds=1, axes=["ppo.lr=0.01"], arms="SFT")
    for said in ("measuring a short step", ""):
        out = io.StringIO()
        console = Console(plain=True, file=out)
        assert ablate_command("grid", options, tmp_path / "sweep", Launch(slots=1), console) == tmp_path / "sweep"
        assert ("measuring a short step" in out.getvalue()) == bool(said) and "core-hours" in out.getvalue()
    assert measured.call_count == 1
    monkeypatch.setattr(sweeps, "cpu_model", lambda: "another")
    ablate_command("grid", options, tmp_path / "sweep", Launch(slots=1), Console(plain=True, file=io.StringIO()))
    assert measured.call_count == 2
    monkeypatch.undo()  # back on the first, whose pace the other has left alone
    monkeypatch.setattr(estimate, "measure_pace", measured)
    ablate_command("grid", options, tmp_path / "sweep", Launch(slots=1), Console(plain=True, file=io.StringIO()))
    assert measured.call_count == 2
    limits = json.loads((tmp_path / "sweep" / "limits.json").read_text())
    for of_machine in limits["paces"].values():  # as code would have it that measures something else
        for pace in of_machine.values():
            pace["further"] = 1.0
    (tmp_path / "sweep" / "limits.json").write_text(json.dumps(limits))
    ablate_command("grid", options, tmp_path / "sweep", Launch(slots=1), Console(plain=True, file=io.StringIO()))
    assert measured.call_count == 3
