"""Which machine, versions and commit a benchmark row comes from. No names of people, hosts or folders."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from srppo.environment import commit_of_source, cpu_model, package_version

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
    cpu, commit = cpu_model(), commit_of_source()
    return Machine(
        device=torch.cuda.get_device_name() if device == "cuda" else cpu,
        device_kind=device,
        cpu=cpu,
        cpu_flags=_cpu_flags(),
        python=platform.python_version(),
        torch=torch.__version__,
        triton=package_version("triton"),
        commit=commit.rstrip("+") if commit else None,
        dirty=commit.endswith("+") if commit else None,
    )


def _cpu_flags() -> str:
    """The matrix and vector extensions that the system names; empty where it names none."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip().lower() in ("flags", "features"):
                present = set(value.split())
                return " ".join(flag for flag in CPU_FLAGS if flag in present)
    except OSError:
        pass
    return ""
