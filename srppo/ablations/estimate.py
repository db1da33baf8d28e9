"""What is tried before a sweep, and what it says: can the data be used, what will it take, and what could it show?

Data are checked here, without models. Steps are measured in a process of its own, started anew: this one may go on to
fork, and a fork must find neither torch's threads nor a CUDA context.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from srppo.ablations.options import test_items
from srppo.ablations.plan import Plan, Task
from srppo.config import Recipe, canonical_json, resolved, with_overrides
from srppo.console import Console
from srppo.errors import RunError, UserError
from srppo.stages.kinds import KINDS, check
from srppo.statistics.tests import detectable, seeds_needed

STEPS = 3  # of which the first is left out, where it is not the only one
SLOW_S = 3.0  # a step of SFT: then one minibatch of PPO takes long enough to time, and three steps too long to wait for
ITEMS, FEW_ITEMS = 60, 16  # development items answered; few by a slow model
GRACE_S = 5.0  # for the process to end once it has answered, or was interrupted with this one
SEED_SD, ITEM_SD, REST_SD = 0.06, 0.30, 0.45
"""Of a paired difference of accuracies: between seeds, between items, and within both; what ten seeds of `srppo demo`
gave for SRPPO minus SFT (0.05, 0.34, 0.43) and minus longer SFT (0.07, 0.17, 0.48), greedy."""


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


@dataclass(frozen=True)
class Estimate:
    """seconds: of each task, by key. lines: what could be significant, in plain words. paces: by base."""

    seconds: Mapping[str, float]
    lines: tuple[str, ...]
    paces: Mapping[str, Pace]


# ---- what is tried


def check_data(tasks: Iterable[Task]) -> None:
    """Ask of each task whether its method knows the reward, and read and encode each choice of data once.

    No model is loaded and no thread started. Raises UserError for the first that cannot be used.
    """
    from srppo.evaluation.development import load_items
    from srppo.models.loading import check_weights, prepare_alone
    from srppo.stages.run import check_needs

    by_data: dict[str, tuple[Recipe, set[str]]] = {}
    for task in tasks:
        check([task.kind], task.recipe)
        recipe = resolved(task.recipe)
        tree = recipe.model_dump(mode="json")
        choice = canonical_json([tree["data"], tree["model"], recipe.rollout.max_new_tokens, recipe.eval.items])
        by_data.setdefault(choice, (recipe, set()))[1].add(task.kind)
    for recipe, kinds in by_data.values():
        for spec in filter(None, (recipe.model.base, recipe.model.sft)):
            check_weights(spec, recipe.model)
        check_needs(kinds, prepare_alone(recipe)[0], load_items(recipe, "test"))


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
    found: Pace | Exception
    try:
        found = _measure(recipe, device)
    except BaseException as error:
        text = str(error).partition("\n")[0] or type(error).__name__
        found = UserError(text) if isinstance(error, UserError) else RunError(text)
    with suppress(BrokenPipeError):  # nobody waits any more
        pipe.send(found)


def _measure(recipe: Recipe, device: str) -> Pace:
    from srppo.evaluation.development import answer_items
    from srppo.evaluation.items import load_items
    from srppo.models.loading import to_train
    from srppo.stages.run import prepare_run
    from srppo.training.loop import Workbench
    from srppo.training.ppo import train_ppo
    from srppo.training.rollout import LocalSampler
    from srppo.training.sft import train_sft

    quick = with_overrides(recipe, {"ppo.steps": STEPS, "eval.every": 0, "eval.curve": ()})
    with TemporaryDirectory() as folder:
        console = Console(quiet=True)
        began = time.perf_counter()
        run = prepare_run(quick, ["ppo"], Path(folder), console, device=device)
        start_s = time.perf_counter() - began
        nothing = copy(run.development)
        nothing.items, nothing.held_out = [], []
        seconds: dict[str, float] = {}
        for kind in ("sft", "ppo"):
            share = 1
            stage, model = run.record.stage(kind, {"pace": True}), to_train(run.base, quick.model)
            with stage.attempt() as attempt:
                bench = Workbench(stage, attempt, run.tokenizer, console, kind)
                if kind == "sft":
                    train_sft(quick, bench, model, run.data.demonstrations, nothing, pad_id=run.pad_id, total=STEPS)
                else:
                    sft, prompts, stops = model.copy(), run.data.prompts, run.stops
                    own, share = _one_minibatch(quick) if seconds["sft"] > SLOW_S else (quick, 1)
                    train_ppo(own, bench, model, sft, run.base, prompts, nothing, LocalSampler(stops, run.pad_id))
            timings = [row["timing"] for row in stage.metrics() if row["step"] > 0]
            seconds[kind] = share * median(
                sum(v for k, v in t.items() if k.endswith("_s") and k != "tokens_per_s") for t in timings[1:] or timings
            )
        items = load_items(quick, "dev")
        count = FEW_ITEMS if seconds["sft"] > SLOW_S else ITEMS
        chosen = items[:: max(len(items) // count, 1)]
        began = time.perf_counter()
        answer_items(run.base, run.tokenizer, chosen, quick, samples=None, stops=run.stops)
        answer_s = (time.perf_counter() - began) / max(len(chosen), 1)
        rows = len(run.data.demonstrations)
        return Pace(start_s, seconds["sft"], seconds["ppo"], answer_s, len(items), len(run.test_items), rows)


def _one_minibatch(recipe: Recipe) -> tuple[Recipe, int]:
    """One step of PPO on a single minibatch's rollouts, and how many such the recipe's step is of."""
    count, batch = recipe.ppo.minibatches, recipe.rollout.batch
    if batch % (count * recipe.rollout.per_prompt) or batch < 2 * count * recipe.rollout.per_prompt:
        count = 1  # minibatches of several sizes or of parts of prompts; or nothing to set a reward beside
    return with_overrides(recipe, {"ppo.steps": 1, "rollout.batch": batch // count, "ppo.minibatches": 1}), count


# ---- what it says


def estimate(plan: Plan, device: str, console: Console, known: Mapping[str, Pace] | None = None) -> Estimate:
    """Try what is to come: read the data of every point, and measure a short step for each base that is trained.

    known: paces that this machine has shown when the sweep began.
    """
    tasks = [task for task in plan.tasks.values() if task.recipe.seed == plan.sweep.seeds[0]]
    console.say("checking the data")
    check_data(tasks)
    paces = dict(known or {})
    for recipe in (task.recipe for task in tasks):
        base = recipe.model.base
        if base not in paces:
            console.say(f"measuring a short step of {base}")
            paces[base] = measure_pace(recipe, device)
    bases = plan.sweep.bases  # of one architecture, so of one pace
    paces |= {base: paces[bases[0]] for base in bases if base not in paces}
    seconds = {key: task_seconds(task, paces[task.recipe.model.base]) for key, task in plan.tasks.items()}
    items = test_items(plan.sweep.recipe)[plan.sweep.analysis.group]
    return Estimate(seconds, tuple(power_lines(plan, items)), paces)


def task_seconds(task: Task, pace: Pace) -> float:
    """Of one stage: starting, training, development items, and, where it is an arm, test items greedy and sampled."""
    recipe, kind = task.recipe, KINDS[task.kind]
    methods, start, dev = recipe.methods, pace.start_s, pace.dev_items * pace.answer_s
    if task.kind == "samples":
        return start + pace.test_items * methods.samples * pace.answer_s
    if "samples" in kind.parents:  # they choose from what is written
        return start
    if task.kind == "prompt-samples":
        return start + methods.self_prompts * methods.self_samples * pace.answer_s
    tests = pace.test_items * (1 + recipe.eval.samples) * pace.answer_s
    fixed = start + (tests if kind.label else 0.0)
    if task.kind == "sft":
        steps, measured = _sft_steps(recipe, pace)
        return fixed + steps * pace.sft_step_s + (measured + 1) * dev
    if "prompt-samples" in kind.parents:
        steps = methods.self_epochs * math.ceil(methods.self_prompts / recipe.sft.batch)
        return fixed + steps * pace.sft_step_s + (methods.self_epochs + 1) * dev
    if task.kind == "distil" or "ppo" in kind.reads:  # a step of distillation takes no longer than one of PPO
        steps = recipe.distil.steps if task.kind == "distil" else recipe.ppo.steps
        fixed += 0 if task.kind == "distil" else len(recipe.eval.curve) * tests
        return fixed + steps * pace.ppo_step_s + (math.ceil(steps / (recipe.eval.every or steps)) + 1) * dev
    if kind.share:  # by counted compute, whose rate is taken to be the same
        train = recipe.ppo.steps * pace.ppo_step_s + _sft_steps(recipe, pace)[0] * pace.sft_step_s
        return fixed + kind.share * train + dev
    return fixed


def _sft_steps(recipe: Recipe, pace: Pace) -> tuple[int, int]:
    """(optimizer steps, measurements) of SFT."""
    rows = recipe.data.size or pace.rows
    if recipe.sft.steps:
        return recipe.sft.steps, min(recipe.sft.steps, 5)
    return recipe.sft.epochs * math.ceil(rows / recipe.sft.batch), recipe.sft.epochs


def power_lines(plan: Plan, items: int) -> list[str]:
    """In plain words: the smallest difference that these seeds and items show, or a warning where none can be."""
    analysis, seeds = plan.sweep.analysis, len(plan.sweep.seeds)
    tests, needed = analysis.comparisons, seeds_needed(analysis.alpha, max(analysis.comparisons, 1))
    if not tests:
        return ["the plan tests no difference: its figures describe, and show nothing"]
    if seeds < needed:
        counted = f"{seeds} seed{'s' * (seeds > 1)} no difference can be significant"
        takes = "1 test of the plan takes" if tests == 1 else f"{tests} tests of the plan take"
        return [
            f"warning: with {counted}: {takes} {needed} seeds (one alone {seeds_needed(analysis.alpha)}); read the "
            "intervals, or give --seeds"
        ]
    error = math.sqrt(SEED_SD**2 / seeds + ITEM_SD**2 / items + REST_SD**2 / (seeds * items))
    least = detectable(error, seeds - 1, alpha=analysis.alpha)
    return [
        f"{seeds} seeds and {items} items a group show differences of about {least:.2f} or more with 80% power before "
        f"Holm's correction over {tests} (assumed spreads: {SEED_SD:g} between seeds, {ITEM_SD:g} between items, "
        f"{REST_SD:g} within)"
    ]
