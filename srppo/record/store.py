"""Stages on disk: what was run, by whom, how far it came, and the one result that counts.

    RUN/sweep.json, data/manifest.json, stages/<id>/
        config.json                     what the stage is; written once
        lease/<n>                       who may run it: the highest number decides
        attempts/<n>-<host>-<pid>/      env.json, events.jsonl, metrics.jsonl
        checkpoints/step-<N>/           the two newest and those asked for
        result.json                     the commit point; never overwritten

A stage's id is a hash of everything that decides its outcome, so two machines' folders unite by copying. Any process
may die at any instant: what is here is whole (see `files.py`), and the next attempt resumes from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from srppo.config import CODE_EPOCH, canonical_json, decisive
from srppo.errors import RecordError
from srppo.record.files import (
    create_exclusive,
    damage,
    describe,
    discard,
    move,
    replace_folder,
    settle,
    storing,
    sync,
    write_whole,
)
from srppo.record.folder import placing, stranger
from srppo.record.json import differences, plain, read_json, read_lines, revive
from srppo.record.lease import LEASE_TIMEOUT_S, Lease, now, server_time

SCHEMA_VERSION = 1
Status = Literal["ok", "failed", "diverged", "oom"]


def stage_id(kind: str, config: Mapping[str, Any], parents: Sequence[str] = (), data_sha: str = "") -> str:
    """Equal for stages with the same outcome: same kind, resolved config, parents, data and code epoch."""
    return hashlib.sha256(_identity(kind, config, parents, data_sha).encode()).hexdigest()[:16]


def _identity(kind: str, config: Mapping[str, Any], parents: Sequence[str], data_sha: str) -> str:
    """The text behind an id, which is also the stage's config.json."""
    identity = {"kind": kind, "config": config, "parents": list(parents), "data_sha": data_sha}
    return canonical_json({**identity, "code_epoch": CODE_EPOCH})


@dataclass(frozen=True)
class Run:
    """A folder of stages that belong to one specification."""

    path: Path
    spec: dict[str, Any]

    @classmethod
    def open(cls, folder: Path, spec: Mapping[str, Any]) -> Run:
        """Create the folder, or continue the one with the same spec; any number of processes may do so at once.

        Keys of a recipe that do not decide what a run is (`config.FREE`) may differ: the first one's are kept.
        Raises RecordError for a folder with another spec or with something else in it (nothing is touched), and
        StorageError when it cannot be written.
        """
        folder = Path(folder)
        text = canonical_json({"schema_version": SCHEMA_VERSION, "spec": spec})
        with placing(folder):
            if found := stranger(folder):
                raise RecordError(f"{folder} {found}, so it is no record of ours; give --out a new or empty folder")
            folder.mkdir(parents=True, exist_ok=True)
            create_exclusive(folder / "sweep.json", text)
        if other := differences(_comparable(cls.load(folder).spec), _comparable(json.loads(text)["spec"])):
            raise RecordError(f"{folder} was made with other settings ({other}); give --out another folder")
        return cls(folder, json.loads(text)["spec"])

    @classmethod
    def load(cls, folder: Path) -> Run:
        """An existing record, for reading. Raises RecordError if there is none or another version wrote it."""
        sweep = read_json(Path(folder) / "sweep.json")
        if sweep.get("schema_version") != SCHEMA_VERSION:
            found = f"schema version {sweep.get('schema_version')!r}, this srppo reads {SCHEMA_VERSION}"
            raise RecordError(f"{folder} has {found}; use the srppo that made it, or give --out another folder")
        return cls(Path(folder), sweep["spec"])

    def write_data_manifest(self, manifest: Mapping[str, Any], name: str = "manifest") -> None:
        """Fix the data of this run. Raises RecordError if it was fixed before and has changed since."""
        path = self.path / "data" / f"{name}.json"
        with storing(path):
            path.parent.mkdir(exist_ok=True)
            text = canonical_json(manifest)
            if not create_exclusive(path, text) and (other := differences(read_json(path), json.loads(text))):
                raise RecordError(f"the data of {self.path} changed ({other}); restore it or give --out another folder")

    def stage(self, kind: str, config: Mapping[str, Any], parents: Sequence[str] = (), data_sha: str = "") -> Stage:
        """The stage with this identity, new or existing."""
        path = self.path / "stages" / stage_id(kind, config, parents, data_sha)
        with storing(path):
            path.mkdir(parents=True, exist_ok=True)
            # Its name is synced with that of result.json, in the same folder: before a commit nothing depends on it.
            create_exclusive(path / "config.json", _identity(kind, config, parents, data_sha), named=False)
        return Stage(path)

    def stages(self) -> list[Stage]:
        """Every stage on disk, by id."""
        return [Stage(path.parent) for path in sorted(self.path.glob("stages/*/config.json"))]


