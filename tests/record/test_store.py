"""Stages on disk, with real processes that race, stop and die. Waits are generous; no outcome depends on timing."""

from __future__ import annotations

import errno
import itertools
import json
import math
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest

from srppo.errors import RecordError, StorageError
from srppo.record import files as checkpoint
from srppo.record import store
from srppo.record.folder import check_place
from srppo.record.lease import Lease, this_process
from srppo.record.store import Run, Stage, stage_id

SPEC = {"ppo": {"lr": 1e-4, "steps": 20}, "seeds": [0, 1]}
WAIT_S = 120.0
processes = multiprocessing.get_context("forkserver")  # fresh processes, quick to start
processes.set_forkserver_preload(["srppo.record.store", "pytest"])


def a_stage(folder: Path) -> Stage:
    return Run.open(folder, SPEC).stage("ppo", {"lr": 1e-4}, ["abc"], "data")


def writes(content: bytes = b"weights"):
    def write(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "model.bin").write_bytes(content)
        (folder / "sub" / "state.json").write_text("{}")

    return write


def in_process(target, *args) -> int:
    """Run a function in another process; its exit code (-9 for one killed)."""
    process = processes.Process(target=target, args=args, daemon=True)
    process.start()
    process.join(WAIT_S)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def wait_for(condition):
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return value


def leftovers(folder: Path) -> list[Path]:
    """Unfinished work below a folder, but for the nameless files that only age removes."""
    return [path for path in folder.rglob(".*") if not (path.name.startswith(".tmp-") and path.name.endswith("x"))]


# --- runs and identities ---------------------------------------------------------------------------------------------


def test_ids_depend_on_everything_that_decides_the_outcome_and_on_nothing_else():
    same = stage_id("ppo", {"a": 1, "b": (2, 3)}, ("p",), "d")
    assert same == stage_id("ppo", {"b": [2, 3], "a": 1}, ["p"], "d") and len(same) == 16
    others = [
        stage_id("sft", {"a": 1, "b": [2, 3]}, ["p"], "d"),
        stage_id("ppo", {"a": 2, "b": [2, 3]}, ["p"], "d"),
        stage_id("ppo", {"a": 1, "b": [2, 3]}, ["q"], "d"),
        stage_id("ppo", {"a": 1, "b": [2, 3]}, ["p"], "e"),
    ]
    assert len({same, *others}) == 5


def test_code_epoch_enters_the_id(monkeypatch):
    before = stage_id("ppo", {})
    monkeypatch.setattr(store, "CODE_EPOCH", store.CODE_EPOCH + 1)
    assert stage_id("ppo", {}) != before


def test_a_run_is_continued_with_the_same_spec_and_refused_with_another(tmp_path):
    Run.open(tmp_path / "run", SPEC)
    assert Run.open(tmp_path / "run", SPEC).spec == SPEC == Run.load(tmp_path / "run").spec
    with pytest.raises(RecordError) as error:
        Run.open(tmp_path / "run", {"ppo": {"lr": 1e-5, "steps": 20, "clip": 0.2}, "seeds": [0, 1]})
    message = str(error.value)
    assert "ppo.lr: 0.0001 there, 1e-05 now" in message and "ppo.clip: absent there, 0.2 now" in message
    assert "--out" in message and "steps" not in message and "\n" not in message


def test_a_folder_with_something_else_in_it_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(RecordError, match=r"thesis\.tex.*--out"):
        Run.open(tmp_path, SPEC)
    with pytest.raises(RecordError, match="is a file, not a folder"):
        Run.open(tmp_path / "thesis.tex", SPEC)
    with pytest.raises(RecordError, match="lies below"):
        Run.open(tmp_path / "thesis.tex" / "deeper" / "run", SPEC)
    assert os.listdir(tmp_path) == ["thesis.tex"]


