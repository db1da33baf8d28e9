"""Trackers: TensorBoard and Weights & Biases get each step once, whatever was killed and resumed."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from srppo.errors import ConfigError
from srppo.training.trackers import trackers


def test_tensorboard_is_written_and_a_resumed_stage_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in (range(0, 6), range(4, 8)):  # killed after step 5, resumed from the checkpoint of step 3
        (tracker,) = trackers(["tensorboard"], "ppo", tmp_path, {"seed": 0, "ppo": {"lr": 1e-4}})
        for step in steps:
            tracker.log({"reward": float(step), "kl_sft": 0.5}, step=step)
        tracker.finish()
        tracker.finish()
    assert list((tmp_path / "tensorboard" / "ppo").glob("events.out.tfevents.*"))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "ppo")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("reward")] == [(s, float(s)) for s in range(8)]


def test_wandb_gets_one_stable_id_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Run:
        def log(self, values: dict[str, Any], step: int, **_: Any) -> None:
            calls.append((step, values))

        def finish(self) -> None:
            calls.append("finish")

    fake: Any = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    fake.init = lambda **kwargs: calls.append(kwargs) or Run()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        (tracker,) = trackers(["wandb", "wandb"], "run/ppo", tmp_path, {"seed": 0})
        tracker.log({"reward": 1.0}, step=1)
        tracker.finish()
    first, second = calls[0], calls[3]
    assert calls[1:3] == [(1, {"reward": 1.0}), "finish"]
    assert first == second and first["resume"] == "allow" and first["project"] == "srppo" and first["name"] == "run-ppo"
    assert json.dumps(first)


def test_an_unused_tracker_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    trackers(["tensorboard"], "ppo", tmp_path, {})[0].finish()
    assert list(tmp_path.iterdir()) == []


def test_tracker_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="unknown tracker 'mlflow'; choose from tensorboard, wandb"):
        trackers(["mlflow"], "ppo", tmp_path, {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'srppo\[wandb\]'"):
        trackers(["wandb"], "ppo", tmp_path, {})
