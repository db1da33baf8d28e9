"""The Triton kernels: interpreted in processes of their own, since the choice is made when they are imported; compiled
and run where there is a GPU; compiled for four chips where there is none."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from srppo.bench.compile import CompileRow, compile_report, problems
from srppo.errors import ConfigError

CASES = Path(__file__).with_name("triton_cases.py")
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="triton is not installed")


def run(*command: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=ENVIRONMENT | environment, cwd=CASES.parents[1]
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def run_cases(keyword: str, file: Path = CASES, **environment: str) -> None:
    output = run(
        "-m", "pytest", str(file), "-k", keyword, "-p", "no:cacheprovider", "-p", "no:xdist", "-v", **environment
    )
    assert " passed" in output and "failed" not in output


@needs_triton
@pytest.mark.parametrize("keyword", ["logits", "linear", "not logits and not linear"])
def test_interpreted(keyword):
    run_cases(keyword, TRITON_INTERPRET="1")


PROMISES = "out_of_range or impossible or do_not_fit or no_rows"


@needs_triton
def test_what_the_dispatch_point_promises_holds_interpreted():
    """The very tests of the other implementations, but for those that take the interpreter minutes."""
    run_cases(f"triton and ({PROMISES})", CASES.with_name("test_checks.py"), TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_gpu():
    run_cases("test_")


COMPILE = """
import dataclasses, json
from srppo.bench import compile
if __name__ == "__main__":
    rows = compile.compile_report(["{target}"], dtypes={{"{dtype}": compile.DTYPES["{dtype}"]}})
    print(json.dumps([dataclasses.asdict(row) for row in rows]))
"""


@needs_triton
@pytest.mark.parametrize(
    "target,dtype",
    [(target, "bf16") for target in ("sm_80", "sm_90", "sm_100", "gfx942")] + [("sm_90", "fp32")],
)
def test_every_kernel_compiles_without_a_problem(target, dtype):
    rows = [CompileRow(**row) for row in json.loads(run("-c", COMPILE.format(target=target, dtype=dtype)))]
    assert len(rows) >= 10 and all(row.target == target and 0 < row.registers <= 512 for row in rows)
    assert problems(rows) == []
    matrix = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}[target]
    assert sum(matrix in row.matrix for row in rows) >= 5


def test_problems_are_found():
    row = CompileRow("linear diff", "bf16", "sm_90", 8, 4, 200, 0, 1024, {"HGMMA": 8})
    fold = CompileRow("fold diff", "bf16", "sm_90", 4, 1, 40, 0, 0, {})
    assert problems([row, fold]) == []
    wrong = {
        "spills 8 bytes": {"spills": 8},
        "needs 262144 bytes": {"shared": 1 << 18},
        "no HGMMA": {"matrix": {"HMMA": 8}},
        "no matrix": {"target": "sm_80", "matrix": {}},
        "waits for every": {"serialised": True},
    }
    for words, change in wrong.items():
        (found,) = problems([CompileRow(**{**vars(row), **change}), fold])
        assert words in found


@needs_triton
@pytest.mark.parametrize("target", ["sm_70", "sm_199", "gfxfoo", "nothing"])
def test_a_chip_that_cannot_be_compiled_for_is_refused_first(target):
    """LLVM would end the process, or a disassembler raise, minutes in."""
    with pytest.raises(ConfigError, match=rf"^unknown target '{target}'; allowed: sm_80, [^\n]*$"):
        compile_report(("sm_90", target))
