"""Files and folders that survive a kill: written aside, synced, moved into place, and verified when read.

Names that begin with a dot are work in progress: `.tmp-*` is not finished, `.old-*` steps aside for its successor,
`.gone-*` is being deleted. A kill leaves them behind, `settle` clears them up; readers never look at them.

Fault injection, for tests: every write, rename and link calls `_durable` right before and right after. With
SRPPO_CRASH_AT=n the n-th call kills the process with SIGKILL; SRPPO_CRASH_COUNT=file keeps the number of calls so far
in that file. Without the two variables `_durable` only counts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path

from srppo.config import canonical_json
from srppo.errors import SrppoError, StorageError

MANIFEST = "manifest.json"

_ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some of your quota",
    errno.EFBIG: "raise the file size limit (ulimit -f)",
    errno.EROFS: "make the disk writable",
    errno.EACCES: "make the folder writable",
    errno.EPERM: "make the folder writable",
    errno.EIO: "check the disk",
    errno.ESTALE: "check the network disk",
}
_NO_HARD_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV}
_calls = 0


def _durable(op: str, path: Path) -> None:
    """A crash point (see the module's docstring); `op` and `path` say in a debugger which one this is."""
    global _calls
    _calls += 1
    if counter := os.environ.get("SRPPO_CRASH_COUNT"):
        Path(counter).write_text(str(_calls))
    if os.environ.get("SRPPO_CRASH_AT") == str(_calls):
        os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _step(op: str, path: Path) -> Iterator[None]:
    _durable(f"before {op}", path)
    yield
    _durable(f"after {op}", path)


def write_atomic(path: Path, data: str | bytes) -> None:
    """Replace a file so that readers and kills see the old content or the new, never a mixture. Raises StorageError."""
    with storing(path), _aside(path, data) as temp:
        move(temp, path)


def create_exclusive(path: Path, data: str | bytes, *, named: bool = True) -> bool:
    """Create a file whole; False when it exists. Of any number of racing processes exactly one gets True.

    named: whether its name, too, must outlive a power cut from now on; its content does in any case.
    """
    with _aside(path, data) as temp:
        with _step("link", path):
            try:
                os.link(temp, path)
            except FileExistsError:
                return temp.stat().st_nlink > 1  # a network disk may report its own repeated success as a failure
            except OSError as error:
                if error.errno not in _NO_HARD_LINKS:
                    raise
                try:
                    _write_synced(path, data)
                except FileExistsError:
                    return False
        if named:
            sync(path.parent)
    return True


def move(source: Path, target: Path) -> None:
    """Rename, for good: the folder's list of names is synced. What is moved must have been synced before."""
    with _step("rename", target):
        os.replace(source, target)
    sync(target.parent)


def replace_folder(target: Path, owner: str, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder aside, add a manifest of checksums, sync it, and swap it in for `target`.

    A kill at any instant leaves the old folder, the new one, or (between two renames) none and a whole `.old-*` that
    `settle` puts back. When `write` or the disk fails, what was there before is there again, and the error passes on.
    """
    aside = target.with_name(f".tmp-{owner}-{target.name}")
    old = target.with_name(f".old-{target.name}")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with _step("write", aside):
            write(aside)
        _seal(aside)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
            move(target, old)
        move(aside, target)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    finally:
        _settle_old(old)


def damage(folder: Path) -> str | None:
    """What is wrong with a folder that `replace_folder` wrote: None if every file has the checksum in its manifest."""
    try:
        files = json.loads((folder / MANIFEST).read_bytes())["files"]
        for name, expected in files.items():
            found = describe(folder / name)
            if found["bytes"] != expected["bytes"]:
                return f"{name} has {found['bytes']} bytes instead of {expected['bytes']}"
            if found["sha256"] != expected["sha256"]:
                return f"{name} has another sha256 than its manifest"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(folder)} is missing"
    except OSError as error:
        return f"{error.filename} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is not readable"
    return None


def describe(path: Path) -> dict[str, str | int]:
    """Checksum and size of a file."""
    with open(path, "rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": os.fstat(file.fileno()).st_size}


def checksum(path: Path) -> str:
    """sha256 of a file, read once a process while nothing of its stamp (inode, size, times) changes."""
    stat = path.stat()
    return _checksum(path, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


@lru_cache(maxsize=1024)
def _checksum(path: Path, *stamp: int) -> str:
    return str(describe(path)["sha256"])


def discard(folder: Path) -> None:
    """Delete a folder so that a kill half way leaves nothing that looks like a damaged one."""
    gone = folder.with_name(f".gone-{uuid.uuid4().hex}")
    with suppress(FileNotFoundError):
        move(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def settle(folder: Path, attempt: int, before: float) -> None:
    """Clear up what kills left anywhere under `folder`: put `.old-*` back or delete it, delete the rest.

    Unfinished work of attempts below `attempt` goes at once; a nameless `.tmp-*` may be another process's file of this
    second, and goes when it was written before the time `before`.
    """
    for path in list(folder.rglob(".*-*")):
        kind, owner = path.name.split("-")[:2]
        with suppress(FileNotFoundError):
            if kind == ".old":
                _settle_old(path)
            elif kind == ".gone":
                shutil.rmtree(path, ignore_errors=True)
            elif kind == ".tmp" and (int(owner) < attempt if owner.isdigit() else path.stat().st_mtime < before):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextmanager
def storing(what: Path | str, folder: Path | None = None, survives: Callable[[], str] = str) -> Iterator[None]:
    """Turn a full, limited or read-only disk into StorageError in one line; every other error passes through.

    `survives` says, once it is needed, what is still whole. safetensors and torch hide the cause in errors of their
    own, so the text and the chain of causes are searched too.
    """
    try:
        yield
    except Exception as error:
        refusal = None if isinstance(error, SrppoError) else _refusal(error)
        if refusal is None:
            raise
        reason, advice = refusal
        parts = [f"cannot write {what}: {reason}", _free(folder or Path(what).parent), survives()]
        parts.append(f"{advice} and run the same command again: it resumes")
        raise StorageError("; ".join(part for part in parts if part)) from error


def _refusal(error: BaseException) -> tuple[str, str] | None:
    """Why the disk refused to write and what to do about it; None when something else went wrong."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        code = link.errno if isinstance(link, OSError) else None
        if found := re.search(r"\(os error (\d+)\)", str(link)):  # safetensors, written in Rust
            code = int(found[1])
        if code in _ADVICE:
            return os.strerror(code), _ADVICE[code]
    if any(re.search(r"inline_container\.cc.* unexpected pos|PytorchStreamWriter failed", str(link)) for link in chain):
        return "torch could not finish the file", "free some space"  # all that torch.save says of a full disk
    return None


def _free(folder: Path) -> str:
    with suppress(OSError):
        nearest = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
        return f"{shutil.disk_usage(nearest).free / 1e9:.2f} GB free"
    return ""


def sync(path: Path) -> None:
    """Make a file's content, or a folder's list of names, outlive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some disks cannot sync folders
            raise
    finally:
        os.close(handle)


@contextmanager
def _aside(path: Path, data: str | bytes) -> Iterator[Path]:
    """A synced temporary file beside `path`, removed afterwards if it is still there."""
    temp = path.with_name(f".tmp-{uuid.uuid4().hex}x")  # the x: never mistaken for an attempt's number
    try:
        with _step("write", temp):
            _write_synced(temp, data)
        yield temp
    finally:
        temp.unlink(missing_ok=True)


def write_whole(path: Path, data: str | bytes) -> None:
    """Replace a file whole for readers and kills. A power cut may take it, until somebody syncs it."""
    temp = path.with_name(f".tmp-{uuid.uuid4().hex}x")
    with _step("write", temp):
        temp.write_bytes(data.encode() if isinstance(data, str) else data)
    with _step("rename", path):
        os.replace(temp, path)


def _write_synced(path: Path, data: str | bytes) -> None:
    with open(path, "xb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def _seal(folder: Path) -> None:
    """Sync every file and folder and write the manifest that `damage` checks."""
    paths = sorted(folder.rglob("*"))
    for path in paths:
        sync(path)
    files = {path.relative_to(folder).as_posix(): describe(path) for path in paths if path.is_file()}
    with _step("write", folder / MANIFEST):
        _write_synced(folder / MANIFEST, canonical_json({"files": files}))
    sync(folder)


def _settle_old(old: Path) -> None:
    """Put a folder back that had stepped aside for a successor that never came, or delete it."""
    target = old.with_name(old.name.removeprefix(".old-"))
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
    elif old.exists():
        move(old, target)
