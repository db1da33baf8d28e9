"""`srppo report` of a run: the tables, plots and page of its folder. Reads the record, trusts nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from srppo.config import build_recipe, canonical_json, to_toml
from srppo.console import Console
from srppo.record.files import write_atomic
from srppo.record.store import Run
from srppo.report import answers, history, plots
from srppo.report.answers import ArmFigures, ArmRow, Sample
from srppo.report.evaluated import TITLE, evaluated_of, evaluated_table
from srppo.report.page import bullets, details, facts, plot, section, soft_text, text, write_page
from srppo.report.plots import TaskFigures
from srppo.report.table import Column, Row, Table, paragraph, to_html
from srppo.report.words import (
    DECODINGS,
    GROUP_MEANING,
    GROUP_WORDS,
    estimate_text,
    group_words,
    interval_words,
    number_text,
    span,
    teraflops,
)
from srppo.stages.arms import stages_by_arm

LONG = 200  # characters of an answer that need a wider column
PAIRS = (
    "Same items and seeds. SRPPO: its best step on development items; longer: longer SFT at equal compute; chosen: "
    "longer SFT, best on development items."
)
CHOICE = (
    f"{answers.SAMPLES} test items of each group, spread evenly over it: chosen by place, not by outcome. Greedy "
    "answers of the first training seed, at the kept step; spaces at their ends are left out."
)


def report_run(folder: Path, console: Console) -> None:
    """Print the tables of a run, write plots, rows and index.html into its folder `report`, and name every path.

    A run that is half finished, or has failed in part, is reported as far as it goes. Raises RecordError, in one line,
    for a folder that holds no record or a damaged one.
    """
    run = Run.load(folder)
    rows, out, seeds = answers.arm_rows(run), folder / "report", run.spec["seeds"]
    arms, pairs, (evaluated, unread) = answers.arms_of(rows), answers.differences_of(rows), evaluated_of(folder)
    missing = [*history.missing_of(run), *answers.left_out(rows), *unread]
    print_arms(arms, pairs, console)
    if evaluated:
        console.print(evaluated_table(evaluated))
    accuracy = plot("Test accuracy with 95% intervals", plots.accuracy_plot(arms, out / "accuracy"))
    recipe = to_toml(build_recipe({**run.spec["recipe"], "seed": seeds[0]}))
    parts = [
        text(f"Training seeds: {', '.join(map(str, seeds))}. Made by: srppo report {folder}"),
        bullets("Missing or failed", [*problem_lines(arms), *missing], "bad"),
        section("Results", results_html(arms) + accuracy),
        section("Paired differences: SRPPO minus", to_html(differences_table(pairs)) if pairs else ""),
        section("Accuracy by task", _tasks(rows, out)),
        section(TITLE, to_html(evaluated_table(evaluated)) if evaluated else ""),
        *_training(history.curves_of(run), out),
        section("Length of answers", _lengths(rows, out)),
        samples_html(answers.samples_of(rows)),
        section("Configuration", details("recipe.toml", f"<pre>{escape(recipe)}</pre>")),
        section("Environment", facts(history.run_environment(run))),
    ]
    page = write_page(out / "index.html", f"srppo: {folder.name}", parts)
    write_atomic(out / "rows.jsonl", "".join(canonical_json(row) + "\n" for row in rows_of(run)))
    for line in missing:
        console.print(line)
    for name, stages in stages_by_arm(run).items():
        for stage in stages:
            if (stage.path / "model").is_dir():
                console.print(f"{name}: {stage.path / 'model'}")
    console.print(f"report: {page}")


# ---- tables


def print_arms(arms: Sequence[ArmFigures], pairs: Sequence[ArmFigures], console: Console) -> None:
    """Accuracy by group and decoding, cost of each arm, what failed, and the paired differences."""
    console.print(accuracy_table(arms))
    console.print(cost_table(arms))
    for line in problem_lines(arms):
        console.print(paragraph(line, "bold red"))
    if pairs:
        console.print(differences_table(pairs))


def accuracy_table(arms: Sequence[ArmFigures]) -> Table:
    """Accuracy of each arm on each group of items, a block a decoding, and what the intervals mean."""
    meanings = "; ".join(GROUP_MEANING[g] for g in answers.groups_of(arms) if g in GROUP_MEANING)
    return _by_group("Test items", arms, [interval_caption(arms), f"{meanings}." if meanings else ""])


def differences_table(pairs: Sequence[ArmFigures]) -> Table:
    """Differences of accuracy between arms on the same items and seeds."""
    return _by_group("Paired differences: SRPPO minus", pairs, [PAIRS], sign="+")


def _by_group(title: str, arms: Sequence[ArmFigures], caption: Sequence[str], sign: str = "") -> Table:
    groups = answers.groups_of(arms)
    rows: list[Row | str] = []
    for decoding in answers.decodings_of(arms):
        rows.append(decoding)
        for arm in arms:
            cells = [estimate_text(arm.figures.get((group, decoding)), sign) for group in groups]
            rows.append(_arm_row(arm, cells))
    heads = (Column(group_words(group), GROUP_WORDS.get(group, group)) for group in groups)
    return Table.of(title, [Column(""), *heads], rows, caption)


def cost_table(arms: Sequence[ArmFigures]) -> Table:
    """Counted operations, time, the kept step and the shape of the answers, those columns that any arm has."""
    several = len({arm.seeds for arm in arms if arm.flops is not None}) > 1
    heads: list[str | Column] = ["", Column("seeds", only="page"), "TFLOPs", "seconds", "kept step", "length"]
    rows = []
    for arm in arms:
        cells = [
            str(arm.seeds) if several and arm.flops is not None else "-",
            teraflops(arm.flops),
            number_text(arm.seconds, ",.0f"),
            "-" if arm.kept_step is None else f"{arm.kept_step} of {arm.steps}",
            number_text(arm.mean_length),
            number_text(arm.ended_share, ".0%"),
            number_text(arm.nll, ".3f"),
        ]
        rows.append(_arm_row(arm, cells))
    notes = (f"{arm.name}: {arm.note}" for arm in arms if arm.note)
    heads += [Column("ended by EOS", "ended"), Column("held-out NLL", "NLL")]
    return Table.of("Cost and shape", heads, rows, [cost_caption(arms), *notes]).telling()


def _arm_row(arm: ArmFigures, cells: Sequence[str]) -> Row:
    nothing = arm.problem and set(cells) <= {"-"}
    return Row([f"{arm.name}: no result" if nothing else arm.name, *cells], "bad" if arm.problem else "")


def problem_lines(arms: Sequence[ArmFigures]) -> list[str]:
    """What failed, a line a problem: the rows of an arm share theirs."""
    names: dict[str, list[str]] = {}
    for arm in arms:
        if arm.problem:
            names.setdefault(arm.problem, []).append(arm.name)
    return [f"{'; '.join(rows)}: {problem}" for problem, rows in names.items()]


def interval_caption(arms: Sequence[ArmFigures]) -> str:
    """What the cells and intervals are over, and what they do not say."""
    groups = answers.groups_of(arms)
    if not groups:
        return "No items with known answers were given (eval.items), so there is no accuracy: held-out answer NLL only."
    counts: dict[str, set[int]] = {g: set() for g in groups}
    for arm in arms:
        for (group, _), estimate in arm.figures.items():
            counts[group].add(estimate.n)
    sizes = {g: "/".join(str(n) for n in sorted(ns)) for g, ns in counts.items()}
    same = len(set(sizes.values())) == 1
    n = f"n = {sizes[groups[0]]} items a group" if same else "n = " + ", ".join(f"{sizes[g]} {g}" for g in groups)
    words = interval_words([arm.seeds for arm in arms if arm.figures])
    text = f"Exact-match accuracy, {n}, with 95% intervals over {words}"
    if "sampled" in answers.decodings_of(arms):
        text += " Sampled: temperature 1; an item counts by its share of right samples."
    if sum(bool(arm.figures) for arm in arms) > 1:
        text += " Arms share items and seeds: read the paired differences, not the overlap."
    return text


def cost_caption(arms: Sequence[ArmFigures]) -> str:
    """What the columns of cost and shape are, those that are shown."""
    parts = []
    if any(arm.flops is not None for arm in arms):
        parts.append("TFLOPs: counted training operations, 10^12, SFT included")
    if any(arm.mean_length is not None for arm in arms):
        parts.append("length: tokens of a sampled answer; ended: by EOS")
    if any(arm.nll is not None for arm in arms):
        parts.append("NLL: of held-out answers, nats a token")
    return ". ".join(part[0].upper() + part[1:] for part in parts) + "." if parts else ""


# ---- sections of the page


def results_html(arms: Sequence[ArmFigures]) -> str:
    """Accuracy and cost."""
    return to_html(accuracy_table(arms)) + to_html(cost_table(arms))


def _tasks(rows: Sequence[ArmRow], out: Path) -> str:
    """Accuracy by task; nothing where every group is one task."""
    by_row = answers.tasks_of(rows)
    tasks = list(dict.fromkeys(key[:2] for figures in by_row.values() for key in figures))
    groups = [group for group, _ in tasks]
    if len(tasks) == len(set(groups)):
        return ""
    items = [estimate.n for figures in by_row.values() for estimate in figures.values()]
    caption = (
        f"n = {span(items)} items a task, with 95% intervals over {_over(rows)} Many tasks are shown at once and no "
        "interval is corrected for that."
    )
    if max(map(groups.count, groups)) > plots.MOST_TASKS:
        caption += f" Of each group {plots.MOST_TASKS} tasks are drawn; the tables hold all."
    html = ""
    for decoding in DECODINGS:
        name = f"Accuracy on each task, {decoding}"
        html += plot(name, plots.task_plot(by_row, decoding, out / f"tasks-{decoding}"))
        html += details(f"{name}, as a table", to_html(_task_table(by_row, tasks, decoding)))
    return html + soft_text(caption)


def _task_table(by_row: TaskFigures, tasks: Sequence[tuple[str, str]], decoding: str) -> Table:
    """A row a task, a column an arm."""
    names = [name for name, figures in by_row.items() if any(key[2] == decoding for key in figures)]
    rows = [
        [f"{task} ({group})", *(estimate_text(by_row[name].get((group, task, decoding))) for name in names)]
        for group, task in tasks
    ]
    return Table.of("", ["task", *names], rows if names else [])


def _training(curves: Mapping[str, history.SeedRows], out: Path) -> list[str]:
    """Curves with bands over seeds, and PPO's reward against its KL."""
    caption = "What PPO sees by step, and development accuracy against counted operations, 10^12, SFT included. "
    if any(arm.kept is not None for arm in curves.values()):
        caption += "Ring: the step that was kept. "
    parts = [
        section("Training", plot(caption + history.band_words(curves), plots.training_curves(curves, out / "curves")))
    ]
    if "SRPPO" in curves:
        ours = curves["SRPPO"]
        seeds = "Each seed thin, the mean over finished seeds thick, from its first step (ring) to its last (diamond)."
        if len(ours.done) == 1:
            seeds = "One finished training seed, from its first step (ring) to its last (diamond)."
        if not ours.done:
            seeds = "No seed is finished: each is dashed, up to where it came."
        words = (
            "Reward of a batch of rollouts against its KL, both nats a response, a point a PPO step; up and left: "
            f"more reward for less change. {seeds}"
        )
        drawn = plots.reward_kl_plot(ours, out / "reward-kl", plots.ARM_COLOURS["SRPPO"])
        parts.append(section("Reward against KL", plot(words, drawn)))
    return parts


