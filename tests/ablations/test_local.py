"""The local engine with real workers and real kills, and stages that only pretend to train.

A worker is a process of its own that forks its stages; each stage writes into a diary what it does. Waits are generous,
and nothing that a test claims depends on how fast anything is.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest

from srppo.ablations import local
from srppo.ablations.ledger import Ledger
from srppo.ablations.local import Worker, run_apart
from srppo.ablations.plan import Task
from srppo.ablations.progress import Watch
from srppo.ablations.run import forgive
from srppo.config import Recipe
from srppo.console import Console
from srppo.errors import ConfigError, Diverged, SrppoError
from srppo.record.lease import Lease, _process_start
from srppo.record.store import Attempt, Run

WAIT_S = 120.0
TRIES = 3
RECIPE = Recipe()
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["srppo.ablations.local", "srppo.ablations.run", "pytest"])


# ---- stages that pretend; what they do is their task's kind


def task(key: str, kind: str = "plain", *needs: str) -> Task:
    return Task(key, kind, RECIPE, needs)


def pretend(task: Task, ledger: Ledger, folder: Path) -> None:
    """Behaves as the task's kind says, and commits who it was."""
    stage = ledger.run.stage("pretended", {"key": task.key})
    ledger.link(task, stage)
    if stage.done:
        return
    with stage.attempt() as attempt:
        note(folder, "begin", task.key, os.getpid(), attempt.number)
        if not task.kind.endswith("silently"):
            print(f"{task.key} prints")
        BEHAVIOURS[task.kind](folder, task, attempt)
        note(folder, "end", task.key, os.getpid())
        attempt.commit("ok", {"by": attempt.number})


def note(folder: Path, *words: object) -> None:
    """A line in the diary, whole and in the order of events whoever writes it."""
    with open(folder / "diary", "ab", buffering=0) as file:
        file.write(" ".join(map(str, words)).encode() + b"\n")


def diary(folder: Path, what: str) -> list[list[str]]:
    """The words of each line of one kind."""
    path = folder / "diary"
    lines = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
    return [words[1:] for words in lines if words[0] == what]


def until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)
    return value


def patiently(condition: Callable[[], Any]) -> None:
    """For stages: without end, so that nothing but the worker ends them."""
    while not condition():
        time.sleep(0.005)


