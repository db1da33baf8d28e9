"""What `srppo eval` measured of a run's arms: every task, with its score, interval, items, decoding and shots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import compress
from pathlib import Path

import numpy as np

from srppo.errors import SrppoError
from srppo.evaluation.results import SUMMARY, TaskResult, read_results
from srppo.record.json import read_json
from srppo.report.table import Row, Table
from srppo.report.words import estimate_text, interval_words
from srppo.stages.arms import stages_by_arm
from srppo.statistics.intervals import Estimate, calibrated_interval, item_interval, within


def evaluated_table(folder: Path) -> tuple[Table, list[str]]:
    """Results of `srppo eval` in a run, a row an arm under a heading for each task and way to evaluate; and what of
    them cannot be read."""
    try:
        results = read_results(folder, arms=stages_by_arm)
        found, problems = [each for each in results if each.path.parent.name == "eval" and "@" in each.path.name], []
    except SrppoError as error:
        found, problems = [], [] if "no evaluated stage" in str(error) else [str(error)]
    groups: dict[tuple[object, ...], list[TaskResult]] = {}
    for each in found:
        groups.setdefault((each.task, each.decoding, _shots(each), _way(each), each.model), []).append(each)
    arms = list(dict.fromkeys(each.model for each in found))
    rows: dict[str, list[Row]] = {}  # by heading
    seeds, left = [], []
    for key in sorted(groups, key=lambda key: (*map(str, key[:-1]), arms.index(str(key[-1])))):
        first = groups[key][0]
        # Training seeds of one arm together where they are on the same items, else the first alone.
        same = {each.seed: each for each in groups[key] if each.items == first.items}
        values = np.array([each.scores for each in same.values()])
        known = ~np.isnan(values).any(axis=0)
        clusters = None if first.clusters is None else list(compress(first.clusters, known))
        score, lost = _score(values[:, known], clusters), int((~known).sum())
        heading = f"{first.task}, {first.metric}, {_decoding(first)}, {_shots(first)} shots"
        rows.setdefault(heading, []).append(Row([first.model, estimate_text(score), str(score.n)]))
        seeds.append(len(same))
        left += [f"{lost} of {first.task} ({first.model})"] if lost else []
    caption = [
        f"Each task's primary score, with 95% intervals over {interval_words(seeds)}"
        + (" Items in clusters count by cluster." if any(each.clusters for each in found) else ""),
        "Sampled (k, seed): the mean over k samples an item. srppo compare RUN says which arms differ.",
        f"Not scored, and in no score: {'; '.join(left)}." if left else "",
    ]
    listed: list[Row | str] = []
    for heading, members in rows.items():
        listed += [heading, *members]
    return Table.of("Tasks of srppo eval", ["", "score", "n"], listed, caption if rows else ()), problems


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


def _score(values: np.ndarray, clusters: Sequence[str] | None) -> Estimate:
    if values.size == 0:
        return Estimate(math.nan, math.nan, math.nan, 0)
    limits = (0.0, 1.0) if values.min() >= 0 and values.max() <= 1 else None
    if len(values) == 1 and clusters is None:
        return item_interval(values[0], limits=limits)
    return within(calibrated_interval(values, clusters, limits=limits), limits)


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
