"""`srppo bench eval`: all ways do the same work, its parts are the harness's, its rows are whole. No time is judged."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

import srppo.bench.overhead as overhead
from srppo.bench.evaluation import BAR, EvalBench, row_of, run_eval_bench, verdicts
from srppo.bench.overhead import SPANS, WAYS, Overhead, measure_overhead
from srppo.bench.rows import read_rows
from srppo.bench.spans import Spans
from srppo.config import ModelConfig
from srppo.console import Console
from srppo.data.chat import ensure_chat_template
from srppo.errors import ConfigError
from srppo.evaluation.harness import model as harness_model
from srppo.models.loading import load_tokenizer


@pytest.fixture(scope="module")
def found() -> Overhead:
    return measure_overhead("embedded:xs", sampled=False, rounds=1)


def test_all_ways_answer_the_same_items_alike(found: Overhead) -> None:
    assert found.batches == [300, 300, 300]
    assert len(set(found.steps.values())) == 1 and found.steps["model"] > 3  # the model alone runs the same passes
    assert len(found.answers["harness"]) == 900 and len(set(found.answers["harness"])) > 300
    assert found.answers["harness"] == found.answers["plain"]


def test_every_part_is_counted_and_nothing_stays_wrapped(found: Overhead) -> None:
    assert set(found.spans) == set(SPANS) and all(seconds[0] > 0 for seconds in found.spans.values())
    assert max(found.spans, key=lambda name: found.spans[name][0]) == "decoding"
    assert harness_model.decode.__module__ == "srppo.evaluation.harness.decode"
    assert overhead.load_tasks.__module__ == "srppo.evaluation.harness.tasks"


def test_shares_are_taken_within_rounds_and_the_bar_is_judged_on_their_median(found: Overhead) -> None:
    seconds = {"model": [1.0, 2.0, 4.0], "plain": [1.0, 1.0, 1.0], "harness": [1.1, 2.2, 5.0]}
    made = Overhead("embedded:xs", True, seconds, seconds, found.spans, [1], found.steps, {})
    row = row_of("xs", made)
    assert row.over_model.median == pytest.approx(0.1) and row.met and row.decoding == "sampled" and row.rounds == 3
    assert row.over_plain.median == pytest.approx(1.2)
    assert "adds 10.0%" in verdicts([row])[0] and f"within the bar of {BAR:.0%}" in verdicts([row])[0]
    slow = row_of("xs", Overhead("embedded:xs", True, seconds | {"harness": [1.2, 2.4, 4.0]}, *list(_rest(made))))
    assert not slow.met and "misses" in verdicts([slow])[0]


def _rest(made: Overhead) -> Any:
    return made.wall_s, made.spans, made.batches, made.steps, made.answers


def test_rows_are_written_and_printed_in_80_columns(
    found: Overhead, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, bool, int | None]] = []

    def measured(spec: str, *, sampled: bool, rounds: int | None) -> Overhead:
        asked.append((spec, sampled, rounds))
        return found

    monkeypatch.setattr("srppo.bench.evaluation.measure_overhead", measured)
    said = io.StringIO()
    out = tmp_path / "rows" / "eval.jsonl"
    run_eval_bench(EvalBench(models=("xs",), rounds=2, out=out), Console(plain=True, file=said))
    assert asked == [("embedded:xs", False, 2), ("embedded:xs", True, 2)]
    rows = read_rows(out)
    assert len(rows) == 2 and {"commit", "torch", "cpu"} <= set(rows[0]["machine"]) and rows[0]["versions"]["lm_eval"]
    assert set(rows[0]["cpu_s"]) == set(rows[0]["wall_s"]) == set(WAYS) and set(rows[0]["parts_s"]) == set(SPANS)
    assert "over model" in said.getvalue() and "…" not in said.getvalue()


def test_an_unknown_base_is_named() -> None:
    with pytest.raises(ConfigError, match="--model huge"):
        run_eval_bench(EvalBench(models=("huge",)), Console(plain=True, quiet=True))


def test_spans_can_be_taken_off() -> None:
    class Work:
        def do(self) -> int:
            return 1

    now, plain = iter(range(10)), Work.do
    spans = Spans(lambda: float(next(now)))
    spans.wrap(Work, "do", "work")
    assert Work().do() == 1 and spans.seconds == {"work": 1.0}
    spans.unwrap()
    assert Work.do is plain


def test_the_session_of_the_bench_loads_no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("embedded:xs", ModelConfig())
    ensure_chat_template(tokenizer)
    session = overhead.srppo.evaluation.harness.session
    with overhead._loaded(tokenizer):
        assert session.load_tokenizer("anything", ModelConfig()) is tokenizer
    assert session.load_tokenizer is load_tokenizer