def mark(folder: Path, name: str) -> bool:
    """True the first time."""
    try:
        (folder / name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _raise(error: BaseException) -> NoReturn:
    raise error


def _diverge(folder: Path, task: Task, attempt: Attempt) -> None:
    attempt.commit("diverged", {"reason": "step 3: the loss is nan"})
    raise Diverged("SRPPO diverged at step 3")


def _meet(folder: Path, task: Task, attempt: Attempt) -> None:
    """Two stages that can only end together."""
    note(folder, "gpu", task.key, os.environ.get("CUDA_VISIBLE_DEVICES", "none"))
    patiently(lambda: len(diary(folder, "begin")) >= 2)


def _wait(folder: Path, task: Task, attempt: Attempt) -> None:
    patiently((folder / "go").exists)


def _save(folder: Path, task: Task, attempt: Attempt) -> None:
    try:
        patiently((folder / "go").exists)
    except KeyboardInterrupt:
        note(folder, "saved", task.key)
        raise


def _deaf(folder: Path, task: Task, attempt: Attempt) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    note(folder, "deaf", task.key)
    _wait(folder, task, attempt)


def _parent(folder: Path, task: Task, attempt: Attempt) -> None:
    note(folder, "grandchild", subprocess.Popen(["sleep", "1000"]).pid)
    _wait(folder, task, attempt)


def _parent_that_saves(folder: Path, task: Task, attempt: Attempt) -> None:
    note(folder, "grandchild", subprocess.Popen(["sleep", "1000"]).pid)
    _save(folder, task, attempt)


def _leave(folder: Path, task: Task, attempt: Attempt) -> None:
    note(folder, "grandchild", subprocess.Popen(["sleep", "1000"]).pid)


def _killed(folder: Path, task: Task, attempt: Attempt) -> None:
    if mark(folder, f"{task.key}-was-here"):
        os.kill(os.getpid(), signal.SIGKILL)


def _limited(folder: Path, task: Task, attempt: Attempt) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    _fill(folder, task, attempt)


def _fill(folder: Path, task: Task, attempt: Attempt) -> None:
    for step in itertools.count(1):
        attempt.log_metrics({"step": step, "text": "x" * 5000})


BEHAVIOURS: dict[str, Callable[[Path, Task, Attempt], Any]] = {
    "plain": lambda *_: None,
    "crash": lambda *_: _raise(ValueError("the reward is\nof two lines")),
    "crash-once": lambda folder, task, _: _raise(ValueError("once")) if mark(folder, task.key) else None,
    "mistake": lambda *_: _raise(ConfigError("ppo.lr is too pretty")),
    "silent": lambda *_: os._exit(3),
    "no-commit": lambda *_: os._exit(0),
    "diverge": _diverge,
    "diverge-unsaid": lambda *_: _raise(Diverged("no model could be built")),
    "meet": _meet,
    "wait": _wait,
    "save": _save,
    "deaf": _deaf,
    "parent": _parent,
    "parent-that-saves": _parent_that_saves,
    "leave": _leave,
    "killed": _killed,
    "limited": _limited,
    "fill": _fill,
    "fill-silently": _fill,
}


# ---- workers


def _work(
    folder: Path,
    tasks: Sequence[Task],
    grace_s: float,
    tries: int,
    retry_s: float,
    slow_birth: bool,
    apart: bool,
    odd: bool,
    overdue: str,
    options: dict[str, Any],
) -> None:
    local.GRACE_S, local.RETRY_S = grace_s, retry_s
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a test may ask for a stop until the process is gone
    if odd:
        sys.stdout = Table()  # type: ignore[assignment]
    if overdue:
        kill = Worker._kill_overdue
        Worker._kill_overdue = lambda self: kill(self) if diary(folder, overdue) else None  # type: ignore
    if slow_birth:
        born = os.setsid
        os.setsid = lambda: (note(folder, "birth", os.getpid()), until((folder / "born").exists), born())  # type: ignore
    events = {"on_event": lambda text: note(folder, "event", text)}
    try:
        note(folder, "worker", os.getpid())
        execute = partial(pretend, folder=folder)
        worker = Worker({t.key: t for t in tasks}, open_ledger(folder, tries), execute, **events, **options)
        run_apart(worker) if apart else worker.run()
    except SrppoError as error:
        note(folder, "error", error)
        sys.exit(error.exit_code)


STARTED: list[Any] = []


@pytest.fixture(autouse=True)
def nothing_is_left_running() -> Iterator[None]:
    """A test that fails leaves no worker behind, and thereby none of its stages."""
    yield
    while STARTED:
        STARTED.pop().kill()


def open_ledger(folder: Path, tries: int = TRIES) -> Ledger:
    return Ledger(Run.open(folder / "run", {"sweep": "pretended"}), tries)


def start(
    folder: Path,
    tasks: Iterable[Task],
    grace_s: float = WAIT_S,
    tries: int = TRIES,
    retry_s: float = 0.0,
    slow_birth: bool = False,
    apart: bool = False,
    odd: bool = False,
    overdue: str = "",
    **options: Any,
) -> Any:
    """apart: a worker in a further process, as a sweep starts it. odd: with something else in place of stdout.
    overdue: stages are overdue once the diary has such a line."""
    ways = (grace_s, tries, retry_s, slow_birth, apart, odd, overdue)
    worker = processes.Process(target=_work, args=(folder, list(tasks), *ways, options))
    worker.start()
    STARTED.append(worker)
    return worker


def end(worker: Any) -> int:
    worker.join(WAIT_S)
    assert worker.exitcode is not None, "the worker hangs"
    return int(worker.exitcode)


def work(folder: Path, tasks: Iterable[Task], **options: Any) -> int:
    return end(start(folder, tasks, **options))


def status(folder: Path, tasks: Sequence[Task]) -> dict[str, tuple[str, str]]:
    """(status, reason) of each task as tables show it; one whose parent failed has failed too."""
    plan: Any = SimpleNamespace(tasks={t.key: t for t in tasks})
    return {key: (state.status, state.reason) for key, state in Watch(plan, open_ledger(folder)).states().items()}


def tries_of(folder: Path, key: str) -> int:
    return [words[0] for words in diary(folder, "begin")].count(key)


def begun(folder: Path, key: str) -> int:
    """The process of a stage, once it runs."""
    return until(lambda: [int(pid) for name, pid, _ in diary(folder, "begin") if name == key])[-1]


def dead(pid: int) -> bool:
    return _process_start(pid) is None


def in_state(pid: int, letter: str) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == letter


DIAMOND = (
    task("top"),
    task("left", "plain", "top"),
    task("right", "plain", "top"),
    task("end", "plain", "left", "right"),
)


@pytest.mark.parametrize(("slots", "apart"), [(1, False), (3, False), (2, True)])
def test_every_task_is_done_once_and_after_what_it_needs(tmp_path, slots, apart):
    assert work(tmp_path, DIAMOND, slots=slots, apart=apart) == 0
    assert set(status(tmp_path, DIAMOND).values()) == {("done", "")}
    order = [(words[0], words[1]) for words in map(str.split, (tmp_path / "diary").read_text().splitlines())]
    for each in DIAMOND:
        assert order.count(("begin", each.key)) == 1
        for need in each.needs:
            assert order.index(("end", need)) < order.index(("begin", each.key))


def test_a_finished_sweep_starts_nothing(tmp_path):
    assert work(tmp_path, DIAMOND) == 0
    before = (tmp_path / "diary").read_text()
    assert work(tmp_path, DIAMOND) == 0
    assert [line for line in (tmp_path / "diary").read_text().splitlines() if "begin" in line] == [
        line for line in before.splitlines() if "begin" in line
    ]


def test_slots_are_all_used_and_never_exceeded(tmp_path):
    tasks = [task("a", "meet"), task("b", "meet"), *(task(f"more{i}") for i in range(6))]
    assert work(tmp_path, tasks, slots=2) == 0  # a and b end only together
    now = most = 0
    for line in (tmp_path / "diary").read_text().splitlines():
        now += line.startswith("begin") - line.startswith("end")
        most = max(most, now)
    assert most == 2


def test_each_slot_sees_its_own_gpu(tmp_path):
    assert work(tmp_path, [task("a", "meet"), task("b", "meet")], slots=2, gpus=("5", "GPU-7")) == 0
    assert sorted(gpu for _, gpu in diary(tmp_path, "gpu")) == ["5", "GPU-7"]


def test_what_a_stage_prints_is_kept_with_its_task(tmp_path):
    assert work(tmp_path, [task("a")]) == 0
    (log,) = (tmp_path / "run" / "tasks" / "a").glob("log-*.txt")
    assert log.read_text() == "a prints\n"


# ---- stages that fail


def test_a_crashing_stage_is_retried_then_failed_with_its_reason_and_the_others_go_on(tmp_path):
    tasks = [task("bad", "crash"), task("child", "plain", "bad"), task("grandchild", "plain", "child"), task("good")]
    assert work(tmp_path, tasks, slots=4) == 0
    found = status(tmp_path, tasks)
    reason = ("failed", "ValueError: the reward is")
    assert found == {"bad": reason, "child": reason, "grandchild": reason, "good": ("done", "")}
    assert tries_of(tmp_path, "bad") == TRIES and tries_of(tmp_path, "child") == 0
    events = [" ".join(words) for words in diary(tmp_path, "event")]
    assert [text.rpartition("; ")[2] for text in events] == ["2 more tries", "one more try", "given up"]
    assert all("ValueError: the reward is" in text for text in events)
    logs = (tmp_path / "run" / "tasks" / "bad").glob("log-*.txt")
    assert all("Traceback" in log.read_text() for log in logs)


class Table:
    """Prints more than it is told."""

    def write(self, text: str) -> int:
        os.write(1, (text + "\nthe table\n").encode())
        return len(text)

    def flush(self) -> None: ...


def test_a_reason_is_the_stages_own_line_whatever_stands_in_for_stdout(tmp_path):
    assert work(tmp_path, [task("a", "crash")], tries=1, odd=True) == 0
    assert open_ledger(tmp_path).failures(task("a"))[0]["reason"] == "ValueError: the reward is"


def test_a_stage_that_crashed_once_is_done_in_the_end(tmp_path):
    assert work(tmp_path, [task("a", "crash-once")]) == 0
    assert status(tmp_path, [task("a")]) == {"a": ("done", "")} and tries_of(tmp_path, "a") == 2


def test_a_failed_stage_is_tried_again_after_a_while_and_others_go_on_meanwhile(tmp_path):
    """A network disk that is away for a moment must not use up all tries; with one slot the order tells."""
    tasks = [task("a", "crash-once"), task("b"), task("c", "plain", "a")]
    assert work(tmp_path, tasks, retry_s=1.0) == 0
    assert set(status(tmp_path, tasks).values()) == {("done", "")}
    assert [words[0] for words in diary(tmp_path, "begin")] == ["a", "b", "a", "c"]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("silent", "silent prints"), ("no-commit", "no-commit prints")],
)
def test_only_the_record_says_that_a_stage_is_done(tmp_path, kind, reason):
    assert work(tmp_path, [task(kind, kind)], tries=1) == 0
    (state, said) = status(tmp_path, [task(kind)])[kind]
    assert state in ("waiting", "failed") and said in ("", reason)
    assert len(open_ledger(tmp_path).failures(task(kind))) == 1


