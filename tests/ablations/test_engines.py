"""The engines for several machines: a real two-node Ray cluster here, and SLURM's script run by a stand-in for sbatch.

Stages only pretend to train, except in the one that goes from end to end. Nothing depends on how fast anything is.
"""

from __future__ import annotations

import io
import json
import os
import shlex
import signal
import stat
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from worlds import make_world

from srppo.ablations.execute import execute as execute_task
from srppo.ablations.execute import execute_together
from srppo.ablations.ledger import Ledger
from srppo.ablations.options import build_sweep, read_options
from srppo.ablations.plan import Plan, Task
from srppo.ablations.slurm import sbatch_script, write_sbatch
from srppo.config import Recipe
from srppo.console import Console
from srppo.errors import ConfigError, Interrupted, RecordError, RunError, StorageError
from srppo.record.store import Run

try:
    import ray
    from ray.cluster_utils import Cluster

    from srppo.ablations.ray_engine import run_ray, sight
except (ImportError, ConfigError):
    ray = None
needs_ray = pytest.mark.skipif(ray is None, reason="Ray is not installed: pip install -c constraints.txt 'srppo[ray]'")
WAIT_S = 60.0
RECIPE = Recipe()


# ---- stages that pretend; what they do is their task's kind


def task(key: str, kind: str = "plain", *needs: str) -> Task:
    return Task(key, kind, RECIPE, needs)


def plan_of(*tasks: Task) -> Plan:
    return cast(Plan, SimpleNamespace(tasks={each.key: each for each in tasks}, title=str))


def open_ledger(folder: Path, tries: int = 2) -> Ledger:
    return Ledger(Run.open(folder / "record", {"pretended": True}), tries)


def pretend(task: Task, ledger: Ledger, folder: Path) -> None:
    """An `execute` that behaves as the task's kind says and keeps a diary, in which it says when it has committed."""
    stage = ledger.run.stage("pretended", {"key": task.key})
    ledger.link(task, stage)
    with stage.attempt() as attempt:
        node = ray.get_runtime_context().get_node_id()
        note(folder, "begin", task.key, node)
        print(f"{task.key} prints")
        behave(folder, task, node)
        attempt.commit("ok", {})
        note(folder, "committed", task.key)


def behave(folder: Path, task: Task, node: str) -> None:
    first = not (folder / task.key).exists()
    (folder / task.key).touch()
    if task.kind == "crash-once" and first:
        os.kill(os.getpid(), signal.SIGKILL)
    if task.kind == "user":
        raise ConfigError("no such setting")
    if task.kind == "error":
        raise ValueError("a bug")
    if task.kind == "full":
        raise StorageError("the disk is full")
    if task.kind == "hang":
        time.sleep(1000)
    if task.kind == "wait" and first:
        until(lambda: False, 1000)
    if task.kind == "doomed":  # ends on one node only, and not before the other has begun something
        until(
            lambda: node == (folder / "lasting").read_text() and len({line[1] for line in diary(folder, "begin")}) > 1
        )


def note(folder: Path, *words: str) -> None:
    with open(folder / "diary", "ab", buffering=0) as file:
        file.write(" ".join(words).encode() + b"\n")


def diary(folder: Path, what: str) -> list[list[str]]:
    path = folder / "diary"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [words[1:] for words in lines if words[0] == what]


def until(condition: Callable[[], Any], wait_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + wait_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def committed(folder: Path) -> dict[str, int]:
    return dict(Counter(key for (key,) in diary(folder, "committed")))


def meanwhile(action: Callable[[], None]) -> None:
    threading.Thread(target=action, daemon=True).start()


# ---- Ray


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A node with one core, to which tests may add others; found as a user's is, through RAY_ADDRESS."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    memory = 80 << 20
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "include_dashboard": False, "object_store_memory": memory},
    )
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # nodes have no tests
    os.environ["RAY_ADDRESS"] = made.address
    try:
        yield made
    finally:
        ray.shutdown()
        del os.environ["RAY_ADDRESS"]
        made.shutdown()


@pytest.fixture
def joined(cluster: Any) -> None:
    """This process in the cluster, and left there: tests share processes of Ray's, which take seconds to start."""
    if not ray.is_initialized():
        ray.init(address=cluster.address, log_to_driver=False, logging_level="CRITICAL")


def run(tmp_path: Path, *tasks: Task, tries: int = 2, timeout_s: float | None = None) -> tuple[Ledger, str]:
    """The record and what was said."""
    said = io.StringIO()
    ledger = open_ledger(tmp_path, tries)
    console = Console(plain=True, file=said)
    execute = partial(pretend, folder=tmp_path)
    run_ray(plan_of(*tasks), ledger, execute, device="cpu", timeout_s=timeout_s, console=console)
    return ledger, said.getvalue()


