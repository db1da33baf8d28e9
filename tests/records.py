"""Records of runs over seeds, whole and half finished, made on disk without any training."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from srppo.config import build_recipe, canonical_json
from srppo.evaluation.results import write_result
from srppo.record.store import Run, Stage
from srppo.report.answers import ArmFigures
from srppo.statistics.intervals import Estimate, wilson

TASKS = {"demonstrated": ("first", "swap"), "unseen": ("sort",)}
ITEMS, STEPS, LIMIT = 8, 3, 6  # items of a task, PPO steps, tokens


def verdicts(seed: int, skill: float, samples: int) -> list[dict[str, Any]]:
    """Answers whose tokens and rightness are drawn; those of LIMIT tokens did not end."""
    draw = np.random.default_rng([seed, int(100 * skill), samples])
    rows = []
    for group, tasks in TASKS.items():
        for task in tasks:
            for i in range(ITEMS):
                tokens = [int(n) for n in draw.integers(2, LIMIT + 1, size=samples)]
                row = {"group": group, "task": task, "prompt": f"{task} {i}", "answer": "a", "tokens": tokens}
                row["correct"] = [bool(value) for value in draw.random(samples) < skill]
                rows.append(row | {"responses": [" a"] * samples, "ended": [n < LIMIT for n in tokens]})
    return rows


def publish(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "samples.jsonl").write_text("".join(canonical_json(row) + "\n" for row in rows))


def dev(step: int, skill: float, **columns: float) -> dict[str, Any]:
    groups = {f"dev/{group}": skill + 0.01 * step for group in TASKS}
    return {"step": step, **groups, "dev/accuracy": skill, **columns}


def finish(stage: Stage, seed: int, skill: float, rows: list[dict[str, Any]], flops: int, **more: Any) -> Stage:
    """Run a stage to its commit: metric rows, answers to the test items, figures."""
    with stage.attempt({"cpu": "a CPU", "packages": {"torch": "2"}}) as attempt:
        for row in rows:
            attempt.log_metrics(row)
        for decoding, samples in (("greedy", 1), ("sampled", 4)):
            attempt.publish(f"eval/kept-{decoding}", partial(publish, rows=verdicts(seed, skill, samples)))
        steps = int(rows[-1]["step"]) if rows else 0
        test = {group: {"greedy": 0, "sampled": 0} for group in TASKS}
        attempt.commit("ok", {"kept_step": steps, "steps": steps, "flops": flops, "test": test, **more})
    return stage


def new_run(folder: Path, seeds: list[int]) -> Run:
    recipe = build_recipe({}).model_dump(mode="json", exclude={"seed"})
    return Run.open(folder, {"recipe": recipe, "seeds": seeds})


def ppo_rows(seed: int, steps: int = STEPS) -> list[dict[str, Any]]:
    return [dev(0, 0.4)] + [
        dev(
            step, 0.4, flops=step * 10**12, reward=step + seed, kl_sft=0.1 * step, kl_base=0.2 * step, length=5, ended=1
        )
        for step in range(1, steps + 1)
    ]


def train(run: Run, seed: int, *, ppo: bool = True, longer: bool = True) -> tuple[Stage, Stage]:
    """All stages of one seed; its SFT and its PPO stage, which without `ppo` is left for the test to run."""
    finish(run.stage("base", {"seed": seed}), seed, 0.1, [], 0)
    sft = finish(run.stage("sft", {"seed": seed}), seed, 0.4, [dev(0, 0.1), dev(2, 0.4, flops=seed + 1)], 10**12)
    stage = run.stage("ppo", {"seed": seed}, [sft.id])
    if ppo:
        finish(stage, seed, 0.7, ppo_rows(seed), 3 * 10**12)
    for kind, steps in (("longer-sft-1", 40), ("longer-sft-1/4", 10)) if longer else ():
        rows = [dev(0, 0.1), dev(steps + seed, 0.5, flops=steps * 10**11)]
        length = finish(run.stage(kind, {"seed": seed, "steps": steps + seed}), seed, 0.5, rows, steps * 10**11)
    if longer:
        figures = {"chosen": length.id, "selection_flops": 4 * 10**12}
        finish(run.stage("chosen-sft", {"seed": seed}, [length.id]), seed, 0.5, [], 0, **figures)
    return sft, stage


def evaluate(stage: Stage, arm: str, seed: int, scores: list[list[float]], **more: Any) -> Path:
    """A result of `srppo eval` on the task `sums`, of one arm and seed, an inner list an item's samples."""
    summary = {"model": arm, "task": "sums", "decoding": "greedy", "metric": "acc", "seed": seed, "group": None}
    rows = [{"item": f"i{i}", "sample": j, "acc": value} for i, row in enumerate(scores) for j, value in enumerate(row)]
    summary |= {"num_fewshot": 5, "key": f"{len(more)}{seed}", **more}
    return write_result(stage.path / "eval", summary, rows)


# ---- figures of arms, ordinary and odd

GROUPS = ("demonstrated", "prompted", "unseen")
HOSTILE = "<script>alert(1)</script><img src=http://x.test/a>\"'&[bold]"


def arm(name: str, right: int, **more: Any) -> ArmFigures:
    figures = {(g, d): wilson(right - 3 * i, 150) for i, g in enumerate(GROUPS) for d in ("greedy", "sampled")}
    return ArmFigures(
        name, figures, flops=1.23e12, seconds=8.4, kept_step=15, steps=20, mean_length=9.2, ended_share=0.97, **more
    )


ARMS = [
    arm("base", 6, nll=1.9),
    arm("SFT", 61, nll=0.753),
    arm("longer SFT, equal compute", 90),
    arm("longer SFT, best on dev", 88),
    arm("SRPPO, best on dev", 83),
    arm("SRPPO, last step", 60),
]
FAILED = ArmFigures("SRPPO", problem="diverged at step 7: KL to the SFT model is 130.1 nats a response")
NO_ITEMS = [ArmFigures("base", nll=2.3), ArmFigures("SFT", nll=1.9, flops=3e18, seconds=1e5), FAILED]
ODD = [
    ArmFigures(HOSTILE, {("items", "greedy"): Estimate(0.4, 0.3, 0.5, 12)}, seeds=3, note=HOSTILE),
    ArmFigures(
        "x" * 70,
        {(f"group {i} {'y' * 20}", "sampled"): Estimate(float("nan"), float("nan"), float("nan"), 0) for i in range(5)},
        flops=1e40,
        seconds=float("nan"),
        kept_step=10**9,
        steps=10**9,
        mean_length=1e12,
        ended_share=float("inf"),
        nll=-1e20,
        seeds=5,
    ),
]
