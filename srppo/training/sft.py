"""Stage 1: supervised fine-tuning of the base on demonstrations; the loss counts answer tokens only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from srppo.config import Recipe, derive_seed
from srppo.data.order import pass_order
from srppo.data.types import EncodedDemonstration
from srppo.models.language_model import LanguageModel
from srppo.training import parallel
from srppo.training.batch import answer_nll_sum, extents, micro_batches, training_flops
from srppo.training.loop import (
    Measure,
    Session,
    Stopwatch,
    TrainState,
    Workbench,
    clip_gradients,
    lr_factor,
    parameters,
    set_lr,
)
from srppo.training.optimizers import make_optimizer

MEASURED = 5  # times that development items are measured where sft.steps counts steps, the last at the end


def steps_per_epoch(count: int, batch: int) -> int:
    """Optimizer steps of one pass; the last may be smaller."""
    return math.ceil(count / batch)


def epoch_rows(rows: Sequence[EncodedDemonstration], batch: int, step: int, seed: int) -> list[EncodedDemonstration]:
    """The demonstrations of optimizer step 1, 2, ...: passes in a seeded order each; a function of the step alone."""
    epoch, index = divmod(step - 1, steps_per_epoch(len(rows), batch))
    order = pass_order(len(rows), derive_seed(seed, "sft-order"), epoch)
    return [rows[i] for i in order[index * batch : (index + 1) * batch].tolist()]


def steps_within(model: LanguageModel, rows: Sequence[EncodedDemonstration], recipe: Recipe, budget_flops: int) -> int:
    """The number of optimizer steps whose counted operations come nearest to a budget; at least 1.

    Operations add up over rows, so every pass costs the same, and only the one in which the budget ends is counted.
    """
    whole = training_flops(model, rows)
    passes = budget_flops // whole
    steps, spent = passes * steps_per_epoch(len(rows), recipe.sft.batch), passes * whole
    while True:
        cost = training_flops(model, epoch_rows(rows, recipe.sft.batch, steps + 1, recipe.seed))
        if steps and spent + cost / 2 > budget_flops:
            return steps
        steps, spent = steps + 1, spent + cost


def evenly(total: int, count: int) -> set[int]:
    """Up to `count` steps evenly over 1..total; the last is `total`."""
    return {max(round(total * i / count), 1) for i in range(1, count + 1)}


def train_sft(
    recipe: Recipe,
    bench: Workbench,
    model: LanguageModel,
    rows: Sequence[EncodedDemonstration],
    development: Measure,
    *,
    pad_id: int,
    total: int | None = None,
) -> Session:
    """Fine-tune `model` in place; resumes by itself. Returns the finished session; the kept step's state is on disk.

    By default for the recipe's epochs, with development items measured at the end of each, or for its sft.steps,
    measured at MEASURED of them; or for `total` optimizer steps, measured at the end only.
    """
    config = recipe.sft
    per_epoch = steps_per_epoch(len(rows), config.batch)
    by_recipe, total = total is None, total or config.steps or config.epochs * per_epoch
    measured = evenly(total, MEASURED) if config.steps else range(per_epoch, total + 1, per_epoch)
    optimizer = make_optimizer(config.optimizer, parameters(model), config.lr, weight_decay=config.weight_decay)
    state = TrainState({"policy": model}, {"policy": optimizer}, {"flops": 0})
    session = Session(
        bench,
        state,
        total=total,
        measure_at=lambda step: by_recipe and step in measured,
        measure=lambda: development.measure(model),
        keep=recipe.eval.keep,
        checkpoint_every=max(total // 5, 1),
        measure_start=by_recipe,  # the start is the base's for every length, and is measured once
    )
    for step in session.steps():
        watch = Stopwatch()
        batch = epoch_rows(rows, config.batch, step, recipe.seed)
        answer_tokens = sum(row.trained for row in batch)
        optimizer.zero_grad(set_to_none=True)
        loss = 0.0
        for part in micro_batches(extents(batch)[0], config.micro_tokens, shared=True):
            nll, _ = answer_nll_sum(model, [batch[i] for i in part.tolist()], pad_id)
            (nll / answer_tokens).backward()
            loss += float(nll.detach()) / answer_tokens
        parallel.add_up_gradients(parameters(model))
        loss = parallel.add_up_numbers({"loss": loss})["loss"]
        grad_norm = clip_gradients(model, config.max_grad_norm, step)
        lr = config.lr * lr_factor(config.schedule, config.warmup, step, total)
        set_lr(optimizer, lr)
        optimizer.step()
        state.counters["flops"] += training_flops(model, batch)
        watch.lap("update_s")
        tokens_per_s = sum(len(row.ids) for row in batch) / watch.seconds["update_s"]
        row = {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": lr,
            "epoch": step / per_epoch,
            "flops": state.counters["flops"],
        }
        session.end_step(step, row, {**watch.seconds, "tokens_per_s": tokens_per_s})
    return session