def test_a_mistake_in_the_settings_is_not_tried_again(tmp_path):
    assert work(tmp_path, [task("a", "mistake")]) == 0
    assert status(tmp_path, [task("a")]) == {"a": ("failed", "ppo.lr is too pretty")}
    assert tries_of(tmp_path, "a") == 1


def test_a_diverged_stage_is_not_tried_again(tmp_path):
    tasks = [task("a", "diverge"), task("child", "plain", "a")]
    assert work(tmp_path, tasks) == work(tmp_path, tasks) == 0
    assert status(tmp_path, tasks)["a"] == status(tmp_path, tasks)["child"] == ("diverged", "step 3: the loss is nan")
    assert tries_of(tmp_path, "a") == 1


def test_a_divergence_that_the_record_knows_nothing_of_is_a_failure(tmp_path):
    assert work(tmp_path, [task("a", "diverge-unsaid")]) == 0
    assert status(tmp_path, [task("a")]) == {"a": ("failed", "no model could be built")}
    assert tries_of(tmp_path, "a") <= TRIES


def test_retry_forgives_what_was_given_up_and_keeps_its_failures_readable(tmp_path):
    tasks = [task("a", "crash"), task("b", "plain", "a")]
    assert work(tmp_path, tasks) == 0
    tasks[0] = task("a")  # mended
    assert work(tmp_path, tasks) == 0 and status(tmp_path, tasks)["a"][0] == "failed"
    plan: Any = SimpleNamespace(tasks={t.key: t for t in tasks})
    forgive(plan, open_ledger(tmp_path), Console(quiet=True))
    assert work(tmp_path, tasks) == 0
    assert set(status(tmp_path, tasks).values()) == {("done", "")}
    (kept,) = (tmp_path / "run" / "tasks" / "a").glob("failures-*.jsonl")
    assert len(kept.read_text().splitlines()) == TRIES


