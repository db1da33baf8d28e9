"""What `srppo eval` measured of a run's arms: every task, with its score, interval, items, decoding and shots."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from srppo.errors import SrppoError
from srppo.evaluation.results import TaskResult, read_results
from srppo.report.figures import estimate_text, interval_words
from srppo.report.html import html_table, soft_text
from srppo.report.run_parts import Part
from srppo.report.terminal import Narrow
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


def _by_way(found: Sequence[Evaluated]) -> dict[tuple[str, ...], dict[str, Evaluated]]:
    """(task, metric, decoding, shots) of each way to evaluate, and in it what each arm has."""
    ways: dict[tuple[str, ...], dict[str, Evaluated]] = {}
    for one in found:
        ways.setdefault((one.task, one.metric, one.decoding, one.shots), {})[one.arm] = one
    return ways


def _page_tables(found: Sequence[Evaluated]) -> str:
    """A table for each metric, decoding and shots, as those of the results: a row an arm, a column a task."""
    tables: dict[tuple[str, ...], list[Evaluated]] = {}
    for one in found:
        tables.setdefault((one.metric, one.decoding, one.shots), []).append(one)
    html = ""
    for (metric, decoding, shots), members in tables.items():
        tasks, arms = (list(dict.fromkeys(values)) for values in zip(*((m.task, m.arm) for m in members), strict=True))
        by_place = {(one.arm, one.task): one.score for one in members}
        rows = [[arm, *(estimate_text(by_place.get((arm, task))) for task in tasks)] for arm in arms]
        heads = [
            f"{task}, n\u00a0=\u00a0{_range([one.score.n for one in members if one.task == task])}" for task in tasks
        ]
        html += html_table([f"{decoding}, {shots} shots, {metric}", *heads], rows)
    return html


def _range(counts: Sequence[int]) -> str:
    return " to ".join(map(str, dict.fromkeys((min(counts), max(counts)))))


def captions(found: Sequence[Evaluated]) -> list[str]:
    """What scores and intervals are."""
    words = f"Each task's primary score, with 95% intervals over {interval_words([one.seeds for one in found])}"
    lines = [words, "Sampled (k, seed): the mean over k samples an item. srppo compare RUN says which arms differ."]
    if any(one.clustered for one in found):
        lines[0] += " Items in clusters count by cluster."
    left = [f"{one.not_scored} of {one.task} ({one.arm})" for one in found if one.not_scored]
    return lines + ([f"Not scored, and in no score: {'; '.join(left)}."] if left else [])


def evaluated_part(found: Sequence[Evaluated]) -> Part:
    """The section of the page; without HTML where nothing was evaluated."""
    return TITLE, _page_tables(found) + "".join(map(soft_text, captions(found))) if found else ""


def evaluated_table(found: Sequence[Evaluated]) -> RenderableType:
    """The same for the terminal, at most 80 columns."""
    table = Table(title=Text(TITLE), title_style="bold", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", width=50, overflow="fold")
    table.add_column("score", width=17, justify="right")
    table.add_column("n", width=5, justify="right")
    for (task, metric, decoding, shots), by_arm in _by_way(found).items():
        table.add_section()
        table.add_row(Text(f"{task}, {metric}, {decoding}, {shots} shots", "bold"), "", "")
        for arm, one in by_arm.items():
            table.add_row(Text(f"  {arm}"), Text(estimate_text(one.score)), str(one.score.n))
    return Group(table, *(Narrow(Text(line, "dim")) for line in captions(found)))
