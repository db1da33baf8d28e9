"""Facts of the machine, for env.json, bug reports and whoever asks, gathered without importing anything heavy."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from srppo.errors import SrppoError

PACKAGES = (
    "srppo torch triton transformers tokenizers accelerate datasets lm-eval safetensors numpy scipy pydantic rich "
    "typer matplotlib peft gguf ray tensorboard wandb"
)
VARIABLES = (
    "OMP_NUM_THREADS OMP_WAIT_POLICY MKL_NUM_THREADS HF_HUB_OFFLINE TRANSFORMERS_OFFLINE CUDA_VISIBLE_DEVICES "
    "CUBLAS_WORKSPACE_CONFIG PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF TORCH_COMPILE_DISABLE TRITON_INTERPRET "
    "TOKENIZERS_PARALLELISM SRPPO_COMPILED CXX"
)


EXTRAS = {"math_verify": "math", "sympy": "math", "antlr4": "math", "punkt_tab": "ifeval"}
EXTRAS |= dict.fromkeys(("langdetect", "immutabledict", "nltk"), "ifeval")
"""Packages, and a table of nltk, that come with an extra of ours."""


def environment() -> dict[str, Any]:
    """Python, machine, packages, GPUs, commit of the source and the variables that change results; no secrets."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "memory_gib": _memory_gib(),
        "gpus": _gpus(),
        "kernels": _kernels(),
        "packages": dict(package_versions()),
        "commit": commit_of_source(),
        "variables": {name: os.environ[name] for name in VARIABLES.split() if name in os.environ},
    }


def _kernels() -> str | None:
    """How the CPU's log-prob kernels are built; known where they are loaded."""
    native = sys.modules.get("srppo.kernels.native")
    return native.load().note if native else None


@cache  # of a process, and of those it forks: what is installed later is not what runs
def package_versions() -> Mapping[str, str]:
    """Installed versions of what results may depend on, by package."""
    return {name: found for name in PACKAGES.split() if (found := package_version(name))}


def package_version(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def way_to(package: str) -> str:
    """The command that installs a package: an extra of ours from the folder of a clone, or the package alone."""
    known = EXTRAS.get(package.split(".")[0])
    return f"pip install -c constraints.txt -e '.[{known}]'" if known else f"pip install {package}"


def cache_folder() -> Path:
    """Where the user keeps what is made once a machine: compiled kernels, dequantized models. It need not be there.

    Raises OSError where the user has no home.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srppo"
    except RuntimeError as error:
        raise FileNotFoundError("no home folder; set XDG_CACHE_HOME") from error


def made_in_cache(part: str, what: str, error: type[SrppoError]) -> Path:
    """A folder within `cache_folder`, which is made. Raises `error` where it cannot be; what: that it would hold."""
    try:
        folder = cache_folder() / part
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        reason = f"{problem}; set XDG_CACHE_HOME to a folder that can be written"
        raise error(f"there is no place for {what}: {reason}") from problem
    return folder


def cpu_model() -> str:
    """As the system calls the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may use, where the system says it; else all."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):
        return None


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is not None:
        if not torch.cuda.is_available():
            return []
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    names = _run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"])
    return [line.strip() for line in (names or "").splitlines() if line.strip()]


@cache  # likewise: code that is checked out later is not what runs
def commit_of_source() -> str | None:
    """The commit of the checkout this package runs from; `+` marks changes that are not committed."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    commit = _run(["git", "-C", str(root), "rev-parse", "HEAD"])
    if not commit:
        return None
    return commit.strip() + ("+" if _run(["git", "-C", str(root), "status", "--porcelain", "-uno"]) else "")


def _run(command: list[str]) -> str | None:
    """The output of a short command; None when it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
