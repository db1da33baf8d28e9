"""Stages in several processes: the figures of one, one attempt each, nothing left behind; and who gets which GPUs."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from worlds import World, make_world

from srppo.ablations.execute import execute, execute_together
from srppo.ablations.ledger import Ledger
from srppo.ablations.local import Worker, run_apart
from srppo.ablations.options import build_sweep, read_options
from srppo.ablations.plan import Plan, Task
from srppo.ablations.run import Launch, places
from srppo.ablations.slurm import sbatch_script
from srppo.config import Recipe
from srppo.errors import ConfigError, RunError
from srppo.record.store import Run
from srppo.training import parallel


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


def test_a_sweep_in_pairs_of_processes_comes_to_the_figures_of_one(world: World, tmp_path: Path) -> None:
    options = read_options("grid", world.recipe(), seeds=1, axes=["ppo.lr=0.01"], arms="SFT,SRPPO")
    tasks = Plan(build_sweep("grid", options)).tasks
    found = []
    for count in (1, 2):
        ledger = Ledger(Run.open(tmp_path / str(count), {"sweep": "pairs"}), 1)
        run: Any = partial(execute, device="cpu")
        run = run if count == 1 else partial(execute_together, execute=run, processes=count)
        said: list[str] = []
        run_apart(Worker(tasks, ledger, run, on_event=said.append))
        assert not said
        stages = ledger.run.stages()
        found.append({stage.id: (stage.result() or {})["figures"] for stage in stages})
        assert all(len(stage.attempts()) == 1 for stage in stages)
    assert found[0].keys() == found[1].keys() and len(found[0]) == 2
    for name, figures in found[0].items():
        assert found[1][name]["held_out_nll"] == pytest.approx(figures["held_out_nll"], rel=1e-2)


def breaks(task: Task, ledger: Ledger) -> None:
    """A stage whose second process dies before the first meets it again."""
    parallel.start("cpu")
    parallel.wait()
    if parallel.rank() == 1:
        raise SystemExit(3)
    parallel.wait()


def test_a_process_that_dies_ends_the_stage(tmp_path: Path) -> None:
    ledger = Ledger(Run.open(tmp_path / "sweep", {"sweep": "breaks"}), 1)
    with pytest.raises(RunError, match="another process of this run has ended"):
        execute_together(Task("a", "sft", Recipe(), ()), ledger, execute=breaks, processes=2)
    assert parallel.size() == 1, "this process is alone again"


def runs_out(task: Task, ledger: Ledger) -> None:
    """A stage whose second process has too little memory."""
    parallel.start("cpu")
    parallel.wait()
    if parallel.rank() == 1:
        raise RunError("ran out of memory; lower ppo.micro_tokens")
    parallel.wait()


def test_what_a_further_process_says_is_heard(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    ledger = Ledger(Run.open(tmp_path / "sweep", {"sweep": "runs-out"}), 1)
    with pytest.raises(RunError, match="another process of this run has ended"):
        execute_together(Task("a", "sft", Recipe(), ()), ledger, execute=runs_out, processes=2)
    assert "process 1: ran out of memory; lower ppo.micro_tokens" in capfd.readouterr().err


def test_each_stage_gets_gpus_for_its_processes(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    sweep = build_sweep("grid", read_options("grid", world.recipe(), seeds=1, axes=["ppo.lr=0.01"], arms="SFT"))
    monkeypatch.setattr("srppo.ablations.run.visible_gpus", lambda: ("0", "1", "2", "3", "4"))
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")
    assert places(sweep, Launch(device="cuda", processes=2)) == (2, ("0,1", "2,3"), "cuda")
    assert places(sweep, Launch(device="cuda", processes=1)) == (5, ("0", "1", "2", "3", "4"), "cuda")
    with pytest.raises(ConfigError, match="6 processes a stage want as many GPUs, and 5 are visible"):
        places(sweep, Launch(device="cuda", processes=6))


def test_slurm_is_asked_for_as_many(world: World) -> None:
    task = Task("a", "sft", Recipe(), ())
    text = sbatch_script(Path("/x"), [task], {"a": 1.0}, workers=1, device="cuda", processes=4, timeout_s=None)
    assert "\n#SBATCH --gres=gpu:4\n" in text and "\n#SBATCH --cpus-per-task=4\n" in text
    assert "--processes 4" in text
