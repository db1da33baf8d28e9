"""Kill a real run again and again; what it ends with must be, to the bit, what an undisturbed run ends with.

    python tests/torture.py                 20 kills spread evenly over the run's duration, one at each durable write
                                            and rename, and some runs that are killed four times (`make torture`)
    python tests/torture.py --moments 5 --every 10 --games 1      a sample of it

A run is `srppo train` on a one-layer model: base figures, SFT, PPO, export. Each life is a process of its own, killed
with SIGKILL. To spare each the seconds that importing torch takes, lives are forked by a server that has imported
everything and has run nothing: it has one thread.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
LIMIT_S = 120.0  # beyond it a life hangs
# Nine SFT and eight PPO steps, two of three PPO steps without a checkpoint; the kept step moves as the NLL falls.
OVERRIDES = {
    "sft.epochs": 3,
    "ppo.steps": 8,
    "ppo.checkpoint_every": 3,
    "ppo.schedule": "linear",
    "ppo.warmup": 0.3,
    "ppo.micro_tokens": 3,
    "eval.every": 4,
    "eval.metric": "nll",
}


# ---- the server: forks lives


def serve() -> None:
    """Read orders from stdin, a JSON line each; answer each with a JSON line. Ends, with its children, at EOF."""
    import torch

    torch.set_num_threads(1)
    # What a run imports on the way.
    import matplotlib
    from transformers.models.llama import modeling_llama  # noqa: F401

    import srppo.cli.app
    import srppo.environment
    import srppo.report.run
    import srppo.stages.run
    import srppo.training.trackers  # noqa: F401

    matplotlib.use("agg")
    threads = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 1
    if threads != 1:
        sys.exit(f"the server has {threads} threads; what it forks could hang")
    gc.collect()
    gc.freeze()  # a child that collects garbage would copy all of it
    children = set()
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            pid, status = os.waitpid(order["wait"], 0 if order["block"] else os.WNOHANG)
            children.discard(pid)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        else:
            pid = os.fork()
            if pid == 0:
                live(order)
            children.add(pid)
            print(json.dumps(pid), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)  # libraries grumble at their own teardown


def live(order: dict[str, Any]) -> None:
    """One life: `srppo train` with the order's arguments; does not return."""
    import srppo.cli.app
    import srppo.record.files
    import srppo.report.run

    code: Any = 70
    try:
        for source, target in ((os.open(os.devnull, os.O_RDONLY), 0), (_append_to(order["log"]), 1)):
            os.dup2(source, target)
        os.dup2(1, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(order["env"])
        srppo.report.run.report_run = lambda *_: None  # reads a finished record, and takes longer than the run
        if order["points"]:
            plain = srppo.record.files._durable

            def noted(op: str, path: Path) -> None:
                with open(order["points"], "a") as file:
                    file.write(f"{op} {path}\n")
                plain(op, path)

            srppo.record.files._durable = noted
        if order["file_limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"], order["file_limit"]))
        sys.argv = ["srppo", "train", order["recipe"], "--out", order["out"], "--plain", "--device", "cpu"]
        srppo.cli.app.main()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 70)


def _append_to(path: str) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


# ---- the client: orders lives and kills them


