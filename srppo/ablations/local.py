"""The local engine: a worker, in a process of its own, that has torch and transformers loaded forks its stages.

What is forked must have no threads but one, or a lock may be caught closed and a thread pool half dead, and no CUDA
context. So a worker is started anew (`run_apart`), whatever its caller has done before, and does no tensor work itself.
Any number of workers may share a record: who runs a stage is decided by its lease, and a worker that comes second looks
elsewhere.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from srppo.ablations.ledger import Ledger
from srppo.ablations.plan import Task
from srppo.errors import Diverged, Interrupted, RecordError, RunError, SrppoError, StorageError, UserError
from srppo.training.together import die_with

HELD, DIVERGED, STORAGE, INTERRUPTED, USER = 75, 76, 74, 130, 2  # exit codes of a child; 0 done, others failed
CODES: dict[type[BaseException], int] = {
    **{Diverged: DIVERGED, StorageError: STORAGE, UserError: USER},
    **{Interrupted: INTERRUPTED, KeyboardInterrupt: INTERRUPTED},
}
GRACE_S = 30.0  # for children to save after a stop was asked for
STOPS = (signal.SIGINT, signal.SIGTERM)
PAUSE_S = 0.1  # between looks at record, clock and table; the end of a stage is seen at once,
SHORT_S = 0.01  # or, where it is not told, looked for so often
ELSEWHERE_S = 1.0  # between looks at stages that other workers hold
STOPPED = "interrupted; the same command goes on where it stopped"
RETRY_S = 1.0  # before the second try of a stage that failed, twice as much before each further one

Execute = Callable[[Task, Ledger], None]


def _nothing(*_: object) -> None: ...


@dataclass
class _Child:
    task: Task
    pid: int
    slot: int
    log: Path
    end: int | None  # a descriptor that can be read once the process has ended, where the system has such
    began: float = field(default_factory=time.monotonic)


@dataclass
class Worker:
    """Runs a plan's tasks until nothing is left that it could run.

    slots: stages at once. timeout_s: of one stage, None for no limit. gpus: each slot sees its own. on_change: called
    now and then, for a table of what happens; on_event: with a line on what went wrong. before: called before a stage
    is forked, to make ready what stages share; it must do no tensor work and start no threads.
    """

    tasks: Mapping[str, Task]
    ledger: Ledger
    execute: Execute
    slots: int = 1
    timeout_s: float | None = None
    gpus: Sequence[str] = ()
    on_change: Callable[[], object] = _nothing
    on_event: Callable[[str], object] = _nothing
    before: Callable[[Task], object] = _nothing

    def __post_init__(self) -> None:
        self._children: dict[str, Any] = {}  # by task: what the engine knows of its running stages
        self._closed: dict[str, bool] = {}  # by task: whether it is known to be done, else given up
        self._later: dict[str, float] = {}  # held by others, or just failed: when to look again

    def run(self) -> None:
        """In this process, which must have one thread only.

        Raises Interrupted after Ctrl-C or SIGTERM, StorageError where the disk is full; all saved in both cases.
        """
        gc.collect()
        gc.freeze()  # or a child that collects garbage would walk and copy all that is loaded here: 0.3 s a time
        with _stop_requests() as stopped:
            try:
                while self._start() or self._children:
                    if stopped:
                        raise Interrupted(STOPPED)
                    self.on_change()
                    self._wait()
                    self._reap()
                    self._kill_overdue()
            finally:
                self._stop_children(stopped)
                gc.unfreeze()
        self.on_change()

    def _wait(self) -> None:
        """Until a stage ends, at most PAUSE_S."""
        ends = [child.end for child in self._children.values()]
        if None in ends:
            time.sleep(SHORT_S)
        else:
            select.select(ends, (), (), PAUSE_S)

    # ---- starting

    def _start(self) -> bool:
        """Fill the free slots with tasks that can run. True while tasks are left that others run or that must wait."""
        waits = False
        for key, task in self.tasks.items():
            if len(self._children) >= self.slots:
                return True
            if key in self._children or key in self._closed:
                continue
            needs = [self._closed.get(need) for need in task.needs]
            if False in needs:
                self._closed[key] = False
            elif None in needs or self._later.get(key, 0.0) > time.monotonic():
                waits = True
            else:
                waits |= self._consider(task)
        return waits

    def _consider(self, task: Task) -> bool:
        """Look at the record and start a task if it waits. True where somebody else runs it."""
        status = self.ledger.state(task).status
        if status == "running":
            self._later[task.key] = time.monotonic() + ELSEWHERE_S
            return True
        if status == "waiting":
            self._launch(task)
        else:
            self._closed[task.key] = status == "done"
        return False

    def _launch(self, task: Task) -> None:
        taken = {child.slot for child in self._children.values()}
        slot = next(i for i in range(self.slots) if i not in taken)
        self.before(task)
        log = self.ledger.log_path(task)
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # one that comes before the child can hear it waits
        pid = os.fork()
        if pid == 0:
            _child(task, self.ledger, self.execute, log, parent, self.gpus[slot : slot + 1])
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        self._children[task.key] = _Child(task, pid, slot, log, _end_of(pid))

    # ---- ends

    def _reap(self) -> None:
        for key, child in list(self._children.items()):
            if _ended(child.pid):
                code = os.waitstatus_to_exitcode(self._bury(key))
                self._judge(child.task, code, last_line(child.log))

    def _judge(self, task: Task, code: int, reason: str) -> None:
        """Draw the consequence of a stage's end. The record decides whether it is done, not the exit code."""
        if code == HELD:
            self._later[task.key] = time.monotonic() + ELSEWHERE_S
        elif code == STORAGE:
            raise StorageError(reason or f"{task.name}: the disk is full, so full that no reason could be written down")
        elif code == INTERRUPTED:
            pass  # somebody stopped the stage by hand: it is saved, and goes on
        elif (status := self.ledger.state(task).status) == "done":
            self._closed[task.key] = True
        elif status == "diverged":
            self.on_event(f"{task.name} diverged: {reason}")
        else:
            if code < 0:
                reason = f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -9 else "")
            reason = reason or f"ended with exit code {code} and no word"
            self._fail(task, reason, final=code in (USER, DIVERGED))

    def _fail(self, task: Task, reason: str, *, final: bool = False) -> None:
        self.ledger.fail(task, reason, final=final)
        failed = len(self.ledger.failures(task))
        left = 0 if final else self.ledger.tries - failed
        if left > 0:  # what hindered it, such as a network disk that is away, may be over in a while
            self._later[task.key] = time.monotonic() + RETRY_S * 2 ** (failed - 1)
        then = f"{left} more tries" if left > 1 else "one more try" if left == 1 else "given up"
        self.on_event(f"{task.name} failed: {reason}; {then}")

    def _kill_overdue(self) -> None:
        if self.timeout_s is None:
            return
        for key, child in list(self._children.items()):
            if time.monotonic() - child.began > self.timeout_s:
                self._bury(key)
                self._fail(child.task, f"timed out after {self.timeout_s:g} s")

    def _stop_children(self, stopped: Sequence[int]) -> None:
        """Ask for a checkpoint, wait a while, then kill; a second request kills at once."""
        for child in self._children.values():
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGTERM)
        deadline = time.monotonic() + GRACE_S
        while self._children:
            self._wait()
            late = time.monotonic() >= deadline or len(stopped) >= 2
            for key, child in list(self._children.items()):
                if late or _ended(child.pid):
                    self._bury(key)

    def _bury(self, key: str) -> int:
        """Kill a child, and whatever it had started itself, ended or not; its status as the system gives it."""
        child = self._children.pop(key)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)  # until it is waited for, its number is still taken
        if child.end is not None:
            os.close(child.end)
        return os.waitpid(child.pid, 0)[1]


