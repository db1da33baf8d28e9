"""`srppo report` of a run: the tables, plots and page of its folder. Reads the record, trusts nothing else."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from srppo.config import build_recipe, canonical_json, to_toml
from srppo.console import Console
from srppo.evaluation.results import answers_file
from srppo.record.files import write_atomic
from srppo.record.store import Run
from srppo.report import answers, history, plots, words
from srppo.report.answers import ArmFigures, ArmRow
from srppo.report.evaluated import evaluated_table
from srppo.report.explain import MEANING, explain_table, explained_by_record, sentences
from srppo.report.page import bullets, details, facts, plot, section, soft_text, text, write_page
from srppo.report.table import Column, Row, Table, paragraph, to_html
from srppo.reward_kinds import REWARD_KINDS
from srppo.stages.arms import compute_of, figures_of, stages_by_arm
from srppo.stages.kinds import KINDS

LONG = 200  # characters of an answer that need a wider column
PAIRS = (
    "Same items and seeds; intervals over seeds and over the tasks of a group where it has several, else over items. "
    "SRPPO: its best step on development items; longer: longer SFT at equal compute; chosen: longer SFT, its length "
    "chosen on development items."
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
    arms, pairs, (evaluated, unread) = answers.arms_of(rows), answers.differences_of(rows), evaluated_table(folder)
    accuracy, cost, differences = accuracy_table(arms), cost_table(arms), differences_table(pairs)
    problems = problem_lines(arms)
    found = explained_by_record(rows)
    by_length, said = explain_table(found), [paragraph(line, "unsure") for line in sentences(found)]
    for part in (
        accuracy,
        cost,
        *(paragraph(line, "bold red") for line in problems),
        differences,
        by_length,
        *said,
        evaluated,
    ):
        console.print(part)
    missing = [*history.missing_of(run), *answers.left_out(rows), *unread]
    drawn = plot("Test accuracy with 95% intervals", plots.accuracy_plot(arms, out / "accuracy"))
    recipe = to_toml(build_recipe({**run.spec["recipe"], "seed": seeds[0]}))
    parts = [
        text(f"Training seeds: {', '.join(map(str, seeds))}. Made by: srppo report {folder}"),
        bullets("Missing or failed", [*problems, *missing], "bad"),
        bullets("Warnings", sentences(found), ""),
        section("Results", to_html(accuracy) + to_html(cost) + drawn),
        section(differences.title, to_html(differences)),
        section(by_length.title, to_html(by_length) + soft_text(MEANING) if found else ""),
        section("Accuracy by task", _tasks(rows, out)),
        section(evaluated.title, to_html(evaluated)),
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
        if folders := [folder for stage in stages if (folder := stage.path / "model").is_dir()]:
            others = f" and {len(folders) - 1} of other seeds, whose stages rows.jsonl names" if folders[1:] else ""
            console.print(f"{name}: {folders[0]}{others}")
    console.print(f"report: {page}")


# ---- tables


def accuracy_table(arms: Sequence[ArmFigures]) -> Table:
    """Accuracy of each arm on each group of items, a block a decoding, and what the intervals mean."""
    meanings = "; ".join(each for group, each in words.GROUP_MEANING.items() if group in answers.groups_of(arms))
    paid = {kind.label: REWARD_KINDS[kind.keys["reward.kind"]] for kind in KINDS.values() if "reward.kind" in kind.keys}
    shown = {arm.name.partition(",")[0] for arm in arms}  # `shuffled, last step`
    controls = "; ".join(f"{label}, {kind.description}" for label, kind in paid.items() if label in shown)
    caption = [interval_caption(arms), f"{meanings}." if meanings else ""]
    return _by_group("Test items", arms, [*caption, f"PPO paid by another reward: {controls}." if controls else ""])


def differences_table(pairs: Sequence[ArmFigures]) -> Table:
    """Differences of accuracy between arms on the same items and seeds."""
    title = "Paired differences: SRPPO minus each, but where a row names both"
    return _by_group(title, pairs, [PAIRS] if pairs else [], "+.2f")


def _by_group(title: str, arms: Sequence[ArmFigures], caption: Sequence[str], form: str = ".2f") -> Table:
    groups = answers.groups_of(arms)
    rows: list[Row | str] = []
    for decoding in answers.decodings_of(arms):
        rows.append(decoding)
        for arm in arms:
            cells = [words.estimate_text(arm.figures.get((group, decoding)), form) for group in groups]
            rows.append(_arm_row(arm, cells))
    heads = (Column(words.group_words(group), words.GROUP_WORDS.get(group, group)) for group in groups)
    return Table.of(title, [Column(""), *heads], rows, caption)


def cost_table(arms: Sequence[ArmFigures]) -> Table:
    """Counted operations, time, the kept step and the shape of the answers, those columns that any arm has."""
    several = len({arm.seeds for arm in arms if arm.flops is not None}) > 1
    heads: list[str | Column] = ["", Column("seeds", only="page"), "TFLOPs", Column("selection", "select")]
    heads += ["seconds", "kept step", "length"]
    rows = []
    for arm in arms:
        cells = [
            str(arm.seeds) if several and arm.flops is not None else "-",
            words.teraflops(arm.flops),
            words.teraflops(arm.selection_flops),
            words.number_text(arm.seconds, ",.0f"),
            "-" if arm.kept_step is None else f"{arm.kept_step} of {arm.steps}",
            words.number_text(arm.mean_length),
            words.number_text(arm.ended_share, ".0%"),
            words.number_text(arm.nll, ".3f"),
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
    counts = {g: {each.n for arm in arms for (group, _), each in arm.figures.items() if group == g} for g in groups}
    sizes = {g: "/".join(map(str, sorted(ns))) for g, ns in counts.items()}
    same = len(set(sizes.values())) == 1
    n = f"n = {sizes[groups[0]]} items a group" if same else "n = " + ", ".join(f"{sizes[g]} {g}" for g in groups)
    over = words.interval_words([arm.seeds for arm in arms if arm.figures])
    caption = f"Exact-match accuracy, {n}, with 95% intervals over {over}"
    if len({decoding for _, decoding in set().union(*(arm.figures for arm in arms))}) > 1 and any(
        len({decoding for _, decoding in arm.figures}) == 1 for arm in arms
    ):
        caption += " A vote is one answer and stands under greedy; resampling is random and has no greedy one."
    if "sampled" in answers.decodings_of(arms):
        caption += " Sampled: temperature 1; an item counts by its share of right samples."
    if sum(bool(arm.figures) for arm in arms) > 1:
        caption += " Arms share items and seeds: read the paired differences, not the overlap."
    return caption


def cost_caption(arms: Sequence[ArmFigures]) -> str:
    """What the columns of cost and shape are, those that are shown."""
    columns = {
        "TFLOPs: counted training operations, 10^12, SFT included; beside them those that chose steps and lengths: "
        "answers to development items, and trainings that were dropped.": [arm.flops for arm in arms],
        "Length: tokens of a sampled answer; ended: by EOS.": [arm.mean_length for arm in arms],
        "NLL: of held-out answers, nats a token.": [arm.nll for arm in arms],
    }
    return " ".join(meaning for meaning, cells in columns.items() if any(cell is not None for cell in cells))


# ---- sections of the page


def _tasks(rows: Sequence[ArmRow], out: Path) -> str:
    """Accuracy by task; nothing where every group is one task."""
    by_row = answers.tasks_of(rows)
    tasks = list(dict.fromkeys(key[:2] for figures in by_row.values() for key in figures))
    groups = [group for group, _ in tasks]
    if len(tasks) == len(set(groups)):
        return ""
    items = [estimate.n for figures in by_row.values() for estimate in figures.values()]
    caption = (
        f"n = {words.span(items)} items a task, with 95% intervals over {_over(rows)} Many tasks are shown at once and "
        "no interval is corrected for that."
    )
    if max(map(groups.count, groups)) > plots.MOST_TASKS:
        caption += f" Of each group {plots.MOST_TASKS} tasks are drawn; the tables hold all."
    html = ""
    for decoding in words.DECODINGS:
        title = f"Accuracy on each task, {decoding}"
        html += plot(title, plots.task_plot(by_row, decoding, out / f"tasks-{decoding}"))
        arms = {name: own for name, own in by_row.items() if any(key[2] == decoding for key in own)}
        table = [
            [f"{task} ({group})", *(words.estimate_text(own.get((group, task, decoding))) for own in arms.values())]
            for group, task in tasks
        ]
        html += details(f"{title}, as a table", to_html(Table.of("", ["task", *arms], table if arms else [])))
    return html + soft_text(caption)


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
        meaning = (
            "Reward of a batch of rollouts against its KL, both nats a response, a point a PPO step; up and left: "
            f"more reward for less change. {seeds}"
        )
        drawn = plots.reward_kl_plot(ours, out / "reward-kl", plots.ARM_COLOURS["SRPPO"])
        parts.append(section("Reward against KL", plot(meaning, drawn)))
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
        share = words.estimate_text(each.cut_share, ".2%")
        rows.append([each.name, f"{sum(tokens) / len(tokens):.2f}", *map(str, quantiles), share])
    caption = f"Share that reached the limit: of all sampled answers, with 95% intervals over {over}" if over else ""
    return Table.of("", ["arm", "mean", "10%", "median", "90%", "reached the limit"], rows, [caption])


def _over(rows: Sequence[ArmRow]) -> str:
    """What intervals of the sampled answers' rows are over."""
    return words.interval_words([len(row.answers["sampled"]) for row in rows if row.answers["sampled"]])


