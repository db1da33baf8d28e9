"""Records of curves made by hand: accuracies linear in KL, so that what is read off them is known."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from unittest.mock import patch

from srppo.ablations import Ablation, Analysis, Arm, Sweep
from srppo.ablations.analysis import SweepResult, analyse
from srppo.ablations.ledger import Ledger
from srppo.ablations.plan import Plan, Task
from srppo.ablations.spec import Curves
from srppo.config import Recipe, canonical_json
from srppo.record.store import Run

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
    *,
    steps: tuple[int, ...] = (10, 20),
    rows: Callable[[Task], Mapping[str, str]] = lambda task: {},
) -> SweepResult:
    plan, run = Plan(sweep), Run.open(folder, sweep.as_spec())
    ledger = Ledger(run, 3)
    with patch("os.fsync"):
        _record(plan, run, ledger, reached, steps, rows)
    return analyse(plan, ledger)


def _record(
    plan: Plan,
    run: Run,
    ledger: Ledger,
    reached: Callable[[Task, int], float],
    steps: tuple[int, ...],
    rows: Callable[[Task], Mapping[str, str]],
) -> None:
    for task in plan.tasks.values():
        stage = run.stage(task.kind, {"seed": task.recipe.seed, "task": task.key})
        ledger.link(task, stage)
        with stage.attempt() as attempt:
            kls = {} if task.kind == "sft" else {step: reached(task, step) for step in steps}
            for which, kl in {"kept": 0.0, **{f"step-{step}": kl for step, kl in kls.items()}}.items():
                text = _answers(accuracy(task, kl), task.recipe.seed, rows(task))
                attempt.publish(f"eval/{which}-greedy", partial(_write, text))
            curve = [{"step": step, "kl": {"unseen": kl}} for step, kl in kls.items()]
            attempt.commit("ok", {"flops": 0, **({"curve": curve} if curve else {})})


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