@pytest.mark.parametrize("kind", ["wait", "deaf", "parent"])
def test_a_hung_stage_is_timed_out_with_all_that_it_started(tmp_path, kind):
    tasks = [task("a", kind), task("child", "plain", "a")]
    begun = {"parent": "grandchild", "deaf": "deaf"}.get(kind, "begin")
    assert work(tmp_path, tasks, timeout_s=0.01, tries=1, overdue=begun) == 0
    found = open_ledger(tmp_path, tries=1)
    assert found.state(tasks[0]).status == "failed" and found.state(tasks[0]).reason == "timed out after 0.01 s"
    assert tries_of(tmp_path, "child") == 0
    pids = [int(words[1]) for words in diary(tmp_path, "begin")]
    pids += [int(words[0]) for words in diary(tmp_path, "grandchild")]
    assert len(pids) == (2 if kind == "parent" else 1)
    until(lambda: all(map(dead, pids)))


def test_what_a_finished_stage_left_running_is_ended(tmp_path):
    assert work(tmp_path, [task("a", "leave")]) == 0
    ((pid,),) = diary(tmp_path, "grandchild")
    until(lambda: dead(int(pid)))
    assert status(tmp_path, [task("a")]) == {"a": ("done", "")}


# ---- kills


def test_a_killed_stage_is_tried_again(tmp_path):
    assert work(tmp_path, [task("a", "killed"), task("b")]) == 0
    assert status(tmp_path, [task("a"), task("b")]) == {"a": ("done", ""), "b": ("done", "")}
    (failure,) = open_ledger(tmp_path).failures(task("a"))
    assert failure["reason"].startswith("killed by SIGKILL") and tries_of(tmp_path, "b") == 1