@dataclass
class Life:
    """A process that runs `srppo train`; its output goes to `log`."""

    server: Server
    pid: int
    folder: Path
    log: Path
    code: int | None = None

    def wait(self) -> int:
        """The exit code, or minus the signal that ended it."""
        if not self.until(lambda: False):
            self.kill()
            raise TimeoutError(f"a life in {self.folder} hangs:\n{self.log.read_text()[-2000:]}")
        assert self.code is not None
        return self.code

    def kill(self) -> int:
        """SIGKILL, unless it has ended by itself."""
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.code = self.server.ask(wait=self.pid, block=True)
        return self.code

    def until(self, condition: Callable[[], bool], limit_s: float = LIMIT_S) -> bool:
        """Wait for the condition or the end of the process; False when neither comes in time."""
        end = time.monotonic() + limit_s
        while self.code is None and not condition():
            if time.monotonic() > end:
                return False
            time.sleep(0.001)
            self.code = self.server.ask(wait=self.pid, block=False)
        return True

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Server:
    """Starts lives, by default one after another in one run folder."""

    def __init__(self, recipe: Path) -> None:
        self.recipe = recipe
        environment = {**os.environ, **ONE_THREAD, "TOKENIZERS_PARALLELISM": "false"}
        for name in ("SRPPO_CRASH_AT", "SRPPO_CRASH_COUNT"):
            environment.pop(name, None)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=recipe.parent,
        )
        if self._answer() != "ready":
            raise RuntimeError("the fork server did not start")

    def ask(self, **order: Any) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the fork server ended")
        return json.loads(line)

    def start(
        self, folder: Path, *, crash_at: int | None = None, points: Path | None = None, file_limit: int | None = None
    ) -> Life:
        """Begin or resume the run in `folder`. crash_at: the durable call at which it kills itself. points: a file for
        a line each such call. file_limit: bytes a file may have, as on a full disk."""
        log = folder.with_name(f"{folder.name}.log")
        log.write_text("")
        pid = self.ask(
            recipe=str(self.recipe),
            out=str(folder),
            log=str(log),
            env={"SRPPO_CRASH_AT": str(crash_at)} if crash_at else {},
            points=str(points) if points else None,
            file_limit=file_limit,
        )
        return Life(self, pid, folder, log)

    def finish(self, folder: Path) -> dict[str, str]:
        """Run the same command to its end; the bits it ends with."""
        life = self.start(folder)
        if code := life.wait():
            raise RuntimeError(f"the run in {folder} ended with {code}:\n{life.log.read_text()[-2000:]}")
        return bits(folder)

    def stop(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


@contextmanager
def workplace() -> Iterator[tuple[Path, Server]]:
    """A folder, in memory where there is one (a kill does not care about the disk), and a server for a run in it."""
    from worlds import make_world

    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory, prefix="srppo-torture-") as name:
        (folder := Path(name)).joinpath("world").mkdir()
        recipe = make_world(folder / "world").recipe_file(folder / "recipe.toml", OVERRIDES)
        server = Server(recipe)
        try:
            yield folder, server
        finally:
            server.stop()


# ---- what is left behind


def bits(folder: Path) -> dict[str, str]:
    """A digest of everything that must not depend on how often a run was killed, by name.

    Exports, the last checkpoint (weights, optimizers, counters, random state), metrics without timing, rollouts,
    figures, samples and checksums in the result; the ids of stages and which steps they kept.
    """
    import torch

    from srppo.config import canonical_json
    from srppo.record.store import Run

    found: dict[str, str] = {}
    for stage in Run.load(folder).stages():
        kind, result = stage.identity["kind"], stage.result()
        assert result is not None, f"{kind} is not committed"
        stage.verify()
        rows = [{k: v for k, v in row.items() if k != "timing"} for row in stage.metrics()]
        found[f"{kind}: id"] = stage.id
        found[f"{kind}: metrics"] = digest(repr(rows))
        found[f"{kind}: rollouts"] = digest(repr(stage.rollouts()))
        for name in ("status", "figures", "files"):
            found[f"{kind}: result's {name}"] = digest(canonical_json(result[name]))
        for file in [*stage.path.glob("model/*"), *stage.path.glob("eval/*/*")]:
            found[f"{kind}: {file.relative_to(stage.path)}"] = digest(file.read_bytes())
        if last := stage.latest_checkpoint():
            found[f"{kind}: last checkpoint"] = str(last[0])
            for file in last[1].glob("*.safetensors"):
                found[f"{kind}: {file.stem} at the last step"] = digest(file.read_bytes())
            state = torch.load(last[1] / "trainer.pt", weights_only=True)
            for name, part in [*state.pop("optimizers").items(), *state.items()]:
                found[f"{kind}: trainer's {name} at the last step"] = tree_digest(part)
            stage.checkpoint(result["figures"]["kept_step"] or last[0])
    kinds = sorted(name.split(":")[0] for name in found if name.endswith(": id"))
    assert kinds == ["base", "ppo", "sft"], kinds
    left = [str(path) for path in folder.rglob(".*-*") if re.match(r"\.(old-|gone-|tmp-\d+-)", path.name)]
    assert not left, f"not cleared up: {left}"
    return found


def digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


def tree_digest(tree: Any) -> str:
    """Digest of nested containers of tensors and numbers, exact."""
    import torch

    if isinstance(tree, torch.Tensor):
        return digest(f"{tree.dtype} {tuple(tree.shape)}".encode() + tree.contiguous().numpy().tobytes())
    if isinstance(tree, dict):
        return digest(
            repr([(key, tree_digest(value)) for key, value in sorted(tree.items(), key=lambda item: repr(item[0]))])
        )
    if isinstance(tree, list | tuple):
        return digest(repr([tree_digest(value) for value in tree]))
    return digest(repr(tree))


def differences(expected: dict[str, str], found: dict[str, str]) -> list[str]:
    """Names of what differs."""
    return sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))


def logged(folder: Path, kind: str) -> int:
    """The last step whose row is on disk, of one kind of stage; -1 before the first."""
    last = -1
    for config in folder.glob("stages/*/config.json"):
        with suppress(OSError, ValueError):
            if json.loads(config.read_text())["kind"] == kind:
                for rows in config.parent.glob("attempts/*/metrics.jsonl"):
                    for line in rows.read_text().splitlines():
                        last = max(last, json.loads(line)["step"])
    return last


def place(folder: Path) -> str:
    """Where a run stands, in words: stages done, and how far the one begun has come."""
    from srppo.record.store import Run

    if not (folder / "sweep.json").exists():
        return "before the record"
    stages = {stage.identity["kind"]: stage for stage in Run.load(folder).stages()}
    begun = [kind for kind in ("base", "sft", "ppo") if kind in stages]
    if not begun:
        return "before the base figures"
    kind, stage = begun[-1], stages[begun[-1]]
    if stage.done:
        return f"{kind} done"
    steps = ", ".join(map(str, stage.checkpoint_steps())) or "none"
    return f"{kind} after step {logged(folder, kind)}, checkpoints {steps}"


def resumed_from(folder: Path) -> str:
    """Where the last attempts went on."""
    parts = []
    for kind in ("sft", "ppo"):
        for config in folder.glob("stages/*/config.json"):
            if json.loads(config.read_text())["kind"] == kind:
                events = [p.read_text().splitlines() for p in sorted(config.parent.glob("attempts/*/events.jsonl"))]
                steps = [e["step"] for lines in events for e in map(json.loads, lines) if e["event"] == "resumed"]
                if len(steps) > 1:
                    parts.append(f"{kind} from {'the start' if steps[-1] < 0 else f'step {steps[-1]}'}")
    return ", ".join(parts) or "nothing to resume"


# ---- the torture


class Report:
    """Lines as they come, and the count of what failed."""

    def __init__(self, expected: dict[str, str]) -> None:
        self.expected, self.trials, self.failed = expected, 0, 0

    def trial(self, label: str, server: Server, folder: Path, killed: bool) -> None:
        """Finish the run and compare; forget it when all is well."""
        self.trials += 1
        before = place(folder)
        try:
            wrong = differences(self.expected, server.finish(folder))
            verdict = "bitwise equal" if not wrong else f"DIFFERS in {', '.join(wrong)}"
        except (RuntimeError, AssertionError, TimeoutError, OSError) as error:
            wrong, verdict = ["error"], f"FAILED: {error}"
        if not killed:
            wrong, verdict = ["not killed"], f"NOT KILLED; {verdict}"
        self.failed += bool(wrong)
        print(f"{label:<54} {before:<44} {resumed_from(folder):<34} {verdict}", flush=True)
        shutil.rmtree(folder, ignore_errors=True)