def _lengths(rows: Sequence[ArmRow], out: Path) -> str:
    """How long sampled answers are."""
    lengths = answers.lengths_of(rows)
    caption = "Tokens of sampled answers to test items, EOS included, of all finished seeds"
    drawn = plot(caption, plots.length_plot(lengths, out / "lengths"))
    return drawn and drawn + to_html(length_table(lengths, _over(rows)))


def length_table(lengths: Sequence[answers.Lengths], over: str = "") -> Table:
    """A row an arm: mean and quantiles in tokens, the share that was cut; over: what its intervals are over."""
    rows = []
    for each in lengths:
        tokens = sorted((each.ended + each.cut).elements())
        quantiles = (tokens[max(math.ceil(share * len(tokens)) - 1, 0)] for share in (0.1, 0.5, 0.9))
        share = f"{each.cut_share.mean:.2%} [{each.cut_share.low:.2%}, {each.cut_share.high:.2%}]"
        rows.append([each.name, f"{sum(tokens) / len(tokens):.2f}", *map(str, quantiles), share])
    caption = f"Share that reached the limit: of all sampled answers, with 95% intervals over {over}" if over else ""
    return Table.of("", ["arm", "mean", "10%", "median", "90%", "reached the limit"], rows, [caption])


def _over(rows: Sequence[ArmRow]) -> str:
    """What intervals of the sampled answers' rows are over."""
    return interval_words([len(row.answers["sampled"]) for row in rows if row.answers["sampled"]])