@dataclass(frozen=True)
class Stage:
    """One unit of work: run by attempts, at most one at a time, committed once."""

    path: Path

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def identity(self) -> dict[str, Any]:
        """kind, config, parents, data_sha and code_epoch, as written at the start."""
        return read_json(self.path / "config.json")

    @property
    def done(self) -> bool:
        """Whether it is committed as ok: the only state that needs no further attempt."""
        return (self.result() or {}).get("status") == "ok"

    def result(self) -> dict[str, Any] | None:
        """What was committed (status, figures, files, attempt), or None. Raises RecordError if it is damaged.

        Finishes a commit that was killed between its two steps. The files' contents are checked by `verify`.
        """
        path = self.path / "result.json"
        if path.exists():
            result = read_json(path)
        elif (result := Lease.top(self.path)[1].get("result", {})) == {}:
            return None
        else:
            with suppress(OSError):  # a record that may only be read still answers
                create_exclusive(path, canonical_json(result))
        if result.get("sha256") != _sha256(result):
            raise RecordError(f"{path} is damaged; copy it again, or remove {self.path} to run the stage again")
        return revive(result)

    def verify(self) -> None:
        """Raises RecordError naming the first file of the result that is missing or changed since the commit."""
        for name, expected in (self.result() or {}).get("files", {}).items():
            path = self.path / name
            if not path.exists() or describe(path) != expected:
                state = "changed after the result was committed" if path.exists() else "is missing"
                raise RecordError(f"{path} {state}; restore it, or remove {self.path} to run the stage again")

    def holder(self, timeout_s: float = LEASE_TIMEOUT_S) -> dict[str, Any] | None:
        """The live process that runs this stage now (host, pid, since, attempt), or None."""
        number, record = Lease.top(self.path)
        return record if Lease.live(self.path, number, record, timeout_s) else None

    @contextmanager
    def attempt(self, env: Mapping[str, Any] | None = None, timeout_s: float = LEASE_TIMEOUT_S) -> Iterator[Attempt]:
        """Run the stage: take the lease, clear up after the dead, and give the lease back whatever happens.

        Raises RecordError if the stage is committed (see `reopen`) or a live process holds it. A holder is dead when
        its process on this machine is, or when its heartbeat is older than `timeout_s` by the file server's clock.
        """
        if result := self.result():
            todo = "nothing is left to do" if result["status"] == "ok" else "reopen it to try again"
            raise RecordError(f"stage {self.id} is committed as {result['status']}; {todo}")
        with storing(self.path / "lease", self.path):
            lease = Lease.take(self.path, timeout_s)
        attempt = None
        try:
            with storing(self.path / "attempts", self.path):
                settle(self.path, lease.number, server_time(self.path) - timeout_s)
                attempt = Attempt(self, lease, env or {})
            yield attempt
        except BaseException as error:
            if attempt:
                with suppress(Exception):
                    attempt.log_event("stopped", error=type(error).__name__, message=str(error).partition("\n")[0])
            raise
        finally:
            lease.release()

    def reopen(self) -> None:
        """Move a result that is not ok into its attempt's folder, so that the stage can be tried again.

        Raises RecordError if it is ok, or if another process is at the stage.
        """
        result = self.result()
        if result is None:
            return
        if result["status"] == "ok":
            raise RecordError(f"stage {self.id} is committed as ok; it is not run again")
        tried, unknown = result["attempt"], self.path / "attempts" / f"{result['attempt']}-unknown"
        kept = next(self.path.glob(f"attempts/{tried}-*"), unknown)
        with storing(kept / "result.json"):
            number, _ = Lease.top(self.path)
            if self.holder() or not Lease.claim(self.path, number + 1, {"state": "reopened"}):
                raise RecordError(f"another process is at stage {self.id}; try again once it is done")
            kept.mkdir(parents=True, exist_ok=True)
            move(self.path / "result.json", kept / "result.json")
            sync(self.path)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows that led to the present state, over all attempts: one for each (phase, step).

        A later attempt's row replaces an earlier one's, and an attempt that resumed from step N discards what earlier
        ones had logged beyond N. A line torn by a kill is left out, with a warning unless it is the last.
        """
        return list({(row.get("phase"), row.get("step")): row for row in self._logged("metrics.jsonl")}.values())

    def rollouts(self) -> list[dict[str, Any]]:
        """The sampled responses that led to the present state, over all attempts, in the order of steps."""
        return self._logged("rollouts.jsonl")

    def _logged(self, name: str) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for folder in self.attempts():
            events = read_lines(folder / "events.jsonl")
            starts = [event["step"] for event in events if event.get("event") == "resumed"]
            if starts:
                rows = [row for row in rows if row.get("step") is None or row["step"] <= min(starts)]
            rows += read_lines(folder / name)
        return rows

    def attempts(self) -> list[Path]:
        """The attempts' folders, oldest first."""
        folders = [path for path in self.path.glob("attempts/*-*") if path.name.split("-")[0].isdigit()]
        return sorted(folders, key=lambda path: (int(path.name.split("-")[0]), path.name))

    def checkpoint_steps(self) -> list[int]:
        """Steps with a checkpoint, oldest first, whole or not."""
        names = [path.name.removeprefix("step-") for path in self.path.glob("checkpoints/step-*")]
        return sorted(int(name) for name in names if name.isdigit())

    def checkpoint(self, step: int) -> Path:
        """The folder of one checkpoint. Raises RecordError if any of its files is not what was saved."""
        path = self.path / "checkpoints" / f"step-{step}"
        if reason := damage(path):
            raise RecordError(f"checkpoint {path} is damaged: {reason}; resume from another one")
        return path

    def latest_checkpoint(self, on_torn: Callable[[Path, str], None] | None = None) -> tuple[int, Path] | None:
        """The newest whole checkpoint; `on_torn` hears of each newer one that is damaged, and why."""
        for step in reversed(self.checkpoint_steps()):
            path = self.path / "checkpoints" / f"step-{step}"
            if (reason := damage(path)) is None:
                return step, path
            if on_torn:
                on_torn(path, reason)
        return None


