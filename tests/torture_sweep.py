"""Kill a real sweep again and again, drivers and stages; its table must be, to the bit, that of an undisturbed one.

    python tests/torture_sweep.py                           20 kills over five runs of one sweep (`make torture`)
    python tests/torture_sweep.py --kills 4 --runs 1        a sample of it

The sweep is `srppo ablate data-size` with two sizes, one seed and two stages at once, on the smallest embedded base. A
driver is `srppo worker`, forked from this process, which has imported everything and run nothing; its worker is a
process of its own. At random moments one of {driver, stage process} gets SIGKILL. What was committed before a kill must
stay as it is, and a stage may only be run again if its process had died.
"""

from __future__ import annotations

import os

os.environ.update({name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")})
os.environ.update({"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"})

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import srppo.ablations.execute  # noqa: F401  torch, before any fork
from srppo.ablations.analysis import analyse
from srppo.ablations.options import build_sweep, read_options
from srppo.ablations.run import Launch, forgive, load_sweep, work_command
from srppo.ablations.spec import Sweep
from srppo.cli.sweep import SMALL
from srppo.config import canonical_json, load_recipe
from srppo.console import Console
from srppo.record.json import plain, read_lines
from srppo.record.lease import _process_start
from srppo.record.store import Run
from srppo.world.items import items

LIMIT_S = 300.0  # beyond it a driver hangs
OVERRIDES = ["ppo.steps=8", "ppo.checkpoint_every=2", "sft.steps=16", "eval.every=4", "eval.limit=6"]


def the_sweep(folder: Path) -> Sweep:
    """Two sizes, two arms, a seed; few items, so that most of the time is stages and their bookkeeping."""
    rows = [
        {"prompt": item.prompt, "answer": item.answer, "group": item.group, "split": split}
        for split in ("dev", "test")
        for group in ("demonstrated", "unseen")
        for item in items(group, split, per_task=3)
    ]
    (file := folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = load_recipe(None, [*SMALL, *OVERRIDES, f"eval.items={file}"])
    options = read_options("data-size", recipe, seeds=1, sizes="8,16", primary="unseen/greedy", quick=True)
    return build_sweep("data-size", options)


# ---- lives


def start(folder: Path) -> int:
    """A driver that joins the sweep: `srppo worker FOLDER --slots 2`."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work_command(folder, Launch(slots=2, device="cpu"), Console(plain=True))
        code = 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(driver: int) -> bool:
    """Whether a driver came to its end; it stays a zombie, so that its number is not given away."""
    return os.waitid(os.P_PID, driver, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def children_of(pid: int) -> list[int]:
    """Those that lead sessions: a driver's worker, and a worker's stages."""
    try:
        children = [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        return [pid for pid in children if os.getsid(pid) == pid]
    except OSError:
        return []


def stages_of(driver: int) -> list[int]:
    """Stages that a driver's worker has forked."""
    return [stage for worker in children_of(driver) for stage in children_of(worker)]


def wait_until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.002)


@dataclass
class Trial:
    """One run of the sweep under kills. lost: stage processes that died by them."""

    folder: Path
    kills: list[str] = field(default_factory=list)
    lost: int = 0
    forgiven: int = 0
    committed: dict[Path, bytes] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)

    def disturb(self, dice: random.Random, count: int, longest_s: float) -> None:
        """Up to `count` kills, each a random while after the one before, the driver's start, or mostly its stages'."""
        driver = start(self.folder)
        while len(self.kills) < count:
            if dice.random() < 0.8:
                wait_until(lambda driver=driver: stages_of(driver) or ended(driver), "a stage")
            moment = time.monotonic() + dice.uniform(0, longest_s)
            wait_until(lambda moment=moment, driver=driver: time.monotonic() >= moment or ended(driver), "a moment")
            if ended(driver):
                break
            driver = self._kill(dice, driver)
        self._finish(driver)

    def _kill(self, dice: random.Random, driver: int) -> int:
        """The driver that goes on: the same, or a new one."""
        children = stages_of(driver)
        victim = dice.choice(children) if children and dice.random() < 0.5 else driver
        self.committed |= self._results()
        os.kill(victim, signal.SIGKILL)
        if victim != driver:
            self.kills.append("stage")
            self.lost += 1
            return driver
        self.kills.append("driver")
        os.waitpid(driver, 0)
        wait_until(lambda: all(_process_start(pid) is None for pid in children), "stages outlive their driver")
        self.lost += len(children)
        return start(self.folder)

    def _finish(self, driver: int) -> None:
        wait_until(lambda: ended(driver), "the last driver")
        code = os.waitstatus_to_exitcode(os.waitpid(driver, 0)[1])
        plan, ledger = load_sweep(self.folder)
        if any(ledger.state(task).status == "failed" for task in plan.tasks.values()):
            self.forgiven += 1  # the same stage was killed three times: `--retry`
            forgive(plan, ledger, Console(quiet=True))
            return self._finish(start(self.folder))
        if code:
            self.complaints.append(f"the last driver ended with {code}")

    def _results(self) -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in self.folder.glob("stages/*/result.json")}

    def check(self, expected: dict[str, str]) -> list[str]:
        """What is wrong in the end; empty where all is well."""
        found, wrong = outcome(self.folder), list(self.complaints)
        wrong += [f"{name} differs" for name in sorted({*expected, *found}) if expected.get(name) != found.get(name)]
        now = self._results()
        wrong += [f"{path.parent.name} was run again" for path, old in self.committed.items() if now.get(path) != old]
        if self.repeats > self.lost:
            wrong.append(f"{self.repeats} attempts were repeated, but {self.lost} stage processes died")
        for stage in Run.load(self.folder).stages():
            for attempt in stage.attempts()[1:]:
                if not any("took_over" in event for event in read_lines(attempt / "events.jsonl")):
                    wrong.append(f"{attempt} followed an attempt that had not died")
        return wrong

    @property
    def repeats(self) -> int:
        return sum(len(stage.attempts()) - 1 for stage in Run.load(self.folder).stages())

    @property
    def resumed(self) -> int:
        """Attempts that went on from a checkpoint."""
        attempts = [attempt for stage in Run.load(self.folder).stages() for attempt in stage.attempts()[1:]]
        events = [event for attempt in attempts for event in read_lines(attempt / "events.jsonl")]
        return sum(event["event"] == "resumed" and event["step"] > 0 for event in events)


