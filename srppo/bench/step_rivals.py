"""TRL's trainers beside our step: a process of its own for each, in an environment of its own, which takes turns.

Their side is `trl_worker.py`, a script that imports nothing of this package. Lines of JSON go to and fro: the work;
then for each step how long each answer is to become, as ours did, and back what it took.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srppo.errors import ConfigError

WORKER = Path(__file__).with_name("trl_worker.py")
OURS = {"ppo": "ppo", "grpo": "rloo", "rloo": "rloo"}
"""Of each trainer, which of our methods does its work: with a critic, or without and with several answers a prompt."""
PROBE_S = 120.0  # until a Python has said what is installed
GRACE_S = 5.0  # from the end of its output to its end
STEP_S = 1800.0  # until a step is done; the first includes importing and building
WANTED = "pip install trl==1.12.0 (PPO) or trl==1.16.0 (GRPO, RLOO)"


class RivalGone(Exception):
    """A rival did not do its step; the message is one line that says why."""


@dataclass(frozen=True)
class Found:
    """One trainer of one environment."""

    python: str
    trainer: str
    versions: dict[str, str | None]

    @property
    def name(self) -> str:
        """As tables name it."""
        return f"TRL {self.versions['trl']} {self.trainer.upper()}"


def find_rivals(pythons: Sequence[str]) -> list[Found]:
    """The trainers of each environment, by its Python. Raises ConfigError, in one line, where there are none."""
    return [found for python in pythons for found in _find(python)]


def _find(python: str) -> list[Found]:
    said, program = f"rival-python is {python!r}", shutil.which(python)
    if program is None:
        raise ConfigError(f"{said}, which is no program; give the Python of an environment that has TRL")
    program = os.path.abspath(program)  # a link is left one: it says which environment is meant
    try:
        done = subprocess.run(
            [program, str(WORKER), "versions"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PROBE_S,
            env=_environment(1),
        )
    except subprocess.TimeoutExpired:
        raise ConfigError(f"{said}, which said nothing in {PROBE_S:.0f} s; give a Python that has TRL") from None
    except OSError as error:
        raise ConfigError(
            f"{said}, which cannot be run: {error.strerror or error}; give a Python that has TRL"
        ) from None
    try:
        answer = json.loads(done.stdout)
        versions, trainers = answer["versions"], answer["trainers"]
    except (ValueError, KeyError, TypeError):
        heard = _last_line(done.stderr) or _last_line(done.stdout) or f"nothing, exit status {done.returncode}"
        raise ConfigError(f"{said}, which answered {heard!r}; give a Python that has TRL") from None
    if versions.get("trl") is None:
        raise ConfigError(f"{said}, where trl is not installed; there: {WANTED}")
    if not trainers:
        raise ConfigError(
            f"{said}, which has TRL {versions['trl']}; compared are 1.12, and 1.16 or later 1.x: {WANTED}"
        )
    return [Found(program, trainer, versions) for trainer in trainers]


class Rival:
    """A running trainer. `close` ends it; what it wrote goes with it."""

    def __init__(self, found: Found, work: dict[str, Any], *, step_s: float | None = None) -> None:
        self.found, self.step_s = found, STEP_S if step_s is None else step_s
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self._errors = Path(self._folder.name, "stderr.txt")
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [found.python, str(WORKER)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                cwd=self._folder.name,
                env=_environment(work["threads"]),
                text=True,
                errors="replace",
            )
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        self._work: str | None = json.dumps(work | {"trainer": found.trainer}) + "\n"

    def step(self, answers: Sequence[int], tokens: int) -> dict[str, Any]:
        """What one step took whose answers become so long: seconds and cpu_s by phase, gc_cpu_s, tokens, answer_tokens,
        peak_bytes.

        tokens: how many the prompts and answers of the step have. Raises RivalGone where it does not come: dead,
        beyond its time, not understood, or another number of tokens.
        """
        try:
            assert self._process.stdin is not None
            self._process.stdin.write((self._work or "") + json.dumps({"answers": list(answers)}) + "\n")
            self._process.stdin.flush()
        except OSError:  # it has ended: the end of its output says so below
            pass
        self._work = None
        try:
            line = self._lines.get(timeout=self.step_s)
        except queue.Empty:
            raise RivalGone(f"gave no step within {self.step_s:.0f} s") from None
        if line is None:
            try:
                status = self._process.wait(timeout=GRACE_S)
            except subprocess.TimeoutExpired:
                raise RivalGone("closed its output and did not end") from None
            words = _last_line(self._errors.read_text(errors="replace"))
            raise RivalGone(f"ended with status {status}" + (f": {words}" if words else ""))
        try:
            row: dict[str, Any] = json.loads(line)
            sums = [sum(row[key].values()) for key in ("seconds", "cpu_s")]
            done, _ = int(row["tokens"]), int(row["answer_tokens"])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise RivalGone(f"said {_short(line)!r}, which is no step") from None
        if done != tokens or min(sums) <= 0:
            raise RivalGone(f"did other work: {done} tokens in {sums[0]:.3g} s, not {tokens}")
        return row

    def close(self) -> None:
        """End the process. What it wrote goes too."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)


def _environment(threads: int) -> dict[str, str]:
    """Ours, but for what would let an environment find packages of another, and the number of threads."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"OMP_NUM_THREADS": str(threads), "TRL_EXPERIMENTAL_SILENCE": "1"}


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _short(lines[-1]) if lines else ""


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 160 else text[:157] + "..."
