"""TRL beside our step: real processes that answer, die, hang and talk nonsense; the same work on both sides.

SRPPO_RIVAL_PYTHON names Pythons of environments with TRL (separated as in PATH); without it the tests of TRL itself are
skipped, and the worker's parts are tested with the transformers that is here.
"""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from srppo.bench import step, step_rivals, trl_worker
from srppo.bench.step import PRESETS, Shape, Work, model_settings, run_step_bench
from srppo.bench.step_rivals import WORKER, find_rivals
from srppo.bench.step_rows import PHASES, StepRow
from srppo.console import Console
from srppo.errors import ConfigError
from srppo.models.language_model import LanguageModel
from srppo.training.batch import Generated
from srppo.training.scores import score_log_ratio

TRL = [python for python in os.environ.get("SRPPO_RIVAL_PYTHON", "").split(os.pathsep) if python]
SHAPE = Shape(16, 24, 1, 2, 40)
VERSIONS = {"trl": "1.12.0", "torch": "2.13.0", "transformers": "5.24.0", "accelerate": "1.15.0"}
COUNTING = """
    row = {"seconds": dict.fromkeys(["rollout", "score", "update"], 2.0), "gc_cpu_s": 0.5, "peak_bytes": 1 << 20}
    row |= {"cpu_s": dict.fromkeys(["rollout", "score", "update"], 1.0), "answer_tokens": sum(answers)}
    print(json.dumps(row | {"tokens": sum(map(len, work["prompts"])) + sum(answers)}), flush=True)
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setitem(step.PRESETS, "small", Work((2, 9), (2, 7), 12, 2, 2, 64, shape=SHAPE))
    monkeypatch.setattr(step, "gemm_gflops", lambda device, dtype: 100.0)  # measured by other tests


def rival(folder: Path, answer: str = COUNTING, *, trainers: tuple[str, ...] = ("ppo",), versions: str = "") -> str:
    """A program that stands for the Python of an environment with TRL: it is run with the worker's path, and passes
    that over. answer: what it does in a step (`work`, `answers`, and `at`: which step); versions: what it does when
    it is asked what is installed."""
    said = versions or f"print(json.dumps({ {'versions': VERSIONS, 'trainers': [*trainers]} }))"
    lines = [f"#!{sys.executable}", "import json, os, sys, time", "if sys.argv[2:] == ['versions']:", f"    {said}"]
    lines += ["    raise SystemExit", "work = json.loads(sys.stdin.readline())"]
    lines += [f"open({str(folder / 'pids')!r}, 'a').write(str(os.getpid()) + ' ')"]
    lines += [f"open({str(folder / 'work.json')!r}, 'w').write(json.dumps([work, dict(os.environ)]))"]
    lines += ["for at, line in enumerate(sys.stdin):", "    answers = json.loads(line)['answers']", answer]
    program = folder / "python"
    program.write_text("\n".join(lines))
    program.chmod(0o755)
    return str(program)


def run(out: Path, *rivals: str, sets: tuple[str, ...] = ()) -> tuple[list[StepRow], list[dict[str, Any]], str]:
    """Our rows, the file's rows of rivals, and what is printed."""
    text, file = io.StringIO(), out / "step.jsonl"
    rows = run_step_bench(
        "small",
        Console(plain=True, file=text),
        steps=2,
        model=model_settings("small", None, sets),
        threads=1,
        device="cpu",
        out=file,
        rivals=rivals,
    )
    written = [json.loads(line) for line in file.read_text().splitlines()]
    return rows, [row for row in written if "rival" in row], text.getvalue()


