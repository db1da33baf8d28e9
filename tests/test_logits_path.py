"""Models whose head is not a plain linear layer: whole logits, the same results, and a word about it, once."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from worlds import World, make_world

import srppo.models
from srppo.console import Console
from srppo.models import Head
from srppo.pipeline import Pipeline, run_train


def run(world: World, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """(metrics of PPO's steps, what was printed)."""
    log = io.StringIO()
    pipeline = Pipeline(world.recipe(), folder, Console(plain=True, file=log))
    run_train(pipeline, baselines=False)
    (ppo,) = [stage for stage in pipeline.run.stages() if stage.identity["kind"] == "ppo"]
    return [{k: v for k, v in row.items() if k != "timing"} for row in ppo.metrics()], log.getvalue()


def test_it_trains_alike_and_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = make_world(tmp_path / "world")
    rows, log = run(world, tmp_path / "linear")
    monkeypatch.setattr(srppo.models, "_find_head", lambda model: Head(linear=False))
    others, said = run(world, tmp_path / "logits")
    assert "whole logits are built" not in log
    assert said.count("whole logits are built") == 1, "three models are loaded, one warning is enough"
    assert len(rows) == len(others) > 1
    for row, other in zip(rows, others, strict=True):
        assert row == pytest.approx(other, rel=1e-4, abs=1e-4)
