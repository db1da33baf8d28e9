"""Evaluation by several processes: the results of one, each with its share, and a line where one is gone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from harness_cases import choice_task, evaluate, rolling_task, samples, summary, tiny_model, write_task

from srppo.errors import ConfigError, OtherEnded, OutOfMemory
from srppo.evaluation.harness import answering, run
from srppo.evaluation.harness.answering import Answering
from srppo.training import parallel, rollout
from srppo.training.together import first_of

PATIENCE_S = 600


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    write_task(tmp_path / "tasks", "letters")
    rolling_task(tmp_path / "tasks")
    return choice_task(tmp_path / "tasks", "pick")


def rounded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows to be compared: a log-prob may hang on the others of its batch by its last bits."""
    return [{k: pytest.approx(v, rel=1e-5) if isinstance(v, float) else v for k, v in row.items()} for row in rows]


def test_two_processes_answer_as_one_and_each_a_half(
    model: Path, tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"include_path": [tasks], "samples": 3, "chat_template": False}
    names = ["letters", "pick", "rolling"]
    alone, _ = evaluate(model, tmp_path / "one", *names, **options)
    written, scored = list[int](), list[int]()
    write, score = rollout.generate_packed, Answering._score

    def counted(lm: Any, prompts: list[list[int]], *rest: Any, **named: Any) -> Any:
        written.append(len(prompts))
        return write(lm, prompts, *rest, **named)

    def counted_too(self: Answering, rows: Any) -> Any:
        scored.append(len(rows))
        return score(self, rows)

    monkeypatch.setattr(rollout, "generate_packed", counted)
    monkeypatch.setattr(Answering, "_score", counted_too)
    shared, said = evaluate(model, tmp_path / "two", *names, **options, processes=2)
    assert written == [7, 7, 7] and sum(scored) == (3 * 14 + 14) / 2  # of 14 prompts, and of choices and texts
    assert said.count("requests in") == 3
    for one, two in zip(alone, shared, strict=True):
        assert one.name == two.name and samples(two) == rounded(samples(one))
        assert (summary(one)["processes"], summary(two)["processes"]) == (1, 2)
    assert parallel.size() == 1, "this process is alone again"

    def no_others(*_: Any) -> Any:
        raise AssertionError("processes were started")

    monkeypatch.setattr(run, "first_of", no_others)
    again, said = evaluate(model, tmp_path / "two", *names, **options, processes=2)
    assert again == shared and said.count(": known, ") == 3


def test_a_launchers_processes_share_the_prompts(model: Path, tasks: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "srppo"]
    command = ["eval", str(model), "--tasks", "letters", "--include-path", str(tasks), "--no-chat-template"]
    options = ["--samples", "3", "--device", "cpu", "--out", str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*launcher, *command, *options], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results: ") == 1 and done.stdout.count("letters") == 1
    (one,), _ = evaluate(model, tmp_path / "one", "letters", include_path=[tasks], samples=3, chat_template=False)
    assert samples(tmp_path / "two" / one.name) == samples(one)
    assert summary(tmp_path / "two" / one.name)["processes"] == 2
    twice = subprocess.run([*launcher, *command, *options, "--processes", "2"], env=environment, capture_output=True)
    assert b"error: --processes 2: a launcher has started 2 already; leave it out" in twice.stderr
    assert twice.returncode != 0 and b"srppo/" not in twice.stderr, "a traceback of ours"


def test_a_process_that_is_killed_ends_it_with_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "srppo", "eval", "embedded:xs", "--suite", "embedded", "--samples", "100"]
    options = ["--processes", "2", "--out", str(tmp_path / "out")]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command, *options], env={**os.environ, "OMP_NUM_THREADS": "1"}, **pipes)
    deadline, others = time.monotonic() + PATIENCE_S, list[psutil.Process]()
    while not others:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
        others = [each for each in psutil.Process(process.pid).children() if "spawn_main" in " ".join(each.cmdline())]
    others[0].kill()  # before it has joined, or after
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == OtherEnded.exit_code
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith("error: another process of this run has ended")
    assert "Traceback" not in said


def test_one_that_ends_before_it_has_begun_is_not_waited_for() -> None:
    with pytest.raises(OtherEnded), first_of(2, _Unreadable()):
        raise AssertionError("it was waited for")


class _Unreadable:
    """Work that ends the process which unpickles it."""

    def __call__(self) -> None: ...

    def __reduce__(self) -> Any:
        return sys.exit, (3,)


def test_what_one_of_several_raises_is_not_tried_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others are in the midst of the first try; alone, fewer rows are written at a time."""
    tried = []

    def full(*_: Any, **options: Any) -> Any:
        tried.append(options["rows"])
        raise OutOfMemory("full")

    monkeypatch.setattr(answering, "decode", full)
    monkeypatch.setattr(parallel, "size", lambda: 2)
    monkeypatch.setattr(parallel, "from_first", lambda work: work())
    one = Answering("cpu")
    one.load(str(model), answering.ModelConfig())
    with pytest.raises(OutOfMemory, match="full"):
        one.decode([[5]] * 8, [0] * 8, answering.Decoding(4))
    assert tried == [8] and one.asking


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"processes": 0}, "--processes 0: it must be at least 1"),
        ({"processes": 2, "device": "mps"}, "--processes 2 on mps: several processes take cpu, or cuda (a GPU each)"),
        ({"processes": 2, "device": "cuda:1"}, "--processes 2 on cuda:1: several processes take cpu, or cuda"),
        ({"processes": 999, "device": "cuda"}, "--processes 999 want as many GPUs, and "),
    ],
)
def test_processes_that_cannot_be(options: dict[str, Any], line: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        evaluate(model, tmp_path, "letters", **options)
    assert str(caught.value).startswith(line)
