"""The Ray engine: the local engine's decisions, with processes of a Ray cluster in place of forks.

The record is the only place where results go, so its folder must lie on a disk that all nodes share. Ray retries
nothing by itself: what is tried again, and what counts as a failure, is decided as for the local engine. Only a node's
death is not a stage's fault; its stage goes on elsewhere once its lease has run out.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from srppo.ablations.ledger import Ledger
from srppo.ablations.local import GRACE_S, INTERRUPTED, SHORT_S, STORAGE, Execute, Worker, last_line, try_task
from srppo.ablations.plan import Plan, Task
from srppo.ablations.progress import LiveTable, Watch
from srppo.console import Console
from srppo.environment import usable_cores
from srppo.errors import ConfigError, RecordError
from srppo.record.store import Run

try:
    import ray
    from ray import exceptions
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
except ImportError:
    raise ConfigError("--engine ray needs Ray: pip install -c constraints.txt 'srppo[ray]'") from None

LOOK_S = 0.1  # between looks at what has ended
CHECK_S = 60.0  # for a node to say whether it sees the record
CONNECT_S = 10.0
STORE_BYTES = 100 << 20  # of a cluster started here: nothing but names and reasons travels through Ray
ENVIRONMENT = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "TOKENIZERS_PARALLELISM")
SHARED = "a sweep's folder must lie on a disk that all nodes share: give --out one, or take the node out of the cluster"


def run_ray(
    plan: Plan,
    ledger: Ledger,
    execute: Execute,
    *,
    device: str,
    timeout_s: float | None,
    console: Console,
    slots: int | None = None,
    processes: int = 1,
) -> None:
    """Run what is left on the cluster at RAY_ADDRESS or on this machine; where there is none, on one started for it.

    slots: stages at once, None for as many as the cluster can run. processes: of a stage, for which one node has the
    room. Raises ConfigError where no node could run one,
    RecordError naming a node that does not see the record, and what `Worker.run` raises.
    """
    run = replace(ledger.run, path=ledger.run.path.absolute())  # a node's processes have another working directory
    ledger = Ledger(run, ledger.tries)
    with _cluster(run.path / "ray.log", console) as log:
        needs = _needs(device, processes)
        room = _room(needs)
        if not room:
            wanted = ", ".join(f"{count} {name}" for name, count in needs.items())
            raise ConfigError(f"no node of the Ray cluster has {wanted}, which a stage takes; add one, or use --device")
        check_nodes(run)
        table = LiveTable(plan, Watch(plan, ledger), console, slots or room)
        with table.shown(), redirect_stdout(log):  # again: a live table shows what is printed
            RayWorker(
                plan.tasks,
                ledger,
                execute,
                slots=slots or room,
                timeout_s=timeout_s,
                on_change=table,
                on_event=console.warn,
                needs=needs,
                grows=slots is None,
            ).run()
    console.say(table.summary())


@dataclass
class _Try:
    task: Task
    ref: Any
    log: Path
    began: float | None = None  # when a process took it up; Ray may queue it before


@dataclass
class RayWorker(Worker):
    """needs: what a stage takes of a node. grows: whether more nodes mean more stages at once."""

    needs: Mapping[str, float] = field(default_factory=lambda: {"CPU": 1})
    grows: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._remote = ray.remote(_run_stage).options(
            num_cpus=self.needs["CPU"],
            num_gpus=self.needs.get("GPU", 0),
            max_retries=0,
            runtime_env=_environment(),
        )

    def _start(self) -> bool:
        if self.grows:
            self.slots = 2 * _room(self.needs)  # some wait in Ray, where a cluster that grows on demand sees them
        return super()._start()

    def _launch(self, task: Task) -> None:
        log = self.ledger.log_path(task)
        ref = self._remote.remote(task, self.ledger, self.execute, log, os.getcwd())
        self._children[task.key] = _Try(task, ref, log)

    def _reap(self) -> None:
        tries = {child.ref: child for child in self._children.values()}
        ended = ray.wait(list(tries), num_returns=len(tries), timeout=LOOK_S)[0] if tries else []
        for child in map(tries.__getitem__, ended):
            del self._children[child.task.key]
            self._end(child)

    def _wait(self) -> None:
        time.sleep(SHORT_S)  # Ray itself waits for what runs

    def _end(self, child: _Try) -> None:
        try:
            code, reason = ray.get(child.ref)
        except (exceptions.NodeDiedError, exceptions.LocalRayletDiedError):
            self.on_event(f"{child.task.name}: its node died; it goes on elsewhere once its lease has run out")
            return
        except exceptions.TaskCancelledError:  # by hand, as nobody else cancels
            code, reason = INTERRUPTED, ""
        except (exceptions.RuntimeEnvSetupError, exceptions.TaskUnschedulableError) as error:
            raise ConfigError(f"Ray cannot run {child.task.name}: {_line(error)}") from None
        except exceptions.WorkerCrashedError:
            said = last_line(child.log)
            code, reason = 1, "its process died" + (f" after printing: {said}" if said else " without a word")
        except exceptions.RayError as error:
            code, reason = 1, _line(error)
        self._judge(child.task, code, reason)

    def _kill_overdue(self) -> None:
        if self.timeout_s is None:
            return
        for key, child in list(self._children.items()):
            if child.began is None and child.log.exists():
                child.began = time.monotonic()
            if child.began is not None and time.monotonic() - child.began > self.timeout_s:
                ray.cancel(child.ref, force=True)
                ray.wait([child.ref], timeout=GRACE_S)
                del self._children[key]
                self._fail(child.task, f"timed out after {self.timeout_s:g} s")

    def _stop_children(self, stopped: Sequence[int]) -> None:
        refs = [child.ref for child in self._children.values()]
        for ref in refs:
            ray.cancel(ref)  # as Ctrl-C would
        deadline = time.monotonic() + GRACE_S
        while refs and time.monotonic() < deadline and len(stopped) < 2:
            refs = ray.wait(refs, num_returns=len(refs), timeout=LOOK_S)[1]
        for ref in refs:
            ray.cancel(ref, force=True)
        self._children.clear()


# ---- on the nodes


def _run_stage(task: Task, ledger: Ledger, execute: Execute, log: Path, folder: str) -> tuple[int, str]:
    """In a process of Ray's: (how it ended, as a child's exit code; the last line that it printed)."""
    if problem := sight(ledger.run):
        return STORAGE, f"Ray node {socket.gethostname()} {problem}; {SHARED}"
    with suppress(OSError):
        os.chdir(folder)  # a recipe's relative paths start where the sweep was
    with _printing_to(log):
        code = try_task(task, ledger, execute)
    return code, last_line(log)


def sight(run: Run) -> str:
    """Why this machine cannot work on a record; "" where it can."""
    try:
        return "" if Run.load(run.path).spec == run.spec else f"sees another sweep in {run.path}"
    except (RecordError, OSError):
        return f"does not see {run.path}"


@contextmanager
def _printing_to(log: Path) -> Iterator[None]:
    """Let this process and what it starts print into a file."""
    kept = os.dup(1), os.dup(2)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        _redirect(file, file)
        yield
    finally:
        _redirect(*kept)
        for each in (file, *kept):
            os.close(each)


def _redirect(out: int, err: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(out, 1)
    os.dup2(err, 2)


# ---- the cluster


@contextmanager
def _cluster(log: Path, console: Console) -> Iterator[TextIO]:
    """Join a cluster or start one, and leave it at the end; gives the file that takes what Ray prints."""
    with open(log, "a") as file, redirect_stdout(file):
        joined = ray.is_initialized()  # by a caller, who may want to stay
        if not joined:
            console.say(_join())
        try:
            yield file
        finally:
            if not joined:
                ray.shutdown()


def _join() -> str:
    """Of which cluster this process is now part."""
    _check_address(os.environ.get("RAY_ADDRESS", ""))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}
    try:
        ray.init(address="auto", **quiet)
        return f"Ray: joined the cluster at {ray.get_runtime_context().gcs_address}: {_size()}"
    except ConnectionError:
        ray.init(
            address="local", num_cpus=usable_cores(), include_dashboard=False, object_store_memory=STORE_BYTES, **quiet
        )
        return f"Ray: no cluster found, one started here: {_size()}"


def _check_address(address: str) -> None:
    """Raises ConfigError where nothing listens at RAY_ADDRESS, HOST:PORT: Ray itself would try for many minutes."""
    host, _, port = address.rpartition(":")
    if not port.isdigit():
        return  # none, or one of Ray's words
    try:
        socket.create_connection((host.rpartition("/")[2], int(port)), timeout=CONNECT_S).close()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"no Ray cluster answers at RAY_ADDRESS={address} ({reason}); start it with `ray start --head`, or unset it"
        ) from None


def check_nodes(run: Run) -> None:
    """Raises RecordError naming a node that does not see the record, or has no srppo to do so."""
    asked = {}
    for node in _nodes():
        here = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        asked[f"{node['NodeName']} ({node['NodeID'][:8]})"] = (
            ray.remote(sight)
            .options(num_cpus=0, max_retries=0, scheduling_strategy=here, runtime_env=_environment())
            .remote(run)
        )
    for name, ref in asked.items():
        try:
            problem = ray.get(ref, timeout=CHECK_S)
        except (exceptions.NodeDiedError, exceptions.TaskUnschedulableError):
            continue  # it left meanwhile
        except exceptions.RayError as error:
            raise RecordError(f"Ray node {name} cannot run srppo's stages: {_line(error)}") from None
        if problem:
            raise RecordError(f"Ray node {name} {problem}; {SHARED}")


def _environment() -> dict[str, Any]:
    """Ray reuses processes of the same environment: the check's become the first stages'."""
    return {"env_vars": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}}


def _needs(device: str, processes: int) -> dict[str, float]:
    """What a stage takes of a node: GPUs, or its threads' cores as far as there is a node that has them."""
    if device == "cuda":
        return {"CPU": processes, "GPU": processes}
    most = max((node["Resources"].get("CPU", 0) for node in _nodes()), default=0)
    return {"CPU": max(min(processes * int(os.environ.get("OMP_NUM_THREADS", "1")), most), 1)}


def _room(needs: Mapping[str, float]) -> int:
    """Stages that the cluster can run at once."""
    return sum(int(min(node["Resources"].get(name, 0) // count for name, count in needs.items())) for node in _nodes())


def _nodes() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _size() -> str:
    nodes = _nodes()
    total = {name: sum(int(node["Resources"].get(name, 0)) for node in nodes) for name in ("CPU", "GPU")}
    return f"{len(nodes)} nodes, {total['CPU']} cores, {total['GPU']} GPUs"


def _line(error: BaseException) -> str:
    """The last line of an error that Ray wraps in its own and in a traceback: what went wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
