"""`srppo bench kernel`: small real runs, what they write, who is named as missing, and that its errors are errors."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console as RichConsole

from srppo.bench import measure
from srppo.bench.inputs import errors, exact, make_inputs
from srppo.bench.kernel import _within_rounds, main, run_kernel_bench
from srppo.bench.options import BACKWARD, DIFF, LOGITS_DIFF, PRESETS, SHAPES, Case, KernelBench
from srppo.bench.rivals import RIVALS, missing_reason
from srppo.bench.rows import COLUMNS, Row, append_rows, read_rows, write_csv
from srppo.bench.table import bench_tables
from srppo.console import Console
from srppo.errors import ConfigError

ROOT = Path(__file__).parents[2]
PLAIN = "ours,ours-reference,ours-twice,eager-fp32,eager-16bit,torch-lce"
TINY = {"n": (32,), "shapes": ("16x300",), "threads": 1, "rounds": 3, "device": "cpu"}


def run(folder: Path, **options: Any) -> tuple[list[Row], str]:
    text = io.StringIO()
    chosen = KernelBench(**{**TINY, "rivals": tuple(PLAIN.split(",")), "out": folder / "rows.jsonl", **options})
    rows = run_kernel_bench(chosen, Console(plain=True, file=text))
    return rows, text.getvalue()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], str, Path]:
    folder = tmp_path_factory.mktemp("bench")
    rows, text = run(folder, dtypes=("bf16", "fp32"))
    return rows, text, folder


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measured ceilings and without a plot, which one run above and one process below have."""
    monkeypatch.setattr("srppo.bench.measure.copy_gb_s", lambda device: 10.0)
    monkeypatch.setattr("srppo.bench.measure.gemm_gflops", lambda device, dtype: 100.0)
    monkeypatch.setattr("srppo.bench.kernel.roofline", lambda rows, path: [])


def test_a_row_for_each_rival_with_every_field(bench: tuple[list[Row], str, Path]) -> None:
    rows = bench[0]
    wanted = [*PLAIN.split(","), "gemm-mm", "gemm-linear"]
    assert [(row.dtype, row.rival) for row in rows] == [(d, r) for d in ("bfloat16", "float32") for r in wanted]
    for row in rows:
        assert (row.n, row.d, row.v, row.op, row.threads, row.seed) == (32, 16, 300, DIFF, 1, 0)
        assert row.device and row.python and row.torch == torch.__version__ and row.date and row.copy_gb_s > 0
        if row.missing is None:
            optional = {"missing", "version", "triton", "commit", "dirty", "grad_rms_error"}
            optional |= {"rms_error", "max_error", "error_rows"} if row.kind == "floor" else set()
            assert not [key for key, value in asdict(row).items() if value is None and key not in optional]


def test_figures_agree_with_each_other(bench: tuple[list[Row], str, Path]) -> None:
    for row in (row for row in bench[0] if row.missing is None):
        assert row.latency_ms and row.ratio and row.times_ours and row.gflops and row.bandwidth_share
        for key in ("latency_ms", "ratio", "times_ours"):
            low, middle, high = (asdict(row)[key + end] for end in ("_q20", "", "_q80"))
            assert 0 < low <= middle <= high
        assert row.rounds == 3
        assert row.flops == 4 * 32 * 16 * 300
        assert row.gflops == pytest.approx(row.flops / row.latency_ms / 1e6)
        assert row.bandwidth_share == pytest.approx(row.bytes_moved / row.latency_ms / 1e6 / row.copy_gb_s)
        if row.rival == row.floor:
            assert (row.ratio_q20, row.ratio, row.ratio_q80) == (1, 1, 1)
        if row.kind == "ours":
            assert (row.times_ours_q20, row.times_ours, row.times_ours_q80) == (1, 1, 1)
    for dtype in ("bfloat16", "float32"):
        floors = [row for row in bench[0] if row.kind == "floor" and row.dtype == dtype]
        assert {row.floor for row in floors} == {min(floors, key=lambda row: row.latency_ms or 0).rival}


def test_errors_are_small_for_ours_and_large_where_logits_are_rounded(bench: tuple[list[Row], str, Path]) -> None:
    off = {(row.rival, row.dtype): row.rms_error for row in bench[0] if row.rms_error is not None}
    for dtype in ("bfloat16", "float32"):
        for rival in ("ours", "ours-reference", "ours-twice", "eager-fp32"):
            assert 0 < off[rival, dtype] < 5e-6
    assert off["eager-16bit", "bfloat16"] > 1e-3
    assert off["torch-lce", "bfloat16"] > 1e-3
    assert all(row.max_error >= row.rms_error for row in bench[0] if row.max_error and row.rms_error)


