"""One stage in several processes of one machine: this one is the first of them, and starts the others."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from srppo.ablations.ledger import Ledger
from srppo.ablations.local import GRACE_S, Execute, die_with
from srppo.ablations.plan import Task
from srppo.errors import OtherEnded, SrppoError


def execute_together(task: Task, ledger: Ledger, *, execute: Execute, processes: int) -> None:
    """Run a task as `execute` does, in so many processes, each of which sees the same and takes a device by its number.

    Raises what the first one raises; the others end with it.
    """
    port = _free_port()
    context = multiprocessing.get_context("spawn")
    work = pickle.dumps((execute, task, ledger))
    others = [
        context.Process(target=_other, args=(rank, processes, port, os.getpid(), work)) for rank in range(1, processes)
    ]
    with _as_process(0, processes, port):
        for each in others:
            each.start()
        try:
            execute(task, ledger)
        except BaseException:  # they may wait for this one
            for each in others:
                each.terminate()
            raise
        finally:
            deadline = time.monotonic() + GRACE_S
            for each in others:
                each.join(max(deadline - time.monotonic(), 0.0))
                each.kill()
                each.join()


def _other(rank: int, processes: int, port: int, parent: int, work: bytes) -> None:
    """What a further process does. It says what went wrong with itself alone."""
    die_with(parent)
    with _as_process(rank, processes, port):
        execute, task, ledger = pickle.loads(work)
        try:
            execute(task, ledger)
        except SrppoError as error:
            if not isinstance(error, OtherEnded):
                print(f"process {rank}: {error}", file=sys.stderr, flush=True)
            sys.exit(1)


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
