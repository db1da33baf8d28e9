"""The arms of a run: which stage is base, SFT, longer SFT, SRPPO or one of the methods beside it. No torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from srppo.errors import RecordError
from srppo.record.store import Run, Stage

METHODS = {
    "extrapolated": "weight extrapolation",
    "decoded": "decode-time extrapolation",
    "resampled": "resampling",
    "best-of-n": "best-of-n",
}
"""Arms made of the SFT model without training; as SRPPO's, their compute comes on top of SFT's."""
KINDS = {"base": "base", "sft": "SFT", "given-sft": "SFT", "ppo": "SRPPO", **METHODS}
EQUAL, CHOSEN = "longer SFT, equal compute", "longer SFT, best on dev"
ORDER = ("base", "SFT", EQUAL, CHOSEN, *METHODS.values(), "SRPPO")


def is_sweep(spec: Mapping[str, Any]) -> bool:
    """Whether the spec of a record is a sweep's, not a plain run's."""
    return "sweep" in spec


def one_run(folder: Path) -> Run:
    """The run in a folder. Raises RecordError for a sweep: its points have arms and seeds of the same names."""
    run = Run.load(folder)
    if is_sweep(run.spec):
        raise RecordError(
            f"{folder} is a sweep, whose points have arms of the same names; give one run, or the `model` folder of "
            f"one of its stages ({folder / 'stages'}/<id>/model), or read the whole with: srppo report {folder}"
        )
    return run


def stages_by_arm(run: Run) -> dict[str, list[Stage]]:
    """Stages of each arm, one a seed, arms in the order of a table.

    Longer SFT was trained at several lengths: the longest is at equal compute; the one that scored best on development
    items, the shorter at a tie, has its epochs chosen.
    """
    found: dict[str, list[Stage]] = {name: [] for name in ORDER}
    longer: dict[int, list[Stage]] = defaultdict(list)
    for stage in sorted(run.stages(), key=lambda s: s.identity["config"]["seed"]):
        kind = stage.identity["kind"]
        if kind == "longer-sft":
            longer[stage.identity["config"]["seed"]].append(stage)
        elif kind in KINDS:
            found[KINDS[kind]].append(stage)
    for stages in longer.values():
        stages.sort(key=lambda s: s.identity["config"].get("steps", 0))
        found[EQUAL].append(stages[-1])
        if all(stage.done and _score(stage) is not None for stage in stages):
            found[CHOSEN].append(max(stages, key=lambda stage: _score(stage) or 0.0))
    return {name: stages for name, stages in found.items() if stages}


def _score(stage: Stage) -> float | None:
    score = (stage.result() or {}).get("figures", {}).get("score")
    return None if score is None else float(score)


def problem_of(stage: Stage, result: Mapping[str, Any] | None) -> str | None:
    """Why a stage has no good result, with its seed, in one line; None where it has one."""
    seed = stage.identity["config"]["seed"]
    if result is None:
        return f"seed {seed} is not finished; run the same command to go on"
    if result["status"] == "ok":
        return None
    return f"seed {seed} {result['status']}: {result['figures'].get('reason', 'no reason recorded')}"