@pytest.mark.parametrize("way", [Run.open, lambda folder, spec: check_place(folder)], ids=["open", "check"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("dangling", "is a broken link, not a folder"),
        ("dangling/run", "a broken link"),
        ("loop", "a broken link"),
        ("x" * 300, "File name too long"),
        ("a/" + "x" * 300, "File name too long"),
        ("/proc/nope", "No such file or directory"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path, way, name, reason):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RecordError, match=reason) as error:
        way(tmp_path / name, SPEC)
    assert "give --out" in str(error.value) and "\n" not in str(error.value)


def test_a_place_that_can_be_used_is_left_as_it_was(tmp_path):
    check_place(tmp_path / "new" / "run")
    check_place(tmp_path)
    assert os.listdir(tmp_path) == []


def test_a_record_of_another_version_or_a_damaged_one_is_refused(tmp_path):
    Run.open(tmp_path, SPEC)
    (tmp_path / "sweep.json").write_text(json.dumps({"schema_version": 99, "spec": SPEC}))
    with pytest.raises(RecordError, match="schema version 99"):
        Run.open(tmp_path, SPEC)
    (tmp_path / "sweep.json").write_text('{"schema')
    with pytest.raises(RecordError, match="cannot be read"):
        Run.open(tmp_path, SPEC)


def test_the_data_manifest_is_fixed_once(tmp_path):
    run = Run.open(tmp_path, SPEC)
    run.write_data_manifest({"sha256": "aa", "rows": 10})
    run.write_data_manifest({"rows": 10, "sha256": "aa"})
    with pytest.raises(RecordError, match=r"data .* changed .*rows: 10 there, 12 now"):
        run.write_data_manifest({"sha256": "aa", "rows": 12})
    assert json.loads((tmp_path / "data" / "manifest.json").read_text())["rows"] == 10


def test_a_stage_knows_its_identity(tmp_path):
    stage = a_stage(tmp_path)
    assert stage.path == tmp_path / "stages" / stage_id("ppo", {"lr": 1e-4}, ["abc"], "data")
    identity = {"kind": "ppo", "config": {"lr": 1e-4}, "parents": ["abc"], "data_sha": "data"}
    assert stage.identity == {**identity, "code_epoch": store.CODE_EPOCH}
    assert a_stage(tmp_path) == stage and Run.load(tmp_path).stages() == [stage]
    assert stage.result() is None and not stage.done and stage.metrics() == []


# --- the lease -------------------------------------------------------------------------------------------------------


def _race(folder: Path, rounds: int, barrier, results) -> None:
    for number in range(rounds):
        stage = Run.open(folder, SPEC).stage("race", {"round": number})
        barrier.wait(WAIT_S)
        try:
            with stage.attempt() as attempt:
                results.put((number, attempt.number))
                barrier.wait(WAIT_S)
        except RecordError:
            barrier.wait(WAIT_S)


@pytest.mark.parametrize("dead_holder", [False, True])
def test_of_eight_racing_processes_exactly_one_gets_the_lease(tmp_path, dead_holder):
    rounds, count = 25, 8
    if dead_holder:
        for number in range(rounds):
            stage = Run.open(tmp_path, SPEC).stage("race", {"round": number})
            leave_a_lease(stage, pid=dead_pid())
    barrier, results = processes.Barrier(count), processes.Queue()
    task = {"target": _race, "args": (tmp_path, rounds, barrier, results), "daemon": True}
    racers = [processes.Process(**task) for _ in range(count)]
    for racer in racers:
        racer.start()
    winners = [results.get(timeout=WAIT_S) for _ in range(rounds)]
    for racer in racers:
        racer.join(WAIT_S)
    assert [racer.exitcode for racer in racers] == [0] * count
    assert results.empty() and sorted(winners) == [(number, 2 if dead_holder else 1) for number in range(rounds)]


def dead_pid() -> int:
    process = processes.Process(target=os._exit, args=(0,))
    process.start()
    process.join(WAIT_S)
    assert process.pid
    return process.pid


def leave_a_lease(stage: Stage, age_s: float = 0.0, **changes) -> None:
    """A lease as a holder leaves it: by default of a process of this machine, this one, that is alive."""
    (stage.path / "lease").mkdir(exist_ok=True)
    me = {**this_process(), "host": "here", "since": "1970", "state": "held"}
    number = Lease.top(stage.path)[0] + 1
    assert Lease.claim(stage.path, number, {**me, **changes})
    stamp = time.time() - age_s
    os.utime(stage.path / "lease" / str(number), (stamp, stamp))


@pytest.mark.parametrize(
    ("lease", "taken"),
    [
        ({}, False),
        ({"started": "1"}, True),  # the pid belongs to another process by now
        ({"machine": "elsewhere", "pid": 1}, False),
        ({"machine": "elsewhere", "pid": 1, "age_s": 100.0}, False),
        ({"machine": "elsewhere", "pid": 1, "age_s": 1000.0}, True),
        ({"age_s": 1000.0}, True),  # alive but stopped
        ({"state": "released"}, True),
    ],
)
def test_whose_lease_is_taken_over(tmp_path, lease, taken):
    stage = a_stage(tmp_path)
    leave_a_lease(stage, **lease)
    assert (stage.holder() is None) == taken
    if taken:
        with stage.attempt() as attempt:
            assert attempt.number == 2 and stage.holder()["pid"] == os.getpid()
    else:
        with (
            pytest.raises(RecordError, match=r"pid \d+ on here since 1970 .*wait for it or stop it") as error,
            stage.attempt(),
        ):
            pass
        assert "\n" not in str(error.value)


def _try_by_a_wrong_clock(folder: Path, off_s: float) -> None:
    """Exit code 0 where this process, whose clock is off, took the stage, 3 where it found a live holder."""
    right = time.time
    time.time = lambda: right() + off_s
    try:
        with a_stage(folder).attempt():
            pass
    except RecordError:
        os._exit(3)


@pytest.mark.parametrize("off_s", [-10_000.0, 10_000.0])
@pytest.mark.parametrize(("age_s", "code"), [(0.0, 3), (1000.0, 0)], ids=["alive", "dead"])
def test_a_lease_expires_by_the_file_servers_clock_whatever_ours_says(tmp_path, off_s, age_s, code):
    leave_a_lease(a_stage(tmp_path), machine="elsewhere", pid=1, age_s=age_s)
    assert in_process(_try_by_a_wrong_clock, tmp_path, off_s) == code


def test_a_process_that_ended_but_was_not_reaped_is_dead(tmp_path):
    pid = os.posix_spawn("/bin/true", ["true"], os.environ)
    wait_for(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z")
    stage = a_stage(tmp_path)
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    leave_a_lease(stage, pid=pid, started=ticks)
    assert stage.holder() is None
    os.waitpid(pid, 0)


def test_a_lease_torn_by_a_copy_is_judged_by_its_age(tmp_path):
    stage = a_stage(tmp_path)
    leave_a_lease(stage)
    (stage.path / "lease" / "1").write_text('{"sta')
    with pytest.raises(RecordError, match="pid unknown"), stage.attempt():
        pass
    os.utime(stage.path / "lease" / "1", (0, 0))
    with stage.attempt() as attempt:
        assert attempt.number == 2


def test_the_heartbeat_beats_and_stops(tmp_path):
    stage = a_stage(tmp_path)
    with stage.attempt(timeout_s=1.0) as attempt:
        file = stage.path / "lease" / "1"
        os.utime(file, (0, 0))
        wait_for(lambda: file.stat().st_mtime > 0)
        thread = attempt._lease._thread
    assert not thread.is_alive()


def test_a_lease_is_let_go_even_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    stage = a_stage(tmp_path)
    with monkeypatch.context() as patch, stage.attempt():
        patch.setattr(Lease, "claim", full)
    assert stage.holder() is None


def test_attempts_are_numbered_upwards_and_a_failed_one_says_why(tmp_path):
    stage = a_stage(tmp_path)
    with pytest.raises(ZeroDivisionError), stage.attempt({"torch": "2.13"}) as first:
        1 / 0  # noqa: B018
    with stage.attempt() as second:
        assert second.number > first.number and second.path.name.startswith(f"{second.number}-")
    assert stage.attempts() == [first.path, second.path]
    assert json.loads((first.path / "env.json").read_text()) == {"torch": "2.13"}
    assert '"error":"ZeroDivisionError"' in (first.path / "events.jsonl").read_text()


def _hold(folder: Path, where: str, marks: Path) -> None:
    """Take the stage, stop at `where`, and note what becomes of everything that is tried after waking."""

    def stop(*args):
        (marks / "pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    def stop_in_write(path: Path) -> None:
        stop()
        if where == "write":  # cleared up meanwhile, and made again, as save_pretrained would
            path.mkdir(exist_ok=True)
        writes(b"of the stopped")(path)

    with suppress(RecordError), a_stage(folder).attempt(timeout_s=1.0) as attempt:
        attempt.save_checkpoint(1, writes())
        if where == "outside":
            stop()
        elif where == "commit":
            real = store._sha256
            store._sha256 = lambda result: (stop(), real(result))[1]
        write = stop_in_write if where.startswith("write") else writes(b"of the stopped")
        tries = {
            "save": lambda: attempt.save_checkpoint(2, write),
            "publish": lambda: attempt.publish("model", write),
            "resumed": lambda: attempt.resumed(0),
            "commit": lambda: attempt.commit("ok", {"by": "the stopped"}),
        }
        for name in ["commit"] if where == "commit" else tries:
            try:
                tries[name]()
                outcome = "went through"
            except RecordError as error:
                outcome = f"RecordError: {error}"
            (marks / name).write_text(outcome)


@pytest.mark.parametrize("where", ["outside", "write", "write without mkdir", "commit"])
def test_a_holder_that_slept_through_its_lease_changes_nothing(tmp_path, request, where):
    marks = tmp_path / "marks"
    marks.mkdir()
    holder = processes.Process(target=_hold, args=(tmp_path / "run", where, marks))
    holder.start()
    request.addfinalizer(holder.kill)  # or a failure here leaves a stopped process to wait for
    wait_for((marks / "pid").exists)
    wait_for(lambda: Path(f"/proc/{holder.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
    stage = a_stage(tmp_path / "run")
    wait_for(lambda: stage.holder(timeout_s=1.0) is None)
    with stage.attempt(timeout_s=1.0) as attempt:
        os.kill(holder.pid, signal.SIGCONT)
        holder.join(WAIT_S)
        assert holder.exitcode == 0
        outcomes = {path.name: path.read_text() for path in marks.iterdir() if path.name != "pid"}
        assert set(outcomes) == ({"commit"} if where == "commit" else {"save", "publish", "resumed", "commit"})
        assert all("RecordError" in text and "lost its lease" in text for text in outcomes.values()), outcomes
        assert stage.result() is None and stage.checkpoint_steps() == [1] and not (stage.path / "model").exists()
        attempt.commit("ok", {"by": "the second"})
    assert stage.result()["attempt"] == attempt.number and stage.result()["figures"] == {"by": "the second"}


# --- checkpoints -----------------------------------------------------------------------------------------------------


def test_the_two_newest_checkpoints_and_the_kept_ones_stay(tmp_path):
    stage = a_stage(tmp_path)
    with stage.attempt() as attempt:
        for step in range(1, 7):
            attempt.save_checkpoint(step, writes(b"%d" % step), keep={2})
    assert stage.checkpoint_steps() == [2, 5, 6]
    assert stage.latest_checkpoint() == (6, stage.checkpoint(6))
    assert (stage.checkpoint(2) / "model.bin").read_bytes() == b"2"
    assert list(stage.path.rglob(".*")) == []


def test_a_step_saved_again_replaces_the_old_one(tmp_path):
    stage = a_stage(tmp_path)
    with stage.attempt() as attempt:
        attempt.save_checkpoint(1, writes(b"old"))
        attempt.save_checkpoint(1, writes(b"new"))
    assert (stage.checkpoint(1) / "model.bin").read_bytes() == b"new" and leftovers(stage.path) == []


def test_everything_is_synced_before_it_is_moved_into_place_and_the_folder_after(tmp_path, monkeypatch):
    log: list[tuple[str, Path]] = []
    fsync, replace, link = os.fsync, os.replace, os.link

    def synced(handle: int) -> None:
        log.append(("sync", Path(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: (log.append(("move", Path(b))), replace(a, b)))
    monkeypatch.setattr(os, "link", lambda a, b: (log.append(("move", Path(b))), link(a, b)))
    stage = a_stage(tmp_path)
    with stage.attempt() as attempt:
        attempt.log_metrics({"step": 1})
        log.clear()
        target = attempt.save_checkpoint(1, writes())
        moved = log.index(("move", target))
        aside = target.parent / ".tmp-1-step-1"
        names = ["", "model.bin", "sub", "sub/state.json", "manifest.json"]
        before = {path for what, path in log[:moved] if what == "sync"}
        assert {aside / name for name in names} | {attempt.path / "metrics.jsonl"} <= before
        assert log[moved + 1] == ("sync", target.parent)
        log.clear()
        attempt.commit("ok", {}, [target])
        decided = log.index(("move", stage.path / "lease" / "2"))
        assert ("sync", target / "model.bin") in log[:decided] and ("sync", stage.path / "lease") in log[decided:]
        assert log[-2:] == [("move", stage.path / "result.json"), ("sync", stage.path)]


def test_a_stage_without_rows_syncs_what_its_commit_depends_on_and_no_more(tmp_path, monkeypatch):
    run, log, fsync = Run.open(tmp_path / "run", {}), [], os.fsync

    def synced(handle: int) -> None:
        log.append(Path(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    stage = run.stage("none", {})
    with stage.attempt() as attempt:
        attempt.commit("ok", {})
    lease = stage.path / "lease"
    written = [path.parent for path in log if path.name.startswith(".tmp-")]
    assert written == [stage.path, lease, lease, stage.path]  # config.json, held, committed, result.json
    assert [path for path in log if not path.name.startswith(".tmp-")] == [lease, lease, stage.path]
    assert json.loads((attempt.path / "env.json").read_text()) == {} and leftovers(stage.path) == []


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "reason"),
    [
        ("model.bin", flip, "model.bin has another sha256 than its manifest"),
        ("model.bin", Path.unlink, "model.bin is missing"),
        ("model.bin", lambda path: os.truncate(path, 3), "model.bin has 3 bytes instead of 7"),
        ("sub/state.json", Path.unlink, "sub/state.json is missing"),
        ("manifest.json", Path.unlink, "manifest.json is missing"),
        ("manifest.json", lambda path: os.truncate(path, 20), "manifest.json is not readable"),
        ("manifest.json", lambda path: os.truncate(path, 0), "manifest.json is not readable"),
    ],
)
def test_a_torn_checkpoint_is_named_and_the_one_before_is_used(tmp_path, name, harm, reason):
    stage = a_stage(tmp_path)
    with stage.attempt() as attempt:
        for step in (1, 2):
            attempt.save_checkpoint(step, writes())
    harm(stage.checkpoint(2) / name)
    with pytest.raises(RecordError, match=f"step-2 is damaged: {reason}"):
        stage.checkpoint(2)
    torn = []
    with stage.attempt() as attempt:
        assert attempt.resume(lambda path, why: torn.append((path.name, why))) == (1, stage.checkpoint(1))
        assert stage.checkpoint_steps() == [1]
    assert torn == [("step-2", reason)] and reason in (attempt.path / "events.jsonl").read_text()


def test_any_flipped_bit_of_a_manifest_is_noticed(tmp_path):
    stage = a_stage(tmp_path)
    with stage.attempt() as attempt:
        attempt.save_checkpoint(1, writes())
    manifest = stage.checkpoint(1) / "manifest.json"
    whole = manifest.read_bytes()
    for position in range(len(whole)):
        manifest.write_bytes(whole[:position] + bytes([whole[position] ^ 2]) + whole[position + 1 :])
        assert checkpoint.damage(manifest.parent), f"byte {position}"


def test_a_failing_write_leaves_what_was_there(tmp_path):
    def fails(folder: Path) -> None:
        writes()(folder)
        raise KeyError("a bug")

    stage = a_stage(tmp_path)
    with stage.attempt() as attempt:
        attempt.save_checkpoint(1, writes(b"good"))
        attempt.publish("model", writes(b"good"))
        with pytest.raises(KeyError):
            attempt.save_checkpoint(1, fails)
        with pytest.raises(KeyError):
            attempt.publish("model", fails)
    assert checkpoint.damage(stage.path / "model") is None and leftovers(stage.path) == []
    assert (stage.checkpoint(1) / "model.bin").read_bytes() == b"good"


def _fill_the_disk(folder: Path, how: str, outcome: Path) -> None:
    def big(path: Path) -> None:
        (path / "small.bin").write_bytes(b"x")
        if how == "safetensors":
            import numpy
            from safetensors.numpy import save_file

            save_file({"w": numpy.zeros(20000)}, path / "model.safetensors")
        elif how == "torch":  # what torch.save("path") says, without importing torch here
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
        else:
            (path / "model.bin").write_bytes(b"x" * 100000)

    with a_stage(folder).attempt() as attempt:
        attempt.save_checkpoint(1, writes())
        attempt.save_checkpoint(2, writes())
        resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
        try:
            if how == "rows":
                for step in range(1000):
                    attempt.log_metrics({"step": step, "filler": "x" * 100})
            elif how == "publish":
                attempt.publish("model", big)
            elif how == "commit":
                attempt.commit("ok", {"filler": "x" * 100000})
            else:
                attempt.save_checkpoint(3, big)
        except StorageError as error:
            outcome.write_text(str(error))


@pytest.mark.parametrize("how", ["bytes", "safetensors", "torch", "publish", "rows", "commit"])
def test_a_full_disk_is_said_in_one_line_and_the_last_checkpoint_survives(tmp_path, how):
    assert in_process(_fill_the_disk, tmp_path / "run", how, tmp_path / "outcome") == 0
    message = (tmp_path / "outcome").read_text()
    reason = "torch could not finish the file" if how == "torch" else os.strerror(errno.EFBIG)
    assert reason in message and "checkpoint step-2 survives" in message and "GB free" in message
    assert "run the same command again: it resumes" in message and "\n" not in message
    stage = a_stage(tmp_path / "run")
    assert stage.latest_checkpoint()[0] == 2 and leftovers(stage.path) == [] and stage.result() is None
    with stage.attempt() as attempt:
        assert attempt.resume()[0] == 2
        attempt.save_checkpoint(3, writes())
        attempt.commit("ok", {})
    assert stage.done and stage.metrics() == ([] if how != "rows" else stage.metrics())


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_of_a_resumed_attempt_replace_those_it_discarded(tmp_path):
    stage = a_stage(tmp_path)
    with stage.attempt() as attempt:
        assert attempt.resume() is None
        attempt.log_metrics({"loss": 9.0})
        for step in range(5):
            attempt.log_metrics({"step": step, "loss": 1.0})
            attempt.log_metrics({"step": step, "phase": "dev", "score": 1.0})
            if step == 2:
                attempt.save_checkpoint(step, writes())
    with stage.attempt() as attempt:
        assert attempt.resume()[0] == 2
        attempt.log_metrics({"step": 3, "loss": 2.0})
    rows = stage.metrics()
    assert [row["loss"] for row in rows if "phase" not in row] == [9.0, 1.0, 1.0, 1.0, 2.0]
    assert [row["step"] for row in rows if row.get("phase") == "dev"] == [0, 1, 2]
    with stage.attempt() as attempt:
        attempt.resumed(-1)
    assert stage.metrics() == [{"loss": 9.0}] and stage.checkpoint_steps() == []


def test_a_torn_last_row_is_ignored_and_one_elsewhere_is_warned_of(tmp_path, recwarn):
    stage = a_stage(tmp_path)
    with stage.attempt() as attempt:
        for step in (1, 2):
            attempt.log_metrics({"step": step})
    file = attempt.path / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + b'{"step":3,"lo')
    assert [row["step"] for row in stage.metrics()] == [1, 2] and len(recwarn) == 0
    file.write_bytes(file.read_bytes() + b'{"step":4}\n{"step":5}\n')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl, line 3, is torn"):
        assert [row["step"] for row in stage.metrics()] == [1, 2, 5]


def test_non_finite_figures_survive_as_strict_json(tmp_path):
    numpy = pytest.importorskip("numpy")
    stage = a_stage(tmp_path)
    with stage.attempt() as attempt:
        attempt.log_metrics({"step": numpy.int64(1), "loss": numpy.float32("nan"), "kl": [math.inf, -math.inf]})
        attempt.commit("diverged", {"loss": math.nan, "where": Path("a/b")})
    text = (attempt.path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] == "NaN"
    (row,) = stage.metrics()
    assert row["step"] == 1 and math.isnan(row["loss"]) and row["kl"] == [math.inf, -math.inf]
    assert math.isnan(stage.result()["figures"]["loss"]) and stage.result()["figures"]["where"] == "a/b"


# --- commits ---------------------------------------------------------------------------------------------------------


def test_a_stage_is_committed_once_with_the_checksums_of_its_files(tmp_path):
    stage = a_stage(tmp_path)
    with stage.attempt() as attempt:
        attempt.publish("model", writes())
        (stage.path / "rollouts.jsonl").write_text("{}\n")
        attempt.commit("ok", {"accuracy": 0.5}, [Path("model"), stage.path / "rollouts.jsonl"])
        with pytest.raises(RecordError, match="never committed twice"):
            attempt.commit("ok", {"accuracy": 0.6})
        with pytest.raises(RecordError, match="lost its lease"):
            attempt.save_checkpoint(1, writes())
    result = stage.result()
    assert stage.done and result["figures"] == {"accuracy": 0.5} and stage.holder() is None
    assert {"model/model.bin", "model/sub/state.json", "rollouts.jsonl"} <= set(result["files"])
    with pytest.raises(RecordError, match="nothing is left to do"), stage.attempt():
        pass
    with pytest.raises(RecordError, match="committed as ok"):
        stage.reopen()
    stage.verify()
    flip(stage.path / "model" / "model.bin")
    with pytest.raises(RecordError, match=r"model\.bin changed"):
        stage.verify()


def test_an_unknown_status_or_a_missing_file_is_not_committed(tmp_path):
    stage = a_stage(tmp_path)
    with stage.attempt() as attempt:
        with pytest.raises(ValueError, match="oom"):
            attempt.commit("done", {})  # type: ignore[arg-type]
        with pytest.raises(FileNotFoundError):
            attempt.commit("ok", {}, [Path("model")])
    assert stage.result() is None


def test_a_damaged_result_is_refused_and_restored_once_removed(tmp_path):
    stage = a_stage(tmp_path)
    with stage.attempt() as attempt:
        attempt.commit("ok", {"accuracy": 0.5})
    path = stage.path / "result.json"
    path.write_text(path.read_text().replace("0.5", "0.9"))
    with pytest.raises(RecordError, match="damaged"):
        stage.result()
    path.unlink()
    assert stage.result()["figures"] == {"accuracy": 0.5} and path.exists()


def test_a_failed_stage_can_be_reopened_and_keeps_its_first_result(tmp_path):
    stage = a_stage(tmp_path)
    with stage.attempt() as first:
        first.commit("oom", {"peak_gib": 80})
    assert not stage.done
    with pytest.raises(RecordError, match="committed as oom; reopen it"), stage.attempt():
        pass
    stage.reopen()
    stage.reopen()
    assert stage.result() is None and json.loads((first.path / "result.json").read_text())["status"] == "oom"
    with stage.attempt() as second:
        second.commit("ok", {})
    assert stage.done and stage.result()["attempt"] == second.number > first.number


def test_two_machines_folders_unite_by_copying(tmp_path):
    import shutil

    for host in ("a", "b"):
        run = Run.open(tmp_path / host, SPEC)
        with run.stage("sft", {"of": host}).attempt() as attempt:
            attempt.commit("ok", {"of": host})
        with run.stage("shared", {}).attempt() as attempt:
            attempt.log_metrics({"step": 1})
            attempt.commit("ok", {})
    shutil.copytree(tmp_path / "a", tmp_path / "b", dirs_exist_ok=True)
    assert [stage.done for stage in Run.open(tmp_path / "b", SPEC).stages()] == [True] * 3


# --- killed at every write and rename --------------------------------------------------------------------------------

STEPS = 4


def _live(folder: Path, crash_at: int, diary: Path) -> None:
    """One life of a trainer: resume, train, save, export, commit; killed at the n-th crash point (0: never)."""
    checkpoint._calls = 0
    os.environ["SRPPO_CRASH_AT"] = str(crash_at)
    os.environ["SRPPO_CRASH_COUNT"] = str(diary) + ".count"

    def note(text: str) -> None:
        with open(diary, "a") as file:
            file.write(text + "\n")

    run = Run.open(folder, SPEC)
    run.write_data_manifest({"rows": 1})
    stage = run.stage("ppo", {"lr": 1e-4}, ["abc"], "data")
    if stage.done:
        return
    with stage.attempt() as attempt:
        found = attempt.resume(lambda path, reason: note(f"torn {path.name} {reason}"))
        first = found[0] if found else 0
        note(f"resumed {first}")
        for step in range(first + 1, STEPS + 1):
            attempt.log_metrics({"step": step, "loss": 1 / step})
            for _ in range(2 if step == 2 else 1):  # a step saved again
                attempt.save_checkpoint(step, writes(b"weights of %d" % step), keep={1})
                note(f"saved {step}")
        for _ in range(2):  # an export repeated
            attempt.publish("model", writes(b"the export"))
        attempt.commit("ok", {"loss": 1 / STEPS}, [stage.path / "model"])


def noted(diary: Path, word: str) -> list[str]:
    lines = diary.read_text().splitlines() if diary.exists() else []
    return [line.split(maxsplit=1)[1] for line in lines if line.startswith(word)]


def inspect_the_dead(folder: Path, diary: Path) -> None:
    """What any reader may rely on right after a kill, before anybody repairs anything."""
    if not (folder / "sweep.json").exists():
        return
    stages = Run.load(folder).stages()
    if not stages:
        return
    (stage,) = stages
    saved = max(map(int, noted(diary, "saved")), default=0)
    found = stage.latest_checkpoint(lambda path, reason: pytest.fail(f"{path} is torn: {reason}"))
    assert (found[0] if found else 0) >= saved - 1, "more than the newest checkpoint is lost"
    if (stage.path / "model").exists():
        assert checkpoint.damage(stage.path / "model") is None
    if stage.result() is not None:
        stage.verify()
    assert [row["step"] for row in stage.metrics()] == list(range(1, len(stage.metrics()) + 1))


def inspect_the_finished(folder: Path, diary: Path) -> None:
    stage = a_stage(folder)
    assert stage.done and stage.result()["figures"] == {"loss": 1 / STEPS}
    stage.verify()
    assert [row["step"] for row in stage.metrics()] == [1, 2, 3, 4]
    assert set(stage.checkpoint_steps()) - {2} == {1, 3, 4}  # one killed just before it was dropped may stay
    assert (stage.checkpoint(4) / "model.bin").read_bytes() == b"weights of 4"
    assert (stage.path / "model" / "model.bin").read_bytes() == b"the export"
    assert noted(diary, "torn") == [] and leftovers(stage.path) == []
    lives = diary.read_text().splitlines()
    for before, line in itertools.pairwise(lives):
        if before.startswith("saved") and line.startswith("resumed"):
            assert int(line.split()[1]) >= int(before.split()[1]), "a checkpoint that was saved is lost"


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """A folder in memory where there is one: a kill does not care about the disk, and syncs cost nothing."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path_factory.mktemp("kills")
        return
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def crash_points(memory) -> int:
    folder = memory / "count"
    folder.mkdir()
    assert in_process(_live, folder / "run", 0, folder / "diary") == 0
    inspect_the_finished(folder / "run", folder / "diary")
    return int((folder / "diary.count").read_text())


def test_killed_at_any_write_or_rename_a_run_resumes(memory, crash_points):
    assert crash_points > 60
    for point in range(1, crash_points + 1):
        folder, diary = memory / str(point), memory / f"diary{point}"
        assert in_process(_live, folder, point, diary) == -signal.SIGKILL, point
        inspect_the_dead(folder, diary)
        assert in_process(_live, folder, 0, diary) == 0, point
        inspect_the_finished(folder, diary)


def test_killed_again_and_again_a_run_still_resumes(memory, crash_points):
    dice = random.Random(0)
    for game in range(15):
        folder, diary = memory / f"game{game}", memory / f"diary-game{game}"
        for _ in range(4):
            in_process(_live, folder, dice.randint(1, crash_points), diary)
            inspect_the_dead(folder, diary)
        assert in_process(_live, folder, 0, diary) == 0
        inspect_the_finished(folder, diary)


def test_what_the_dead_left_behind_is_swept_and_what_may_be_alive_is_not(tmp_path):
    stage = a_stage(tmp_path)
    with stage.attempt() as attempt:
        attempt.save_checkpoint(1, writes())
    old, young = stage.path / ".tmp-aax", stage.path / ".tmp-bbx"
    old.write_text("")
    young.write_text("")
    os.utime(old, (0, 0))
    (stage.path / "checkpoints" / ".tmp-1-step-2").mkdir()
    (stage.path / "checkpoints" / ".gone-abc").mkdir()
    (stage.path / "checkpoints" / "step-1").rename(stage.path / "checkpoints" / ".old-step-1")
    with stage.attempt() as attempt:
        assert attempt.resume()[0] == 1
    assert not old.exists() and young.exists() and leftovers(stage.path) == []
