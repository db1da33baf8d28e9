"""`srppo eval`: check everything, look up what is known, evaluate the rest, write each result at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from srppo.config import canonical_json
from srppo.console import Console
from srppo.errors import ConfigError
from srppo.evaluation.harness.checks import EvalOptions
from srppo.evaluation.harness.guards import Problems, quiet, seeded
from srppo.evaluation.harness.session import Evaluator
from srppo.evaluation.harness.targets import Target, find_targets
from srppo.evaluation.harness.tasks import load_tasks, wanted
from srppo.evaluation.results import NOT_SCORED, SAMPLES, SUMMARY
from srppo.models.loading import check_weights
from srppo.record.arms import ArmsOf, stages_by_kind
from srppo.record.files import write_atomic
from srppo.record.folder import check_place
from srppo.record.json import plain, read_json

NAMED = 10  # reasons for prompts not scored that are printed; every prompt is in the file beside the result


def evaluate_command(
    model: str | None,
    *,
    tasks: Sequence[str] = (),
    suite: str | None = None,
    data: Path | None = None,
    include_path: Sequence[Path] = (),
    num_fewshot: int | None = None,
    chat_template: bool | None = None,
    samples: int | None = None,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    batch_size: int | None = None,
    limit: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    out: Path | None = None,
    score_rest: bool = False,
    system: str | None = None,
    cluster: str | None = None,
    console: Console | None = None,
    arms: ArmsOf = stages_by_kind,
) -> list[Path]:
    """Evaluate a model, or every arm of a run; returns the folders of the results.

    samples: so many a prompt at `temperature`; None: decode as each task says. chat_template None: the tokenizer's own
    if it has one, ours for our models and for the embedded suite. system: a system message, by default that with which
    a run was trained, "" for none. cluster: the items' field that says which belong together, by default as the task's
    metadata says. arms: what the arms of a run are.

    Raises a UserError, before anything is generated, for whatever cannot be loaded, scored or fitted into the context.
    """
    console = console or Console()
    options = EvalOptions(
        samples, temperature, num_fewshot, chat_template, max_new_tokens, limit, seed, score_rest, system, cluster
    )
    _check_numbers(options, batch_size)
    targets = find_targets(model, out, console.say, arms)
    if model is None:
        console.say(f"no MODEL given: {targets[0].spec if len(targets) == 1 else 'the newest run'} is evaluated")
    problems = _problems_of(targets)
    with quiet(), seeded(seed):
        loaded = load_tasks(
            wanted(tasks, suite),
            data=data,
            include_path=include_path,
            score_rest=score_rest,
            say=console.say,
            problems=problems,
        )
        evaluator = Evaluator(options, batch_size, device, console)
        plan = []
        for target in targets:
            with problems.gathered():
                plan.append((target, *evaluator.prepare(target, loaded, problems)))
            problems.raise_any()  # of one arm: the other arms have the same
        found = []
        for target, lm, requests in plan:
            found += [evaluator.evaluate(target, lm, each) for each in requests]
            lm.release()
    _say_not_scored(console, found)
    folders = list(dict.fromkeys(str(path.parent) for path in found))
    console.print(f"results: {folders[0]}{f' and {len(folders) - 1} more such folders' if folders[1:] else ''}")
    return found


def _problems_of(targets: Sequence[Target]) -> Problems:
    """Weights of any arm that are not whole, and places of results that cannot be written."""
    problems = Problems()
    for target in targets:
        with problems.gathered():
            check_place(target.parent)
        with problems.gathered():
            check_weights(target.spec, target.config)
    return problems


def _check_numbers(options: EvalOptions, rows: int | None) -> None:
    floors = {"samples": 1, "limit": 1, "max_new_tokens": 1, "num_fewshot": 0, "seed": 0}
    for name, least in floors.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: it must be at least {least}")
    if rows is not None and rows < 1:
        raise ConfigError(f"--batch-size {rows}: it must be at least 1, or left out to fit the memory")
    if not options.temperature > 0:
        raise ConfigError(f"--temperature {options.temperature}: it must be above 0; leave out --samples for greedy")


def _say_not_scored(console: Console, found: Sequence[Path]) -> None:
    """How many prompts were left out, by reason; all of them stand in a file beside the result."""
    import pyarrow.parquet as pq

    for path in found:
        if read_json(path / SUMMARY)["not_scored"]:
            rows = [row for row in pq.read_table(path / SAMPLES).to_pylist() if row.get("not_scored")]
            console.print(f"{path.name}: {len(rows)} prompts not scored (left out, not counted as failed):")
            for reason, count in Counter(row["not_scored"] for row in rows).most_common(NAMED):
                first = next(row for row in rows if row["not_scored"] == reason)
                console.print(f"  {count}: {reason}; such as {first['item'][:8]} {first['prompt'][:40]!r}")
            listed = path.with_name(f"{path.name}{NOT_SCORED}")
            lines = ({"item": row["item"], "reason": row["not_scored"], "prompt": row["prompt"]} for row in rows)
            write_atomic(listed, "".join(canonical_json(plain(line)) + "\n" for line in lines))
            console.print(f"  all of them: {listed}")
