"""Builds and loads the compiled kernels: once a machine, by its own C++ compiler, kept in the user's cache."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from srppo.environment import cache_folder

FOLDER = Path(__file__).parent
SOURCES, HEADERS = ("native.cpp", "body.cpp"), ("vectors.h",)
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# The first that compiles is taken. Without OpenMP there is one thread; without the native target, narrow vectors.
FLAGS: tuple[list[str], ...] = (["-march=native", "-fopenmp"], ["-mcpu=native", "-fopenmp"], ["-march=native"], [])
SWITCH = "SRPPO_COMPILED"  # an environment variable: 0 keeps to plain torch
_PROCESSOR = ("vendor_id", "model name", "flags", "Features")
_Pointer, _Int, _Float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_MATRIX, _TRANSFORM = [_Pointer, _Int, _Int], [_Float, _Float, _Float]
_SIGNATURES = {
    "srppo_linear_stats": [*_MATRIX * 2, *[_Pointer] * 2, *[_Int] * 3, *_TRANSFORM, ctypes.c_int]
    + [_Pointer] * 3
    + [ctypes.c_int],
    "srppo_logits_diff": [*_MATRIX * 2, _Pointer, _Int, _Int, *_TRANSFORM, _Pointer, ctypes.c_int],
    "srppo_rms_norm": [*[_Pointer] * 4, _Int, _Int, _Float, ctypes.c_int],
    "srppo_rms_norm_gradient": [*[_Pointer] * 6, _Int, _Int, ctypes.c_int],
    "srppo_swiglu": [*[_Pointer] * 3, _Int, ctypes.c_int],
    "srppo_swiglu_gradient": [*[_Pointer] * 5, _Int, ctypes.c_int],
    "srppo_rotate": [*[_Pointer] * 4, _Int, _Pointer, *[_Int] * 4, *[ctypes.c_int] * 2],
    "srppo_logits_gradient": [_Pointer, _Int, *[_Pointer] * 5, _Int, _Int, _Int, *_TRANSFORM, ctypes.c_int],
}


class Native(NamedTuple):
    """The loaded library, or None and why. `bf16`: it multiplies bf16 tensors as they are, else it widens them."""

    library: ctypes.CDLL | None
    note: str
    bf16: bool = False


@functools.cache
def load() -> Native:
    """The compiled kernels; `note` says how they were built and multiply bf16, or why there are none."""
    if os.environ.get(SWITCH) == "0":
        return Native(None, f"switched off by {SWITCH}=0")
    wanted = os.environ.get("CXX", "")
    missing = f"; CXX is {wanted!r}, which was not found" if wanted and not shutil.which(wanted) else ""
    compiler = _compiler()
    if compiler is None:
        return Native(None, f"no C++ compiler (g++ or clang++) was found{missing}")
    try:
        path, note = _build(compiler)
        try:
            library = ctypes.CDLL(str(path))
        except OSError:  # not a library at all
            path.unlink(missing_ok=True)
            library = ctypes.CDLL(str(_build(compiler)[0]))
        for name, signature in _SIGNATURES.items():
            getattr(library, name).argtypes = signature
        if not _agrees(library, pairs=False):
            return Native(None, "the compiled kernels disagree with torch on this machine")
        instructions = _bf16_instructions(library)
    except (OSError, subprocess.SubprocessError, AttributeError, RuntimeError, MemoryError) as error:
        return Native(None, f"{compiler} could not build or load them: {_first_line(error)}{missing}")
    return Native(library, f"{note}; bf16 products: {instructions or 'widened to fp32'}{missing}", bool(instructions))


def compiler_version() -> str | None:
    """What the compiler calls itself, asked once in this process and those it forks; None without one."""
    compiler = _compiler()
    return compiler and _version(compiler)


def _compiler() -> str | None:
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", ""), "g++", "clang++", "c++"))), None)


@functools.cache
def _version(compiler: str) -> str:
    found = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60)
    return found.stdout.splitlines()[0]


def _first_line(error: Exception) -> str:
    output = getattr(error, "stderr", None) or str(error)
    lines = [line for line in output.splitlines() if "error" in line.lower()] or output.splitlines()
    return lines[0] if lines else type(error).__name__


def _build(compiler: str) -> tuple[Path, str]:
    """Compile unless the cache holds this very build. Raises OSError or SubprocessError."""
    version = _version(compiler)
    folder = _cache()
    targets = []
    texts = [(FOLDER / name).read_text() for name in (*SOURCES, *HEADERS)]
    for flags in FLAGS:
        identity = "\n".join([*texts, version, *flags, torch.__version__, _processor()])
        targets.append(folder / f"native-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.so")
    notes = [f"compiled by {version} {' '.join(flags)}".rstrip() for flags in FLAGS]
    for target, note in zip(targets, notes, strict=True):
        if target.exists():
            return target, note
    for flags, target, note in zip(FLAGS, targets, notes, strict=True):
        try:
            _compile(compiler, flags, target)
            return target, note
        except subprocess.CalledProcessError as error:
            failure = error
    raise failure


def _compile(compiler: str, flags: list[str], target: Path) -> None:
    libraries = Path(torch.__file__).parent / "lib"
    # Into a file of its own, then renamed: two processes that build at once do not meet.
    handle, name = tempfile.mkstemp(dir=target.parent, suffix=".so")
    os.close(handle)
    command = [compiler, "-O3", "-std=c++17", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", *flags]
    command += [
        *(str(FOLDER / source) for source in SOURCES),
        "-o",
        name,
        f"-L{libraries}",
        "-ltorch_cpu",
        "-lc10",
        f"-Wl,-rpath,{libraries}",
    ]
    try:
        subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
        with open(name, "rb") as file:  # on disk before it has its name: half a library would kill the process
            os.fsync(file.fileno())
        os.replace(name, target)
    finally:
        Path(name).unlink(missing_ok=True)


def _cache() -> Path:
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    except OSError:  # no home, or one that is read-only: compiled anew in each process
        pass
    folder = Path(tempfile.mkdtemp(prefix="srppo-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _processor() -> str:
    """What -march=native saw: homes are shared by machines of different kinds."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return "\n".join(sorted({line for line in lines if line.startswith(_PROCESSOR)}))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"


