"""What a run's stages left behind beside their figures: time, environment, and what is missing or failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from srppo.errors import RecordError
from srppo.record.arms import problem_of
from srppo.record.files import damage
from srppo.record.json import read_json
from srppo.record.store import Run, Stage
from srppo.report.answers import answers_file, figures_of, seed_of
from srppo.report.figures import DECODINGS
from srppo.stages.arms import CHOSEN, EQUAL, LONGER, stages_by_arm
from srppo.stages.kinds import KINDS

NEVER_RUN = {
    "base": "the base was not measured",
    "SFT": "SFT was not run",
    "SRPPO": "SRPPO was not run (srppo train)",
}


def seconds_of(stage: Stage) -> float:
    """Seconds of training, as logged."""
    return sum(_seconds(row) for row in stage.metrics())


def _seconds(row: Mapping[str, Any]) -> float:
    return sum(v for k, v in row.get("timing", {}).items() if k.endswith("_s") and k != "tokens_per_s")


def environment_of(stage: Stage) -> dict[str, Any]:
    """What the last attempt at a stage ran on; empty where none got so far as to say."""
    for attempt in reversed(stage.attempts()):
        try:
            return read_json(attempt / "env.json")
        except RecordError:  # killed before it was written
            continue
    return {}


def environment_of_run(run: Run) -> dict[str, Any]:
    """The environment of the last arm's first stage, and under `differs` what other stages had otherwise."""
    found = [environment_of(stage) for stages in reversed(stages_by_arm(run).values()) for stage in stages]
    found = [each for each in found if each]
    if not found:
        return {}
    differing = [key for key in found[0] if any(each.get(key) != found[0][key] for each in found)]
    return found[0] | ({"differs": f"{', '.join(differing)}: not the same for every stage"} if differing else {})


def missing_of_run(run: Run) -> list[str]:
    """Arms that were not run, seeds not started, lengths of longer SFT not finished, and files that are gone.

    Stages of an arm that failed are not repeated: its row says so (`ArmFigures.problem`).
    """
    by_arm = stages_by_arm(run)
    lines = [text for arm, text in NEVER_RUN.items() if arm not in by_arm]
    if "SRPPO" in by_arm and EQUAL not in by_arm:
        lines.append(f"{LONGER} at equal compute was not run; add --baselines")
    undecided = sorted({*map(seed_of, by_arm.get(EQUAL, []))} - {*map(seed_of, by_arm.get(CHOSEN, []))})
    if undecided:
        lines.append(f"{CHOSEN}: not chosen for {_seeds(undecided)}, since not every length is finished and scored")
    for arm, stages in by_arm.items():
        seeds = [seed for seed in run.spec.get("seeds", []) if seed not in map(seed_of, stages)]
        if seeds and arm != CHOSEN:
            lines.append(f"{arm}: {_seeds(seeds)} not started; run the same command to go on")
    shown = {stage.id for stages in by_arm.values() for stage in stages}
    for stage in run.stages():
        kind, steps = stage.identity["kind"], stage.identity["config"].get("steps")
        beside = kind in KINDS and KINDS[kind].shares and stage.id not in shown  # a length that is no arm by itself
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
        files = [answers_file(stage, which, decoding) for decoding in DECODINGS if measured.get("test")]
        lines += [f"{file} is gone or damaged" for file in files if not file.exists() or damage(file.parent)]
    if figures.get("steps") and not stage.metrics():
        lines.append(f"{stage.path / 'attempts'} has no metrics.jsonl any more")
    return lines
