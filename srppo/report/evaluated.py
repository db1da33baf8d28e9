"""What `srppo eval` measured of a run's arms: every task, with its score, interval, items, decoding and shots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from srppo.errors import SrppoError
from srppo.evaluation.results import SUMMARY, TaskResult, read_results
from srppo.record.json import read_json
from srppo.report.table import Row, Table
from srppo.report.words import estimate_text, interval_words
from srppo.stages.arms import stages_by_arm
from srppo.statistics.intervals import Estimate, calibrated_interval, item_interval, within

TITLE = "Tasks of srppo eval"


@dataclass(frozen=True)
class Evaluated:
    """One arm on one task, evaluated in one way. score: with its 95% interval; its n counts items that were scored."""

    task: str
    arm: str
    metric: str
    score: Estimate
    decoding: str
    shots: str
    seeds: int
    not_scored: int
    clustered: bool


def evaluated_of(folder: Path) -> tuple[list[Evaluated], list[str]]:
    """Results of `srppo eval` in a run, by task, and what of them cannot be read."""
    try:
        results = read_results(folder, arms=stages_by_arm)
        found = [result for result in results if result.path.parent.name == "eval" and "@" in result.path.name]
    except SrppoError as error:
        return [], [] if "no evaluated stage" in str(error) else [str(error)]
    groups: dict[tuple[object, ...], list[TaskResult]] = {}
    for result in found:
        groups.setdefault((result.task, result.decoding, _shots(result), _way(result), result.model), []).append(result)
    arms = list(dict.fromkeys(result.model for result in found))
    ranked = sorted(groups, key=lambda key: (*map(str, key[:-1]), arms.index(str(key[-1]))))
    return [_evaluated(groups[key]) for key in ranked], []


def _way(result: TaskResult) -> tuple[object, ...]:
    """What else parts two results of one arm and task: settings, and how many items a limit left."""
    names = ("samples", "eval_seed", "max_new_tokens", "generation.temperature", "harness")
    settings = tuple(str(result.settings.get(name)) for name in names)
    return (result.metric, result.settings.get("chat_template") is not None, len(result.items), *settings)


def _shots(result: TaskResult) -> str:
    shots = result.settings.get("num_fewshot")
    return "-" if shots is None else str(shots)


def _decoding(result: TaskResult) -> str:
    """`greedy`, or `sampled (4, seed 1)`: how often an item, and the seed of the draws."""
    samples, seed = result.settings.get("samples"), result.settings.get("eval_seed")
    return f"sampled ({samples}, seed {seed})" if result.decoding == "sampled" else result.decoding


def _evaluated(results: Sequence[TaskResult]) -> Evaluated:
    """Training seeds of one arm together where they are on the same items, else the first alone."""
    first = results[0]
    same = list({result.seed: result for result in results if result.items == first.items}.values())
    values = np.array([result.scores for result in same])
    known = ~np.isnan(values).any(axis=0)
    return Evaluated(
        first.task,
        first.model,
        first.metric,
        _score(
            values[:, known], [c for c, k in zip(first.clusters, known, strict=True) if k] if first.clusters else None
        ),
        _decoding(first),
        _shots(first),
        len(same),
        int((~known).sum()),
        first.clusters is not None,
    )


def _score(values: np.ndarray, clusters: Sequence[str] | None) -> Estimate:
    if values.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    limits = (0.0, 1.0) if values.min() >= 0 and values.max() <= 1 else None
    if len(values) == 1 and clusters is None:
        return item_interval(values[0], limits=limits)
    return within(calibrated_interval(values, clusters, limits=limits), limits)


def evaluated_table(found: Sequence[Evaluated]) -> Table:
    """A row an arm under a heading for each task and way to evaluate."""
    ways: dict[str, list[Evaluated]] = {}
    for one in found:
        ways.setdefault(f"{one.task}, {one.metric}, {one.decoding}, {one.shots} shots", []).append(one)
    rows: list[Row | str] = []
    for way, members in ways.items():
        rows.append(way)
        rows += [Row([one.arm, estimate_text(one.score), str(one.score.n)]) for one in members]
    return Table.of(TITLE, ["", "score", "n"], rows, captions(found))


def scores_table(folders: Sequence[Path]) -> Table:
    """Results of `srppo eval` as it ends: a row a metric, the primary one first, under a heading a task and model."""
    rows: list[Row | str] = []
    for path in folders:
        summary = read_json(path / SUMMARY)
        seed = "" if summary["seed"] is None else f", seed {summary['seed']}"
        decoding = "" if summary["decoding"] == "greedy" else f", {summary['samples']} samples"
        rows.append(f"{summary['task']}: {summary['model']}{seed}{decoding}")
        items = str(summary["items"] - summary["not_scored"])
        for name, each in sorted(summary["metrics"].items(), key=lambda pair: pair[0] != summary["metric"]):
            interval = "" if each["low"] is None else f"[{each['low']:.3f}, {each['high']:.3f}]"
            rows.append(Row([name, f"{each['value']:.3f}", interval, items]))
    return Table.of("Scores with 95% intervals over items", ["metric", "score", "interval", "items"], rows)


def captions(found: Sequence[Evaluated]) -> list[str]:
    """What scores and intervals are."""
    words = f"Each task's primary score, with 95% intervals over {interval_words([one.seeds for one in found])}"
    lines = [words, "Sampled (k, seed): the mean over k samples an item. srppo compare RUN says which arms differ."]
    if any(one.clustered for one in found):
        lines[0] += " Items in clusters count by cluster."
    left = [f"{one.not_scored} of {one.task} ({one.arm})" for one in found if one.not_scored]
    return lines + ([f"Not scored, and in no score: {'; '.join(left)}."] if left else [])