@needs_ray
def test_a_node_killed_in_mid_sweep_costs_nothing(cluster: Any, tmp_path: Path) -> None:
    ray.shutdown()  # another test may have joined
    doomed = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)
    cluster.wait_for_nodes()
    (tmp_path / "lasting").write_text(cluster.head_node.node_id)

    def kill() -> None:
        until(lambda: any(node == doomed.node_id for _, node in diary(tmp_path, "begin")))
        cluster.remove_node(doomed, allow_graceful=False)

    meanwhile(kill)
    first = [task(f"sft{i}", "doomed") for i in range(4)]
    tasks = [*first, *(task(f"ppo{i}", "plain", f"sft{i}") for i in range(4))]
    ledger, said = run(tmp_path, *tasks, tries=1)
    assert committed(tmp_path) == {each.key: 1 for each in tasks}
    assert all(ledger.state(each).status == "done" for each in tasks)
    assert not any(ledger.failures(each) for each in tasks), "a node's death is not a stage's fault"
    assert "Ray: joined the cluster at" in said and "2 nodes, 2 cores" in said and "its node died" in said
    lost = {key for key, node in diary(tmp_path, "begin") if node == doomed.node_id}
    again = [key for key, node in diary(tmp_path, "begin") if node != doomed.node_id]
    assert lost and lost <= set(again)
    order = [words[0] for words in diary(tmp_path, "committed")]
    assert all(order.index(f"sft{i}") < order.index(f"ppo{i}") for i in range(4))


@needs_ray
def test_a_stage_of_two_processes_takes_two_cores_of_one_node(cluster: Any, tmp_path: Path) -> None:
    """A real stage, on a node that has them beside one that has not."""
    ray.shutdown()
    world = make_world(tmp_path / "world")
    options = read_options("grid", world.recipe(), seeds=1, axes=["ppo.lr=0.01"], arms="SFT")
    plan = Plan(build_sweep("grid", options))
    ledger = Ledger(Run.open(tmp_path / "record", {"sweep": "pairs"}), 1)
    said = io.StringIO()
    how: dict[str, Any] = {
        "device": "cpu",
        "timeout_s": None,
        "console": Console(plain=True, file=said),
        "processes": 2,
    }
    pair = partial(execute_together, execute=partial(execute_task, device="cpu"), processes=2)
    node = cluster.add_node(num_cpus=2, object_store_memory=80 << 20)
    try:
        cluster.wait_for_nodes()
        run_ray(plan, ledger, pair, **how)
    finally:
        ray.shutdown()
        cluster.remove_node(node)
    (stage,) = ledger.run.stages()
    assert (stage.result() or {})["status"] == "ok" and len(stage.attempts()) == 1
    (env,) = stage.path.glob("attempts/*/env.json")
    assert json.loads(env.read_text())["processes"] == 2, said.getvalue()


@needs_ray
def test_failures_are_counted_as_the_local_engine_does(joined: None, tmp_path: Path) -> None:
    tasks = [
        *(task("a", "crash-once"), task("b", "user"), task("c", "error")),
        *(task("d", "plain", "a"), task("e", "plain", "b")),
    ]
    ledger, said = run(tmp_path, *tasks, tries=2)
    assert committed(tmp_path) == {"a": 1, "d": 1}
    states = {each.key: ledger.state(each) for each in tasks}
    assert [state.status for state in states.values()] == ["done", "failed", "failed", "done", "waiting"]
    assert [len(ledger.failures(each)) for each in tasks] == [1, 1, 2, 0, 0]
    assert states["b"].reason == "no such setting" and ledger.failures(tasks[1])[0]["final"]
    assert states["c"].reason == "ValueError: a bug"
    assert "crash-once, seed 0, a failed: its process died after printing: a prints; one more try" in said
    logs = [path.read_text() for path in sorted(ledger.folder(tasks[2]).glob("log-*.txt"))]
    assert len(logs) == 2 and all("c prints" in log and "Traceback" in log for log in logs)


@needs_ray
def test_a_hung_stage_is_killed_and_the_time_in_rays_queue_does_not_count(joined: None, tmp_path: Path) -> None:
    tasks = [task("a", "hang"), task("b")]  # one core: the second waits in Ray for as long as the first may take
    ledger, said = run(tmp_path, *tasks, tries=1, timeout_s=10.0)
    assert ledger.state(tasks[0]).reason == "timed out after 10 s"
    assert committed(tmp_path) == {"b": 1} and not ledger.failures(tasks[1])
    assert "hang, seed 0, a failed: timed out after 10 s; given up" in said


