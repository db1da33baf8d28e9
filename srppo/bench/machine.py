"""Which machine, versions and commit a benchmark row comes from. No names of people, hosts or folders."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
    "asimd",
    "bf16",
    "sve",
)


@dataclass(frozen=True)
class Machine:
    """device: model of the GPU or CPU; cpu_flags: its matrix and vector extensions; commit: None without a checkout."""

    device: str
    device_kind: str
    cpu: str
    cpu_flags: str
    python: str
    torch: str
    triton: str | None
    commit: str | None
    dirty: bool | None


def machine(device: str) -> Machine:
    """Facts of this machine for a run on "cpu" or "cuda"."""
    cpu, flags = _cpu()
    commit, dirty = _commit()
    return Machine(
        device=torch.cuda.get_device_name() if device == "cuda" else cpu,
        device_kind=device,
        cpu=cpu,
        cpu_flags=flags,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=package_version("triton"),
        commit=commit,
        dirty=dirty,
    )


def package_version(package: str) -> str | None:
    """Installed version of a distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> tuple[str, str]:
    model, flags = platform.processor() or platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip().lower() in ("flags", "features"):
                present = set(value.split())
                return model, " ".join(flag for flag in CPU_FLAGS if flag in present)
    except OSError:
        pass
    return model, flags


def _commit() -> tuple[str | None, bool | None]:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None, None
    commit = _git(root, "rev-parse", "HEAD")
    changes = _git(root, "status", "--porcelain", "--", "srppo")  # new files count as well
    return (commit.strip() or None) if commit else None, None if changes is None else bool(changes)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout if done.returncode == 0 else None
