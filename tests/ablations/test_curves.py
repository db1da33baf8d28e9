"""Arms at equal distance, on records made by hand: pairing at a KL, what is out of reach, and the family."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from srppo.ablations import Ablation, Analysis, Arm, Sweep
from srppo.ablations.analysis import SweepResult, analyse
from srppo.ablations.curves import Matched
from srppo.ablations.ledger import Ledger
from srppo.ablations.plan import Plan, Task
from srppo.ablations.spec import Curves
from srppo.config import Recipe, canonical_json
from srppo.errors import ConfigError, DataError
from srppo.record.store import Run
from srppo.report.sweep_curves import curves_answer, matched_records, matched_table
from srppo.report.table import to_markdown

TASKS, EACH = 10, 4
ARMS = (
    Arm("SFT", "sft"),
    Arm("coherent", "ppo", {"reward.kind": "ratio"}),
    Arm("brevity", "ppo", {"reward.kind": "brevity"}),
    Arm("shuffled", "ppo", {"reward.kind": "shuffled"}),
)
PLAN = Curves("SFT", "coherent", ("brevity", "shuffled"), (0.25, 0.75))
KLS = {"coherent": 2.0, "brevity": 3.0, "shuffled": 0.6}  # of the last step at the stronger pull
GAIN = {"coherent": 0.3, "brevity": 0.2, "shuffled": 0.0}  # accuracy a nat


def sweep_of(seeds: int = 8, curves: Curves = PLAN) -> Sweep:
    points = tuple(
        Ablation(f"beta {beta}", {"reward.beta": beta, "eval.curve": [10, 20]}, {"beta": beta}) for beta in (0.1, 0.2)
    )
    analysis = Analysis("unseen", "greedy", (), curves=curves)
    return Sweep("trial", "Well?", Recipe(), ("beta",), points, ARMS, tuple(range(seeds)), analysis)


def distance(task: Task, step: int) -> float:
    """Further with steps and with less pull, at every seed a little further; not in the order of steps."""
    arm = {"ratio": "coherent", "brevity": "brevity", "shuffled": "shuffled"}[task.recipe.reward.kind]
    way = {(0.1, 10): 0.5, (0.1, 20): 1.0, (0.2, 10): 0.75, (0.2, 20): 0.4}[task.recipe.reward.beta, step]
    return KLS[arm] * way * (1 + 0.1 * task.recipe.seed)


def accuracy(task: Task, kl: float) -> float:
    arm = {"ratio": "coherent", "brevity": "brevity", "shuffled": "shuffled"}[task.recipe.reward.kind]
    return 0.1 + GAIN[arm] * kl if task.kind == "ppo" else 0.1


def analysed(
    folder: Path,
    sweep: Sweep,
    reached: Callable[[Task, int], float] = distance,
    rows: Callable[[Task], Mapping[str, str]] = lambda task: {},
) -> SweepResult:
    plan, run = Plan(sweep), Run.open(folder, sweep.as_spec())
    ledger = Ledger(run, 3)
    for task in plan.tasks.values():
        stage = run.stage(task.kind, {"seed": task.recipe.seed, "task": task.key})
        ledger.link(task, stage)
        with stage.attempt() as attempt:
            steps = {} if task.kind == "sft" else {step: reached(task, step) for step in (10, 20)}
            for which, kl in {"kept": 0.0, **{f"step-{step}": kl for step, kl in steps.items()}}.items():
                text = _answers(accuracy(task, kl), task.recipe.seed, rows(task))
                attempt.publish(f"eval/{which}-greedy", partial(_write, text))
            curve = [{"step": step, "kl": {"unseen": kl}} for step, kl in steps.items()]
            attempt.commit("ok", {"flops": 0, **({"curve": curve} if curve else {})})
    return analyse(plan, ledger)


def _answers(mean: float, seed: int, extra: Mapping[str, str]) -> str:
    """Answers of this mean: every item is right in a share of 10,000 samples, a larger one at every other task."""
    made = []
    for i in range(TASKS * EACH):
        right = round(10_000 * mean * (1.1 if i % 2 else 0.9) * (1 + 0.001 * seed))
        row = {"prompt": f"item {i}", "answer": "a", "task": f"task {i % TASKS}", "group": "unseen", **extra}
        made.append(row | {"correct": [right / 10_000], "tokens": [5]})
    return "".join(canonical_json(row) + "\n" for row in made)


def _write(text: str, folder: Path) -> None:
    (folder / "samples.jsonl").write_text(text)


def found(result: SweepResult, other: str) -> list[Matched]:
    return [each for each in result.curves[0].matched if each.other == other]


def test_arms_are_compared_at_shares_of_what_the_model_reaches_at_every_seed(tmp_path: Path) -> None:
    """Seed 0 reaches least: 2 nats. Accuracy is linear in KL, so every difference is 0.1 a nat, at every seed."""
    result = analysed(tmp_path / "run", sweep_of())
    (curves,) = result.curves
    assert curves.primary and curves.reach == pytest.approx(2.0)
    near, far = found(result, "brevity")
    assert (near.kl, far.kl) == (pytest.approx(0.5), pytest.approx(1.5))
    assert near.finding and far.finding
    assert near.finding.difference.mean == pytest.approx(0.05, abs=1e-3)
    assert far.finding.difference.mean == pytest.approx(0.15, abs=1e-3)
    assert near.tasks == TASKS and near.finding.p >= 2 / 2**8 and near.finding.verdict == "better"


def test_what_does_not_reach_has_no_verdict_and_still_counts(tmp_path: Path) -> None:
    """Shuffled reaches 0.6 nats: 0.5 is within, 1.5 is not."""
    result = analysed(tmp_path / "run", sweep_of())
    near, far = found(result, "shuffled")
    assert near.finding and near.finding.difference.mean == pytest.approx(0.15, abs=1e-3)
    assert far.finding is None and far.reach == pytest.approx(0.6) and len(far.seeds) == 8
    smallest = min(each.finding.p for each in result.curves[0].matched if each.finding)
    corrected = [each.finding.p_holm for each in result.curves[0].matched if each.finding]
    assert min(corrected) == pytest.approx(4 * smallest), "four are planned, three have a result"
    said = curves_answer(result)
    assert "At KL 0.5 coherent is better than brevity and shuffled" in said
    assert "At KL 1.5 coherent is better than brevity, out of reach: shuffled" in said
    assert "Holm over 4; 8 seeds" in said
    text = to_markdown(matched_table(result.curves[0], PLAN))
    assert "coherent minus each, at KL 1.5 (75% of what it reaches)" in text and "| out of reach | 0.6 |" in text
    rows = list(matched_records(result))
    assert [row["verdict"] for row in rows] == ["better", "better", "better", "out of reach"]


def test_one_seed_that_falls_short_is_enough(tmp_path: Path) -> None:
    """The seeds that happen to reach so far are no sample of all seeds."""

    def reached(task: Task, step: int) -> float:
        short = task.recipe.reward.kind == "brevity" and task.recipe.seed == 5
        return 1.0 if short else distance(task, step)

    near, far = found(analysed(tmp_path / "run", sweep_of(), reached), "brevity")
    assert near.finding is not None and far.finding is None and far.reach == 1.0


def test_other_items_are_not_paired(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="answers other items than"):
        analysed(tmp_path / "run", sweep_of(), rows=lambda task: {"answer": "b"} if task.kind == "ppo" else {})


def test_a_plan_of_curves_is_kept_and_checked() -> None:
    sweep = sweep_of()
    assert Sweep.from_spec(sweep.as_spec()) == sweep and sweep.analysis.comparisons == 4
    with pytest.raises(ConfigError, match=r"compares the curve of 'longer SFT', which it does not run"):
        sweep_of(curves=Curves("SFT", "coherent", ("longer SFT",)))
    with pytest.raises(ConfigError, match=r"would test 26 differences"):
        sweep_of(curves=Curves("SFT", "coherent", ("brevity", "shuffled"), tuple(i / 13 for i in range(1, 14))))
