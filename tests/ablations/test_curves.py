"""Arms at equal distance, on records made by hand: pairing at a KL, what is out of reach, and the family."""

from __future__ import annotations

from pathlib import Path

import pytest
from curve_records import TASKS, analysed, distance, sweep_of

from srppo.ablations import Sweep
from srppo.ablations.analysis import SweepResult
from srppo.ablations.curves import Matched
from srppo.ablations.plan import Task
from srppo.ablations.spec import Curves
from srppo.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    """Every seed and step, as `curve_records` makes them."""
    return analysed(tmp_path_factory.mktemp("whole") / "run", sweep_of())


def found(result: SweepResult, other: str) -> list[Matched]:
    return [each for each in result.curves[0].matched if each.other == other]


def test_arms_are_compared_at_shares_of_what_the_model_reaches_at_every_seed(whole: SweepResult) -> None:
    """Seed 0 reaches least: 2 nats. Accuracy is linear in KL, so every difference is 0.1 a nat, at every seed."""
    (curves,) = whole.curves
    assert curves.primary and curves.reach == pytest.approx(2.0)
    near, far = found(whole, "brevity")
    assert (near.kl, far.kl) == (pytest.approx(0.5), pytest.approx(1.5))
    assert near.finding and far.finding
    assert near.finding.difference.mean == pytest.approx(0.05, abs=1e-3)
    assert far.finding.difference.mean == pytest.approx(0.15, abs=1e-3)
    assert near.tasks == TASKS and near.finding.p >= 2 / 2**8 and near.finding.verdict == "better"


def test_what_does_not_reach_has_no_verdict_and_still_counts(whole: SweepResult) -> None:
    """Shuffled reaches 0.6 nats: 0.5 is within, 1.5 is not."""
    near, far = found(whole, "shuffled")
    assert near.finding and near.finding.difference.mean == pytest.approx(0.15, abs=1e-3)
    assert far.finding is None and far.reach == pytest.approx(0.6) and len(far.seeds) == 8
    smallest = min(each.finding.p for each in whole.curves[0].matched if each.finding)
    corrected = [each.finding.p_holm for each in whole.curves[0].matched if each.finding]
    assert min(corrected) == pytest.approx(4 * smallest), "four are planned, three have a result"


def test_one_seed_that_falls_short_is_enough(tmp_path: Path) -> None:
    """The seeds that happen to reach so far are no sample of all seeds."""

    def reached(task: Task, step: int) -> float:
        short = task.recipe.reward.kind == "brevity" and task.recipe.seed == 5
        return 1.0 if short else distance(task, step)

    near, far = found(analysed(tmp_path / "run", sweep_of(6), reached), "brevity")
    assert near.finding is not None and far.finding is None and far.reach == 1.0


def test_other_items_are_not_paired(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="answers other items than"):
        analysed(tmp_path / "run", sweep_of(1), rows=lambda task: {"answer": "b"} if task.kind == "ppo" else {})


def test_a_plan_of_curves_is_kept_and_checked() -> None:
    sweep = sweep_of()
    assert Sweep.from_spec(sweep.as_spec()) == sweep and sweep.analysis.comparisons == 4
    with pytest.raises(ConfigError, match=r"compares the curve of 'longer SFT', which it does not run"):
        sweep_of(curves=Curves("SFT", "coherent", ("longer SFT",)))
    with pytest.raises(ConfigError, match=r"would test 26 differences"):
        sweep_of(curves=Curves("SFT", "coherent", ("brevity", "shuffled"), tuple(i / 13 for i in range(1, 14))))
