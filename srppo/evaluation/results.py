"""Evaluation results on disk: a model's scores on the items of one task. No torch.

    PARENT/<task>@<key>/    summary.json (model, task, decoding, metric, seed, key, group and more), samples.parquet
                            (a row a sample: item, sample, prompt, response, a float column a metric, and where they
                            apply cluster and not_scored, the reason), manifest.json (checksums of both)

A run's own test answers (stages/<id>/eval/kept-greedy and kept-sampled) read as tasks named by their group.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from srppo.config import canonical_json
from srppo.errors import DataError, RecordError
from srppo.record.arms import ArmsOf, one_run, stages_by_kind
from srppo.record.files import MANIFEST, damage, replace_folder, storing
from srppo.record.json import plain, read_json, read_lines, revive
from srppo.record.store import Stage

DECODINGS = ("greedy", "sampled")
TASKS = "tasks"  # the unit of a claim about tasks
SUMMARY, SAMPLES, NOT_SCORED = "summary.json", "samples.parquet", ".not-scored.jsonl"
_OWN = {"max_new_tokens": "rollout.max_new_tokens", "data.system": "data.system", "precision": "precision"}
"""What decides a run's own test answers beside model and items: names in a stage's identity, and in `settings`."""
_NEEDED = ("model", "task", "decoding", "metric", "seed", "key", "group")


@dataclass(frozen=True)
class TaskResult:
    """One model's scores on the items of one task, of one training seed.

    decoding: greedy or sampled. metric: the name of what `scores` hold. seed: the arm's training seed, None where
    unknown. items: ids, unique within the task. scores: one an item, the mean over its samples, in the metric's own
    unit (a share for accuracies); NaN where any sample was not scored, with the reason in not_scored. clusters: the
    cluster of each item, None where items are independent; unit: what these are called, "tasks" where items belong to
    several tasks and a claim is about tasks. group: such as in-domain or out-of-domain. settings: how it
    was made, as far as that is recorded, with dotted names (`pairing` says which of them must be equal).
    """

    model: str
    task: str
    decoding: str
    metric: str
    seed: int | None
    items: tuple[str, ...]
    scores: tuple[float, ...]
    clusters: tuple[str, ...] | None
    group: str | None
    path: Path
    higher_is_better: bool = True
    not_scored: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "clusters"


def write_result(parent: Path, summary: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> Path:
    """Write parent/<task>@<key> whole, aside and then renamed, and return it; characters unfit for names become _.

    Raises DataError for a summary or samples that `read_result` could not read, StorageError when the disk refuses.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(parent) / (re.sub(r"[^\w.+-]", "_", str(summary.get("task"))) + f"@{summary.get('key')}")
    rows = [dict(row) for row in samples]
    _result(folder, dict(summary), rows, None)
    columns = list(dict.fromkeys(name for row in rows for name in row))  # from_pylist keeps those of the first row only
    table = pa.table({name: [row.get(name) for row in rows] for name in columns})

    def write(aside: Path) -> None:
        (aside / SUMMARY).write_text(canonical_json(plain(summary)), encoding="utf-8")
        pq.write_table(table, aside / SAMPLES)

    with storing(folder):
        try:
            replace_folder(folder, f"{uuid.uuid4().hex}x", write)
        except OSError:
            if damage(folder) is not None:  # else another process has just written the same key
                raise
    return folder