# ---- a process for the worker, and one for each stage


def run_apart(worker: Worker) -> None:
    """Run a worker in a new process; this one may have threads, draw a table, and have used torch before.

    execute and before must be importable by name. Raises as the worker does. A stop is passed on to it; it dies with
    this process.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    work = {each.name: getattr(worker, each.name) for each in fields(Worker) if not each.name.startswith("on_")}
    process = context.Process(target=_apart, args=(pickle.dumps(work), there, os.getpid()))
    with _stop_requests() as stopped:
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)  # until the process can hear them itself; it inherits this
        process.start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        there.close()
        passed = 0
        try:
            while (said := _heard(here)) is not None:
                if isinstance(said, SrppoError):
                    raise said
                if said:
                    worker.on_event(said)
                for number in stopped[passed:]:
                    passed += 1
                    with suppress(ProcessLookupError):
                        os.kill(process.pid or 0, number)
                worker.on_change()
        except BaseException:  # its own last word, or the table has failed here
            process.terminate()
            raise
        finally:
            process.join()
            here.close()
    worker.on_change()
    if process.exitcode:
        raise Interrupted(STOPPED) if stopped else RunError(f"the sweep's worker died (exit code {process.exitcode})")


def _heard(pipe: Connection) -> str | SrppoError | None:
    """An event or error of the worker, "" if it said nothing for a while, None once it has ended."""
    try:
        return pipe.recv() if pipe.poll(PAUSE_S) else ""
    except EOFError:
        return None


def _apart(work: bytes, pipe: Connection, parent: int) -> None:
    """In the new process. Its stages must find it with one thread, also where OpenBLAS would start some at import."""
    for number in STOPS:
        signal.signal(number, lambda *_: os._exit(INTERRUPTED))  # nothing is running yet
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
    os.setsid()  # Ctrl-C on the terminal is for the caller, who passes it on
    die_with(parent)
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        Worker(**pickle.loads(work), on_event=pipe.send).run()
    except SrppoError as error:
        pipe.send(error)


def _child(task: Task, ledger: Ledger, execute: Execute, log: Path, parent: int, gpu: Sequence[str]) -> None:
    """Never returns. Its last printed line says how it ended."""
    code = 1
    try:
        os.setsid()
        die_with(parent)
        for number in STOPS:
            signal.signal(number, signal.default_int_handler)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        # Line by line, or the last words of a stage that is killed would be lost.
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
        if gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu[0]
        code = try_task(task, ledger, execute)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def try_task(task: Task, ledger: Ledger, execute: Execute) -> int:
    """Run a task in this process; how it ended, as a child's exit code, with the reason as the last printed line."""
    try:
        execute(task, ledger)
    except BaseException as error:
        code = next((code for kind, code in CODES.items() if isinstance(error, kind)), 1)
        if isinstance(error, RecordError):
            # Somebody else was faster, or took over after this process had slept past its lease: their attempt counts.
            code = HELD if ledger.state(task).status in ("running", "done") else 1
        elif code == 1:
            traceback.print_exc()
        text = str(error).strip().partition("\n")[0]
        known = isinstance(error, UserError | Diverged | StorageError)
        with suppress(OSError):  # a disk may be so full that not even this can be written
            print(text if known else f"{type(error).__name__}: {text}", flush=True)
        return code
    return 0


def _end_of(pid: int) -> int | None:
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # an old kernel, or a Python built on one
            return os.pidfd_open(pid)
    return None


def _ended(pid: int) -> bool:
    """Whether a child has come to its end; its number stays taken until it is waited for."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def last_line(log: Path) -> str:
    """What a try printed last; "" where it printed nothing."""
    with suppress(OSError):
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip() if lines else ""
    return ""


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Signals that asked for a stop, in order."""
    seen: list[int] = []
    before = {number: signal.signal(number, lambda signum, frame: seen.append(signum)) for number in STOPS}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