def test_a_killed_worker_takes_its_stages_with_it_and_another_goes_on(tmp_path):
    tasks = [task("first"), task("a", "wait", "first"), task("b", "wait", "first")]
    worker = start(tmp_path, tasks, slots=2)
    pids = [begun(tmp_path, "a"), begun(tmp_path, "b")]
    worker.kill()
    assert end(worker) == -signal.SIGKILL
    until(lambda: all(map(dead, pids)))
    (tmp_path / "go").touch()
    assert work(tmp_path, tasks, slots=2) == 0
    assert set(status(tmp_path, tasks).values()) == {("done", "")}
    assert [tries_of(tmp_path, each.key) for each in tasks] == [1, 2, 2]  # only what was in flight is repeated
    assert all(open_ledger(tmp_path).failures(each) == [] for each in tasks)


def test_two_workers_share_a_record_and_each_stage_is_run_once(tmp_path):
    roots = [task(f"root{i}") for i in range(8)]
    tasks = [*roots, *(task(f"leaf{i}", "plain", f"root{i}") for i in range(8)), task("a", "meet"), task("b", "meet")]
    workers = [start(tmp_path, tasks, slots=2) for _ in range(2)]
    assert [end(worker) for worker in workers] == [0, 0]
    assert set(status(tmp_path, tasks).values()) == {("done", "")}
    assert [tries_of(tmp_path, each.key) for each in tasks] == [1] * len(tasks)
    assert all(open_ledger(tmp_path).failures(each) == [] for each in tasks)


def test_a_second_worker_waits_for_what_the_first_runs(tmp_path):
    tasks = [task("a", "wait"), task("b", "plain", "a")]
    first = start(tmp_path, tasks)
    begun(tmp_path, "a")
    second = start(tmp_path, tasks)
    until(lambda: len(diary(tmp_path, "worker")) == 2)
    (tmp_path / "go").touch()
    assert end(first) == end(second) == 0
    assert tries_of(tmp_path, "a") == tries_of(tmp_path, "b") == 1


def test_a_worker_that_slept_past_its_lease_does_not_overwrite_the_newer_attempt(tmp_path, request):
    tasks = [task("a", "wait"), task("b", "plain", "a")]
    first = start(tmp_path, tasks)
    pid = begun(tmp_path, "a")
    request.addfinalizer(lambda: [os.kill(each, signal.SIGKILL) for each in (pid, first.pid) if not dead(each)])
    for each in (first.pid, pid):
        os.kill(each, signal.SIGSTOP)
    until(lambda: in_state(first.pid, "T") and in_state(pid, "T"))
    stage = open_ledger(tmp_path).stage(tasks[0])
    assert stage and Lease.top(stage.path)[0] == 1 and stage.holder()
    os.utime(stage.path / "lease" / "1", (0, 0))  # as if it had slept for hours: by the file server's clock
    (tmp_path / "go").touch()
    assert work(tmp_path, tasks) == 0
    kept = (stage.path / "result.json").read_bytes()
    assert json.loads(kept)["figures"] == {"by": 2}
    for each in (pid, first.pid):
        os.kill(each, signal.SIGCONT)
    assert end(first) == 0  # it finds all done
    assert (stage.path / "result.json").read_bytes() == kept
    assert len(diary(tmp_path, "end")) == 3, "the sleeper came to its commit, which was refused"
    assert open_ledger(tmp_path).failures(tasks[0]) == [] and tries_of(tmp_path, "b") == 1