def outcome(folder: Path) -> dict[str, str]:
    """All that must not depend on kills: rows of the table, tested differences, and each stage's figures and files."""
    plan, ledger = load_sweep(folder)
    result = analyse(plan, ledger)
    rows = [{key: value for key, value in row.items() if key != "seconds"} for row in result.rows]
    found = {f"row {i}": canonical_json(plain(row)) for i, row in enumerate(rows)}
    found |= {f"difference {i}": repr(each) for i, each in enumerate(result.differences)}
    for key, task in plan.tasks.items():
        stage = ledger.stage(task)
        committed = stage.result() if stage else None
        assert stage and committed, f"{task.name} is not committed"
        stage.verify()
        found |= {f"{key}: {name}": canonical_json(plain(committed[name])) for name in ("status", "figures", "files")}
        metrics = [{k: v for k, v in row.items() if k != "timing"} for row in stage.metrics()]
        found[f"{key}: metrics"] = repr(metrics)
    assert len(rows) == 16, f"{len(rows)} rows: 2 sizes, 2 arms, 2 groups, 2 decodings"
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--runs", type=int, default=5, help="over which the kills are spread (5)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, dice = time.monotonic(), random.Random(options.seed)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a kill does not care about the disk
    with tempfile.TemporaryDirectory(dir=memory, prefix="srppo-torture-") as name:
        sweep = the_sweep(folder := Path(name))
        reference = Trial(folder / "reference")
        Run.open(reference.folder, sweep.as_spec())
        reference.disturb(dice, 0, 0.0)
        duration_s, expected = time.monotonic() - began, outcome(reference.folder)
        print(f"undisturbed: {duration_s:.1f} s, {len(expected)} figures; {reference.repeats} repeats", flush=True)
        kills = failed = number = 0
        while kills < options.kills:
            trial = Trial(folder / f"run{number}")
            Run.open(trial.folder, sweep.as_spec())
            left = options.kills - kills
            trial.disturb(dice, min(left, -(-options.kills // options.runs)), duration_s / 3)
            wrong = trial.check(expected)
            kills, failed, number = kills + len(trial.kills), failed + bool(wrong), number + 1
            print(
                f"run {number}: killed {', '.join(trial.kills) or 'nothing'}; {trial.lost} stages lost, "
                f"{trial.repeats} begun again, {trial.resumed} from a checkpoint, --retry {trial.forgiven} times; "
                + ("; ".join(wrong)[:600] if wrong else f"{len(expected)} figures bitwise equal"),
                flush=True,
            )
    print(f"{kills} kills over {number} runs, {failed} runs wrong, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
