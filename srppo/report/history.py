"""What a run left behind beside its answers: metric rows over training seeds, environments, and what is missing."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as scipy_stats

from srppo.errors import RecordError
from srppo.evaluation.results import answers_file
from srppo.record.arms import problem_of
from srppo.record.files import damage
from srppo.record.json import read_json
from srppo.record.store import Run, Stage
from srppo.report.answers import seed_of
from srppo.report.words import is_number
from srppo.stages.arms import figures_of, stages_by_arm
from srppo.stages.kinds import CHOSEN, EQUAL, KINDS

Rows = Sequence[Mapping[str, Any]]
LONGER = "longer SFT"  # all its lengths
NEVER_RUN = {
    "base": "the base was not measured",
    "SFT": "SFT was not run",
    "SRPPO": "SRPPO was not run (srppo train)",
}


@dataclass(frozen=True)
class SeedRows:
    """Metric rows of one arm by training seed: of seeds that finished well, and of those that did not.

    Rows have `step`, by which seeds are aligned, and `tflops`: counted operations up to there, 10^12, those of the
    arm's SFT included. kept: the kept step, of one seed alone.
    """

    done: Mapping[int, Rows] = field(default_factory=dict)
    broken: Mapping[int, Rows] = field(default_factory=dict)
    kept: int | None = None

    def rows(self) -> list[Mapping[str, Any]]:
        """Those of all seeds."""
        return [row for rows in (*self.done.values(), *self.broken.values()) for row in rows]


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


def band_words(arms: Mapping[str, SeedRows]) -> str:
    """What lines and bands are, for a caption."""
    counts = {name: len(arm.done) for name, arm in arms.items() if arm.done}
    numbers = set(counts.values())
    words = ["One training seed: lines without bands." if numbers else "Nothing is finished."]
    if numbers - {1}:
        some = f"{max(numbers)}" if len(numbers) == 1 else ", ".join(f"{n} of {name}" for name, n in counts.items())
        kinds = ["95% t interval of the mean, point by point"] if max(numbers) > 2 else []
        kinds += ["the range of both seeds where there are 2"] if 2 in numbers else []
        kinds += ["none where there is 1"] if 1 in numbers else []
        words = [f"Lines: means over training seeds ({some}). Bands: {'; '.join(kinds)}."]
    broken = [f"{name}, seed {seed}" for name, arm in arms.items() for seed in arm.broken]
    words += [f"Thin dashed, and in no mean, since not finished or failed: {'; '.join(broken)}."] if broken else []
    return " ".join(words)


def curves_of(run: Run) -> dict[str, SeedRows]:
    """Rows of SFT, longer SFT and what was trained on prompts, where there are any."""
    by_arm = stages_by_arm(run)
    sft_flops = {stage.id: figures_of(stage).get("flops", 0) for stage in by_arm.get("SFT", [])}
    arms = {
        "SFT": _seed_rows(by_arm.get("SFT", []), {}),
        LONGER: longer_ends(run) if EQUAL in by_arm else SeedRows(),
    }
    for kind in KINDS.values():
        if kind.needs_prompts and kind.label:
            arms[kind.label] = _seed_rows(by_arm.get(kind.label, []), sft_flops)
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
    ends, starts = defaultdict[int, list[dict[str, Any]]](list), dict[int, list[dict[str, Any]]]()
    for stage in run.stages():
        kind = KINDS.get(stage.identity["kind"])
        if kind and kind.share and stage.done and (rows := stage.metrics()):
            ends[seed_of(stage)].append(rows[-1])
    for stage in stages_by_arm(run).get("SFT", []):
        starts[seed_of(stage)] = [*filter(lambda row: row.get("step") == 0, stage.metrics())][-1:]
    done = {}
    for seed, rows in sorted(ends.items()):
        if len(rows) == max(map(len, ends.values())):
            start = starts.get(seed, [])
            ranked = enumerate([*start, *sorted(rows, key=lambda row: row["step"])], 1 - len(start))
            done[seed] = [{**row, "step": i, "tflops": row.get("flops", 0) / 1e12} for i, row in ranked]
    return SeedRows(done)


# ---- environments, and what is missing


def environment_of(stage: Stage) -> dict[str, Any]:
    """What the last attempt at a stage ran on; empty where none got so far as to say."""
    for attempt in reversed(stage.attempts()):
        try:
            return read_json(attempt / "env.json")
        except RecordError:  # killed before it was written
            continue
    return {}


def run_environment(run: Run) -> dict[str, Any]:
    """The environment of the last arm's first stage, and under `differs` what other stages had otherwise."""
    found = [environment_of(stage) for stages in reversed(stages_by_arm(run).values()) for stage in stages]
    found = [each for each in found if each]
    if not found:
        return {}
    differing = [key for key in found[0] if any(each.get(key) != found[0][key] for each in found)]
    return found[0] | ({"differs": f"{', '.join(differing)}: not the same for every stage"} if differing else {})


def missing_of(run: Run) -> list[str]:
    """Arms that were not run, seeds not started, lengths of longer SFT not finished, and files that are gone.

    Stages of an arm that failed are not repeated: its row says so (`ArmFigures.problem`).
    """
    by_arm = stages_by_arm(run)
    lines = [text for arm, text in NEVER_RUN.items() if arm not in by_arm]
    if "SRPPO" in by_arm and EQUAL not in by_arm:
        lines.append(f"{LONGER} at equal compute was not run; add --baselines")
    undecided = sorted({*map(seed_of, by_arm.get(EQUAL, []))} - {*map(seed_of, by_arm.get(CHOSEN, []))})
    if undecided:
        lines.append(f"{CHOSEN}: not chosen for {_seeds(undecided)}, since not every length is finished")
    for arm, stages in by_arm.items():
        seeds = [seed for seed in run.spec.get("seeds", []) if seed not in map(seed_of, stages)]
        if seeds and arm != CHOSEN:
            lines.append(f"{arm}: {_seeds(seeds)} not started; run the same command to go on")
    shown = {stage.id for stages in by_arm.values() for stage in stages}
    for stage in run.stages():
        kind, steps = stage.identity["kind"], stage.identity["config"].get("steps")
        beside = kind in KINDS and KINDS[kind].share and stage.id not in shown  # a length that is no arm by itself
        if beside and (problem := problem_of(stage, stage.result())):
            lines.append(f"{LONGER} of {steps} steps: {problem}")
        lines += [f"{kind}, seed {seed_of(stage)}: {line}" for line in _gone(stage)]
    return lines


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"


def _gone(stage: Stage) -> list[str]:
    """Files that a finished stage should have and has not: of its result, its answers, its metrics.

    Answers are checked by content, what is large by name alone (`srppo train` checks it before it goes on).
    """
    figures = figures_of(stage)
    names = (stage.result() or {}).get("files", {})
    lines = [f"{stage.path / name} is gone" for name in names if not (stage.path / name).exists()]
    for which, measured in (("kept", figures), ("last", figures.get("last", {}))):
        decodings = dict.fromkeys(each for by_decoding in measured.get("test", {}).values() for each in by_decoding)
        files = [answers_file(stage, which, decoding) for decoding in decodings]
        lines += [f"{file} is gone or damaged" for file in files if not file.exists() or damage(file.parent)]
    if figures.get("steps") and "chosen" not in figures and not stage.metrics():  # the chosen one's are its own
        lines.append(f"{stage.path / 'attempts'} has no metrics.jsonl any more")
    return lines