def test_jsonl_csv_and_plot(bench: tuple[list[Row], str, Path]) -> None:
    rows, text, folder = bench
    stored = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    assert stored == [asdict(row) for row in rows]
    with (folder / "rows.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert table == [{key: "" if value is None else str(value) for key, value in row.items()} for row in stored]
    assert (folder / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert "ours" in (folder / "rows.svg").read_text()
    assert str(folder / "rows.jsonl") in text.replace("\n", "")


def test_appending_keeps_older_rows_and_survives_a_torn_line(
    bench: tuple[list[Row], str, Path], tmp_path: Path
) -> None:
    path, row = tmp_path / "rows.jsonl", bench[0][0]
    append_rows([row], path)
    with path.open("a") as file:
        file.write('{"schema": 1, "riv')  # a crash in the middle of a write
    append_rows([replace(row, rounds=9)], path)
    assert [each["rounds"] for each in read_rows(path)] == [row.rounds, 9]
    with write_csv(path).open(newline="") as file:
        assert [each["rounds"] for each in csv.DictReader(file)] == [str(row.rounds), "9"]


def test_table_is_narrow_ours_first_and_by_time(bench: tuple[list[Row], str, Path]) -> None:
    rows, text, _ = bench
    lines = text.splitlines()
    table = lines[next(i for i, line in enumerate(lines) if line.startswith("N=32 D=16 V=300 float32")) :]
    assert max(map(len, table)) <= 80
    assert "..." not in text and "…" not in text
    assert table[3].startswith("> ours ")
    measured = [row for row in rows if row.dtype == "float32" and row.missing is None and row.kind != "ours"]
    order = [row.words for row in sorted(measured, key=lambda row: row.latency_ms or 0)]
    assert [line[2:].split("  ")[0].removesuffix(" *") for line in table[4 : 4 + len(order)]] == order
    assert "missing: torch eager 16-bit: for 16-bit inputs" in text


def shown(rows: list[Row]) -> str:
    out = RichConsole(file=io.StringIO(), width=80)
    out.print(bench_tables(rows))
    return " ".join(out.file.getvalue().split())  # type: ignore[attr-defined]


def test_the_verdict_is_honest(bench: tuple[list[Row], str, Path]) -> None:
    rows = [row for row in bench[0] if row.dtype == "bfloat16"]
    slower = [
        replace(r, times_ours=2.0, times_ours_q20=1.5, times_ours_q80=3.0) if r.kind == "outside" else r for r in rows
    ]
    assert "ours is faster than every outside rival here: 3 outside rivals over 1 case; the nearest, " in shown(slower)
    assert "our own kernel for one model, run twice, takes " in shown(slower)
    one = [replace(row, times_ours=0.9) if row.rival == "eager-16bit" else row for row in slower]
    assert "ours is not faster than every outside rival here (3 outside rivals over 1 case)" in shown(one)
    assert "torch eager 16-bit 0.90 (error " in shown(one)
    lost = [replace(row, missing="no luck", latency_ms=None) if row.kind == "ours" else row for row in slower]
    assert "ours did not run" in shown(lost) and "missing: ours: no luck" in shown(lost)
    alone = [row for row in rows if row.kind != "outside"]
    assert "no outside rival ran" in shown(alone)


@pytest.mark.parametrize("options", [{"backward": True}, {"op": LOGITS_DIFF}], ids=["backward", "from logits"])
def test_the_other_operations(options: dict[str, Any], tmp_path: Path, quick: None) -> None:
    rows, text = run(tmp_path, dtypes=("bfloat16",), **options)
    by_id = {row.rival: row for row in rows}
    assert by_id["ours"].missing is None and (by_id["ours"].rms_error or 1) < 5e-6
    assert (by_id["eager-16bit"].rms_error or 0) > 1e-3
    if "backward" in options:
        assert by_id["ours"].op == BACKWARD and by_id["ours"].flops == 6 * 32 * 16 * 300
        assert 0 < (by_id["ours"].grad_rms_error or 0) < (by_id["eager-16bit"].grad_rms_error or 0)
        assert "ours-twice" not in by_id and by_id["ours"].floor == "gemm-mm"
    else:
        assert by_id["ours"].d == 0 and by_id["ours"].floor in ("read-max", "read-sum")
    assert "> ours" in text


def test_exact_is_fp64_autograd() -> None:
    for op in (DIFF, LOGITS_DIFF, BACKWARD):
        case = Case(op, "x", 9, 0 if op == LOGITS_DIFF else 7, 31, "bfloat16")
        inputs = make_inputs(case, "cpu", seed=3)
        leaf = inputs.sft[0].double().requires_grad_()

        def logprob(first: torch.Tensor, rest: tuple[torch.Tensor, ...], tokens: torch.Tensor) -> torch.Tensor:
            logits = first @ rest[0].double().T if rest else first
            return -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")

        want = logprob(leaf, inputs.sft[1:], inputs.tokens_N)
        truth = exact(inputs, seed=0)
        if op == BACKWARD:
            (want * inputs.grad_N.double()).sum().backward()
            torch.testing.assert_close(truth.d_hidden_KD, leaf.grad[truth.rows_K])  # type: ignore[index]
        else:
            want = want - logprob(inputs.base[0].double(), inputs.base[1:], inputs.tokens_N)
        torch.testing.assert_close(truth.values_K, want[truth.rows_K])
        moved = (want + 0.25).float().detach()
        assert astuple(errors(moved, None, truth)) == pytest.approx((0.25, 0.25, None), abs=1e-6)


def test_inputs_are_seeded_and_realistic() -> None:
    case = Case(DIFF, "x", 64, 128, 500, "float32")
    one, two, other = (make_inputs(case, "cpu", seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.sft + one.base, two.sft + two.base, strict=True))
    assert not torch.equal(one.sft[0], other.sft[0])
    assert 2 < (one.sft[0] @ one.sft[1].T).std(dim=-1).mean() < 4  # nats
    assert 0.01 < exact(one, 0).values_K.std() < 1  # the two models are near
    assert case.input_bytes == sum(x.nbytes for x in (*one.sft, *one.base, one.tokens_N))


def test_rivals_take_turns_and_a_failing_one_drops_out() -> None:
    log: list[str] = []

    def failing() -> None:
        if log.count("c") == 1:
            raise MemoryError("no room\nfor more")
        log.append("c")

    calls = {"a": lambda: log.append("a"), "b": lambda: log.append("b"), "c": failing}
    samples, failed = measure.round_robin(calls, measure.Timer("cpu"), rounds=5, seconds=math.inf, seed=0)
    assert {name: len(sample) for name, sample in samples.items()} == {"a": 5, "b": 5}
    assert failed == {"c": "MemoryError: no room"}
    assert sorted(log[:3]) == ["a", "b", "c"]  # each once before any comes again
    hurried, _ = measure.round_robin({"a": lambda: None}, measure.Timer("cpu"), rounds=50, seconds=0, seed=0)
    assert len(hurried["a"]) == measure.MIN_ROUNDS


def test_ratios_are_taken_within_rounds() -> None:
    """Drift that hits a whole round cancels: medians of the latencies would give 4 / 3."""
    samples = {"slow": [2.0, 4.0, 60.0], "fast": [1.0, 3.0, 20.0]}
    assert _within_rounds(samples, "slow", "fast") == measure.quantiles([2.0, 4 / 3, 3.0])
    assert _within_rounds(samples, "slow", "absent") is None


def test_quantiles() -> None:
    assert measure.quantiles([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == measure.Quantiles(2.0, 3.5, 5.0)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux says the high-water mark")
def test_memory_of_a_call() -> None:
    size, room = 64 << 20, torch.zeros(1 << 20)
    grown = measure.peak_extra_bytes(lambda: torch.ones(size, dtype=torch.int8), "cpu")
    assert grown is not None and size * 0.95 < grown < size * 1.2
    still = measure.peak_extra_bytes(lambda: room.add_(1), "cpu")
    assert still is not None and still < 4 << 20
    before = measure.tensor_storages()
    kept = {"buffer": torch.empty(1000)}  # a cache of a kernel's own
    new = [size for address, size in measure.tensor_storages().items() if address not in before]
    assert new == [kept["buffer"].nbytes]


BLOCKED = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from srppo.bench.kernel import main
sys.exit(main(sys.argv[2:]))
"""


def bench_process(blocked: str, *arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*([str(path)] if path else []), str(ROOT)])}
    tiny = ("--n", "16", "--shape", "8x60", "--dtype", "fp32", "--rounds", "3", "--threads", "1", "--device", "cpu")
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, blocked, *tiny, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )


def stand_ins(folder: Path) -> None:
    """Modules under TRL's names: its function of logits works, its kernels fail to import."""
    for inner in ("trl/trainer", "trl/kernels"):
        (folder / inner).mkdir(parents=True)
    for name in ("trl/__init__.py", "trl/trainer/__init__.py", "trl/kernels/__init__.py"):
        (folder / name).touch()
    (folder / "trl/trainer/utils.py").write_text(
        "def selective_log_softmax(logits, index):\n"
        "    return logits.log_softmax(-1).gather(-1, index[:, None]).squeeze(-1)\n"
    )
    (folder / "trl/kernels/chunked_logprob.py").write_text("raise OSError('libtrl.so is missing\\nhelp')\n")


def test_runs_without_the_rest_and_names_who_is_missing(tmp_path: Path) -> None:
    """Where nothing but torch, rich and matplotlib is left, one rival is installed and one is broken."""
    stand_ins(tmp_path)
    absent = "pydantic,typer,transformers,datasets,accelerate,lm_eval,scipy,liger_kernel,cut_cross_entropy"
    rivals = "ours,eager-fp32,trl-softmax,trl-chunked,liger,cce,cce-compile"
    out = tmp_path / "rows.jsonl"
    done = bench_process(absent, "--rivals", rivals, "--out", str(out), path=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = {row["rival"]: row for row in read_rows(out)}
    assert [name for name, row in rows.items() if row["missing"] is None] == [
        *("ours", "eager-fp32", "trl-softmax", "gemm-mm", "gemm-linear")
    ]
    assert rows["trl-softmax"]["rms_error"] < 5e-6
    assert rows["trl-chunked"]["missing"] == "OSError: libtrl.so is missing"
    assert rows["trl-chunked"]["latency_ms"] is None
    assert rows["liger"]["missing"] == "not installed (pip install liger-kernel)"
    assert rows["cce"]["missing"] == rows["cce-compile"]["missing"] == "not installed (pip install cut-cross-entropy)"
    shown = " ".join(done.stdout.split())
    for words in ("TRL ChunkedLogProb: OSError", "Liger-Kernel: not", "cut-cross-entropy compile: not"):
        assert f"missing: {words}" in shown


def test_reasons_that_are_known_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    by_id = {rival.id: rival for rival in RIVALS}
    monkeypatch.setattr("srppo.bench.rivals._installed", lambda module: True)
    case = Case(DIFF, "x", 1 << 20, 8, 1 << 20, "float32")
    assert missing_reason(by_id["liger"], case, "cpu") == "needs a GPU"
    assert "GB are free" in (missing_reason(by_id["eager-fp32"], case, "cpu") or "")
    assert missing_reason(by_id["ours"], case, "cpu") is None
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert missing_reason(by_id["compile"], replace(case, n=1), "cpu") == "needs a C++ compiler (g++)"


def test_a_case_too_large_is_said_and_the_others_run(tmp_path: Path, quick: None) -> None:
    rows, text = run(tmp_path, shapes=("16x300", "1000000x9000000"), dtypes=("float32",), rivals=("ours",))
    assert [row.missing is None for row in rows] == [True] * 3 + [False] * 3
    assert "warning: the inputs of " in text and "choose smaller n or shape" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "fast"], "preset is 'fast'; allowed: quick, cpu, full"),
        (["--op", "softmax"], "op is 'softmax'; allowed: linear_logprob_diff, logprob_diff"),
        (["--op", "logprob_diff", "--backward"], "leave out one of the two"),
        (["--shape", "4096"], "shape is '4096'; allowed: DxV, such as 4096x32000, or qwen2.5-0.5b"),
        (["--dtype", "int8"], "dtype is 'int8'; allowed: bfloat16, float16, float32"),
        (["--rivals", "ours,quack"], "rival is 'quack'; allowed: ours, ours-reference"),
        (["--n", "0"], "n is 0; it must be at least 1"),
        (["--threads", "0"], "threads is 0; it must be at least 1"),
        (["--device", "tpu"], "device is 'tpu'; allowed: auto, cpu, cuda"),
        (["--out", "rows.csv"], "out is 'rows.csv'; it must be a file that ends in .jsonl"),
        (["--out", "/proc/none/rows.jsonl"], "which cannot be written"),
    ],
)
def test_a_bad_option_is_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--out" not in arguments:
        arguments = [*arguments, "--out", str(tmp_path / "rows.jsonl")]
    assert main(arguments) == 2
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1


def test_a_missing_gpu_is_one_line(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="torch finds no GPU"):
        run_kernel_bench(KernelBench(device="cuda", out=tmp_path / "rows.jsonl"), Console(plain=True))


def test_presets_name_known_shapes_and_cover_the_listed_models() -> None:
    for name in PRESETS:
        cases = KernelBench(preset=name).cases
        assert cases and {case.shape for case in cases} <= SHAPES.keys()
    full = KernelBench(preset="full").cases
    assert {"qwen2.5-0.5b", "llama-3.2-1b", "mistral-7b", "llama-3-8b", "qwen2.5-7b", "ragged"} == {
        case.shape for case in full
    }
    assert (min(case.n for case in full), max(case.n for case in full)) == (512, 8192)


def test_columns_are_the_fields() -> None:
    assert len(COLUMNS) == len(set(COLUMNS)) and {"device", "commit", "torch", "missing", "ratio_q80"} <= set(COLUMNS)
