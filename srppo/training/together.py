"""Several processes of this machine for one piece of work, where no launcher has started them: this one is the first,
and starts the others. No torch until they join."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess

from srppo.errors import OtherEnded, SrppoError

GRACE_S = 30.0  # for the others to end after the first


@contextmanager
def first_of(processes: int, others: Callable[[], object]) -> Iterator[None]:
    """Within, this process is the first of so many: what `parallel.start` joins. Each other one does `others`, which is
    pickled, and takes a device by its number. They end with this one, at once where it raises. Raises OtherEnded where
    one of them ends before it begins."""
    port = _free_port()
    context = multiprocessing.get_context("spawn")
    work = pickle.dumps(others)
    here, there = context.Pipe(duplex=False)  # each says in it that it is about to begin
    place = (processes, port, os.getpid(), there, work)
    started = [context.Process(target=_other, args=(rank, *place)) for rank in range(1, processes)]
    with here, there, _as_process(0, processes, port):
        with _deaf_to_interrupts():
            for each in started:
                each.start()
        try:
            _wait_for(started, here)
            yield
        except BaseException:  # they may wait for this one
            for each in started:
                each.terminate()
            raise
        finally:
            deadline = time.monotonic() + GRACE_S
            for each in started:
                each.join(max(deadline - time.monotonic(), 0.0))
                each.kill()
                each.join()


def die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies (Linux); elsewhere it goes on until it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _wait_for(started: Sequence[SpawnProcess], here: Connection) -> None:
    """Until each of them is about to begin: whoever joins them would wait for hours for one that is gone."""
    begun = 0
    while begun < len(started):
        if here in wait([here, *(each.sentinel for each in started)]):
            here.recv()
            begun += 1
        else:
            from srppo.training.parallel import other_ended

            raise other_ended()


def _other(rank: int, processes: int, port: int, parent: int, there: Connection, work: bytes) -> None:
    """What a further process does. It says what went wrong with itself alone."""
    die_with(parent)
    with _as_process(rank, processes, port):
        try:
            others = pickle.loads(work)  # imports torch and all
            there.send(rank)
            others()
        except SrppoError as error:
            if not isinstance(error, OtherEnded):
                print(f"process {rank}: {error}", file=sys.stderr, flush=True)
            sys.exit(1)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """What is started within never hears of Ctrl-C, which a terminal sends to all: this process ends it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _as_process(rank: int, processes: int, port: int) -> Iterator[None]:
    """What a launcher tells its processes; and out of the group again."""
    place: dict[str, object] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1"}
    place |= {"MASTER_PORT": port}
    if sys.platform == "linux" and "GLOO_SOCKET_IFNAME" not in os.environ:
        place |= {"GLOO_SOCKET_IFNAME": "lo"}  # the host's name need not be known to anybody
    before = {name: os.environ.get(name) for name in place}
    os.environ.update({name: str(value) for name, value in place.items()})
    try:
        yield
    finally:
        from srppo.training import parallel

        parallel.leave()
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
