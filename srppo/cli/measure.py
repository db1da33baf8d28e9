"""The commands that measure: eval, compare, score, forecast, explain, report."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from srppo.cli.options import BaseModel, Debug, Device, Limit, Out, Run, SftModel, TrainingSeed


def evaluate(
    model: Annotated[
        str | None,
        Argument(help="A model (folder, hub name, embedded:xs) or a run, whose arms it is. (default: the newest run)"),
    ] = None,
    tasks: Annotated[str, Option(metavar="A,B", help="Tasks: names that lm-eval knows, yours, or ours.")] = "",
    suite: Annotated[
        str | None, Option(help="embedded, embedded_long, ifeval, gsm8k (of the hub, or a file by --data), or paper.")
    ] = None,
    data: Annotated[Path | None, Option(metavar="PATH", help="Local file of ifeval or gsm8k.")] = None,
    include_path: Annotated[
        list[Path] | None, Option(metavar="DIR", help="Folder of your own YAML tasks (repeatable).")
    ] = None,
    num_fewshot: Annotated[int | None, Option(min=0, help="Shots. (default: the task's)")] = None,
    chat_template: Annotated[
        bool | None,
        Option(
            "--chat-template/--no-chat-template", help="Put prompts into the chat template. (default: if there is one)"
        ),
    ] = None,
    samples: Annotated[int | None, Option(min=1, help="Sample so many answers a prompt. (default: the task's)")] = None,
    temperature: Annotated[float, Option(help="Of sampling.")] = 1.0,
    max_new_tokens: Annotated[int | None, Option(min=1, help="Tokens of an answer. (default: the task's)")] = None,
    batch_size: Annotated[
        int | None,
        Option(min=1, help="Prompts at once; another size rounds otherwise. (default: by the machine's memory)"),
    ] = None,
    limit: Limit = None,
    seed: Annotated[int, Option(help="Of sampling and few-shot draws.")] = 0,
    device: Device = "auto",
    processes: Annotated[
        int, Option(min=1, help="That share the prompts, each with the whole model: on GPUs one each, else cores.")
    ] = 1,
    out: Out = None,
    score_rest: Annotated[
        bool, Option("--score-rest", help="Score what can be scored, list the rest as not scored.")
    ] = False,
    system: Annotated[str | None, Option(metavar="TEXT", help="System message. (default: the run's; '': none)")] = None,
    cluster: Annotated[
        str | None, Option(metavar="FIELD", help="Items with one FIELD belong together. (default: the task's)")
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure a model on tasks of lm-eval, on ours, or on yours. Results are cached, and never stale."""
    from srppo.environment import usable_cores

    if processes > 1:  # their threads share the cores; read when torch is imported
        os.environ.setdefault("OMP_NUM_THREADS", str(max(usable_cores() // processes, 1)))
    from srppo.console import Console
    from srppo.evaluation.harness.checks import EvalOptions
    from srppo.evaluation.harness.run import evaluate_command
    from srppo.models.loading import pick_device
    from srppo.report.evaluated import scores_table
    from srppo.stages.arms import stages_by_arm

    console = Console()
    options = EvalOptions(
        samples, temperature, num_fewshot, chat_template, max_new_tokens, limit, seed, score_rest, system, cluster
    )
    found = evaluate_command(
        model,
        options,
        tasks=[name for name in tasks.split(",") if name],
        suite=suite,
        data=data,
        include_path=include_path or [],
        batch_size=batch_size,
        device=pick_device(device),
        processes=processes,
        out=out,
        console=console,
        arms=stages_by_arm,
    )
    if found:  # of a launcher's processes the first has them
        console.print(scores_table(found))


def compare(
    paths: Annotated[
        list[Path],
        Argument(help="A run (its arms against SFT), or several: RUN, RUN:ARM, result folders; first: baseline."),
    ],
    task: Annotated[list[str] | None, Option(help="Only this task (repeatable).")] = None,
    metric: Annotated[str | None, Option(help="Scores to compare. (default: each task's primary)")] = None,
    decoding: Annotated[str | None, Option(help="greedy or sampled. (default: both)")] = None,
    alpha: Annotated[float, Option(help="Level of the tests, Holm-corrected over tasks.")] = 0.05,
    margin: Annotated[
        float | None, Option(help="Models that differ by less are the same. (default: 0.05, where scores are shares)")
    ] = None,
    out: Annotated[Path | None, Option(metavar="PATH", help="A .md, .csv or .json file, or a folder for all.")] = None,
    debug: Debug = False,
) -> None:
    """Paired differences, with intervals and tests. And what could have been seen, in plain words."""
    from srppo.console import Console
    from srppo.report.comparison import compare_command

    compare_command(
        paths,
        task=task or [],
        metric=metric,
        decoding=decoding,
        alpha=alpha,
        margin=margin,
        out=out,
        console=Console(),
    )


def score(
    run: Run = None,
    sft: SftModel = None,
    base: BaseModel = None,
    seed: TrainingSeed = None,
    prompt: Annotated[str | None, Option(help="Score one response, with --response.")] = None,
    response: Annotated[str | None, Option(help="Score one response, with --prompt.")] = None,
    answer: Annotated[str | None, Option(help="The right answer, where there is one.")] = None,
    file: Annotated[Path | None, Option(metavar="FILE", help="Score its rows: prompt, response, maybe answer.")] = None,
    prompts: Annotated[
        Path | None, Option(metavar="FILE", help="Sample responses to these. (default: dev items)")
    ] = None,
    samples: Annotated[int, Option(min=1, help="Fresh responses a prompt.")] = 4,
    limit: Limit = None,
    top: Annotated[int, Option(min=0, help="Show the responses the reward likes most.")] = 5,
    bottom: Annotated[int, Option(min=0, help="And least.")] = 5,
    device: Device = "auto",
    out: Out = None,
    debug: Debug = False,
) -> None:
    """Look inside the reward, token by token, and how right it is. Tokens are coloured by their log-ratios."""
    from srppo.analysis.score import score_command
    from srppo.console import Console
    from srppo.models.loading import pick_device
    from srppo.record.folder import check_place
    from srppo.report.page import RUNS, page_folder
    from srppo.report.score import report_score

    console = Console()
    check_place(out or RUNS)
    result = score_command(
        run,
        sft=sft,
        base=base,
        seed=seed,
        prompt=prompt,
        response=response,
        answer=answer,
        file=file,
        prompts=prompts,
        samples=samples,
        limit=limit,
        device=pick_device(device),
        console=console,
    )
    report_score(result, out or page_folder("score", run, result.sft, seed), console, top=top, bottom=bottom)


def forecast(
    run: Run = None,
    sft: SftModel = None,
    base: BaseModel = None,
    seed: TrainingSeed = None,
    prompts: Annotated[
        Path | None, Option(metavar="FILE", help="Prompts, maybe with answers. (default: dev items)")
    ] = None,
    limit: Limit = None,
    samples: Annotated[int | None, Option(min=2, help="Of the SFT model, a prompt.")] = None,
    beta: Annotated[list[float] | None, Option(help="Of the grid (repeatable).")] = None,
    anchor: Annotated[list[str] | None, Option(help="sft, base (repeatable). (default: both)")] = None,
    checkpoints: Annotated[
        bool, Option("--checkpoints/--no-checkpoints", help="Draw the run's PPO against it.")
    ] = True,
    device: Device = "auto",
    out: Out = None,
    debug: Debug = False,
) -> None:
    """What the objective itself can give, before any PPO. Its optimum's reward, KL, length and accuracy over beta."""
    from srppo.analysis import forecast as module
    from srppo.console import Console
    from srppo.models.loading import pick_device
    from srppo.record.folder import check_place
    from srppo.report.forecast import report_forecast
    from srppo.report.page import RUNS, page_folder

    console = Console()
    check_place(out or RUNS)
    result = module.forecast_command(
        run,
        sft=sft,
        base=base,
        seed=seed,
        prompts=prompts,
        limit=limit or module.PROMPTS,
        samples=samples or module.SAMPLES,
        betas=beta or [],
        anchors=anchor or ("sft", "base"),
        checkpoints=checkpoints,
        device=pick_device(device),
        console=console,
    )
    report_forecast(result, out or page_folder("forecast", run, result.sft, seed), console)


def explain(
    run: Run = None,
    arm: Annotated[str | None, Option(metavar="NAME", help="Only this arm. (default: every trained one)")] = None,
    seed: Annotated[int | None, Option("--seed", help="Only this training seed. (default: all)")] = None,
    samples: Annotated[int | None, Option(min=2, help="Fresh ones of the SFT model, a test item.")] = None,
    limit: Limit = None,
    device: Device = "auto",
    out: Out = None,
    debug: Debug = False,
) -> None:
    """How much of a gain length alone explains. The SFT model's own answers, at the lengths of the trained policy's."""
    from srppo.analysis import explain as module
    from srppo.console import Console
    from srppo.models.loading import pick_device
    from srppo.record.folder import check_place
    from srppo.report.explain import report_explain
    from srppo.report.page import RUNS, page_folder
    from srppo.stages.arms import stages_by_arm

    check_place(out or RUNS)
    result = module.explain_command(
        run,
        arms=stages_by_arm,
        arm=arm,
        seed=seed,
        samples=samples or module.SAMPLES,
        limit=limit,
        device=pick_device(device),
        console=Console(),
    )
    report_explain(result, out or page_folder("explain", run, result.sft, seed), Console())


def report(run: Annotated[Path, Argument(help="The folder of a run, or of a sweep.")], debug: Debug = False) -> None:
    """The tables of a run or a sweep, and its report. Here in the terminal, and as one HTML file that opens offline."""
    from srppo.console import Console
    from srppo.record.arms import is_sweep
    from srppo.record.store import Run

    if is_sweep(Run.load(run).spec):
        from srppo.report.sweep import report_sweep

        report_sweep(run, Console())
    else:
        from srppo.report.run import report_run

        report_run(run, Console())
