"""The compiled CPU kernels: how they are built, kept, checked and done without; and the mode for CPUs with AMX."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from kernel_cases import BF16, check_one, make_head, make_tokens
from torch import Tensor

from srppo.kernels import native

SCRIPT = """
import torch
from srppo.kernels import linear_logprob_diff, native
g = torch.Generator().manual_seed(0)
a, b = (torch.randn(5, 12, generator=g) for _ in range(2))
v, w = (torch.randn(70, 12, generator=g) for _ in range(2))
t = torch.tensor([0, 69, 3, 4, 64])
x = linear_logprob_diff(a, v, b, w, t)
y = linear_logprob_diff(a.double(), v.double(), b.double(), w.double(), t, impl="reference")
print(float((x - y).abs().max()) < 1e-5, native.load().note, sep="|")
"""


def in_process(**environment: str) -> tuple[str, str]:
    """(whether a difference is right, how the kernels were built) in a fresh process."""
    done = run(environment).communicate(timeout=120)[0]
    right, _, note = done.strip().partition("|")
    return right, note


def run(environment: dict[str, str]) -> subprocess.Popen[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen([sys.executable, "-c", SCRIPT], env=variables, stdout=subprocess.PIPE, text=True)


def builds(cache: Path) -> list[Path]:
    return sorted((cache / "srppo").glob("*"))


needs_compiler = pytest.mark.skipif(native.load().library is None, reason=native.load().note)


def test_where_there_is_a_compiler_they_are_built_and_pass_their_check() -> None:
    """Or every other test of the fast path would quietly test its twin."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ here")
    assert native.load().library is not None, native.load().note


@needs_compiler
@pytest.mark.parametrize(
    "setting", ["default_dtype(torch.bfloat16)", "default_dtype(torch.float64)", "default_device('meta')"]
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_the_users_default_dtype_and_device_change_nothing(setting: str, when: str, tmp_path: Path) -> None:
    """The library writes fp32 on the CPU, whatever an empty tensor would be: with bf16 that was past its end."""
    script = """
import torch
from srppo.kernels import linear_logprob, linear_logprob_diff, logprob_diff, native
here = {"dtype": torch.float32, "device": "cpu"}
g = torch.Generator().manual_seed(0)
a, b, v, w = (torch.randn(n, 12, generator=g, **here) for n in (2000, 2000, 70, 70))
t = torch.arange(2000, device="cpu") % 70
BEFORE
def all_three():
    one = linear_logprob(a.requires_grad_(), v, t)
    (grad,) = torch.autograd.grad(one.sum(), a)
    return [linear_logprob_diff(a, v, b, w, t), logprob_diff(a @ v.T, b @ w.T, t), one, grad]
found = all_three()
AFTER
again = all_three()
print(all(torch.equal(x, y) for x, y in zip(found, again)), native.load().note, sep="|")
"""
    script = script.replace(when.upper(), f"torch.set_{setting}").replace("BEFORE\n", "").replace("AFTER\n", "")
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("True|compiled by "), done.stdout + done.stderr


@needs_compiler
def test_two_processes_build_at_once_and_a_third_finds_it_done(tmp_path: Path) -> None:
    both = [run({"XDG_CACHE_HOME": str(tmp_path)}) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0] for process in both]
    assert all(answer.startswith("True|compiled by ") for answer in answers)
    (library,) = builds(tmp_path)  # and nothing half-written beside it
    before = library.stat().st_mtime_ns
    assert in_process(XDG_CACHE_HOME=str(tmp_path))[0] == "True" and library.stat().st_mtime_ns == before


@needs_compiler
def test_a_cached_file_that_is_no_library_is_built_again(tmp_path: Path) -> None:
    assert in_process(XDG_CACHE_HOME=str(tmp_path))[0] == "True"
    (library,) = builds(tmp_path)
    whole = library.read_bytes()
    library.write_bytes(b"")
    right, note = in_process(XDG_CACHE_HOME=str(tmp_path))
    assert right == "True" and note.startswith("compiled by ") and len(library.read_bytes()) == len(whole)


@needs_compiler
def test_a_home_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    right, note = in_process(XDG_CACHE_HOME=str(tmp_path / "file"))
    assert right == "True" and note.startswith("compiled by ")


def test_without_a_compiler_the_twin_answers(tmp_path: Path) -> None:
    assert in_process(SRPPO_COMPILED="0") == ("True", "switched off by SRPPO_COMPILED=0")
    (tmp_path / "bin").mkdir()
    right, note = in_process(PATH=str(tmp_path / "bin"), CXX="", XDG_CACHE_HOME=str(tmp_path))
    assert (right, note) == ("True", "no C++ compiler (g++ or clang++) was found")


def test_a_compiler_that_fails_is_named_with_its_reason(tmp_path: Path) -> None:
    compiler = tmp_path / "broken-cxx"
    compiler.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit 0\necho "fatal error: no" >&2; exit 1\n'
    )
    compiler.chmod(0o755)
    right, note = in_process(CXX=str(compiler), XDG_CACHE_HOME=str(tmp_path))
    assert (right, note) == ("True", f"{compiler} could not build or load them: fatal error: no")


@needs_compiler
def test_a_build_with_wrong_results_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = native.SOURCE.read_text()
    monkeypatch.setattr(native, "SOURCE", tmp_path / "wrong.cpp")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.SOURCE.write_text(text.replace("all(0.693359375f)", "all(0.69f)"))
    assert native.SOURCE.read_text() != text
    assert native.load.__wrapped__() == (None, "the compiled kernels disagree with torch on this machine")


@needs_compiler
@pytest.mark.parametrize(("D", "vocabulary"), [(2, 5), (64, 1000), (250, 4099), (1026, 513), (2050, 300)])
def test_bf16_products_are_exact_with_fp32_sums(D: int, vocabulary: int) -> None:
    """The mode that CPUs with AMX use; AVX-512 runs it too, slowly. Its error is that of fp32, and rows stand alone."""
    if not torch.cpu._is_avx512_bf16_supported() or {"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & os.environ.keys():
        pytest.skip("this CPU has no bf16 products, or oneDNN may not use them")
    head, tokens_N = make_head(70, D, vocabulary, (BF16, BF16))._replace(bias_V=None), make_tokens(70, vocabulary)
    library = native.load().library
    assert library is not None

    def logprobs(rows: slice, pairs: bool) -> Tensor:
        arguments = (head.hidden_ND[rows], head.weight_VD, None, tokens_N[rows], (1.0, 0.0, 1.0))
        out_3N = native.linear_stats(library, *arguments, pairs, 1)
        return out_3N[0] - out_3N[2]

    for pairs in (False, True):
        whole_N = logprobs(slice(0, 70), pairs)
        check_one(whole_N, head, tokens_N)
        for count in (1, 2, 7, 15, 16, 17, 33):
            assert torch.equal(logprobs(slice(0, count), pairs), whole_N[:count])