def read_result(folder: Path, metric: str | None = None) -> TaskResult:
    """The result in one folder; `metric` picks another column of its samples than the primary one.

    Raises RecordError for a folder that holds none or a damaged one, DataError for a metric it does not have.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    summary = revive(read_json(folder / SUMMARY))
    if (folder / MANIFEST).exists() and (reason := damage(folder)):
        raise RecordError(f"{folder} is damaged: {reason}; evaluate again")
    try:
        rows = pq.read_table(folder / SAMPLES).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise RecordError(f"{folder / SAMPLES} cannot be read ({error}); evaluate again") from None
    return _result(folder, summary, rows, metric)


def not_scored_file(folder: Path) -> Path:
    """Where a result's items without a score are listed: a file beside its folder (`srppo eval` writes it), a line an
    item with the reason; or else the samples themselves."""
    listed = folder.with_name(f"{folder.name}{NOT_SCORED}")
    return listed if listed.exists() else folder / SAMPLES


def read_results(path: Path, metric: str | None = None, arms: ArmsOf = stages_by_kind) -> list[TaskResult]:
    """Every result in a result folder, in a folder of them, or in a run (then a model an arm, a result a seed).

    arms: what the arms of a run are; each kind of stage is one, unless the caller knows them by their names.

    Stages that are not finished well are left out (`arms.problem_of` says why). Raises RecordError when there is
    nothing, or something damaged.
    """
    path = Path(path)
    if not path.exists():
        raise RecordError(f"{path} does not exist; give a run, or a folder that srppo eval wrote")
    if (path / SUMMARY).exists():
        return [read_result(path, metric)]
    if (path / "sweep.json").exists():
        found = _of_run(arms(one_run(path)), metric)
        missing = "has no evaluated stage yet; finish the run, or evaluate it: srppo eval"
    else:
        found = _read(path, metric)
        missing = f"holds no evaluation result (no {SUMMARY}); give a run, or a folder that srppo eval wrote"
    if not found:
        raise RecordError(f"{path} {missing if metric is None else f'has no result with the metric {metric!r}'}")
    return found


class _NoMetric(DataError):
    """A result without the metric that was asked for."""


def _read(path: Path, metric: str | None) -> list[TaskResult]:
    """Results in a folder or one level below it, by name; work in progress and those without the metric left out."""
    found = []
    for summary in sorted({*path.glob(f"*@*/{SUMMARY}"), *path.glob(f"*/*@*/{SUMMARY}")}):
        if not any(part.startswith(".") for part in summary.relative_to(path).parts):
            with suppress(_NoMetric):
                found.append(read_result(summary.parent, metric))
    return found


def _of_run(arms: Mapping[str, Sequence[Stage]], metric: str | None) -> list[TaskResult]:
    found = []
    for arm, stages in arms.items():
        for stage in stages:
            if not stage.done:
                continue
            seed = int(stage.identity["config"]["seed"])
            own = [result for decoding in DECODINGS for result in own_tests(stage, arm, seed, decoding)]
            found += [result for result in own if metric in (None, result.metric)]
            found += [replace(each, model=arm, seed=seed) for each in _read(stage.path / "eval", metric)]
    return found


def answers_file(stage: Stage, which: str, decoding: str) -> Path:
    """A stage's answers to the test items, a line an item; which: kept or last step, or a point of a curve."""
    return stage.path / "eval" / f"{which}-{decoding}" / "samples.jsonl"