def kill_at_moments(report: Report, server: Server, folder: Path, count: int, duration_s: float) -> int:
    """Kills spread evenly over the duration, each at a random moment of its share; how many hit after a checkpoint."""
    dice, after = random.Random(0), 0
    for k in range(count):
        moment = duration_s * (k + dice.random()) / count
        while True:  # a run that was faster than the first is killed a little earlier
            run = folder / f"moment{k}"
            life = server.start(run)
            end = time.monotonic() + moment
            life.until(lambda end=end: time.monotonic() >= end)
            if life.kill() == -signal.SIGKILL:
                break
            shutil.rmtree(run)
            moment *= 0.95
        after += any(run.glob("stages/*/checkpoints/step-*"))
        report.trial(f"killed after {moment:.2f} s", server, run, True)
    return after


def kill_at_writes(report: Report, server: Server, folder: Path, points: list[str], every: int) -> None:
    """A kill right before and right after each durable write, link and rename."""
    for number, point in list(enumerate(points, 1))[::every]:
        run = folder / f"point{number}"
        code = server.start(run, crash_at=number).wait()
        report.trial(f"{number}/{len(points)} {point}", server, run, code == -signal.SIGKILL)


def kill_again_and_again(report: Report, server: Server, folder: Path, points: int, games: int) -> None:
    """Four kills of one run, at random writes of lives that resumed."""
    dice = random.Random(1)
    for game in range(games):
        run, killed = folder / f"game{game}", []
        for _ in range(4):
            crash_at = dice.randint(1, max(points // 2, 1))
            if server.start(run, crash_at=crash_at).wait() == -signal.SIGKILL:
                killed.append(crash_at)
        report.trial(f"killed at writes {', '.join(map(str, killed))} of its lives", server, run, bool(killed))


def name_points(file: Path, folder: Path) -> list[str]:
    """What each durable call was about, without random names; paths from the run's folder, stages by their kind."""
    kinds = {c.parent.name: json.loads(c.read_text())["kind"] for c in folder.glob("stages/*/config.json")}
    names = []
    for line in file.read_text().splitlines():
        line = line.replace(f"{folder}/", "")
        line = re.sub(r"stages/([0-9a-f]{16})", lambda found: kinds.get(found[1], found[1]), line)
        names.append(re.sub(r"[0-9a-f]{32}", "*", line))
    return names


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20, help="kills spread over the duration (20)")
    parser.add_argument("--every", type=int, default=1, help="kill at every n-th durable write or rename (1)")
    parser.add_argument("--games", type=int, default=10, help="runs that are killed four times (10)")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve()
        return 0
    began = time.monotonic()
    with workplace() as (folder, server):
        server.finish(folder / "warm")  # fills the disk's caches, so that the next is timed fairly
        start = time.monotonic()
        life = server.start(folder / "reference", points=folder / "points")
        if life.wait():
            print(life.log.read_text())
            return 1
        duration_s = time.monotonic() - start
        expected = bits(folder / "reference")
        points = name_points(folder / "points", folder / "reference")
        print(f"an undisturbed run: {duration_s:.2f} s, {len(points)} crash points, {len(expected)} figures and files")
        report = Report(expected)
        report.trial("never killed, run again", server, folder / "warm", True)
        after = kill_at_moments(report, server, folder, options.moments, duration_s)
        print(f"{options.moments} kills spread over the run, {after} of them after the first checkpoint", flush=True)
        if after < min(5, options.moments // 4):
            print("too few kills after the first checkpoint")
            report.failed += 1
        kill_at_writes(report, server, folder, points, options.every)
        kill_again_and_again(report, server, folder, len(points), options.games)
    seconds = time.monotonic() - began
    print(f"{report.trials} runs compared, {report.failed} failed, {seconds:.0f} s")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main())
