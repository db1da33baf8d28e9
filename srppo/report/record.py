"""Arms, curves and samples from a run folder: reads the record, trusts nothing else, needs no torch."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from srppo.arms import CHOSEN, EQUAL, problem_of, stages_by_arm
from srppo.checkpoint import write_atomic
from srppo.config import Recipe, build_recipe, canonical_json, to_toml
from srppo.console import Console
from srppo.report.figures import ArmFigures
from srppo.report.html import Sample, write_report
from srppo.report.plots import accuracy_plot, training_curves
from srppo.report.terminal import arms_table, differences_table
from srppo.stats import Estimate, crossed_interval, item_interval
from srppo.store import Run, Stage

PAIRS = (
    "Same items and seeds. SRPPO: its best step on development items; longer: longer SFT at equal compute; chosen: "
    "longer SFT, best on development items."
)
DIFFERENCES = {"SFT": "SFT", EQUAL: "longer", CHOSEN: "chosen"}  # from the arm to its short name in the paired table
SAMPLES_SHOWN = 2  # of each group


def arms_of_run(run: Run) -> list[ArmFigures]:
    """A row for each arm; SRPPO has a second row for its last step where development items picked another."""
    by_arm, rows = stages_by_arm(run), []
    sft_cost = _mean_cost(by_arm.get("SFT", []))
    for name, stages in by_arm.items():
        before = sft_cost if name == "SRPPO" else (0.0, 0.0)
        results = [stage.result() for stage in stages]
        problems = [problem_of(stage, result) for stage, result in zip(stages, results, strict=True)]
        good = [stage for stage, problem in zip(stages, problems, strict=True) if problem is None]
        problem = "; ".join(p for p in problems if p) or None
        if not good:
            rows.append(ArmFigures(name, problem=problem))
            continue
        picked = any("last" in (stage.result() or {})["figures"] for stage in good)
        if picked:
            rows.append(_arm(f"{name}, last step", good, "last", before, problem))
        rows.append(_arm(f"{name}, best on dev" if picked else name, good, "kept", before, problem))
    return rows


def _arm(
    name: str, stages: Sequence[Stage], which: str, before: tuple[float, float], problem: str | None
) -> ArmFigures:
    results = [(stage.result() or {})["figures"] for stage in stages]
    measured = [result.get("last", result) if which == "last" else result for result in results]
    # A stage that kept its last step has no separate "last": its kept figures are both.
    folders = [which if which == "kept" or "last" in result else "kept" for result in results]
    figures: dict[tuple[str, str], Estimate] = {}
    for decoding in ("greedy", "sampled"):
        by_group: dict[str, list[list[float]]] = defaultdict(list)
        for stage, folder in zip(stages, folders, strict=True):
            for group, values in _shares(stage.path / "eval" / f"{folder}-{decoding}" / "samples.jsonl").items():
                by_group[group].append(values)
        for group, by_seed in by_group.items():
            one = len(by_seed) == 1
            figures[group, decoding] = item_interval(by_seed[0]) if one else crossed_interval(by_seed)
    flops, seconds = _mean_cost(stages)
    steps = [result["steps"] for result in results]
    kept = [result["kept_step"] for result in results] if which == "kept" else steps
    spread = f"kept steps {min(kept)} to {max(kept)} over the seeds; the median is shown" if len(set(kept)) > 1 else ""
    return ArmFigures(
        name,
        figures,
        flops=before[0] + flops,
        seconds=before[1] + seconds,
        kept_step=int(median(kept)),
        steps=int(median(steps)),
        mean_length=_mean([m["sampled_tokens"] for m in measured if "sampled_tokens" in m]),
        ended_share=_mean([m["sampled_ended"] for m in measured if "sampled_ended" in m]),
        nll=_mean([m["held_out_nll"] for m in measured if "held_out_nll" in m]),
        problem=problem,
        note=spread,
        seeds=len(stages),
    )


def differences_of_run(run: Run) -> list[ArmFigures]:
    """SRPPO minus each other trained arm, kept steps, paired on items and seeds."""
    by_arm = stages_by_arm(run)
    by_seed = {
        name: {s.identity["config"]["seed"]: s for s in stages if (s.path / "eval").is_dir()}
        for name, stages in by_arm.items()
    }
    rows = []
    for other, short in DIFFERENCES.items():
        seeds = sorted(by_seed.get("SRPPO", {}).keys() & by_seed.get(other, {}).keys())
        figures: dict[tuple[str, str], Estimate] = {}
        for decoding in ("greedy", "sampled"):
            by_group: dict[str, list[list[float]]] = defaultdict(list)
            for seed in seeds:
                ours, theirs = (
                    _shares(by_seed[name][seed].path / "eval" / f"kept-{decoding}" / "samples.jsonl")
                    for name in ("SRPPO", other)
                )
                for group in ours:
                    by_group[group].append([a - b for a, b in zip(ours[group], theirs[group], strict=True)])
            for group, values in by_group.items():
                figures[group, decoding] = crossed_interval(values)
        if figures:
            rows.append(ArmFigures(short, figures, seeds=len(seeds)))
    return rows


def rows_of_run(run: Run) -> list[dict[str, Any]]:
    """One plain row a seed, arm, kept or last step, group and decoding, with what made it: for results/*.jsonl."""
    rows = []
    for arm, stages in stages_by_arm(run).items():
        for stage in stages:
            environment = _environment_of(stage)
            made = {key: environment.get(key) for key in ("cpu", "cores", "commit")}
            made |= {name: environment.get("packages", {}).get(name) for name in ("torch", "transformers")}
            figures = (stage.result() or {}).get("figures", {})
            common = {"arm": arm, "seed": stage.identity["config"]["seed"], "flops": figures.get("flops"), **made}
            common |= {"kept_step": figures.get("kept_step"), "steps": figures.get("steps")}
            for which in ("kept", "last"):
                for decoding in ("greedy", "sampled"):
                    path = stage.path / "eval" / f"{which}-{decoding}" / "samples.jsonl"
                    for group, values in _shares(path).items():
                        row = {"group": group, "decoding": decoding, "which": which, "items": len(values)}
                        rows.append({**common, **row, "accuracy": sum(values) / len(values)})
    return rows


def longer_curve(run: Run) -> list[dict[str, Any]]:
    """Accuracy against compute: the start (the base, as SFT's) and the end of each longer SFT of the first seed."""
    stages = [stage for stage in run.stages() if stage.identity["kind"] == "longer-sft" and stage.done]
    first = min((stage.identity["config"]["seed"] for stage in stages), default=0)
    rows = [stage.metrics() for stage in stages if stage.identity["config"]["seed"] == first]
    ends = sorted((metrics[-1] for metrics in rows), key=lambda row: row["step"])
    start = [row for stage in stages_by_arm(run).get("SFT", [])[:1] for row in stage.metrics()[:1]]
    return [*start, *ends] if rows else []


def _mean_cost(stages: Sequence[Stage]) -> tuple[float, float]:
    """(counted training operations, seconds of training), a seed."""
    done = [stage for stage in stages if stage.done]
    flops = [(stage.result() or {})["figures"]["flops"] for stage in done]
    seconds = [sum(_seconds(row) for row in stage.metrics()) for stage in done]
    return _mean(flops) or 0.0, _mean(seconds) or 0.0


def _seconds(row: Mapping[str, Any]) -> float:
    return sum(v for k, v in row.get("timing", {}).items() if k.endswith("_s") and k != "tokens_per_s")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _verdicts(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _shares(path: Path) -> dict[str, list[float]]:
    shares: dict[str, list[float]] = defaultdict(list)
    for verdict in _verdicts(path):
        shares[verdict["group"]].append(sum(verdict["correct"]) / len(verdict["correct"]))
    return shares


def samples_of_run(run: Run) -> list[Sample]:
    """A few test prompts of each group with the greedy answers of base, SFT and SRPPO, of the first seed."""
    verdicts = {
        name: _verdicts(stages[0].path / "eval" / "kept-greedy" / "samples.jsonl")
        for name, stages in stages_by_arm(run).items()
    }
    verdicts = {name: rows for name, rows in verdicts.items() if rows}
    if not verdicts:
        return []
    shown: dict[str, int] = defaultdict(int)
    samples = []
    rows = next(iter(verdicts.values()))
    for i in range(0, len(rows), max(len(rows) // 24, 1)):  # spread over the tasks
        row = rows[i]
        if shown[row["group"]] < SAMPLES_SHOWN:
            shown[row["group"]] += 1
            answers = {name: found[i] for name, found in verdicts.items()}
            samples.append(
                Sample(
                    row["prompt"],
                    {name: v["responses"][0] for name, v in answers.items()},
                    answer=row["answer"],
                    group=row["group"],
                    right={name: v["correct"][0] for name, v in answers.items()},
                )
            )
    return samples


def report_run(folder: Path, console: Console) -> None:
    """Print the table of a run, write plots and report.html into its folder, and name every path."""
    run = Run.load(folder)
    recipe: Recipe = build_recipe({**run.spec["recipe"], "seed": run.spec["seeds"][0]})
    arms = arms_of_run(run)
    console.print(arms_table(arms))
    pairs = differences_of_run(run)
    if pairs:
        console.print(differences_table(pairs, caption=PAIRS))
    by_arm = stages_by_arm(run)
    curves: dict[str, list[dict[str, Any]]] = {}
    for name in ("SFT", "longer SFT", "SRPPO"):
        rows = longer_curve(run) if name == "longer SFT" else [r for s in by_arm.get(name, [])[:1] for r in s.metrics()]
        if rows:
            curves[name] = rows
    kept = {name: (stages[0].result() or {}).get("figures", {}).get("kept_step", 0) for name, stages in by_arm.items()}
    plots = {
        "Training, first seed: what PPO sees, and development accuracy against counted operations": training_curves(
            curves, folder / "report" / "curves", flops_before={"SRPPO": _mean_cost(by_arm["SFT"])[0]}, kept_steps=kept
        ),
        "Test accuracy with 95% intervals": accuracy_plot(arms, folder / "report" / "accuracy"),
    }
    missing = []
    if "SRPPO" in by_arm and EQUAL not in by_arm:
        missing.append("longer SFT at equal compute was not run; add --baselines")
    page = write_report(
        folder / "report" / "index.html",
        title=f"srppo: {folder.name}",
        arms=arms,
        differences=pairs,
        differences_caption=PAIRS,
        plots={caption: paths[1] for caption, paths in plots.items() if paths},
        samples=samples_of_run(run),
        recipe_toml=to_toml(recipe),
        environment=next((_environment_of(stages[0]) for stages in reversed(by_arm.values())), {}),
        missing=missing,
    )
    lines = "".join(canonical_json(row) + "\n" for row in rows_of_run(run))
    write_atomic(folder / "report" / "rows.jsonl", lines)
    for line in missing:
        console.print(line)
    for name, stages in by_arm.items():
        for stage in stages:
            if (stage.path / "model").is_dir():
                console.print(f"{name}: {stage.path / 'model'}")
    console.print(f"report: {page}")


def _environment_of(stage: Stage) -> dict[str, Any]:
    """What the last attempt at a stage ran on."""
    attempts = stage.attempts()
    return json.loads((attempts[-1] / "env.json").read_text()) if attempts else {}