# ---- stops


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_asks_the_stages_to_save_and_the_same_command_goes_on(tmp_path, number):
    tasks = [task("a", "save"), task("b", "save"), task("c", "plain", "a")]
    worker = start(tmp_path, tasks, slots=2)
    pids = [begun(tmp_path, "a"), begun(tmp_path, "b")]
    os.kill(worker.pid, number)
    assert end(worker) == 130
    assert sorted(diary(tmp_path, "saved")) == [["a"], ["b"]] and all(map(dead, pids))
    (line,) = diary(tmp_path, "error")
    assert "the same command goes on" in " ".join(line)
    (tmp_path / "go").touch()
    assert work(tmp_path, tasks, slots=2) == 0
    assert set(status(tmp_path, tasks).values()) == {("done", "")}
    assert all(open_ledger(tmp_path).failures(each) == [] for each in tasks)


def test_a_stage_that_is_deaf_to_the_stop_is_killed_after_a_while(tmp_path):
    worker = start(tmp_path, [task("a", "deaf")], grace_s=0.2)
    pid = begun(tmp_path, "a")
    until(lambda: diary(tmp_path, "deaf"))
    os.kill(worker.pid, signal.SIGTERM)
    assert end(worker) == 130 and dead(pid)
    assert open_ledger(tmp_path).failures(task("a")) == []


def test_a_second_stop_does_not_wait(tmp_path):
    worker = start(tmp_path, [task("a", "deaf")], grace_s=1e9)
    pid = begun(tmp_path, "a")
    until(lambda: diary(tmp_path, "deaf"))

    def stopped() -> bool:
        with suppress(ProcessLookupError):  # it has ended since the last look
            os.kill(worker.pid, signal.SIGINT)
        return worker.exitcode is not None

    until(stopped)
    assert end(worker) == 130 and dead(pid)


def test_a_stop_that_comes_while_a_stage_is_being_born_reaches_it(tmp_path):
    worker = start(tmp_path, [task("a", "save")], slow_birth=True, grace_s=1e9)
    ((child,),) = until(lambda: diary(tmp_path, "birth"))
    os.kill(worker.pid, signal.SIGTERM)
    pending = 1 << (signal.SIGTERM - 1)
    until(lambda: int(re.search(r"ShdPnd:\s*(\w+)", Path(f"/proc/{child}/status").read_text())[1], 16) & pending)
    (tmp_path / "born").touch()
    assert end(worker) == 130
    assert open_ledger(tmp_path).failures(task("a")) == []


def test_a_stop_ends_what_stages_had_started(tmp_path):
    worker = start(tmp_path, [task("a", "parent-that-saves")])
    ((pid,),) = until(lambda: diary(tmp_path, "grandchild"))
    os.kill(worker.pid, signal.SIGTERM)
    assert end(worker) == 130 and diary(tmp_path, "saved") == [["a"]]
    until(lambda: dead(int(pid)))


def test_a_stage_stopped_by_hand_is_saved_and_goes_on(tmp_path):
    worker = start(tmp_path, [task("a", "save")])
    os.kill(begun(tmp_path, "a"), signal.SIGTERM)
    until(lambda: tries_of(tmp_path, "a") == 2)
    (tmp_path / "go").touch()
    assert end(worker) == 0 and diary(tmp_path, "saved") == [["a"]]
    assert open_ledger(tmp_path).failures(task("a")) == []


# ---- a worker in a process of its own


def threads_run(task: Task, ledger: Ledger, folder: Path) -> None:
    """A stage that has one thread when it begins, and whose torch then works with two."""
    note(folder, "threads", len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1)
    import torch

    torch.set_num_threads(2)
    x = torch.ones(512, 512, requires_grad=True)
    (x @ x).sum().backward()
    pretend(task, ledger, folder)


