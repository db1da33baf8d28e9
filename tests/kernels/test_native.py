"""The compiled CPU kernels: how they are built, kept, checked and done without; and how they multiply bf16."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import BF16, FP16, FP32, INF, NAN, Head, check_one, make_head, make_tokens
from torch import Tensor

from srppo.kernels import Transform, cpu, native

SCRIPT = """
import torch
from srppo.kernels import linear_logprob_diff, native
g = torch.Generator().manual_seed(0)
a, b = (torch.randn(5, 12, generator=g) for _ in range(2))
v, w = (torch.randn(70, 12, generator=g) for _ in range(2))
t = torch.tensor([0, 69, 3, 4, 64])
def error(dtype):
    inputs = [x.to(dtype) for x in (a, v, b, w)]
    return linear_logprob_diff(*inputs, t) - linear_logprob_diff(*(x.double() for x in inputs), t, impl="reference")
right = all(float(error(dtype).abs().max()) < 1e-5 for dtype in (torch.float32, torch.bfloat16))
print(right, native.load().note, sep="|")
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


def with_another(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, old: str, new: str) -> None:
    """The sources with one edit of one of them, built into a cache of their own."""
    shutil.copytree(native.FOLDER, folder / "sources")
    monkeypatch.setattr(native, "FOLDER", folder / "sources")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    text = (native.FOLDER / name).read_text()
    assert old in text
    (native.FOLDER / name).write_text(text.replace(old, new))


needs_compiler = pytest.mark.skipif(native.load().library is None, reason=native.load().note)
needs_dot_products = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported() or bool({"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & os.environ.keys()),
    reason="this CPU has no bf16 products, or oneDNN may not use them",
)


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
    with_another(monkeypatch, tmp_path, "vectors.h", "all(0.693359375f)", "all(0.69f)")
    assert native.load.__wrapped__() == (None, "the compiled kernels disagree with torch on this machine", False)


# bf16


@pytest.mark.parametrize(
    ("tiles", "dot_products", "vendor", "expected"),
    [
        (True, True, "GenuineIntel", "AMX"),
        (False, True, "AuthenticAMD", "AVX512-BF16"),
        (False, True, "GenuineIntel", None),
        (False, False, "AuthenticAMD", None),
    ],
)
def test_bf16_is_multiplied_as_it_is_where_that_is_faster(
    monkeypatch: pytest.MonkeyPatch, tiles: bool, dot_products: bool, vendor: str, expected: str | None
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: dot_products)
    monkeypatch.setattr(native, "_processor", lambda: f"vendor_id : {vendor}")
    assert native.faster_bf16() == expected


@pytest.mark.parametrize("faster", [False, True])
def test_only_bf16_tensors_of_even_width_are_multiplied_as_such(monkeypatch: pytest.MonkeyPatch, faster: bool) -> None:
    """Any other takes the pass that widens: fp16, fp32, two dtypes, and a width that makes no pairs."""
    asked: list[bool] = []

    def fake(library: object, hidden_ND: Tensor, *arguments: Any) -> Tensor:
        asked.append(arguments[-2])
        return torch.zeros(3, len(hidden_ND))

    monkeypatch.setattr(native, "load", lambda: native.Native(object(), "", faster))  # type: ignore[arg-type]
    monkeypatch.setattr(native, "linear_stats", fake)
    for width, pair in ((4, (BF16, BF16)), (5, (BF16, BF16)), (4, (BF16, FP32)), (4, (FP32, BF16)), (4, (FP16, FP16))):
        cpu.forward(make_head(3, width, 7, pair), make_tokens(3, 7), Transform())
    assert asked == [faster, False, False, False, False]


@needs_compiler
def test_bf16_is_widened_where_onednn_is_kept_from_the_instructions() -> None:
    right, note = in_process(ONEDNN_MAX_CPU_ISA="AVX2")
    assert right == "True" and note.endswith("; bf16 products: widened to fp32")


@needs_compiler
@needs_dot_products
def test_wrong_bf16_products_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "faster_bf16", lambda: "AVX512-BF16")
    right = native.load.__wrapped__()
    assert right.bf16 and right.note.endswith("; bf16 products: AVX512-BF16")
    with_another(monkeypatch, tmp_path, "native.cpp", "+ k % 2] = source[k]", "+ 1 - k % 2] = source[k]")
    wrong = native.load.__wrapped__()
    assert wrong.library is not None and not wrong.bf16 and wrong.note.endswith("; bf16 products: widened to fp32")


def logprobs(head: Head, tokens_N: Tensor, pairs: bool, scale: float = 1.0, cap: float = 0.0, t: float = 1.0) -> Tensor:
    library = native.load().library
    assert library is not None
    bias_V = None if head.bias_V is None else head.bias_V.float()
    out_3N = native.linear_stats(library, *head[:2], bias_V, tokens_N, (scale, cap, 1 / t), pairs, 1)
    return out_3N[0] - out_3N[2]


@needs_compiler
@needs_dot_products
@pytest.mark.parametrize("pairs", [False, True], ids=["widened", "as it is"])
@pytest.mark.parametrize(("D", "vocabulary"), [(2, 5), (64, 1000), (250, 4099), (1000, 515), (1026, 513), (2050, 300)])
def test_bf16_products_are_exact_with_fp32_sums(D: int, vocabulary: int, pairs: bool) -> None:
    """The error is that of fp32, and rows stand alone: by number, by place, whether panels are copied or not."""
    rows = 200
    head, tokens_N = make_head(rows, D, vocabulary, (BF16, BF16)), make_tokens(rows, vocabulary)
    whole_N = logprobs(head, tokens_N, pairs)
    check_one(whole_N, head, tokens_N)
    for first, count in ((0, 1), (0, 2), (0, 7), (40, 15), (0, 16), (3, 17), (0, 33), (60, 128), (1, 129)):
        part = slice(first, first + count)
        alone = head._replace(hidden_ND=head.hidden_ND[part])
        assert torch.equal(logprobs(alone, tokens_N[part], pairs), whole_N[part])
    unaligned_VD = F.pad(head.weight_VD, (1, 2))[:, 1:-2]  # rows begin at any multiple of two bytes
    for part in (slice(0, 20), slice(None)):
        moved = head._replace(hidden_ND=head.hidden_ND[part], weight_VD=unaligned_VD)
        assert torch.equal(logprobs(moved, tokens_N[part], pairs), whole_N[part])
    check_one(
        logprobs(head, tokens_N, pairs, 0.5, 4.0, 0.7), head, tokens_N, logit_scale=0.5, softcap=4.0, temperature=0.7
    )


@needs_compiler
@needs_dot_products
def test_infinities_and_nans_are_the_same_in_both_products() -> None:
    head, tokens_N = make_head(150, 36, 300, (BF16, BF16)), make_tokens(150, 300)
    clean = [logprobs(head, tokens_N, pairs) for pairs in (False, True)]
    head.hidden_ND[3, 35], head.hidden_ND[77], head.hidden_ND[149, 0] = NAN, INF, -INF
    good_N = torch.ones(150, dtype=torch.bool)
    good_N[[3, 77, 149]] = False
    for before_N, after_N in zip(clean, [logprobs(head, tokens_N, pairs) for pairs in (False, True)], strict=True):
        assert torch.equal(after_N[good_N], before_N[good_N]) and after_N[~good_N].isnan().all()
    head.weight_VD[299, 1] = NAN
    assert all(logprobs(head, tokens_N, pairs).isnan().all() for pairs in (False, True))
