"""The commands that measure: eval, compare, score, forecast, report. Registered in cli.py."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

OutDir = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder for what is written.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps, or auto.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks.")]
RunArgument = Annotated[
    Path | None, typer.Argument(help="A run folder; without one the newest under runs/.", show_default=False)
]
SftModel = Annotated[str | None, typer.Option("--sft", metavar="MODEL", help="An SFT model, with --base.")]
BaseModel = Annotated[str | None, typer.Option("--base", metavar="MODEL", help="Its base, with --sft.")]
TrainingSeed = Annotated[int | None, typer.Option("--seed", help="Training seed of the run. (default: the first)")]
Limit = Annotated[int | None, typer.Option(min=1, help="At most so many items a task or prompts.", show_default=False)]


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A folder, a hub name, embedded:xs|s|l, or a run (then each arm in it). Without: the newest run.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[str, typer.Option(metavar="A,B", help="Tasks: names that lm-eval knows, yours, or ours.")] = "",
    suite: Annotated[
        str | None, typer.Option(help="embedded, ifeval, gsm8k (both with --data), or paper.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Local file of ifeval or gsm8k.", show_default=False)
    ] = None,
    include_path: Annotated[
        list[Path] | None, typer.Option(metavar="DIR", help="Folder with YAML tasks of your own (repeatable).")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Shots. (default: the task's)")] = None,
    chat_template: Annotated[
        bool | None,
        typer.Option(
            "--chat-template/--no-chat-template",
            help="Put prompts into the chat template. (default: where the tokenizer has one)",
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Sample so many answers a prompt. (default: as the task says)")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Of sampling.")] = 1.0,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer. (default: the task's)")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompts at once; another size rounds otherwise and may change a few responses. "
            "(default: by the machine's memory, the same each time)",
        ),
    ] = None,
    limit: Limit = None,
    seed: Annotated[int, typer.Option(help="Of sampling and few-shot draws.")] = 0,
    device: Device = "auto",
    out: OutDir = None,
    score_rest: Annotated[
        bool, typer.Option("--score-rest", help="Score what can be scored; list the other prompts as not scored.")
    ] = False,
    system: Annotated[
        str | None,
        typer.Option(metavar="TEXT", help="System message. (default: with which a run was trained; '': none)"),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Items with the same FIELD belong together. (default: as the task says)"),
    ] = None,
    debug: Debug = False,
) -> None:
    """Measure a model on tasks of lm-eval, on ours, or on yours. Results are cached, and never stale."""
    from srppo.console import Console
    from srppo.evaluation.harness.run import evaluate_command
    from srppo.models.loading import pick_device
    from srppo.stages.arms import stages_by_arm

    evaluate_command(
        model,
        tasks=[name for name in tasks.split(",") if name],
        suite=suite,
        data=data,
        include_path=include_path or [],
        num_fewshot=num_fewshot,
        chat_template=chat_template,
        samples=samples,
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        limit=limit,
        seed=seed,
        device=pick_device(device),
        out=out,
        score_rest=score_rest,
        system=system,
        cluster=cluster,
        console=Console(),
        arms=stages_by_arm,
    )


def compare(
    paths: Annotated[
        list[Path],
        typer.Argument(help="A run (its arms against SFT), or several: RUN, RUN:ARM, result folders; first: baseline."),
    ],
    task: Annotated[list[str] | None, typer.Option(help="Only this task (repeatable).")] = None,
    metric: Annotated[
        str | None, typer.Option(help="Scores to compare. (default: each task's primary)", show_default=False)
    ] = None,
    decoding: Annotated[str | None, typer.Option(help="greedy or sampled. (default: both)")] = None,
    alpha: Annotated[float, typer.Option(help="Level of the tests, Holm-corrected over tasks.")] = 0.05,
    out: Annotated[
        Path | None, typer.Option(metavar="PATH", help="A .md, .csv or .json file, or a folder for all three.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Paired differences with intervals, tests, and what could have been seen; in plain words."""
    from srppo.console import Console
    from srppo.report.comparison import compare_command

    compare_command(paths, task=task or [], metric=metric, decoding=decoding, alpha=alpha, out=out, console=Console())


def score(
    run: RunArgument = None,
    sft: SftModel = None,
    base: BaseModel = None,
    seed: TrainingSeed = None,
    prompt: Annotated[str | None, typer.Option(help="Score one response, with --response.")] = None,
    response: Annotated[str | None, typer.Option(help="Score one response, with --prompt.")] = None,
    answer: Annotated[str | None, typer.Option(help="The right answer, where there is one.")] = None,
    file: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Score these: prompt, response, maybe answer, group.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Sample fresh responses to these. (default: dev items)")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Fresh responses a prompt.")] = 4,
    limit: Limit = None,
    top: Annotated[int, typer.Option(min=0, help="Show the responses the reward likes most.")] = 5,
    bottom: Annotated[int, typer.Option(min=0, help="And least.")] = 5,
    device: Device = "auto",
    out: OutDir = None,
    debug: Debug = False,
) -> None:
    """Look inside the reward: each token coloured by its log-ratio, and whether the reward is right."""
    from srppo.analysis.score import score_command
    from srppo.console import Console
    from srppo.models.loading import pick_device
    from srppo.record.folder import check_place
    from srppo.report.places import RUNS, page_folder
    from srppo.report.score_page import report_score

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
    run: RunArgument = None,
    sft: SftModel = None,
    base: BaseModel = None,
    seed: TrainingSeed = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help="Prompts, maybe with answers. (default: dev items)")
    ] = None,
    limit: Limit = None,
    samples: Annotated[int | None, typer.Option(min=2, help="Of the SFT model, a prompt.", show_default=False)] = None,
    beta: Annotated[list[float] | None, typer.Option(help="Of the grid (repeatable).")] = None,
    anchor: Annotated[list[str] | None, typer.Option(help="sft, base (repeatable). (default: both)")] = None,
    checkpoints: Annotated[
        bool, typer.Option("--checkpoints/--no-checkpoints", help="Draw the run's PPO checkpoints against it.")
    ] = True,
    device: Device = "auto",
    out: OutDir = None,
    debug: Debug = False,
) -> None:
    """What the objective itself can give, before any PPO: its optimum's reward, KL, length and accuracy over beta."""
    from srppo.analysis import forecast as module
    from srppo.console import Console
    from srppo.models.loading import pick_device
    from srppo.record.folder import check_place
    from srppo.report.forecast_page import report_forecast
    from srppo.report.places import RUNS, page_folder

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


def report(
    run: Annotated[Path, typer.Argument(help="The folder of a run, or of a sweep.")],
    debug: Debug = False,
) -> None:
    """The tables of a run or a sweep in the terminal, and its report as one HTML file that opens offline."""
    from srppo.console import Console
    from srppo.record.arms import is_sweep
    from srppo.record.store import Run

    if is_sweep(Run.load(run).spec):
        from srppo.report.sweep import report_sweep

        report_sweep(run, Console())
    else:
        from srppo.report.record import report_run

        report_run(run, Console())