def samples_html(samples: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """Test items with what each arm answered, side by side."""
    return section("Samples", soft_text(CHOICE) + "".join(map(_sample, samples)) if samples else "")


def _sample(by_arm: Mapping[str, Mapping[str, Any]]) -> str:
    item, told, longest = next(iter(by_arm.values())), "", 0
    for arm, verdict in by_arm.items():
        response, kind = verdict["responses"][0].strip(), "right" if verdict["correct"][0] else "wrong"
        shown = f'<span class="{kind}">{"✓" if verdict["correct"][0] else "✗"}&nbsp;{kind}</span>'
        shown = f'<span class="soft">{escape(arm)} {shown}</span><pre>{escape(response) or "(nothing)"}</pre>'
        told, longest = f"{told}<div>{shown}</div>", max(longest, len(response))
    group = words.group_words(item["group"])
    group += "" if item["task"] == item["group"] else f", task {item['task']}"
    answer = f'<span class="soft">right answer: <code>{escape(item["answer"])}</code></span>' if item["answer"] else ""
    return (
        f'<div class="sample"><span class="soft">{escape(group)}</span><pre>{escape(item["prompt"])}</pre>'
        f'{answer}<div class="answers{" long" if longest > LONG else ""}">{told}</div></div>'
    )


# ---- the rows of results/*.jsonl


def rows_of(run: Run) -> list[dict[str, Any]]:
    """One plain row a seed, arm, kept or last step, group and decoding, with what made it: for results/*.jsonl."""
    rows = []
    for arm, stages in stages_by_arm(run).items():
        for stage in stages:
            environment, figures = history.environment_of(stage), figures_of(stage)
            training, choosing = compute_of(stage)
            made = {key: environment.get(key) for key in ("cpu", "cores", "commit")}
            made |= {name: environment.get("packages", {}).get(name) for name in ("torch", "transformers")}
            common = {"arm": arm, "seed": answers.seed_of(stage), "stage": stage.id, **made}
            common |= {"flops": training, "selection_flops": choosing}
            common |= {"kept_step": figures.get("kept_step"), "steps": figures.get("steps")}
            for which in ("kept", "last"):
                for decoding in words.DECODINGS:
                    verdicts = answers.read_verdicts(answers_file(stage, which, decoding))
                    for group in dict.fromkeys(each["group"] for each in verdicts):
                        shares = [answers.right_share(each) for each in verdicts if each["group"] == group]
                        row = {"group": group, "decoding": decoding, "which": which, "items": len(shares)}
                        rows.append({**common, **row, "accuracy": sum(shares) / len(shares)})
    return rows