@needs_ray
def test_a_stop_interrupts_stages_and_the_same_call_goes_on(joined: None, tmp_path: Path) -> None:
    tasks = [task("a", "wait"), task("b")]

    def stop() -> None:
        until(lambda: diary(tmp_path, "begin"))
        os.kill(os.getpid(), signal.SIGINT)

    meanwhile(stop)
    with pytest.raises(Interrupted, match="goes on where it stopped"):
        run(tmp_path, *tasks)
    ledger = open_ledger(tmp_path)
    stage = ledger.stage(tasks[0])
    assert stage is not None
    until(lambda: stage.holder() is None)  # told to stop, or, on a machine too busy to hear it, killed
    assert not any(ledger.failures(each) for each in tasks)
    run(tmp_path, *tasks)
    assert committed(tmp_path) == {"a": 1, "b": 1}


@needs_ray
def test_another_workers_stage_is_left_to_it_and_a_full_disk_ends_all(joined: None, tmp_path: Path) -> None:
    ledger, mine = open_ledger(tmp_path), task("a")
    stage = ledger.run.stage("pretended", {"key": "a"})
    ledger.link(mine, stage)
    with stage.attempt() as attempt:

        def commit() -> None:
            until(lambda: committed(tmp_path) == {"b": 1})
            attempt.commit("ok", {})

        meanwhile(commit)
        run(tmp_path, mine, task("b"))
    assert [key for key, _ in diary(tmp_path, "begin")] == ["b"]
    with pytest.raises(StorageError, match="the disk is full"):
        run(tmp_path, task("c", "full"))


@needs_ray
def test_nodes_that_do_not_see_the_record_are_named(joined: None, tmp_path: Path) -> None:
    ledger = open_ledger(tmp_path)
    assert sight(ledger.run) == ""
    assert sight(Run(ledger.run.path, {"other": 1})).startswith("sees another sweep in")
    (tmp_path / "gone").mkdir()
    gone = Ledger(Run(tmp_path / "gone", {}), 1)
    how: dict[str, Any] = {"timeout_s": None, "console": Console(plain=True, file=io.StringIO())}
    with pytest.raises(RecordError, match=r"Ray node .* does not see .*gone; .* disk that all nodes share"):
        run_ray(plan_of(task("a")), gone, pretend, device="cpu", **how)
    with pytest.raises(ConfigError, match="no node of the Ray cluster has 1 CPU, 1 GPU"):
        run_ray(plan_of(), ledger, pretend, device="cuda", **how)


@needs_ray
def test_a_dead_address_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    with pytest.raises(ConfigError, match=r"no Ray cluster answers at RAY_ADDRESS=127\.0\.0\.1:1"):
        run(tmp_path, task("a"))


def test_without_ray_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['ray'] = None; import srppo.ablations.ray_engine"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith("needs Ray: pip install -c constraints.txt 'srppo[ray]'")


# ---- SLURM

STRANGE = 'a b\'s "100%" $HOME `x` \\n #é'
SBATCH = """#!{python}
import os, re, subprocess, sys
script = sys.argv[-1]
assert sys.argv[1] == "--parsable"
last = int(re.search(r"^#SBATCH --array=1-(\\d+)$", open(script).read(), re.M)[1])
for i in range(1, last + 1):
    subprocess.run(["bash", script], env=os.environ | {{"SLURM_ARRAY_TASK_ID": str(i)}}, cwd="/", check=True)
print("4711;here")
"""
PYTHON = """#!{python}
# In place of `python -m srppo worker`: one stage, and a note of how it was called.
import os, sys
from pathlib import Path
from srppo.record.store import Run
assert sys.argv[1:4] == ["-m", "srppo", "worker"]
folder, number = Path(sys.argv[4]), os.environ["SLURM_ARRAY_TASK_ID"]
with Run.load(folder).stage("pretended", {{"key": number}}).attempt() as attempt:
    attempt.commit("ok", {{}})
with open(folder / "diary", "a") as file:
    print("called", number, os.getcwd().replace(" ", "_"), *sys.argv[5:], file=file)
"""


