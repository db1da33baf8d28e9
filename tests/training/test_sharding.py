"""Weights that are spread over processes give what whole ones give, and take their share of the memory."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import sharded
import torch
import worlds
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from srppo.config import build_recipe
from srppo.console import Console
from srppo.errors import ConfigError
from srppo.record.json import read_lines
from srppo.record.store import Run
from srppo.stages.division import Division
from srppo.stages.run import prepare_run, run_stages
from srppo.training import parallel
from srppo.training.batch import micro_batches
from srppo.training.loop import trained_bytes

PATIENCE_S = 600
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
SCRIPT = Path(sharded.__file__)


def make_models(folder: Path) -> None:
    for name, tied, dtype in (
        ("untied", False, torch.float32),
        ("tied", True, torch.float32),
        ("narrow", False, torch.bfloat16),
    ):
        torch.manual_seed(len(name))
        config = LlamaConfig(
            vocab_size=61,  # which two or three processes cannot divide evenly
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            tie_word_embeddings=tied,
        )
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder / name)


def launch(what: str, folder: Path, processes: int) -> list[dict[str, Any]]:
    """What each of several processes finds."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    this_tree = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [*launcher, str(SCRIPT), what, str(folder)],
        env={**os.environ, **ENVIRONMENT, "PYTHONPATH": this_tree},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert ran.returncode == 0, ran.stderr
    return [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("sharding")
    make_models(made)
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> Any:
    """What one process finds, with whole weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srppo.models.narrow.WORTH", 0)
        return sharded.find(folder)


@pytest.fixture(scope="module")
def together(folder: Path, alone: Any) -> list[dict[str, Any]]:
    """What each of two finds, of which the second has fewer rows."""
    return launch("find", folder, 2)


def assert_same(found: Any, expected: Any, *, tolerance: float = 1e-4) -> None:
    """Numbers within what the order of a sum moves, after a division by the root of a square; all else equal."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key], tolerance=tolerance)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other, tolerance=tolerance)
    elif isinstance(expected, torch.Tensor | float):
        torch.testing.assert_close(
            torch.as_tensor(found), torch.as_tensor(expected), rtol=tolerance, atol=tolerance / 10
        )
    else:
        assert found == expected


MEMORY = ("frozen", "trained", "gradient_bytes", "adam_bytes", "reckoned")


@pytest.mark.parametrize("case", sharded.CASES)
def test_what_is_learned_is_what_one_process_learns(case: str, alone: Any, together: list[dict[str, Any]]) -> None:
    """Loss, gradients, two steps of Adam, a copy, the base, answers of unequal lengths; in both processes."""
    expected = {name: x for name, x in alone[case].items() if name not in MEMORY}
    for each in together:
        assert_same({name: x for name, x in each[case].items() if name not in MEMORY}, expected)


@pytest.mark.parametrize(
    "case", [f"{case}, {critic}" for case in ("untied", "recomputed", "adapters") for critic in ("own", "shared")]
)
def test_critics_learn_what_they_learn_in_one_process(case: str, alone: Any, together: list[dict[str, Any]]) -> None:
    for each in together:
        assert_same(each[case], alone[case])
        assert each[case]["recomputed"] == [case.startswith("recomputed")] * 2


@pytest.mark.parametrize("case", ["untied, compared", "bf16, compared", "adapters, compared"])
def test_two_models_at_once(case: str, alone: Any, together: list[dict[str, Any]]) -> None:
    """Scores, a step of distillation, weight extrapolation, decoding by two models, an adapter merged into its base."""
    for each in together:
        assert_same(each[case], alone[case])


@pytest.mark.parametrize("case", sharded.CASES)
def test_each_process_holds_half(case: str, alone: Any, together: list[dict[str, Any]]) -> None:
    """Of what is frozen, what is trained and what Adam keeps of it; adapters, which are small, are whole."""
    whole = alone[case]
    for each in together:
        found = each[case]
        names = ("frozen",) if case == "adapters" else ("frozen", "trained", "adam_bytes")
        for name in names:
            assert 0.48 < found[name] / whole[name] < 0.52, name
        if case == "adapters":
            assert found["trained"] == whole["trained"]
        assert found["reckoned"] < 0.95 * whole["reckoned"]
    assert len({each[case]["reckoned"] for each in together}) == 1, "or batches would be of two sizes"


@pytest.mark.parametrize("case", sharded.CASES)
def test_a_plan_says_to_the_byte_what_each_process_holds(
    case: str, folder: Path, together: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the models of one process. Adam's last parts are not filled up, so the first process holds most of them."""
    monkeypatch.setattr("srppo.models.narrow.WORTH", 0)
    base, model = sharded.models(folder, case)
    planned, adapters = Division(2, spread=True), 0 if case != "adapters" else trained_bytes(model) // 4
    trained = planned.trained_bytes(model)
    for each in (every[case] for every in together):
        assert planned.weight_bytes(base) - adapters == each["frozen"]
        assert trained == each["trained"] and each["adam_bytes"] <= 2 * trained
        assert planned.gradient_bytes(model) == each["gradient_bytes"]
    assert together[0][case]["adam_bytes"] == 2 * trained


@pytest.mark.parametrize("case", ["untied", "tied", "bf16"])
def test_exports_load_and_are_those_of_one_process(
    case: str, folder: Path, alone: Any, together: list[dict[str, Any]]
) -> None:
    one, two = (AutoModelForCausalLM.from_pretrained(folder / f"{case}-of-{count}") for count in (1, 2))
    assert_same(dict(two.named_parameters()), dict(one.named_parameters()))
    names = [sorted(path.name for path in (folder / f"{case}-of-{count}").iterdir()) for count in (1, 2)]
    assert names[0] == names[1]
    config = [(folder / f"{case}-of-{count}" / "config.json").read_text() for count in (1, 2)]
    assert config[0] == config[1]


def test_checkpoints_go_on_in_any_number_of_processes(folder: Path, alone: Any, together: list[dict[str, Any]]) -> None:
    """Saved by one and by two, gone on from by one, two and three: Adam's moments, its count of steps, counters."""
    expected = alone["saved-by-1"]
    assert [float(each["step"]) for each in expected["adam"]] == [3.0] * len(expected["adam"])
    assert expected["counters"] == {"steps": 3}
    assert (folder / "saved-by-2" / "shards").is_dir() and not (folder / "saved-by-1" / "shards").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("srppo.models.narrow.WORTH", 0)
        found = [sharded.resume(folder), *together, *launch("resume", folder, 3)]
    for each in found:
        for name in ("saved-by-1", "saved-by-2"):
            assert_same(each[name], expected)


# ---- in this process


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_all_processes_make_as_many_passes_and_each_row_has_one(
    processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths_B = torch.tensor([9, 30, 7, 8])
    monkeypatch.setattr(parallel, "size", lambda: processes)
    plans = []
    for rank in range(processes):
        monkeypatch.setattr(parallel, "rank", lambda rank=rank: rank)
        plans.append([index.tolist() for index in micro_batches(lengths_B, 9, shared=True)])
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(row for plan in plans for index in plan for row in index) == [0, 1, 2, 3]
    assert all(plan[0] for plan in plans[:4]) and not any(plan[0] for plan in plans[4:])


# ---- a whole run


def test_a_killed_run_goes_on_in_one_process_from_what_two_have_saved(tmp_path: Path) -> None:
    """SFT and PPO with a critic of its own, to the figures of a run that was not stopped, in one process throughout."""
    (tmp_path / "world").mkdir()
    world = worlds.make_world(tmp_path / "world")
    settings = {"ppo.steps": 12, "ppo.checkpoint_every": 1, "eval.every": 0, "model.sharding": "full"}
    settings |= {"ppo.minibatches": 2, "rollout.batch": 7, "ppo.micro_tokens": 40}
    settings |= {"ppo.lr": 1e-3, "ppo.value_lr": 5e-3}  # slow, since rounding grows with every step
    recipe = world.recipe_file(tmp_path / "recipe.toml", settings)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = ["-m", "srppo", "train", str(recipe), "--out", str(tmp_path / "run"), "--device", "cpu", "--plain"]
    pipes: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*launcher, *command], env={**os.environ, **ENVIRONMENT}, **pipes)
    deadline = time.monotonic() + PATIENCE_S
    while not any(int(path.name[5:]) >= 4 for path in (tmp_path / "run").glob("stages/*/checkpoints/step-[0-9]*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (second,) = [child for child in psutil.Process(process.pid).children() if child.environ().get("RANK") == "1"]
    second.send_signal(signal.SIGKILL)
    _, told = process.communicate(timeout=PATIENCE_S)
    (line,) = [line for line in told.splitlines() if line.startswith("error:")]
    assert "another process of this run has ended" in line and "/srppo/" not in told

    (stage,) = [each for each in Run.load(tmp_path / "run").stages() if each.identity["kind"] == "ppo"]
    found = stage.latest_checkpoint()
    assert found is not None and (found[1] / "shards" / ".metadata").is_file() and stage.result() is None
    console = Console(plain=True, file=io.StringIO())
    resumed = run_stages(prepare_run(world.recipe(settings), ["base", "ppo"], tmp_path / "run", console))
    settings["model.sharding"] = "none"
    whole = run_stages(prepare_run(world.recipe(settings), ["base", "ppo"], tmp_path / "whole", console))
    starts = [row["start"] for row in read_lines(stage.attempts()[-1] / "events.jsonl") if row["event"] == "training"]
    assert starts == [found[0]]
    for kind in ("sft", "ppo"):
        ours, theirs = resumed[kind].metrics(), whole[kind].metrics()
        assert [row["step"] for row in ours] == [row["step"] for row in theirs]
        for row, twin in zip(ours, theirs, strict=True):
            row, twin = ({k: v for k, v in each.items() if k != "timing"} for each in (row, twin))
            assert row == pytest.approx(twin, rel=1e-2, abs=1e-3)


def test_an_end_within_a_pass_is_told_from_mistakes() -> None:
    gloo = RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    assert parallel.is_end_of_other(gloo) and parallel.is_end_of_other(torch.distributed.DistBackendError("NCCL"))
    assert not parallel.is_end_of_other(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_optimizers_that_cannot_be_divided_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"ppo\.optimizer = adafactor keeps what cannot be divided over processes"):
        build_recipe({"model": {"sharding": "full"}, "ppo": {"optimizer": "adafactor"}})
    build_recipe({"model": {"sharding": "full", "adapters": "lora"}, "ppo": {"optimizer": "adafactor"}})
