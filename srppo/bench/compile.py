"""Every Triton kernel compiled for every target without a GPU: registers, spills, shared memory, matrix instructions.

The operations themselves are run on small CPU tensors while their launches are recorded, so what is compiled is what
would be launched: the same tiles, the same specialisation on alignment, the same options. Registers and instructions
come from the disassembly (NVIDIA) or the assembly's metadata (AMD).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from srppo.console import Console
from srppo.errors import ConfigError
from srppo.kernels.types import Head, RowStats, Transform

# Of others LLVM ends the process without a word to Python.
CHIPS = r"sm_(80|86|87|89|90|100|101|103|120|121)|gfx(90a|94[0-2]|950|1[0-2]\d\d)"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# The vocabulary of Llama 3 and one that is odd; D is only ever a loop bound.
VOCABULARY, RAGGED, DEPTH, COUNT = 128256, 50257, 64, 24
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a program may have
_GEMMS = ("linear diff", "linear stats", "d logits")
MATRIX = re.compile(r"\b(?:HGMMA|QGMMA|HMMA|UTC\w*MMA|v_mfma\w*)")


@dataclass(frozen=True)
class CompileRow:
    """One kernel of one operation for one target. Spills are bytes a thread; shared memory is bytes a program."""

    kernel: str
    dtype: str
    target: str
    warps: int
    stages: int
    registers: int
    spills: int
    shared: int
    matrix: dict[str, int]  # instruction family -> how often it stands in the code
    serialised: bool = False  # sm_90: every HGMMA waits for the one before it


def compile_report(targets: Sequence[str] = TARGETS, dtypes: Mapping[str, torch.dtype] = DTYPES) -> list[CompileRow]:
    """A row for each kernel, dtype and target. Takes about 2 s a row the first time; compilations are cached.

    Raises ConfigError without triton, under TRITON_INTERPRET, and for an unknown target.
    """
    if not importlib.util.find_spec("triton"):
        raise ConfigError("triton is not installed (it comes for Linux only), so there is nothing to compile")
    from srppo.kernels.triton_common import INTERPRETED

    if INTERPRETED:
        raise ConfigError("TRITON_INTERPRET is set, so kernels are interpreted, not compiled; unset it and start again")
    for target in targets:
        if not re.fullmatch(CHIPS, target):
            raise ConfigError(
                f"unknown target {target!r}; allowed: {', '.join(TARGETS)} "
                "and their relatives, from sm_80 and gfx90a on"
            )
    rows = []
    for short, dtype in dtypes.items():
        for target in targets:
            for name, launch in _launches(target, dtype):
                try:
                    rows.append(_compile(name, short, target, launch))
                except Exception as error:  # of Triton, LLVM, ptxas or a disassembler that does not know the chip
                    reason = (str(error).splitlines() or [type(error).__name__])[0]
                    raise ConfigError(f"{name} {short} does not compile for {target}: {reason}") from error
    return rows


def problems(rows: Iterable[CompileRow]) -> list[str]:
    """What is wrong with a report: a spill, too much shared memory, a GEMM without its chip's matrix instructions.

    One line each; empty where all is well.
    """
    found = []
    for row in rows:
        name = f"{row.kernel} {row.dtype} on {row.target}"
        if row.spills:
            found.append(f"{name} spills {row.spills} bytes a thread")
        if row.shared > SHARED.get(row.target, row.shared):
            found.append(f"{name} needs {row.shared} bytes of shared memory; there are {SHARED[row.target]}")
        if not row.kernel.startswith(_GEMMS):
            continue
        if row.target == "sm_90" and row.dtype != "fp32" and not row.matrix.get("HGMMA"):
            found.append(f"{name} has no HGMMA; it has {_matrix(row)}")
        elif not row.matrix:
            found.append(f"{name} has no matrix instructions")
        if row.serialised:
            found.append(f"{name} waits for every HGMMA before it issues the next")
    return found


def print_compile_report(console: Console, targets: Sequence[str] = TARGETS) -> int:
    """Print the report as a table of 80 columns and every problem as an error; 1 if there is any, else 0."""
    rows = compile_report(targets)
    table = Table(box=None, pad_edge=False)
    table.add_column("kernel", no_wrap=True)
    for name in ("dtype", "target"):
        table.add_column(name)
    for name in ("warps", "regs", "spill B", "smem KiB"):
        table.add_column(name, justify="right")
    table.add_column("matrix")
    for row in rows:
        cells = (row.kernel, row.dtype, row.target, row.warps, row.registers, row.spills, f"{row.shared / 1024:.0f}")
        table.add_row(*map(str, cells), _matrix(row))
    console.print(table)
    found = problems(rows)
    for problem in found:
        console.error(problem)
    return int(bool(found))


def _matrix(row: CompileRow) -> str:
    return ", ".join(f"{count} {name}" for name, count in row.matrix.items()) or "-"


def _launches(target: str, dtype: torch.dtype) -> list[tuple[str, Any]]:
    """(name, recorded launch) of every kernel; the operations run on CPU tensors whose values nobody reads."""
    from srppo.kernels import triton_linear as kernels
    from srppo.kernels.triton_backward import CHUNK
    from srppo.kernels.triton_common import recording

    plain, capped = Transform(), Transform(temperature=0.7, softcap=30.0)
    tokens_N, ones_N = torch.zeros(COUNT, dtype=torch.int64), torch.ones(COUNT)
    stats = RowStats(ones_N, ones_N, ones_N)
    logits_NV = torch.zeros(COUNT, VOCABULARY, dtype=dtype)
    odd_NV = torch.zeros(COUNT, RAGGED, dtype=dtype)
    sft, base = (
        Head(torch.zeros(COUNT, DEPTH, dtype=dtype), torch.zeros(VOCABULARY, DEPTH, dtype=dtype)) for _ in "ab"
    )
    biased = sft._replace(bias_V=torch.zeros(VOCABULARY, dtype=dtype))
    # Rows that do not begin on 16 bytes cannot be described to TMA: the pointer version.
    odd = Head(torch.zeros(COUNT, DEPTH + 1, dtype=dtype), torch.zeros(RAGGED, DEPTH + 1, dtype=dtype))
    ragged = sft._replace(weight_VD=sft.weight_VD[:RAGGED])
    needs = (True, False, False)
    # One chunk of the vocabulary is enough of a gradient: the others launch the same code.
    first, last = slice(CHUNK), slice(RAGGED // CHUNK * CHUNK, RAGGED)
    chunk = sft._replace(weight_VD=sft.weight_VD[first])
    biased_chunk = chunk._replace(bias_V=torch.zeros(CHUNK, dtype=dtype))
    ragged_chunk = Head(sft.hidden_ND, sft.weight_VD[last], torch.zeros(RAGGED % CHUNK, dtype=dtype))
    calls: dict[tuple[str, ...], Callable[[], object]] = {
        ("logits",): lambda: kernels.logprob_diff(logits_NV, logits_NV, tokens_N, plain),
        ("logits, odd V, cap",): lambda: kernels.logprob_diff(odd_NV, odd_NV, tokens_N, capped),
        ("linear diff", "fold diff"): lambda: kernels.linear_logprob_diff(sft, base, tokens_N, plain),
        ("linear diff, odd D", "fold diff, odd D"): lambda: kernels.linear_logprob_diff(odd, odd, tokens_N, plain),
        ("linear diff, odd V", "fold diff, odd V"): lambda: kernels.linear_logprob_diff(
            ragged, ragged, tokens_N, plain
        ),
        ("linear stats, all", "fold stats, all"): lambda: kernels.forward(biased, tokens_N, capped),
        ("d logits",): lambda: kernels.backward(chunk, tokens_N, plain, stats, ones_N, needs),
        ("d logits, all",): lambda: kernels.backward(biased_chunk, tokens_N, capped, stats, ones_N, needs),
        ("d logits, odd V",): lambda: kernels.backward(ragged_chunk, tokens_N, capped, stats, ones_N, needs),
    }
    named: list[tuple[str, Any]] = []
    for names, call in calls.items():
        with recording(target) as launches:
            call()
        named.extend(zip(names, launches, strict=True))
    return named


def _compile(name: str, dtype: str, target: str, launch: Any) -> CompileRow:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend
    from triton.runtime.jit import create_function_from_signature

    nvidia = target.startswith("sm_")
    chip = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
    backend = make_backend(chip)
    # What a launch does before it compiles, for a chip that is not there.
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**launch.arguments, **launch.options)
    options, signature, constants, attributes = kernel._pack_args(backend, launch.options, bound, specialization, None)
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=chip, options=options.__dict__)
    measured = _nvidia(compiled.asm["cubin"]) if nvidia else _amd(compiled.asm["amdgcn"])
    warps, stages = launch.options["num_warps"], launch.options["num_stages"]
    return CompileRow(name, dtype, target, warps, stages, shared=compiled.metadata.shared, **measured)


def _nvidia(cubin: bytes) -> dict[str, Any]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage = _output(knobs.nvidia.cuobjdump.path, "-res-usage", str(path))
        code = _output(knobs.nvidia.nvdisasm.path, "-c", str(path))
    registers, stack = (int(x) for x in re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())  # type: ignore[union-attr]
    # A stack without loads or stores to local memory is room that nothing uses.
    spills = stack if re.search(r"\b(?:LDL|STL)\b", code) else 0
    # gsb0 marks an instruction that something waits for: of those for one step in depth, the last.
    hgmma = re.findall(r"\bHGMMA.*", code)
    serialised = len(hgmma) > 1 and all("gsb0" in line for line in hgmma)
    return {"registers": registers, "spills": spills, "matrix": _count(code), "serialised": serialised}


def _amd(assembly: str) -> dict[str, Any]:
    def field(name: str) -> int:
        match = re.search(rf"\.{name}:\s+(\d+)", assembly)
        return int(match[1]) if match else 0

    spills = 4 * field("vgpr_spill_count") + 4 * field("sgpr_spill_count")
    spills = max(spills, field("private_segment_fixed_size"))
    return {"registers": field("vgpr_count"), "spills": spills, "matrix": _count(assembly)}


def _count(code: str) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name in MATRIX.findall(code):
        family = "v_mfma" if name.startswith("v_mfma") else name
        counts[family] = counts.get(family, 0) + 1
    return counts


def _output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
