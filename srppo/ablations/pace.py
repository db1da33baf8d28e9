"""What a few real steps of a recipe take on this machine; in a process of its own, so that no worker inherits torch's
threads or a CUDA context."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from srppo.ablations.plan import Task
from srppo.config import Recipe, with_overrides
from srppo.console import Console
from srppo.errors import RunError, UserError

STEPS = 3  # of which the first is left out
ITEMS = 60  # development items answered


@dataclass(frozen=True)
class Pace:
    """Seconds: to start a stage, for an SFT step, a PPO step, and a greedy answer. Items of dev and test; rows: of SFT
    demonstrations."""

    start_s: float
    sft_step_s: float
    ppo_step_s: float
    answer_s: float
    dev_items: int
    test_items: int
    rows: int


def measure_pace(recipe: Recipe, device: str) -> Pace:
    """The pace of a recipe. Raises UserError or RunError where it cannot even begin, with the reason."""
    return Pace(**apart(lambda: asdict(_measure(recipe, device))))


def check_data(recipes: Sequence[Recipe], device: str, tasks: Sequence[Task] = ()) -> None:
    """Read the data of each recipe as its stages will, and ask of each task whether its method knows the reward.

    Raises UserError for the first that cannot be used."""

    def check() -> dict[str, Any]:
        from srppo.stages.extrapolation import check_decodable
        from srppo.stages.resampling import check_ranks, check_resamples
        from srppo.stages.run import Pipeline

        checks = {"decoded": check_decodable, "resampled": check_resamples, "best-of-n": check_ranks}
        for task in tasks:
            if task.kind in checks:
                checks[task.kind](task.recipe.reward)
        for recipe in recipes:
            with TemporaryDirectory() as folder:
                Pipeline(recipe, Path(folder), Console(quiet=True), device=device)
        return {}

    apart(check)


def apart(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns, done in a process of its own; errors come back as the kind they were."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reader)
        answer: dict[str, Any]
        try:
            answer = {"found": work()}
        except BaseException as error:
            text = str(error).partition("\n")[0] or type(error).__name__
            answer = {"user" if isinstance(error, UserError) else "error": text}
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(json.dumps(answer).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        found = pipe.read()
    os.waitpid(pid, 0)
    answer = json.loads(found or b'{"error": "the process died"}')
    if "user" in answer:
        raise UserError(answer["user"])
    if "error" in answer:
        raise RunError(f"a short trial of the recipe failed: {answer['error']}")
    return dict(answer["found"])


def _measure(recipe: Recipe, device: str) -> Pace:
    from srppo.evaluation.development import Development, answer_items
    from srppo.evaluation.items import load_items
    from srppo.stages.run import Pipeline
    from srppo.training.loop import Workbench
    from srppo.training.ppo import train_ppo
    from srppo.training.sft import train_sft

    quick = with_overrides(recipe, {"ppo.steps": STEPS, "eval.every": 0})
    with TemporaryDirectory() as folder:
        console = Console(quiet=True)
        began = time.perf_counter()
        pipeline = Pipeline(quick, Path(folder), console, device=device)
        start_s = time.perf_counter() - began
        nothing = Development(quick, pipeline.tokenizer, [], pipeline.stop_ids)
        nothing.items = []
        seconds = {}
        for kind in ("sft", "ppo"):
            stage = pipeline.run.stage(kind, {"pace": True})
            with stage.attempt() as attempt:
                bench = Workbench(stage, attempt, pipeline.tokenizer, console, kind)
                policy, rows = pipeline.fresh_base(), pipeline.data.demonstrations
                if kind == "sft":
                    train_sft(quick, bench, policy, rows, nothing, pad_id=pipeline.pad_id, total=STEPS)
                else:
                    sft, base, prompts = pipeline.fresh_base(), pipeline.base, pipeline.data.prompts
                    stops, pad = pipeline.stop_ids, pipeline.pad_id
                    train_ppo(quick, bench, policy, sft, base, prompts, nothing, stop_ids=stops, pad_id=pad)
            timings = [row["timing"] for row in stage.metrics() if row["step"] > 1]
            seconds[kind] = median(
                sum(v for k, v in t.items() if k.endswith("_s") and k != "tokens_per_s") for t in timings
            )
        items = load_items(quick, "dev")
        chosen = items[:: max(len(items) // ITEMS, 1)]
        began = time.perf_counter()
        answer_items(pipeline.base, pipeline.tokenizer, chosen, quick, samples=None, stops=pipeline.stop_ids)
        answer_s = (time.perf_counter() - began) / max(len(chosen), 1)
        test = len(load_items(quick, "test"))
        return Pace(
            start_s, seconds["sft"], seconds["ppo"], answer_s, len(items), test, len(pipeline.data.demonstrations)
        )
