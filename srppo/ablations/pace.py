"""What is tried before a sweep: whether its data can be used, and what a few real steps take on this machine.

Data are checked here, without models. Steps are measured in a process of its own, started anew: a worker forks its
stages, and a fork must find neither torch's threads nor a CUDA context.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from srppo.ablations.plan import Task
from srppo.config import Recipe, canonical_json, resolved, with_overrides
from srppo.console import Console
from srppo.errors import RunError, UserError
from srppo.stages.kinds import check

STEPS = 3  # of which the first is left out
ITEMS = 60  # development items answered
GRACE_S = 5.0  # for the process to end once it has answered, or was interrupted with this one


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


def check_data(tasks: Iterable[Task]) -> None:
    """Ask of each task whether its method knows the reward, and read and encode each choice of data once.

    No model is loaded and no thread started. Raises UserError for the first that cannot be used.
    """
    from srppo.data.chat import stop_ids
    from srppo.data.prepare import asks_base, prepare
    from srppo.evaluation.development import load_items
    from srppo.models.loading import check_weights, declared, load_tokenizer
    from srppo.stages.run import check_needs

    by_data: dict[str, tuple[Recipe, set[str]]] = {}
    for task in tasks:
        check([task.kind], task.recipe)
        recipe = resolved(task.recipe)
        tree = recipe.model_dump(mode="json")
        choice = canonical_json([tree["data"], tree["model"], recipe.rollout.max_new_tokens, recipe.eval.items])
        by_data.setdefault(choice, (recipe, set()))[1].add(task.kind)
    for recipe, kinds in by_data.values():
        config, data = recipe.model, recipe.data
        if asks_base(data):  # what it would say needs the model itself
            data = with_overrides(recipe, {"data.noise": "none", "data.noise_rate": 0.0}).data
        for spec in filter(None, (config.base, config.sft)):
            check_weights(spec, config)
        starts = config.sft or config.base
        tokenizer = load_tokenizer(starts, config)
        prepared = prepare(
            data,
            tokenizer,
            recipe.seed,
            declared(config.base, config)[0],
            max_new_tokens=recipe.rollout.max_new_tokens,
            stop=stop_ids(tokenizer, declared(starts, config)[1]),
        )
        check_needs(kinds, prepared, load_items(recipe, "test"))


def measure_pace(recipe: Recipe, device: str) -> Pace:
    """The pace of a recipe. Raises UserError or RunError where it cannot even begin, with the reason."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, recipe, device), daemon=True)
    process.start()
    there.close()
    try:
        found: Pace | Exception = here.recv()
    except EOFError:
        found = RunError("the process died")
    finally:
        process.join(GRACE_S)
        process.kill()
        process.join()
        here.close()
    if isinstance(found, Pace):
        return found
    if isinstance(found, UserError):
        raise found
    raise RunError(f"a short trial of the recipe failed: {found}")


def _answer(pipe: Connection, recipe: Recipe, device: str) -> None:
    try:
        pipe.send(_measure(recipe, device))
    except BaseException as error:
        text = str(error).partition("\n")[0] or type(error).__name__
        pipe.send(UserError(text) if isinstance(error, UserError) else RunError(text))


def _measure(recipe: Recipe, device: str) -> Pace:
    from srppo.evaluation.development import Development, answer_items
    from srppo.evaluation.items import load_items
    from srppo.stages.run import prepare_run
    from srppo.training.loop import Workbench
    from srppo.training.ppo import train_ppo
    from srppo.training.sft import train_sft

    quick = with_overrides(recipe, {"ppo.steps": STEPS, "eval.every": 0})
    with TemporaryDirectory() as folder:
        console = Console(quiet=True)
        began = time.perf_counter()
        run = prepare_run(quick, ["ppo"], Path(folder), console, device=device)
        start_s = time.perf_counter() - began
        nothing = Development(quick, run.tokenizer, [], run.stops)
        nothing.items = []
        seconds = {}
        for kind in ("sft", "ppo"):
            stage, model = run.record.stage(kind, {"pace": True}), run.base.copy()
            with stage.attempt() as attempt:
                bench = Workbench(stage, attempt, run.tokenizer, console, kind)
                if kind == "sft":
                    train_sft(quick, bench, model, run.data.demonstrations, nothing, pad_id=run.pad_id, total=STEPS)
                else:
                    sft, prompts, stops = run.base.copy(), run.data.prompts, run.stops
                    train_ppo(quick, bench, model, sft, run.base, prompts, nothing, stop_ids=stops, pad_id=run.pad_id)
            timings = [row["timing"] for row in stage.metrics() if row["step"] > 1]
            seconds[kind] = median(
                sum(v for k, v in t.items() if k.endswith("_s") and k != "tokens_per_s") for t in timings
            )
        items = load_items(quick, "dev")
        chosen = items[:: max(len(items) // ITEMS, 1)]
        began = time.perf_counter()
        answer_items(run.base, run.tokenizer, chosen, quick, samples=None, stops=run.stops)
        answer_s = (time.perf_counter() - began) / max(len(chosen), 1)
        rows = len(run.data.demonstrations)
        return Pace(start_s, seconds["sft"], seconds["ppo"], answer_s, len(items), len(run.test_items), rows)