def test_a_rival_does_the_same_work_and_is_compared_step_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/of/ours")
    ours, theirs, text = run(tmp_path, rival(tmp_path))
    assert [row["step"] for row in theirs] == [row.step for row in ours] == [1, 2]
    for mine, row in zip(ours, theirs, strict=True):
        assert row["tokens"] == mine.tokens and row["answer_tokens"] == mine.answer_tokens
        assert row["times_ours"] == pytest.approx(6 / sum(mine.seconds.values()))
        assert row["times_ours_cpu"] == pytest.approx(3 / sum(mine.cpu_s.values()))
        assert (row["missing"], row["method"], row["rival"]) == (None, "ppo", "TRL 1.12.0 PPO")
        assert row["versions"] == VERSIONS
    work, environment = json.loads((tmp_path / "work.json").read_text())
    assert "PYTHONPATH" not in environment and environment["OMP_NUM_THREADS"] == "1"
    assert (work["rollouts"], work["epochs"], work["minibatches"], work["steps"]) == (12, 2, 2, 3)
    assert work["rows"] == 3  # a minibatch has 6, four of at most 16 tokens are a pass of 64, and 4 does not divide 6
    assert work["config"] == SHAPE.config() and work["longest"] == 7 and work["model"] is None
    assert len(work["prompts"]) == 12 and {*map(len, work["prompts"])} <= {*range(2, 10)}
    assert "ours, PPO" in text and "TRL 1.12.0 PPO" in text and "missing" not in text


def test_what_has_no_critic_stands_beside_our_step_without_one(tmp_path: Path) -> None:
    ours, theirs, _ = run(tmp_path, rival(tmp_path, trainers=("grpo", "rloo")))
    assert [(row["trainer"], row["method"]) for row in theirs] == [("grpo", "rloo"), ("rloo", "rloo")] * 2
    assert {row.method for row in ours} == {"rloo"}
    work, _ = json.loads((tmp_path / "work.json").read_text())
    assert work["per_prompt"] == 2 and work["prompts"][::2] == work["prompts"][1::2]


@pytest.mark.parametrize(
    ("answer", "step", "line"),
    [
        (
            "    if at: raise RuntimeError('out of luck')\n" + COUNTING,
            1,
            "ended with status 1: RuntimeError: out of luck",
        ),
        ("    os._exit(3)", 0, "ended with status 3"),
        ("    time.sleep(600)", 0, "gave no step within 1 s"),
        ("    print('0% |      |', flush=True)", 0, "said '0% | |', which is no step"),
        ("    sys.stdout.buffer.write(b'\\xff\\n'); sys.stdout.flush()", 0, "said '\ufffd', which is no step"),
        ("    print('[1, 2]', flush=True)", 0, "said '[1, 2]', which is no step"),
        ("    answers.pop()\n" + COUNTING, 0, "did other work: "),
        ("    os.close(1); time.sleep(600)", 0, "closed its output and did not end"),
    ],
    ids=["raises", "dies", "hangs", "rubbish", "bytes", "other json", "other work", "silent"],
)
def test_a_rival_that_fails_drops_out_with_one_line_and_ours_goes_on(
    answer: str, step: int, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_rivals, "STEP_S", 1.0 if "within" in line else 300.0)
    monkeypatch.setattr(step_rivals, "GRACE_S", 0.5 if "closed" in line else 60.0)
    ours, theirs, text = run(tmp_path, rival(tmp_path, answer))
    assert [row.step for row in ours] == [1, 2]
    assert [row["missing"] for row in theirs if row["step"] < step] == [None] * (step - 1 if step else 0)
    (missing,) = [row for row in theirs if row["missing"]]
    assert missing["step"] == step and missing["missing"].startswith(line) and missing["seconds"] is None
    assert text.count(f"missing: TRL 1.12.0 PPO, step {step}: {line}"[:79]) == 1
    for pid in (tmp_path / "pids").read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


