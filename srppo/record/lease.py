"""Who may run a stage: numbered links of which the highest decides, a heartbeat, and when a holder counts as dead."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from srppo.config import canonical_json
from srppo.errors import RecordError
from srppo.record.files import create_exclusive

LEASE_TIMEOUT_S = 120.0
HEARTBEAT_S = 5.0


class Lease:
    """The right to run a stage: the highest number in its `lease/` folder.

    Each change of hands (`held`, `released`, `committed`, `reopened`) links a fully written file to the next number. A
    number is given once and never taken back, so of racing processes exactly one gets it, nobody undoes what another
    did since he looked, and checking and acting are one step. The file's mtime is the holder's heartbeat.
    """

    def __init__(self, stage: Path, number: int, took_over: Mapping[str, Any] | None, heartbeat_s: float):
        self._stage, self.number, self.took_over = stage, number, took_over
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, args=(heartbeat_s,), name="lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, stage: Path, timeout_s: float) -> Lease:
        """The next number, once the last holder has let go or is dead; RecordError while it lives."""
        (stage / "lease").mkdir(exist_ok=True)
        while True:
            number, record = cls.top(stage)
            if cls.live(stage, number, record, timeout_s):
                pid, host, since = (record.get(key, "unknown") for key in ("pid", "host", "since"))
                who = f"pid {pid} on {host} since {since} (attempt {number})"
                wait = f"wait for it or stop it; one that died elsewhere is taken over after {timeout_s:.0f} s"
                raise RecordError(f"stage {stage.name} is being run by {who}; {wait}")
            if "result" in record:
                raise RecordError(f"stage {stage.name} was committed by another process just now")
            mine = {"state": "held", "attempt": number + 1, "since": now(), **this_process()}
            if cls.claim(stage, number + 1, mine):
                dead = record if record.get("state") == "held" else None
                return cls(stage, number + 1, dead, min(HEARTBEAT_S, timeout_s / 4))

    @staticmethod
    def claim(stage: Path, number: int, record: Mapping[str, Any]) -> bool:
        """Make `record` the decision with this number; False when there is one."""
        return create_exclusive(stage / "lease" / str(number), canonical_json(record))

    @staticmethod
    def top(stage: Path) -> tuple[int, dict[str, Any]]:
        """The highest number and its record; (0, {}) before the first."""
        folder = stage / "lease"
        number = max((int(path.name) for path in folder.glob("*") if path.name.isdigit()), default=0)
        while (folder / str(number + 1)).exists():  # a network disk may list late
            number += 1
        try:
            return number, dict(json.loads((folder / str(number)).read_bytes())) if number else {}
        except (ValueError, TypeError):
            return number, {"state": "held"}  # torn by a copy: its age decides

    @staticmethod
    def live(stage: Path, number: int, record: Mapping[str, Any], timeout_s: float) -> bool:
        """Whether somebody holds the lease and shows signs of life."""
        if record.get("state") != "held":
            return False
        if record.get("machine") == _machine():
            started = _process_start(record["pid"])
            if started is None or (started and started != record["started"]):
                return False  # dead, or its pid belongs to another process by now
        with open(stage / "lease" / str(number), "rb") as file:  # opened: a network disk caches what is only looked at
            beat = os.fstat(file.fileno()).st_mtime
        return server_time(stage / "lease") - beat <= timeout_s

    def release(self) -> None:
        """Stop the heartbeat and let go, if it is still ours."""
        self._stop.set()
        self._thread.join()
        if (self._stage / "lease" / str(self.number + 1)).exists():  # committed, or taken over
            return
        try:
            self.claim(self._stage, self.number + 1, {"state": "released"})
        except OSError:
            with suppress(OSError):  # a full disk: an old heartbeat needs no space
                os.utime(self._stage / "lease" / str(self.number), (0, 0))

    def _beat(self, heartbeat_s: float) -> None:
        while not self._stop.wait(heartbeat_s):
            with suppress(OSError):  # the disk may be away for a while
                os.utime(self._stage / "lease" / str(self.number))


def _machine() -> str:
    """Where a pid means this process: host, boot and pid namespace (containers share the first two)."""
    boot = namespace = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    return f"{socket.gethostname()} {boot} {namespace}"


def this_process() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "machine": _machine(), "pid": pid, "started": _process_start(pid)}


def _process_start(pid: int) -> str | None:
    """When a process started, in ticks since boot; "" if that cannot be told, None if it is dead."""
    try:
        os.kill(pid, 0)
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]
    except ProcessLookupError:
        return None
    except OSError:  # another user's, or no /proc
        return ""


def server_time(folder: Path) -> float:
    """The file server's clock, which stamps heartbeats; ours may be wrong."""
    path = folder / f".tmp-{uuid.uuid4().hex}x"
    try:
        with open(path, "xb") as file:
            now = os.fstat(file.fileno()).st_mtime
        path.unlink()
        return now
    except OSError:
        return time.time()  # nothing can be written here, so nothing can be taken over either


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
