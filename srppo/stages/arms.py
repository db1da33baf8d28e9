"""The arms of a run: which stages are base, SFT, longer SFT, SRPPO or one of the methods beside it. No torch."""

from __future__ import annotations

from collections import defaultdict

from srppo.record.json import read_lines
from srppo.record.store import Run, Stage
from srppo.stages.kinds import KINDS

LONGER = str(KINDS["longer-sft"].label)
EQUAL, CHOSEN = f"{LONGER}, equal compute", f"{LONGER}, best on dev"


def arm_names() -> list[str]:
    """Every arm that a run may have, in the order of tables."""
    arms = [[EQUAL, CHOSEN] if kind.shares else [kind.label] for kind in KINDS.values() if kind.label]
    return list(dict.fromkeys(name for names in arms for name in names))


def stages_by_arm(run: Run) -> dict[str, list[Stage]]:
    """Stages of each arm, one a seed, arms in the order of a table.

    Longer SFT is trained for several shares of the compute: the whole is at equal compute; the one that scored best on
    development items, the shorter at a tie, has its epochs chosen, once all are finished.
    """
    found: dict[str, list[Stage]] = {name: [] for name in arm_names()}
    longer: dict[int, list[Stage]] = defaultdict(list)
    for stage in sorted(run.stages(), key=lambda s: s.identity["config"]["seed"]):
        kind = KINDS.get(stage.identity["kind"])
        if kind and kind.shares:
            longer[stage.identity["config"]["seed"]].append(stage)
        elif kind and kind.label:
            found[kind.label].append(stage)
    for stages in longer.values():
        stages.sort(key=lambda s: s.identity["config"].get("steps", 0))
        shares = {stage.id: share_of(stage) for stage in stages}
        if set(shares.values()) == {None}:  # records from before the share was written down: all lengths were trained
            shares[stages[-1].id] = 1.0
        found[EQUAL] += [stage for stage in stages if shares[stage.id] == 1]
        if all(stage.done and _score(stage) is not None for stage in stages):
            found[CHOSEN].append(max(stages, key=lambda stage: _score(stage) or 0.0))
    return {name: stages for name, stages in found.items() if stages}


def share_of(stage: Stage) -> float | None:
    """The share of its parents' compute that a stage was trained for, as its last attempt wrote it down."""
    events = [event for folder in stage.attempts() for event in read_lines(folder / "events.jsonl")]
    return next((float(event["share"]) for event in reversed(events) if "share" in event), None)


def _score(stage: Stage) -> float | None:
    score = (stage.result() or {}).get("figures", {}).get("score")
    return None if score is None else float(score)