@pytest.mark.parametrize(
    ("versions", "line"),
    [
        ("print(json.dumps({'versions': {'trl': None}, 'trainers': []}))", "where trl is not installed; there: pip"),
        ("print(json.dumps({'versions': {'trl': '1.14.0'}, 'trainers': []}))", "which has TRL 1.14.0; compared are"),
        ("print('hello')", "which answered 'hello'"),
        ("print('[]')", "which answered '[]'"),
        ("raise ImportError('no libc')", "which answered 'ImportError: no libc'"),
        ("os._exit(9)", "which answered 'nothing, exit status 9'"),
        ("time.sleep(600)", "which said nothing in 1 s"),
    ],
)
def test_an_environment_that_cannot_be_compared_is_refused_in_one_line(
    versions: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_rivals, "PROBE_S", 1.0 if "said nothing" in line else 120.0)
    program = rival(tmp_path, versions=versions)
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, program)
    assert str(caught.value).startswith(f"rival-python is {program!r}, {line}") and "\n" not in str(caught.value)


def test_what_is_no_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no program")
    for path in (tmp_path, tmp_path / "none", tmp_path / "text"):
        with pytest.raises(ConfigError, match="which is no program; give the Python of an environment that has TRL"):
            find_rivals([str(path)])
    (tmp_path / "text").chmod(0o755)
    with pytest.raises(ConfigError, match="which cannot be run: Exec format error"):
        find_rivals([str(tmp_path / "text")])


@pytest.mark.parametrize("setting", ["model.adapters=lora", "model.precision=bf16", "model.scoring=bf16"])
def test_work_that_trl_would_do_otherwise_is_refused(setting: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="whole models in fp32 on a CPU: leave out --rival-python"):
        run(tmp_path, rival(tmp_path), sets=(setting,))


# The worker's parts, with what is installed here


def test_the_worker_needs_nothing_but_python_to_say_what_is_installed() -> None:
    names = [node for node in ast.walk(ast.parse(WORKER.read_text())) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = [alias.name for node in names for alias in node.names] + [getattr(node, "module", "") for node in names]
    assert not [name for name in modules if (name or "").startswith("srppo")]
    done = subprocess.run([sys.executable, "-I", "-S", str(WORKER), "versions"], capture_output=True, text=True)
    said = {"trl": None, "torch": None, "transformers": None, "accelerate": None}
    assert json.loads(done.stdout) == {"versions": said, "trainers": []}


@pytest.mark.parametrize(
    ("trl", "trainers"),
    [
        ("1.12.0", ["ppo"]),
        ("1.12.1", ["ppo"]),
        ("1.16.0", ["grpo", "rloo"]),
        ("1.20rc1", ["grpo", "rloo"]),
        ("1.13.0", []),
        ("0.29.0", []),
        ("2.0.0", []),
    ],
)
def test_the_version_decides_what_is_compared(trl: str, trainers: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_worker, "version", lambda name: trl)
    assert trl_worker.versions()["trainers"] == trainers


def llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SHAPE.config())).eval()


def test_the_reward_they_are_given_is_ours() -> None:
    sft, base = llama(1), llama(2)
    tokens_BS = torch.randint(2, SHAPE.vocabulary, (3, 9), generator=torch.Generator().manual_seed(3))
    mask_BS = torch.ones((3, 9), dtype=torch.bool)
    mask_BS[0, :2], mask_BS[1, 7:] = False, False
    with torch.no_grad():
        theirs_BT = trl_worker.log_ratio(sft, base, tokens_BS, mask_BS, 5)
    batch = Generated(tokens_BS, mask_BS, mask_BS[:, -5:], torch.ones(3, dtype=torch.bool))
    ours = score_log_ratio(LanguageModel(sft), LanguageModel(base), batch)
    torch.testing.assert_close(theirs_BT, ours.log_ratio_BT, rtol=1e-4, atol=1e-5)
    assert float(ours.log_ratio_BT.abs().max()) > 0.01


