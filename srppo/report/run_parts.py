"""Sections of a run's page that hold plots; each writes its plots into a folder as .png and .svg."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from zlib import crc32

from srppo.report.accuracy import tasks_of
from srppo.report.answers import ArmRow
from srppo.report.curves import reward_kl_plot, training_curves
from srppo.report.figures import DECODINGS, ArmFigures, estimate_text, interval_words
from srppo.report.html import details, html_table, inline_plot, soft_text
from srppo.report.lengths import HEAD, length_plot, length_table, lengths_of
from srppo.report.plots import ARM_COLOURS, MOST_TASKS, TaskFigures, accuracy_plot, task_plot
from srppo.report.training import SeedRows, band_words

Part = tuple[str, str]  # title and HTML; without HTML there is nothing to show


def accuracy_figure(arms: Sequence[ArmFigures], out: Path) -> str:
    """The plot below the tables of results, as HTML."""
    return _figure("Test accuracy with 95% intervals", accuracy_plot(arms, out / "accuracy"))


def task_part(rows: Sequence[ArmRow], out: Path) -> Part:
    """Accuracy by task; nothing where every group is one task."""
    by_row = tasks_of(rows)
    tasks = list(dict.fromkeys(key[:2] for figures in by_row.values() for key in figures))
    groups = [group for group, _ in tasks]
    if len(tasks) == len(set(groups)):
        return "Accuracy by task", ""
    items = sorted({estimate.n for figures in by_row.values() for estimate in figures.values()})
    caption = (
        f"n = {' to '.join(map(str, dict.fromkeys((items[0], items[-1]))))} items a task, with 95% intervals over "
        f"{_over(rows)} Many tasks are shown at once and no interval is corrected for that."
    )
    if max(map(groups.count, groups)) > MOST_TASKS:
        caption += f" Of each group {MOST_TASKS} tasks are drawn; the tables hold all."
    html = ""
    for decoding in DECODINGS:
        name = f"Accuracy on each task, {decoding}"
        html += _figure(name, task_plot(by_row, decoding, out / f"tasks-{decoding}"))
        html += details(f"{name}, as a table", _task_table(by_row, tasks, decoding))
    return "Accuracy by task", html + soft_text(caption)


def _task_table(by_row: TaskFigures, tasks: Sequence[tuple[str, str]], decoding: str) -> str:
    """A row a task, a column an arm."""
    names = [name for name, figures in by_row.items() if any(key[2] == decoding for key in figures)]
    rows = [
        [f"{task} ({group})", *(estimate_text(by_row[name].get((group, task, decoding))) for name in names)]
        for group, task in tasks
    ]
    return html_table(["task", *names], rows) if names else ""


def training_parts(curves: Mapping[str, SeedRows], out: Path) -> list[Part]:
    """Curves with bands over seeds, and PPO's reward against its KL."""
    caption = "What PPO sees by step, and development accuracy against counted operations, 10^12, SFT included. "
    if any(arm.kept is not None for arm in curves.values()):
        caption += "Ring: the step that was kept. "
    parts = [("Training", _figure(caption + band_words(curves), training_curves(curves, out / "curves")))]
    if "SRPPO" in curves:
        ours = curves["SRPPO"]
        words = (
            "Reward of a batch of rollouts against its KL, both nats a response, a point a PPO step; up and left: "
            "more reward for less change. Each seed thin, the mean over finished seeds thick, from its first step "
            "(ring) to its last (diamond)."
        )
        if len(ours.done) == 1:
            words = words.replace("Each seed thin, the mean over finished seeds thick", "One finished training seed")
        if not ours.done:
            words = words.partition("Each seed")[0] + "No seed is finished: each is dashed, up to where it came."
        parts.append(
            ("Reward against KL", _figure(words, reward_kl_plot(ours, out / "reward-kl", ARM_COLOURS["SRPPO"])))
        )
    return parts


def length_part(rows: Sequence[ArmRow], out: Path) -> Part:
    """How long sampled answers are."""
    lengths = lengths_of(rows)
    caption = "Tokens of sampled answers to test items, EOS included, of all finished seeds"
    html = _figure(caption, length_plot(lengths, out / "lengths"))
    words = f"Share that reached the limit: of all sampled answers, with 95% intervals over {_over(rows)}"
    return "Length of answers", html and html + html_table(HEAD, length_table(lengths)) + soft_text(words)


def _over(rows: Sequence[ArmRow]) -> str:
    """What intervals of the sampled answers' rows are over."""
    return interval_words([len(row.answers["sampled"]) for row in rows if row.answers["sampled"]])


def _figure(caption: str, paths: Sequence[Path]) -> str:
    """The SVG of a plot's files inlined; nothing where there is no plot."""
    return inline_plot(caption, paths[1], crc32(caption.encode())) if paths else ""
