"""Metric rows over training seeds: the mean of those that finished, and a band that says how far it is known."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from srppo.record.store import Run, Stage
from srppo.report.answers import figures_of, seed_of
from srppo.stages.arms import EQUAL, LONGER, stages_by_arm
from srppo.stages.kinds import KINDS

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class SeedRows:
    """Metric rows of one arm by training seed: of seeds that finished well, and of those that did not.

    Rows have `step`, by which seeds are aligned, and `tflops`: counted operations up to there, 10^12, those of the
    arm's SFT included. kept: the kept step, of one seed alone.
    """

    done: Mapping[int, Rows] = field(default_factory=dict)
    broken: Mapping[int, Rows] = field(default_factory=dict)
    kept: int | None = None


@dataclass(frozen=True)
class Line:
    """Means over seeds with their band, one entry a point; without a band (one seed) low = high = mean."""

    x: NDArray[np.float64]
    mean: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


def band(values_by_seed_point: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(low, high) of each point: 95% t interval of the mean over three seeds or more, the range of two, none of one."""
    values = np.asarray(values_by_seed_point, dtype=float)
    seeds = values.shape[0]
    if seeds < 3:
        return values.min(axis=0), values.max(axis=0)
    half = scipy_stats.t.ppf(0.975, seeds - 1) * values.std(axis=0, ddof=1) / math.sqrt(seeds)
    return values.mean(axis=0) - half, values.mean(axis=0) + half


def over_seeds(rows_by_seed: Mapping[int, Rows], x: str, y: str) -> Line | None:
    """`y` against the mean `x` over seeds, at the steps where every seed has both; None where there are none."""
    found = [
        {row["step"]: (float(row[x]), float(row[y])) for row in rows if is_number(row.get(x)) and is_number(row.get(y))}
        for rows in rows_by_seed.values()
    ]
    steps = sorted(set.intersection(*map(set, found))) if found else []
    if not steps:
        return None
    values = np.array([[points[step] for step in steps] for points in found])
    low, high = band(values[:, :, 1])
    return Line(values[:, :, 0].mean(axis=0), values[:, :, 1].mean(axis=0), low, high)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def band_words(arms: Mapping[str, SeedRows]) -> str:
    """What lines and bands are, for a caption."""
    counts = {name: len(arm.done) for name, arm in arms.items() if arm.done}
    numbers = set(counts.values())
    words = ["Nothing is finished."]
    if numbers == {1}:
        words = ["One training seed: lines without bands."]
    elif numbers:
        some = f"{max(numbers)}" if len(numbers) == 1 else ", ".join(f"{n} of {name}" for name, n in counts.items())
        kinds = ["95% t interval of the mean, point by point"] if max(numbers) > 2 else []
        kinds += ["the range of both seeds where there are 2"] if 2 in numbers else []
        kinds += ["none where there is 1"] if 1 in numbers else []
        words = [f"Lines: means over training seeds ({some}). Bands: {'; '.join(kinds)}."]
    broken = [f"{name}, seed {seed}" for name, arm in arms.items() for seed in arm.broken]
    words += [f"Thin dashed, and in no mean, since not finished or failed: {'; '.join(broken)}."] if broken else []
    return " ".join(words)


def curves_of_run(run: Run) -> dict[str, SeedRows]:
    """Rows of SFT, longer SFT and SRPPO, where there are any."""
    by_arm = stages_by_arm(run)
    sft_flops = {stage.id: figures_of(stage).get("flops", 0) for stage in by_arm.get("SFT", [])}
    arms = {
        "SFT": _seed_rows(by_arm.get("SFT", []), {}),
        LONGER: longer_ends(run) if EQUAL in by_arm else SeedRows(),
        "SRPPO": _seed_rows(by_arm.get("SRPPO", []), sft_flops),
    }
    return {name: arm for name, arm in arms.items() if arm.done or arm.broken}


def _seed_rows(stages: Sequence[Stage], parents_flops: Mapping[str, float]) -> SeedRows:
    done: dict[int, Rows] = {}
    broken: dict[int, Rows] = {}
    for stage in stages:
        before = sum(parents_flops.get(parent, 0) for parent in stage.identity["parents"])
        rows = [{**row, "tflops": (before + row.get("flops", 0)) / 1e12} for row in stage.metrics() if "step" in row]
        if rows:
            (done if stage.done else broken)[seed_of(stage)] = rows
    kept = [figures_of(stage)["kept_step"] for stage in stages if stage.done]
    return SeedRows(done, broken, kept[0] if len(kept) == 1 else None)


def longer_ends(run: Run) -> SeedRows:
    """Longer SFT against compute: the start (the base) and the end of each length, trained on its own.

    `step` counts the lengths, since their optimizer steps differ a little between seeds. A seed whose lengths are not
    all finished, where another's are, is left out.
    """
    ends: dict[int, list[dict[str, Any]]] = {}
    for stage in run.stages():
        kind = KINDS.get(stage.identity["kind"])
        if kind and kind.shares and stage.done and (rows := stage.metrics()):
            ends.setdefault(seed_of(stage), []).append(dict(rows[-1]))
    starts = {
        seed_of(stage): [dict(row)]
        for stage in stages_by_arm(run).get("SFT", [])
        for row in stage.metrics()
        if row.get("step") == 0
    }
    whole = max(map(len, ends.values()), default=0)
    done = {}
    for seed, rows in sorted(ends.items()):
        rows.sort(key=lambda row: row["step"])
        if len(rows) == whole:
            start = starts.get(seed, [])
            ranked = enumerate([*start, *rows], start=1 - len(start))
            done[seed] = [{**row, "step": i, "tflops": row.get("flops", 0) / 1e12} for i, row in ranked]
    return SeedRows(done)