def samples_html(samples: Sequence[Sample]) -> str:
    """Test items with what each arm answered, side by side."""
    return section("Samples", soft_text(CHOICE) + "".join(map(_sample, samples)) if samples else "")


def _sample(sample: Sample) -> str:
    told = ""
    for arm, words in sample.responses.items():
        kind = ("right" if sample.right[arm] else "wrong") if arm in sample.right else ""
        verdict = f' <span class="{kind}">{"✓" if kind == "right" else "✗"}&nbsp;{kind}</span>' if kind else ""
        shown = escape(words) or "(nothing)"
        told += f'<div><span class="soft">{escape(arm)}{verdict}</span><pre>{shown}</pre></div>'
    long = max(map(len, sample.responses.values()), default=0) > LONG
    answer = f'<span class="soft">right answer: <code>{escape(sample.answer)}</code></span>' if sample.answer else ""
    return (
        f'<div class="sample"><span class="soft">{escape(sample.group)}</span><pre>{escape(sample.prompt)}</pre>'
        f'{answer}<div class="answers{" long" if long else ""}">{told}</div></div>'
    )


# ---- the rows of results/*.jsonl


def rows_of(run: Run) -> list[dict[str, Any]]:
    """One plain row a seed, arm, kept or last step, group and decoding, with what made it: for results/*.jsonl."""
    rows = []
    for arm, stages in stages_by_arm(run).items():
        for stage in stages:
            environment, figures = history.environment_of(stage), answers.figures_of(stage)
            made = {key: environment.get(key) for key in ("cpu", "cores", "commit")}
            made |= {name: environment.get("packages", {}).get(name) for name in ("torch", "transformers")}
            common = {"arm": arm, "seed": answers.seed_of(stage), "flops": figures.get("flops"), **made}
            common |= {"kept_step": figures.get("kept_step"), "steps": figures.get("steps")}
            for which in ("kept", "last"):
                for decoding in DECODINGS:
                    verdicts = answers.read_verdicts(answers.answers_file(stage, which, decoding))
                    for group in dict.fromkeys(each["group"] for each in verdicts):
                        shares = [answers.right_share(each) for each in verdicts if each["group"] == group]
                        row = {"group": group, "decoding": decoding, "which": which, "items": len(shares)}
                        rows.append({**common, **row, "accuracy": sum(shares) / len(shares)})
    return rows