def means_by_task(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of lines of an `answers_file`, one row a group and task: items, share right (`accuracy`), and of the answers mean
    length in tokens and share ended, both None where the lines do not say."""
    by_task: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        by_task.setdefault((row["group"], row["task"]), []).append(row)
    made = []
    for (group, task), each in by_task.items():
        found = {key: [value for row in each for value in row.get(key, ())] for key in ("tokens", "ended")}
        means = {key: fmean(values) if values else None for key, values in found.items()}
        right = fmean(fmean(row["correct"]) for row in each)
        made.append({"group": group, "task": task, "items": len(each), "accuracy": right, **means})
    return made


def own_tests(stage: Stage, arm: str, seed: int, decoding: str, which: str = "kept") -> list[TaskResult]:
    """What the pipeline measured at a stage's kept step, or `which` else: one result for each group of items, its tasks
    the units."""
    folder = answers_file(stage, which, decoding).parent
    config = dotted(stage.identity["config"])
    settings = {name: config[key] for key, name in _OWN.items() if key in config}
    by_group: dict[str, dict[str, float]] = {}
    tasks: dict[str, list[str]] = {}
    copies = Counter[tuple[str, str]]()
    for row in read_lines(folder / "samples.jsonl"):
        name, group = question_name(row["task"], row["prompt"], row["answer"]), row["group"]
        copies[group, name] += 1
        item = name if copies[group, name] == 1 else f"{name} ({copies[group, name]})"
        by_group.setdefault(group, {})[item] = sum(row["correct"]) / len(row["correct"])
        tasks.setdefault(group, []).append(row["task"])
    made = (decoding, "accuracy", seed)
    return [
        TaskResult(
            *(arm, group, *made, tuple(scores), tuple(scores.values()), task_units(tuple(scores), tasks[group], group)),
            group,
            folder,
            settings=settings,
            unit=TASKS,
        )
        for group, scores in by_group.items()
    ]


def task_units(items: Sequence[str], tasks: Sequence[str], group: str) -> tuple[str, ...] | None:
    """The unit of each item of a group: its task, or itself where that is but the group's name, as where a user's file
    names none. None where these are the items, or there is one task alone, which is no sample of tasks."""
    units = tuple(item if task == group else task for item, task in zip(items, tasks, strict=True))
    return units if 1 < len(set(units)) < len(units) else None


def dotted(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted names."""
    found: dict[str, Any] = {}
    for key, value in nested.items():
        found |= dotted(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


@lru_cache(maxsize=100_000)  # a sweep reads the same questions hundreds of times
def question_name(task: str, prompt: str, answer: str) -> str:
    """Legible, and the same for the same question in any run: task, start of the prompt, and a hash of all of it."""
    text = json.dumps([task, prompt, answer])
    return f"{task}: {prompt[:40]} #{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _result(
    folder: Path, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], metric: str | None
) -> TaskResult:
    """Rows of samples to scores of items. Raises DataError, in one line, for what is missing or contradicts itself."""
    if missing := [key for key in _NEEDED if key not in summary]:
        raise DataError(f"{folder}: the summary has no {', '.join(missing)}; it needs {', '.join(_NEEDED)}")
    if summary["decoding"] not in DECODINGS:
        raise DataError(f"{folder}: decoding {summary['decoding']!r}; it is {' or '.join(DECODINGS)}")
    name = metric or str(summary["metric"])
    if not rows or not any(row.get(name) is not None or row.get("not_scored") for row in rows):
        others = sorted({key for row in rows for key, value in row.items() if isinstance(value, float)})
        raise _NoMetric(f"{folder}: no sample has the metric {name!r}; there are: {', '.join(others) or 'none'}")
    values: dict[str, list[float]] = {}
    clusters: dict[str, str] = {}
    reasons: dict[str, str] = {}
    for row in rows:
        item = str(row["item"])
        value = math.nan if row.get("not_scored") or row.get(name) is None else float(row[name])
        if math.isnan(value):
            reasons.setdefault(item, str(row.get("not_scored") or f"no {name}"))
        values.setdefault(item, []).append(value)
        if row.get("cluster") is not None and clusters.setdefault(item, str(row["cluster"])) != str(row["cluster"]):
            raise DataError(f"{folder}: item {item!r} is in clusters {clusters[item]!r} and {row['cluster']!r}")
    if clusters and len(clusters) < len(values):
        lone = next(item for item in values if item not in clusters)
        raise DataError(f"{folder}: item {lone!r} has no cluster, others have; give every item one, or none")
    return TaskResult(
        model=str(summary["model"]),
        task=str(summary["task"]),
        decoding=str(summary["decoding"]),
        metric=name,
        seed=None if summary["seed"] is None else int(summary["seed"]),
        items=tuple(values),
        scores=tuple(sum(each) / len(each) for each in values.values()),
        clusters=tuple(clusters[item] for item in values) if clusters else None,
        group=None if summary["group"] is None else str(summary["group"]),
        path=folder,
        higher_is_better=bool(summary.get("higher_is_better", True)),
        not_scored=reasons,
        settings=dotted({key: value for key, value in summary.items() if key != "metrics"}),
        unit=TASKS if summary.get("cluster") == "task" else "clusters",
    )
