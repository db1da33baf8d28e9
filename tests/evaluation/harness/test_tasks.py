"""`--suite paper` beyond the check of its data: the hub's data sets stand in as rows of the same columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness_cases import evaluate, samples, summary, tiny_model

from srppo.instructions import checkers

ROWS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "google/IFEval": {
        "train": [
            {"key": i, "prompt": f"Write {i}.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
            for i in range(3)
        ]
    },
    "openai/gsm8k": {
        split: [{"question": f"{i}+1?", "answer": f"So.\n#### {i + 1}"} for i in range(4)]
        for split in ("train", "test")
    },
    "Idavidrein/gpqa": {
        "train": [
            {"Question": f"Q{i}", "Correct Answer": "a", **{f"Incorrect Answer {n}": f"{n}{i}" for n in (1, 2, 3)}}
            for i in range(12)
        ]
    },
}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets import Dataset, DatasetDict

    def load(path: str, name: str | None = None, **_: Any) -> DatasetDict:
        assert name == {"openai/gsm8k": "main", "Idavidrein/gpqa": "gpqa_main"}.get(path)
        return DatasetDict({split: Dataset.from_list(rows) for split, rows in ROWS[path].items()})

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load)
    monkeypatch.setattr(checkers, "missing", lambda: ["langdetect", "punkt_tab"])


@pytest.mark.usefixtures("hub")
def test_the_suite_runs_and_scores(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny")
    options: dict[str, Any] = {"max_new_tokens": 8, "num_fewshot": 1, "chat_template": False, "score_rest": True}
    paths, said = evaluate(model, tmp_path / "all", suite="paper", **options)
    assert [summary(path)["metric"] for path in paths] == ["prompt_level_strict_acc", "exact_match,strict-match", "acc"]
    assert [len(samples(path)) for path in paths] == [3, 4, 12]
    assert [summary(path)["num_fewshot"] for path in paths] == [0, 1, 0] and "is not used for it" in said
    assert {summary(path)["group"] for path in paths} == {"paper"}
    rows = samples(paths[2])
    for row in rows:  # the choice that was scored as right is the one that the question shows as such
        right = next(line[:3] for line in row["prompt"].splitlines() if line.endswith(") a"))
        assert row["acc"] == float(row["response"].strip() == right)
    assert len({row["prompt"].index(") a") for row in rows}) > 1, "choices are shuffled"
    (alone,), _ = evaluate(model, tmp_path / "alone", "gpqa_main_zeroshot", **options)
    assert samples(alone) == rows, "and in the same way whatever else was asked for"
