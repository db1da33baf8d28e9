"""The README's commands and code run as they stand."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.startswith("srppo")
]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    return tmp_path


def run(arguments: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=540)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, folder: Path) -> None:
    output = run(command.split(), folder)
    if "--out" in command:
        out = folder / command.split("--out ")[1].split()[0]
        assert (out / "report" / "index.html").exists() and "report:" in output
        assert list(out.glob("stages/*/model/model.safetensors"))
        assert "0." in output and "n = 300" in " ".join(output.split())
    if "bench kernel" in command:
        assert (folder / "runs" / "bench-kernel" / "kernel.jsonl").exists() and "GEMMs" in output


@pytest.mark.parametrize("code", PYTHON)
def test_python(code: str, folder: Path) -> None:
    output = run([sys.executable, "-c", code], folder)
    if "run_train" in code:
        assert output.count("greedy") == 3 and "unseen" in code
    else:
        assert output.endswith(" nats a token\n")


def test_the_two_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in ("demo", "test"):
        assert f"make {target}" in README and re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert len(COMMANDS) >= 4


def test_demo_ends_with_the_table(folder: Path) -> None:
    """The demo itself, as `make demo` runs it."""
    output = run(["srppo", "demo", "--plain", "--out", "demo"], folder)
    text = " ".join(output.split())
    for arm in ("base", "SFT", "longer SFT", "SRPPO"):
        assert arm in output
    assert "in-domain" in text and "out-of-domain" in text and "n = 300 items a group" in text
    assert "greedy" in text and "sampled" in text and "95% intervals" in text
    assert "one training seed" in text
    assert max(len(line) for line in output.splitlines() if "/" not in line) <= 80
