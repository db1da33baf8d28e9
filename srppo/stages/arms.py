"""The arms of a run: which stages are base, SFT, longer SFT, SRPPO or one of the methods beside it. No torch."""

from __future__ import annotations

from typing import Any

from srppo.record.store import Run, Stage
from srppo.stages.kinds import KINDS


def arm_names() -> list[str]:
    """Every arm that a run may have, in the order of tables."""
    return list(dict.fromkeys(kind.label for kind in KINDS.values() if kind.label))


def stages_by_arm(run: Run) -> dict[str, list[Stage]]:
    """Stages of each arm, one a seed, arms in the order of a table."""
    found: dict[str, list[Stage]] = {name: [] for name in arm_names()}
    for stage in sorted(run.stages(), key=lambda s: s.identity["config"]["seed"]):
        kind = KINDS.get(stage.identity["kind"])
        if kind and kind.label:
            found[kind.label].append(stage)
    return {name: stages for name, stages in found.items() if stages}


def compute_of(stage: Stage) -> tuple[float, float]:
    """Counted operations of (training, choosing) a stage and all that it was made from.

    Choosing: answers to development items, and what was trained and dropped. What only set a budget is no parent.
    """
    figures = [figures_of(each) for each in made_from(stage)]
    training, choosing = (sum(float(each.get(key) or 0.0) for each in figures) for key in ("flops", "selection_flops"))
    return training, choosing


def made_from(stage: Stage) -> list[Stage]:
    """A stage and its ancestors in the record, each once; of one that chose among its parents, the chosen one's."""
    found, left = dict[str, Stage](), [stage]
    while left:
        found.setdefault((each := left.pop()).id, each)
        chosen = figures_of(each).get("chosen")
        beside = (Stage(each.path.parent / name) for name in ([chosen] if chosen else each.identity["parents"]))
        left += [parent for parent in beside if (parent.path / "config.json").exists()]  # models are parents too
    return list(found.values())


def figures_of(stage: Stage) -> dict[str, Any]:
    """The committed figures; empty where nothing is committed."""
    return dict((stage.result() or {}).get("figures", {}))