def test_a_process_whose_threads_have_run_may_run_a_sweep(tmp_path):
    """It may have used torch with several threads, and have others of its own; what it forked would be stuck."""
    torch = pytest.importorskip("torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    (torch.ones(512, 512) @ torch.ones(512, 512)).sum()
    waits = threading.Event()
    (other := threading.Thread(target=waits.wait)).start()
    said: list[str] = []
    try:
        tasks = {each.key: each for each in (task("a"), task("b", "mistake"))}
        execute = partial(threads_run, folder=tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Python 3.12 and newer warn of a fork where there are threads
            run_apart(Worker(tasks, open_ledger(tmp_path), execute, on_event=said.append))
    finally:
        torch.set_num_threads(before)
        waits.set()
        other.join()
    assert diary(tmp_path, "threads") == [["1"], ["1"]]
    assert status(tmp_path, list(tasks.values())) == {"a": ("done", ""), "b": ("failed", "ppo.lr is too pretty")}
    assert len(said) == 1 and said[0].endswith("failed: ppo.lr is too pretty; given up")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_passed_on(tmp_path, number):
    worker = start(tmp_path, [task("a", "save")], apart=True)
    pid = begun(tmp_path, "a")
    os.kill(worker.pid, number)
    assert end(worker) == 130 and diary(tmp_path, "saved") == [["a"]] and dead(pid)
    assert "the same command goes on" in the_error(tmp_path)


def test_a_worker_apart_dies_with_its_caller_and_so_do_its_stages(tmp_path):
    worker = start(tmp_path, [task("a", "wait")], apart=True)
    pid = begun(tmp_path, "a")
    worker.kill()
    assert end(worker) == -signal.SIGKILL
    until(lambda: dead(pid))


def test_a_full_disk_ends_a_worker_apart_with_the_same_line(tmp_path):
    assert work(tmp_path, [task("a", "limited")], apart=True) == 1
    assert "cannot write" in the_error(tmp_path) and "run the same command again" in the_error(tmp_path)


def test_a_worker_apart_that_is_killed_is_said(tmp_path):
    worker = start(tmp_path, [task("a", "wait")], apart=True)
    with open(f"/proc/{begun(tmp_path, 'a')}/status") as file:
        parent = next(int(line.split()[1]) for line in file if line.startswith("PPid"))
    os.kill(parent, signal.SIGKILL)
    assert end(worker) == 1 and "the sweep's worker died (exit code -9)" in the_error(tmp_path)


# ---- a full disk


def the_error(folder: Path) -> str:
    (words,) = diary(folder, "error")
    return " ".join(words)


def test_a_full_disk_stops_the_worker_with_one_line_and_its_other_stages_save(tmp_path):
    tasks = [task("other", "save"), task("a", "limited")]
    assert work(tmp_path, tasks, slots=2) == 1
    assert "cannot write" in the_error(tmp_path) and "run the same command again" in the_error(tmp_path)
    assert diary(tmp_path, "saved") == [["other"]] or tries_of(tmp_path, "other") == 0
    assert open_ledger(tmp_path).failures(task("a")) == []
    (tmp_path / "go").touch()
    assert work(tmp_path, [task("other", "save"), task("a")]) == 0  # the disk has room again
    assert set(status(tmp_path, tasks).values()) == {("done", "")}


@pytest.mark.parametrize(
    ("kind", "words"), [("fill", "No space left on device"), ("fill-silently", "so full that no reason")]
)
def test_on_a_disk_without_a_byte_left_there_is_one_line_too(tmp_path, kind, words):
    """A tmpfs of 256 KiB, in a mount namespace of its own; silently: not even the log can be written."""
    tool = shutil.which("unshare")
    (disk := tmp_path / "disk").mkdir()
    mount = f"mount -t tmpfs -o size=256k none {disk}"
    if not tool or subprocess.run([tool, "-rm", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    program = f"{mount} && exec {sys.executable} {__file__} {kind} {disk}"
    path = os.pathsep.join([str(Path(local.__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [tool, "-rm", "sh", "-c", program], capture_output=True, text=True, timeout=WAIT_S, env=environment
    )
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stdout.splitlines()
    assert words in line
    assert "Traceback" not in done.stderr


def _on_a_small_disk(kind: str, disk: Path) -> int:
    try:
        Worker({"a": task("a", kind)}, open_ledger(disk), partial(pretend, folder=disk), on_event=print).run()
    except SrppoError as error:
        print(error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(_on_a_small_disk(sys.argv[1], Path(sys.argv[2])))