def test_answers_end_where_they_are_told_to_and_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, prompts_BP = llama(1), torch.tensor([[0, 0, 5], [7, 8, 9], [0, 3, 4]])
    policy.generation_config = GenerationConfig(pad_token_id=trl_worker.PAD, eos_token_id=trl_worker.END)
    with torch.no_grad():
        policy.lm_head.weight[[trl_worker.PAD, trl_worker.END]] *= 0
        policy.lm_head.weight[2:] *= 1e-3  # neither of the two would stay away by itself
    turns = trl_worker.Turns({"trainer": "ppo", "epochs": 1, "minibatches": 1}, io.StringIO())
    trl_worker.watch(policy, turns)
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps({"answers": [1, 6, 4]}) + "\n"))
    turns.wait()
    config = GenerationConfig(max_new_tokens=6, do_sample=True)
    found_BS = policy.generate(input_ids=prompts_BP, attention_mask=prompts_BP != 0, generation_config=config)
    for row, length in zip(found_BS[:, 3:].tolist(), [1, 6, 4], strict=True):
        assert row[length - 1] == trl_worker.END and row[length:] == [trl_worker.PAD] * (6 - length)
        assert not {trl_worker.PAD, trl_worker.END} & {*row[: length - 1]}
    assert (turns.tokens, turns.answer_tokens) == (6 + 11, 11)
    turns.update_begins()
    turns.answer()
    row = json.loads(turns.answers.getvalue())
    assert [*row["seconds"]] == [*row["cpu_s"]] == [*PHASES] and min(row["seconds"].values()) > 0
    assert (row["tokens"], row["answer_tokens"]) == (17, 11)


def test_words_are_token_ids() -> None:
    words = trl_worker.tokenizer(40)
    assert words(["<1> <11> <0> <39>", "<2>"])["input_ids"] == [[1, 11, 0, 39], [2]]
    assert (words.pad_token_id, words.eos_token_id) == (trl_worker.PAD, trl_worker.END)


# The presets for GPUs


@pytest.mark.parametrize(("preset", "billions"), [("gpu-0.5b", 0.494), ("gpu-7b", 7.61)])
def test_sizes_are_those_of_the_models_that_are_named(preset: str, billions: float) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**PRESETS[preset].shape.config()))
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, rel=0.002)


@pytest.mark.parametrize("preset", ["gpu-0.5b", "gpu-7b"])
def test_a_step_of_theirs_at_a_small_size(preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = PRESETS[preset]
    shape = whole.shape._replace(hidden=32, inner=48, layers=2, heads=4, vocabulary=50, kv_heads=2)
    monkeypatch.setitem(PRESETS, preset, replace(whole, shape=shape, prompts=(2, 9), answers=(2, 7), rollouts=8))
    config, text = model_settings(preset, None, ["model.lora_rank=4"]), io.StringIO()
    (row,) = run_step_bench(
        preset, Console(plain=True, file=text), steps=1, model=config, threads=1, device="cpu", out=tmp_path / "x.jsonl"
    )
    assert (row.model["adapters"], row.model["precision"], row.model["hidden"]) == ("lora", "bf16", 32)
    assert row.work["dtype"] == "bfloat16" and row.answer_tokens >= 16


@pytest.mark.parametrize(("micro_tokens", "rows"), [(96, 6), (95, 3), (48, 3), (47, 2), (32, 2), (31, 1), (8, 1)])
def test_a_rival_takes_an_even_part_of_a_minibatch_that_its_padding_lets_fit(micro_tokens: int, rows: int) -> None:
    """Of 6 rows of up to 16 tokens; one at least."""
    assert step.rows_a_pass(Work((2, 9), (2, 7), 12, 2, 2, micro_tokens, shape=SHAPE)) == rows


# TRL itself


@pytest.mark.skipif(not TRL, reason="SRPPO_RIVAL_PYTHON names no environment with TRL")
def test_trl_does_the_same_work(tmp_path: Path) -> None:
    ours, theirs, text = run(tmp_path, *TRL)
    assert theirs and not [row["missing"] for row in theirs if row["missing"]], text
    tokens = {(row.method, row.step): (row.tokens, row.answer_tokens) for row in ours}
    for row in theirs:
        assert (row["tokens"], row["answer_tokens"]) == tokens[row["method"], row["step"]]
        assert min(row["seconds"].values()) > 0 and 0 <= row["gc_cpu_s"] <= sum(row["cpu_s"].values())