def estimate_of(*tasks: Task, seconds: float = 60.0) -> Any:
    return SimpleNamespace(seconds={each.key: seconds for each in tasks})


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def write(ledger: Ledger, *tasks: Task, slots: int = 3, device: str = "auto", seconds: float = 60.0) -> str:
    said = io.StringIO()
    console = Console(plain=True, file=said)
    found = estimate_of(*tasks, seconds=seconds)
    write_sbatch(plan_of(*tasks), ledger, found, slots=slots, device=device, timeout_s=90.0, console=console)
    return said.getvalue()


def test_the_array_runs_in_a_folder_with_a_strange_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / STRANGE
    place.mkdir()
    executable(tmp_path / "bin" / "sbatch", SBATCH.format(python=sys.executable))
    python = tmp_path / "py thon's"
    executable(python, PYTHON.format(python=sys.executable))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.chdir(place)
    ledger = Ledger(Run.open(Path("the record"), {"pretended": True}), 2)  # as relative as --out may be
    tasks = [task(str(i)) for i in range(1, 5)]
    said = write(ledger, *tasks)
    script = place / "the record" / "sbatch.sh"
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert "submitted as job 4711;" in said and "squeue -j 4711" in said and "srppo report 'the record'" in said
    calls = diary(place / "the record", "called")
    options = ["--plain", "--slots", "1", "--device", "auto", "--timeout", "90"]
    assert calls == [[str(i), str(place).replace(" ", "_"), *options] for i in (1, 2, 3)]
    assert len([stage for stage in ledger.run.stages() if stage.done]) == 3
    log = next(line for line in script.read_text().splitlines() if line.startswith("#SBATCH --output="))
    assert shlex.split(log.partition("=")[2]) == [f"{place}/the record/slurm/%A-%a.txt".replace("100%", "100%%")]
    assert (place / "the record" / "slurm").is_dir()


@pytest.mark.parametrize(
    ("count", "workers", "seconds", "limit"),
    [(1, 1, 10.0, "00:10:00"), (8, 2, 600.0, "01:20:00"), (100, 1, 3600.0, "24:00:00"), (2, 2, 601.0, "00:50:00")],
)
def test_the_time_limit_is_twice_the_estimate(count: int, workers: int, seconds: float, limit: str) -> None:
    tasks = [task(str(i), "plain", *([str(i - 1)] if count == 2 and i else [])) for i in range(count)]
    each = {one.key: seconds for one in tasks}
    text = sbatch_script(Path("/x"), tasks, each, workers=workers, device="cpu", timeout_s=None)
    assert f"#SBATCH --time={limit}\n" in text and "--timeout" not in text


def test_gpus_requeue_and_signals_are_asked_for() -> None:
    big = Task("b", "sft", RECIPE.model_copy(update={"model": RECIPE.model.model_copy(update={"base": "org/big"})}), ())
    make = partial(sbatch_script, Path("/x"), seconds={"a": 1.0, "b": 1.0}, workers=1, timeout_s=None)
    assert "\n#SBATCH --gres=gpu:1\n" in make(left=[big], device="auto")
    assert "\n#SBATCH --gres=gpu:1\n" in make(left=[task("a")], device="cuda")
    assert "\n##SBATCH --gres=gpu:1\n" in make(left=[task("a")], device="auto")
    assert "\n##SBATCH --gres=gpu:1\n" in make(left=[big], device="cpu")
    text = make(left=[task("a")], device="cpu")
    for line in ("--requeue", "--signal=B:TERM@120", "--open-mode=append"):
        assert f"\n#SBATCH {line}\n" in text
    assert "\nexec " in text, "a signal to the batch shell must reach the worker"


def test_what_is_done_is_not_submitted_and_a_refusal_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", os.defpath)
    ledger, tasks = open_ledger(tmp_path), [task("a"), task("b")]
    assert "there is no sbatch here" in write(ledger, *tasks)
    assert "#SBATCH --array=1-2\n" in (ledger.run.path / "sbatch.sh").read_text()
    executable(tmp_path / "bin" / "sbatch", "#!/bin/sh\necho noise >&2; echo 'error: no account' >&2; exit 1\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.defpath}")
    with pytest.raises(RunError, match=r"sbatch refused .*sbatch\.sh: error: no account; change"):
        write(ledger, *tasks)
    for each in tasks:
        stage = ledger.run.stage("pretended", {"key": each.key})
        ledger.link(each, stage)
        with stage.attempt() as attempt:
            attempt.commit("ok", {})
    assert "nothing is left to run (2 done)" in write(ledger, *tasks)
    with pytest.raises(ConfigError, match="a line break or tab"):
        sbatch_script(Path("/a\nb"), tasks, {"a": 1, "b": 1}, workers=1, device="cpu", timeout_s=None)