class Attempt:
    """One process's try at a stage; made by `Stage.attempt`.

    Every method that changes the stage raises RecordError once another attempt has taken over, and StorageError when
    the disk refuses, naming the checkpoint that survives.
    """

    def __init__(self, stage: Stage, lease: Lease, env: Mapping[str, Any]):
        host = re.sub(r"[^A-Za-z0-9._]", "_", socket.gethostname())
        self.stage, self.number, self._lease = stage, lease.number, lease
        self.path = stage.path / "attempts" / f"{lease.number}-{host}-{os.getpid()}"
        self.path.mkdir(parents=True)
        write_whole(self.path / "env.json", canonical_json(plain(env)))  # synced with the first rows that it explains
        self.log_event("started", **({"took_over": lease.took_over} if lease.took_over else {}))

    def log_metrics(self, row: Mapping[str, Any]) -> None:
        """Append a row of figures: `step`, `phase` where a step has several rows, and anything else that JSON can hold.

        NaN and infinities are written as the strings "NaN", "Infinity" and "-Infinity", which every JSON reader takes,
        and come back from `Stage.metrics` as floats.
        """
        self._append("metrics.jsonl", row)

    def log_rollout(self, row: Mapping[str, Any]) -> None:
        """Append a sampled response with its reward, for reading; not part of the result."""
        self._append("rollouts.jsonl", row)

    def log_event(self, kind: str, **fields: Any) -> None:
        """Append what happened, with the time."""
        self._append("events.jsonl", {"event": kind, "time": now(), **fields})

    def resume(self, on_torn: Callable[[Path, str], None] | None = None) -> tuple[int, Path] | None:
        """Where to go on: the newest whole checkpoint, or None to start from step 0. Call it once, first.

        Damaged checkpoints are reported, logged and removed, for the run is about to save those steps again.
        """

        def report(path: Path, reason: str) -> None:
            self.log_event("torn_checkpoint", name=path.name, reason=reason)
            if on_torn:
                on_torn(path, reason)

        found = self.stage.latest_checkpoint(report)
        self.resumed(found[0] if found else -1)
        return found

    def resumed(self, step: int) -> None:
        """Declare that this attempt goes on from the state after `step` (-1: from nothing): what came later is void."""
        self.check()
        self.log_event("resumed", step=step)
        for later in self.stage.checkpoint_steps():
            if later > step:
                discard(self.stage.path / "checkpoints" / f"step-{later}")

    def save_checkpoint(self, step: int, write: Callable[[Path], None], keep: Iterable[int] = ()) -> Path:
        """Let `write` fill the checkpoint of `step`; then drop all but the two newest and the steps in `keep`."""
        target = self.stage.path / "checkpoints" / f"step-{step}"
        self._replace(target, write)
        steps = self.stage.checkpoint_steps()
        with self._storing(target):
            for old in set(steps) - set(steps[-2:]) - {step, *keep}:
                discard(target.with_name(f"step-{old}"))
        return target

    def publish(self, name: str, write: Callable[[Path], None]) -> Path:
        """Let `write` fill the folder `name` of the stage, for example `model` or `eval/<task>@<hash>`.

        A kill leaves the folder as it was, or whole, or absent until the next attempt; never half written.
        """
        self._replace(self.stage.path / name, write)
        return self.stage.path / name

    def commit(self, status: Status, figures: Mapping[str, Any], files: Iterable[Path] = ()) -> dict[str, Any]:
        """Record the one result of this stage; `files` (folders: all they hold) are listed with their checksums.

        The decision is one exclusive link of the lease's next number, which whoever takes over needs too: if it
        succeeds, nobody took over before and nobody can afterwards. Raises RecordError if somebody did, or if there is
        a result.
        """
        if status not in get_args(Status):
            raise ValueError(f"status {status!r} is not one of {', '.join(get_args(Status))}")
        with self._storing(self.stage.path / "result.json"):
            if (self.stage.path / "result.json").exists():
                raise RecordError(f"stage {self.stage.id} has a result already; it is never committed twice")
            result: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "stage": self.stage.id, "attempt": self.number}
            result |= {"status": status, "figures": plain(figures), "files": self._checksums(files), "time": now()}
            result["sha256"] = _sha256(result)
            if any((self.path / name).exists() for name in ("metrics.jsonl", "rollouts.jsonl")):
                self._sync_logs()  # without rows there is nothing that a result leaves to the logs
            if not Lease.claim(self.stage.path, self.number + 1, {"state": "committed", "result": result}):
                self.check()
            create_exclusive(self.stage.path / "result.json", canonical_json(result))
        return revive(result)

    def check(self) -> None:
        """Raises RecordError if this attempt may not change the stage any more."""
        number, record = Lease.top(self.stage.path)
        if number != self.number:
            by = f" by pid {record['pid']} on {record['host']}" if "pid" in record else ""
            now = f"now {record.get('state')}{by}"
            raise RecordError(f"attempt {self.number} of stage {self.stage.id} lost its lease ({now}): it stops here")

    def _replace(self, target: Path, write: Callable[[Path], None]) -> None:
        """Swap in a folder, after the rows that led to it are safe on disk."""

        def write_and_check(folder: Path) -> None:
            write(folder)
            self.check()  # writing may take long enough to lose the lease

        self.check()
        with self._storing(target):
            self._sync_logs()
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                replace_folder(target, str(self.number), write_and_check)
            except FileNotFoundError:
                self.check()  # whoever takes over clears up after an attempt that he takes for dead
                raise

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        """One line to the kernel: it outlives this process at once, and the machine from the next checkpoint on."""
        with self._storing(self.path / name), open(self.path / name, "ab", buffering=0) as file:
            line = memoryview((canonical_json(plain(row)) + "\n").encode())
            while line:
                line = line[file.write(line) :]

    def _sync_logs(self) -> None:
        for path in self.path.iterdir():
            sync(path)
        sync(self.path)

    def _checksums(self, files: Iterable[Path]) -> dict[str, Any]:
        found = {}
        for file in files:
            path = self.stage.path / file
            for each in sorted(each for each in path.rglob("*") if each.is_file()) if path.is_dir() else [path]:
                sync(each)
                found[each.relative_to(self.stage.path).as_posix()] = describe(each)
        return found

    def _storing(self, path: Path) -> AbstractContextManager[None]:
        def survives() -> str:
            found = self.stage.latest_checkpoint()
            return f"checkpoint step-{found[0]} survives" if found else "there is no checkpoint yet"

        return storing(path, survives=survives)


class OnlookerAttempt(Attempt):
    """An attempt that another process of the same run makes, seen from here: it writes nothing."""

    def __init__(self, stage: Stage) -> None:
        self.stage, self.number, self.path = stage, 0, stage.path

    def resumed(self, step: int) -> None:
        pass

    def save_checkpoint(self, step: int, write: Callable[[Path], None], keep: Iterable[int] = ()) -> Path:
        return self.stage.path / "checkpoints" / f"step-{step}"

    def commit(self, status: Status, figures: Mapping[str, Any], files: Iterable[Path] = ()) -> dict[str, Any]:
        return {}

    def check(self) -> None:
        pass

    def _replace(self, target: Path, write: Callable[[Path], None]) -> None:
        pass

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        pass


def _comparable(spec: Mapping[str, Any]) -> dict[str, Any]:
    return {**spec, "recipe": decisive(spec["recipe"])} if isinstance(spec.get("recipe"), Mapping) else dict(spec)


def _sha256(result: Mapping[str, Any]) -> str:
    return hashlib.sha256(canonical_json({k: v for k, v in result.items() if k != "sha256"}).encode()).hexdigest()
