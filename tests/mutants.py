"""Mutants of the core, and the test that kills each (`make mutants`).

    python tests/mutants.py [WORD ...]      all, or those whose name or file contains one of the words

Each mutant is one edit of one file, made in a copy of the repository, never in place; only its own tests run, in a
process forked from one that has imported torch but nothing of this package. A mutant is killed when a test fails: one
that cannot be imported or names what is not there, or whose tests cannot be found, does not count.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import mutant_lists
from mutant_lists import Mutant

ROOT = Path(__file__).parent.parent
LIMIT_S = 180
CARELESS = ("NameError", "UnboundLocalError", "AttributeError", "ImportError")  # what no test needs to find

MUTANTS: list[Mutant] = [
    mutant
    for module in pkgutil.iter_modules(mutant_lists.__path__)
    for mutant in importlib.import_module(f"mutant_lists.{module.name}").MUTANTS
]


def problems(root: Path = ROOT) -> list[str]:
    """What is wrong with the list itself: names that repeat, text not there exactly once, tests that do not exist."""
    found = [f"{name}: the name is there {n} times" for name, n in Counter(m.name for m in MUTANTS).items() if n > 1]
    for mutant in MUTANTS:
        times = (root / "srppo" / mutant.file).read_text().count(mutant.old)
        if times != 1:
            found.append(f"{mutant.name}: its text is {times} times in {mutant.file}")
        for node in mutant.tests.split():
            file, _, function = node.partition("::")
            if f"def {function.partition('[')[0]}(" not in (root / "tests" / file).read_text():
                found.append(f"{mutant.name}: there is no test {node}")
    return found


class Watcher:
    """A pytest plugin: the first test that fails and why, and how many ran."""

    def __init__(self) -> None:
        self.failed: str | None = None
        self.why = ""
        self.ran = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.ran += report.when == "call"
        if report.failed and self.failed is None:
            self.failed = report.nodeid
            self.why = str(getattr(getattr(report.longrepr, "reprcrash", None), "message", ""))[:200]


def run_tests(root: Path, tests: list[str], answer: Path) -> None:
    """In a forked process: pytest on the copy, quiet; writes what happened, and does not return."""
    import pytest

    devnull = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(devnull, stream)
    os.chdir(root)
    sys.dont_write_bytecode = True  # a mutant of the same size and second would find the last one's
    sys.path[:0] = [str(root), str(root / "tests")]
    watcher, code, wrong = Watcher(), 70, ""
    try:
        nodes = [f"tests/{node}" for node in tests]
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *nodes], plugins=[watcher]))
        import srppo

        if not str(srppo.__file__).startswith(str(root)):
            wrong = f"{srppo.__file__} was tested, which is not the copy"
    except BaseException as error:
        wrong = repr(error)
    if watcher.why.startswith(CARELESS):
        wrong = f"the mutant is no working program: {watcher.why}"
    answer.write_text(json.dumps({"code": code, "failed": watcher.failed, "ran": watcher.ran, "wrong": wrong}))
    os._exit(0)


def outcome(root: Path, tests: list[str]) -> dict[str, Any]:
    """What pytest says of these tests in the copy."""
    answer = root / "answer.json"
    answer.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        run_tests(root, tests, answer)
    end = time.monotonic() + LIMIT_S
    while os.waitpid(pid, os.WNOHANG)[0] == 0:
        if time.monotonic() > end:
            os.killpg(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return {"code": 124, "failed": None, "ran": 0, "wrong": f"no answer in {LIMIT_S} s"}
        time.sleep(0.01)
    if not answer.exists():
        return {"code": 70, "failed": None, "ran": 0, "wrong": "the tests' process died"}
    return dict(json.loads(answer.read_text()))


def main(words: list[str]) -> int:
    if wrong := problems():
        print("\n".join(wrong))
        return 1
    chosen = [m for m in MUTANTS if not words or any(word in f"{m.file} {m.name}" for word in words)]
    os.environ["OMP_NUM_THREADS"] = "1"
    # What the tests import beside this package, once; forking is safe while there is one thread.
    import hypothesis
    import numpy  # noqa: F401
    import scipy.stats
    import torch
    import transformers
    from transformers.models.llama import modeling_llama  # noqa: F401

    torch.set_num_threads(1)
    assert hypothesis and scipy.stats and transformers and not any(name.startswith("srppo") for name in sys.modules)
    began, bad = time.monotonic(), 0
    with tempfile.TemporaryDirectory(prefix="srppo-mutants-") as name:
        root = Path(name)
        for part in ("srppo", "tests"):
            shutil.copytree(ROOT / part, root / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", root)
        nodes = sorted({node for mutant in chosen for node in mutant.tests.split()})
        whole = outcome(root, nodes)
        if whole["code"] != 0 or whole["wrong"]:
            print(f"without any mutant the tests do not pass: {whole}")
            return 1
        print(f"{len(nodes)} test functions pass without a mutant, {time.monotonic() - began:.0f} s")
        for mutant in chosen:
            start, file = time.monotonic(), root / "srppo" / mutant.file
            text = file.read_text()
            file.write_text(text.replace(mutant.old, mutant.new))
            found = outcome(root, mutant.tests.split())
            file.write_text(text)
            killed = found["code"] == 1 and found["failed"] is not None and not found["wrong"]
            bad += not killed
            verdict = found["failed"] if killed else f"SURVIVES, or the test did not run: {found}"
            print(f"{mutant.name:<50} {time.monotonic() - start:5.1f} s  {verdict}", flush=True)
    print(f"{len(chosen)} mutants, {len(chosen) - bad} killed, {time.monotonic() - began:.0f} s")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