def _agrees(library: ctypes.CDLL, *, pairs: bool) -> bool:
    """Whether this build gives torch's results on a small product of bf16, widened to fp32 or, `pairs`, as it is."""
    generator = torch.Generator().manual_seed(0)
    here: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    hidden_ND, weight_VD = (
        torch.randn(shape, generator=generator, **here).bfloat16() for shape in ((129, 40), (130, 40))
    )
    tokens_N = torch.arange(129, device="cpu")  # enough rows for panels to be copied
    logits_NV = hidden_ND.double() @ weight_VD.double().T
    expected_N = logits_NV.log_softmax(-1).gather(-1, tokens_N[:, None])[:, 0].float()
    out_3N = linear_stats(library, hidden_ND, weight_VD, None, tokens_N, (1.0, 0.0, 1.0), pairs, 1)
    return torch.allclose(out_3N[0] - out_3N[2], expected_N, atol=1e-4)


def _bf16_instructions(library: ctypes.CDLL) -> str | None:
    """By what the library multiplies bf16 tensors as they are; None where that is wrong here, or not allowed."""
    instructions = faster_bf16()
    try:
        return instructions if instructions and _agrees(library, pairs=True) else None
    except RuntimeError:  # ONEDNN_MAX_CPU_ISA keeps oneDNN from them
        return None


def faster_bf16() -> str | None:
    """The instructions by which this CPU multiplies bf16 with fp32 sums faster than fp32, or None.

    AVX512-BF16 has twice the rate of fp32 on AMD's CPUs (Zen 4: 234 GF/s a core, and 117), half of it on Intel's.
    """
    if has_bf16_tiles():
        return "AMX"
    return "AVX512-BF16" if torch.cpu._is_avx512_bf16_supported() and "AuthenticAMD" in _processor() else None


def has_bf16_tiles() -> bool:
    """Whether the CPU has AMX: then torch's own fp32 products of matrices rounded to bf16 are faster, too."""
    return bool(torch.cpu._is_amx_tile_supported())


def linear_stats(
    library: ctypes.CDLL,
    hidden_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    tokens_N: Tensor,
    transform: tuple[float, float, float],
    pairs: bool,
    threads: int,
) -> Tensor:
    """3N fp32: target logit - maximum, maximum, log sum exp(z - maximum). `pairs`: bf16 is not widened; D even."""
    out_3N = _result(3, len(tokens_N))
    _call(
        library.srppo_linear_stats,
        *_matrix(hidden_ND),
        *_matrix(weight_VD),
        None if bias_V is None else bias_V.data_ptr(),
        tokens_N.data_ptr(),
        len(tokens_N),
        hidden_ND.shape[1],
        len(weight_VD),
        *transform,
        int(pairs),
        *(row_N.data_ptr() for row_N in out_3N),
        threads,
    )
    return out_3N


def logits_diff(
    library: ctypes.CDLL,
    sft_NV: Tensor,
    base_NV: Tensor,
    tokens_N: Tensor,
    transform: tuple[float, float, float],
    threads: int,
) -> Tensor:
    """5N fp32: the fields of LogprobDiff; rows with a negative token are 0."""
    out_5N = _result(5, len(tokens_N))
    arguments = (*_matrix(sft_NV), *_matrix(base_NV), tokens_N.data_ptr(), *sft_NV.shape, *transform)
    _call(library.srppo_logits_diff, *arguments, out_5N.data_ptr(), threads)
    return out_5N


def logits_gradient(
    library: ctypes.CDLL,
    raw_NC: Tensor,
    first: int,
    bias_C: Tensor | None,
    rows: Sequence[Tensor],
    transform: tuple[float, float, float],
    threads: int,
) -> None:
    """Raw fp32 logits of columns first..first+C become the gradient of sum(upstream * log-prob) in them, in place.

    rows: tokens_N, max_N, log_sum_N, upstream_N.
    """
    vectors = [None if x is None else x.contiguous() for x in (bias_C, *rows)]
    pointers = [None if x is None else x.data_ptr() for x in vectors]
    shape = (len(raw_NC), first, raw_NC.shape[1])
    _call(library.srppo_logits_gradient, raw_NC.data_ptr(), raw_NC.stride(0), *pointers, *shape, *transform, threads)


def _result(*shape: int) -> Tensor:
    """Memory that the library writes fp32 into, whatever dtype and device the user has made the default."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def _matrix(x: Tensor) -> tuple[int, int, int]:
    return x.data_ptr(), DTYPES[x.dtype], x.stride(0)


def _call(function: object, *arguments: object) -> None:
    status = function(*arguments)  # type: ignore[operator]
    if status == 1:
        raise MemoryError("not enough memory for the log-prob kernel's buffers")
    if status:
        raise RuntimeError("the compiled log-prob kernel failed; SRPPO_COMPILED=0 keeps to plain torch")
