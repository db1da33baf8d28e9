"""Every plot, drawn by matplotlib without a display and written as PNG, SVG and a narrow SVG for phones.

`save_figure` and the pieces below it are shared; then come the plots of a run, of scored responses, of a forecast and
of a sweep. A function returns the files that it wrote, or nothing where there is nothing to draw.
"""

from __future__ import annotations

import math
import textwrap
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from srppo.report import sweep_tables as tables
from srppo.report.answers import ArmFigures, Lengths, decodings_of, groups_of
from srppo.report.history import Line, SeedRows, over_seeds
from srppo.report.page import narrow_of
from srppo.report.style import GRID, INK, PAPER, STYLE
from srppo.report.words import GROUP_WORDS, is_number, short_number
from srppo.stages.kinds import KINDS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from srppo.ablations.analysis import Metric, SweepResult
    from srppo.ablations.curves import CurveResult
    from srppo.ablations.spec import Sweep
    from srppo.analysis.forecast import ForecastResult
    from srppo.analysis.optimum import Point
    from srppo.analysis.score import ScoreResult
    from srppo.statistics.intervals import Estimate

# Okabe and Ito's colours, told apart also without red-green vision.
ARM_COLOURS = {
    "base": "#7f7f7f",
    "SFT": "#56b4e9",
    "longer SFT": "#0072b2",
    "longer SFT, equal compute": "#0072b2",
    "longer SFT, equal compute, last step": "#cc79a7",
    "longer SFT, best on dev": "#009e73",
    "SRPPO": "#d55e00",
    "SRPPO, last step": "#e69f00",
}
BEST = ", best on dev"  # an arm's row at its kept step has the arm's colour
OTHER_COLOURS = ["#cc79a7", "#44aa99", "#999933", "#ab6857", "#0072b2", "#009e73", "#e69f00", "#56b4e9", "#d55e00"]
WIDTH_INCHES, NARROW_INCHES = 10.0, 4.6
LABEL_CHARACTERS = 30  # a line of a row's name
MOST_TASKS = 16  # drawn in a group; the table holds all
MOST_GROUPS = 3  # panels side by side; the tables hold all groups
BAND = 0.2  # opacity
TaskFigures = Mapping[str, Mapping[tuple[str, str, str], "Estimate"]]  # by row, then by group, task and decoding
Accuracies = Mapping["Metric", Mapping[tuple[str, str], "Estimate"]]  # by metric, then by point and arm


# ---- what all plots share


def save_figure(draw: Callable[[Figure], None], path: Path, *, height: float) -> list[Path]:
    """Draw and write `path` as .png and .svg, in the common style; `height` in inches. Returns both.

    Beside them `path`-narrow.svg, for phones: the same panels one below the other (`page.plot` takes both).
    """
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = _figure(draw, WIDTH_INCHES, height)
        png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
        figure.savefig(png, dpi=160)
        figure.savefig(svg, metadata={"Date": None})
        narrow = _figure(draw, NARROW_INCHES, height)
        _stack(narrow, height)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="constrained_layout not applied")
            try:
                narrow.savefig(narrow_of(svg), metadata={"Date": None})
            except UserWarning:  # names too long for it: phones get the wide one
                narrow_of(svg).unlink(missing_ok=True)
    return [png, svg]


def _figure(draw: Callable[[Figure], None], width: float, height: float) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.08, w_pad=0.06)
    figure = Figure(figsize=(width, height), layout=layout, facecolor=PAPER)
    FigureCanvasAgg(figure)
    draw(figure)
    return figure


def _stack(figure: Figure, height: float) -> None:
    """Panels one below the other, each about as tall as it was, with ticks and names of its own; legends above, in one
    column."""
    shown = [axis for axis in figure.axes if axis.get_visible()]
    rows = {spec.rowspan.start for axis in shown if (spec := axis.get_subplotspec())}
    grid = figure.add_gridspec(len(shown), 1)
    for place, axis in enumerate(shown):
        axis.set_subplotspec(grid[place])
        axis.tick_params(labelleft=True, labelbottom=True)
        if not axis.get_ylabel() and axis.get_shared_y_axes().joined(axis, shown[0]):
            axis.set_ylabel(shown[0].get_ylabel())
    for axis in figure.axes:
        if not axis.get_visible():
            axis.remove()
    drawn = _handles(shown)
    entries = 0
    for legend in list(figure.legends):
        labels = [text.get_text() for text in legend.get_texts()]
        handles: list[Any] = [drawn.get(name) or own for name, own in zip(labels, legend.legend_handles, strict=True)]
        legend.remove()
        figure.legend(handles, labels, loc="outside upper left", handlelength=1.6)
        entries += len(labels)
    figure.set_size_inches(NARROW_INCHES, len(shown) * (height / len(rows) + 0.2) + 0.2 * entries)


def _handles(axes: Iterable[Axes]) -> dict[str, Any]:
    """By label, each once; the first axis that has it gives it its look."""
    found: dict[str, Any] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return found


def _legend(figure: Figure, handles: Mapping[str, Any], where: str = "upper", ncols: int = 5) -> None:
    place: Any = f"outside {where} left"
    figure.legend([*handles.values()], [*handles], loc=place, ncols=ncols, handlelength=1.6)


def _panels(figure: Figure, count: int, columns: int = 3, **grid: Any) -> list[Axes]:
    """So many panels, at most `columns` beside each other, four as two by two; the places left over are hidden."""
    columns = 2 if count == 4 else min(count, columns)
    axes = list(figure.subplots(math.ceil(count / columns), columns, squeeze=False, **grid).flatten())
    for axis in axes[count:]:
        axis.set_visible(False)
    return axes[:count]


@dataclass(frozen=True)
class Dots:
    """A panel of named rows from the top down, and in it dots with intervals: (place, estimate, colour, filled).

    at: where the names stand, None for one a row. borders: between groups of rows.
    """

    title: str
    names: Sequence[str]
    dots: Sequence[tuple[float, Estimate, str, bool]]
    at: Sequence[float] | None = None
    borders: Sequence[int] = ()


def _dot_plot(
    panels: Sequence[Dots],
    path: Path,
    label: str,
    *,
    height: float,
    legend: Mapping[str, Any] | None = None,
    limits: tuple[float, float] = (0.0, 1.0),
    rows: int | None = None,
    **grid: Any,
) -> list[Path]:
    """Panels of dots over one axis, `label`, that does not run beyond the limits of its values, with a line at a 0
    between them. rows: of every panel, None for each its own."""

    def draw(figure: Figure) -> None:
        axes = _panels(figure, len(panels), sharex=True, **grid)
        for axis, panel in zip(axes, panels, strict=True):
            if limits[0] < 0:
                axis.axvline(0.0, color=INK, lw=1)
            for place, estimate, colour, filled in panel.dots:
                if math.isfinite(estimate.mean):
                    reach, fill = _reach([estimate]), colour if filled else PAPER
                    axis.errorbar(estimate.mean, place, xerr=reach, fmt="o", ms=4.5, color=colour, mfc=fill)
            for border in panel.borders:
                axis.axhline(border - 0.5, color=GRID, lw=0.7)
            short = [textwrap.wrap(name, LABEL_CHARACTERS, max_lines=2, placeholder="…") for name in panel.names]
            axis.set_yticks(range(len(short)) if panel.at is None else panel.at, ["\n".join(lines) for lines in short])
            axis.set_ylim((rows or len(panel.names)) - 0.5, -0.5)
            axis.grid(axis="y", visible=False)
            axis.tick_params(axis="y", length=0)
            axis.set_title(panel.title)
        _clamp(axes[0].get_xlim, axes[0].set_xlim, *limits)
        figure.supxlabel(label, fontsize=10)
        if legend:
            _legend(figure, legend)

    return save_figure(draw, path, height=height)


def _arm_handles(colours: Mapping[str, str]) -> dict[str, Any]:
    from matplotlib.lines import Line2D

    return {name: Line2D([], [], color=colour, marker="o", ms=4, lw=1.6) for name, colour in colours.items()}


def _reach(estimates: Sequence[Estimate]) -> list[list[float]]:
    """How far intervals reach below and above their means, 0 where there are none."""

    def finite(value: float) -> float:
        return max(value, 0.0) if math.isfinite(value) else 0.0

    return [[finite(e.mean - e.low) for e in estimates], [finite(e.high - e.mean) for e in estimates]]


def _clamp(get: Callable[[], tuple[float, float]], put: Callable[..., Any], low: float, high: float) -> None:
    """Let no axis run beyond what a value can be, however wide the intervals of few seeds are."""
    (start, end), margin = get(), 0.02 * (high - low)
    put(max(start, low - margin), min(end, high + margin))


def arm_colours(names: Sequence[str]) -> dict[str, str]:
    """A fixed colour for each known arm; the others take turns."""
    known = {name: ARM_COLOURS.get(name) or ARM_COLOURS.get(name.removesuffix(BEST)) for name in names}
    free = [colour for colour in OTHER_COLOURS if colour not in known.values()] or OTHER_COLOURS
    unknown = [name for name in names if known[name] is None]
    return {name: known[name] or free[unknown.index(name) % len(free)] for name in names}


# ---- a run


def accuracy_plot(arms: Sequence[ArmFigures], path: Path) -> list[Path]:
    """A dot with its 95% interval for each arm, group and decoding; sampled answers are hollow."""
    from matplotlib.lines import Line2D

    shown, groups, decodings = [arm for arm in arms if arm.figures], groups_of(arms), decodings_of(arms)
    if not shown:
        return []
    colours = arm_colours([arm.name for arm in shown])
    shifts = {decoding: (i - (len(decodings) - 1) / 2) * 0.3 for i, decoding in enumerate(decodings)}
    panels = []
    for group in groups:
        dots = [
            (row + shift, arm.figures[group, decoding], colours[arm.name], decoding != "sampled")
            for row, arm in enumerate(shown)
            for decoding, shift in shifts.items()
            if (group, decoding) in arm.figures
        ]
        panels.append(Dots(GROUP_WORDS.get(group, group), [*colours], dots))
    fills = {each: PAPER if each == "sampled" else INK for each in decodings}
    legend = {each: Line2D([], [], marker="o", ls="", color=INK, mfc=fill) for each, fill in fills.items()}
    height = 1.1 + math.ceil(len(groups) / 3) * (0.5 + 0.42 * len(shown))
    return _dot_plot(panels, path, "accuracy on test items, 95% interval", height=height, legend=legend, sharey=True)


def task_plot(by_row: TaskFigures, decoding: str, path: Path) -> list[Path]:
    """Accuracy of every row on each task with its 95% interval, a panel a group, of its tasks the first MOST_TASKS."""
    colours = arm_colours([name for name, own in by_row.items() if any(key[2] == decoding for key in own)])
    tasks: dict[str, list[str]] = {}
    for group, task in dict.fromkeys(key[:2] for name in colours for key in by_row[name] if key[2] == decoding):
        tasks.setdefault(group, []).append(task)
    if not tasks:
        return []
    most, panels = min(max(map(len, tasks.values())), MOST_TASKS), []
    for group, names in tasks.items():
        shown = names[:MOST_TASKS]
        dots = [
            (i + (place + 0.5) / len(colours) * 0.8 - 0.4, by_row[name][group, task, decoding], colour, True)
            for place, (name, colour) in enumerate(colours.items())
            for i, task in enumerate(shown)
            if (group, task, decoding) in by_row[name]
        ]
        panels.append(Dots(GROUP_WORDS.get(group, group), shown, dots, borders=range(1, len(shown))))
    height = 1.3 + math.ceil(len(tasks) / 3) * (0.4 + most * (0.14 + 0.13 * len(colours)))
    label, legend = f"accuracy, {decoding}, 95% interval", _arm_handles(colours)
    return _dot_plot(panels, path, label, height=height, legend=legend, rows=most)


def length_plot(lengths: Sequence[Lengths], path: Path) -> list[Path]:
    """A histogram an arm, as shares of its answers: ended in the arm's colour, cut by the limit on top, in ink."""
    if not lengths:
        return []
    longest = max(max(each.ended + each.cut) for each in lengths)
    width = math.ceil(longest / 40)
    edges = np.arange(0.5, longest + width + 0.5, width)
    colours = arm_colours([each.name for each in lengths])

    def draw(figure: Figure) -> None:
        axes = _panels(figure, len(lengths), sharex=True, sharey=True)
        for axis, each in zip(axes, lengths, strict=True):
            total, bottom = (each.ended + each.cut).total(), np.zeros(len(edges) - 1)
            for counts, fill in ((each.ended, colours[each.name]), (each.cut, INK)):
                if counts:
                    shares = np.histogram(list(counts), edges, weights=list(counts.values()))[0] / total
                    axis.bar(edges[:-1], shares, np.diff(edges) * 0.9, bottom, color=fill, align="edge")
                    bottom = bottom + shares
            axis.set_title(each.name)
            cut = f"{each.cut_share.mean:.2%} cut"
            axis.annotate(cut, (1, 1), xycoords="axes fraction", ha="right", va="top", fontsize=9, color=INK)
            axis.grid(axis="x", visible=False)
            axis.set_axisbelow(True)
            axis.locator_params(axis="x", integer=True, nbins=8)
        axes[0].set_ylim(0, 1.08 * axes[0].get_ylim()[1])
        axes[0].plot([], [], "s", color=INK, label="cut by the limit")
        figure.supxlabel("tokens of a sampled answer, EOS included", fontsize=10)
        figure.supylabel("share of the arm's answers", fontsize=10)
        _legend(figure, _handles(axes[:1]))

    return save_figure(draw, path, height=0.9 + 1.9 * math.ceil(len(lengths) / 3))


PPO_PANELS: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = (
    ("reward, nats", (("reward", "-"),)),
    ("KL, nats (dotted: to base)", (("kl_sft", "-"), ("kl_base", ":"))),
    ("length, tokens", (("length", "-"),)),
    ("ended by EOS", (("ended", "-"),)),
)
WIDE = 30  # a range of compute this wide is drawn on a logarithmic axis


def training_curves(arms: Mapping[str, SeedRows], path: Path) -> list[Path]:
    """What was trained on prompts: reward, KL to both models, length, EOS share by step. All: accuracy by operations.

    A ring marks the kept step of an arm with one seed.
    """
    ppo = {name: arm for name, arm in arms.items() if any("reward" in row for row in arm.rows())}
    development = _development_panels(arms)
    if not ppo and not development:
        return []
    colours, rows = arm_colours([*arms]), bool(ppo) + bool(development)

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(rows, 12)
        for i, (title, series) in enumerate(PPO_PANELS if ppo else ()):
            axis = figure.add_subplot(grid[0, 3 * i : 3 * i + 3])
            for name, arm in ppo.items():
                for key, style in series:
                    _course(axis, arm, "step", key, style, colours[name], name if style == "-" else "_")
            axis.set_title(title)
            axis.set_xlabel("step")
            steps = {row["step"] for arm in ppo.values() for row in arm.rows() if "reward" in row}
            if len(steps) < 5:  # no room for fractions of a step
                axis.set_xticks(sorted(steps))
                axis.set_xlim(min(steps) - 0.5, max(steps) + 0.5)
            else:
                axis.locator_params(axis="x", integer=True, nbins=5)
            axis.locator_params(axis="y", nbins=5)
            if title == "ended by EOS":
                axis.set_ylim(-0.03, 1.03)
        shared = None
        for i, (key, title) in enumerate(development):
            size = min(12 // len(development), 6 if ppo else 12)
            axis = figure.add_subplot(grid[-1, size * i : size * (i + 1)], sharey=None if key == "nll" else shared)
            shared = shared or axis
            _development(axis, f"dev/{key}", arms, colours)
            axis.set_title(title)
        # Development panels first: their handles have dots.
        _legend(figure, _handles(reversed(figure.axes)), "lower", ncols=4)

    return save_figure(draw, path, height=0.6 + 2.6 * rows)


def _course(axis: Axes, arm: SeedRows, x: str, y: str, style: str, colour: str, label: str, **more: Any) -> None:
    """Mean and band of the finished seeds, and each other seed as it is."""
    line = over_seeds(arm.done, x, y)
    if line is not None:
        dots = "o" if len(line.x) == 1 and "o" not in style else ""  # a line of one point cannot be seen
        axis.plot(line.x, line.mean, dots + style, color=colour, label=label, **{"lw": 1.8, "ms": 3.5, **more})
        if (line.high > line.low).any():
            axis.fill_between(line.x, line.low, line.high, color=colour, alpha=BAND, lw=0)
    for seed, rows in arm.broken.items():
        _broken(axis, over_seeds({seed: rows}, x, y), colour, label if line is None else "_")


def _broken(axis: Axes, line: Line | None, colour: str, label: str) -> None:
    """A seed that did not finish: thin, dashed, a cross at its end."""
    if line is not None:
        axis.plot(line.x, line.mean, "--", color=colour, lw=0.9, label=label)
        axis.plot(line.x[-1:], line.mean[-1:], "x", color=colour, ms=5, label="_")


def _development_panels(arms: Mapping[str, SeedRows]) -> list[tuple[str, str]]:
    """(key, title) of each panel: accuracy by group, on all items where groups are many, or NLL."""
    keys = dict.fromkeys(key[4:] for arm in arms.values() for row in arm.rows() for key in row if key[:4] == "dev/")
    groups = [g for g in dict.fromkeys((*GROUP_WORDS, *keys)) if g in keys and g not in ("accuracy", "nll")]
    if len(groups) > MOST_GROUPS:
        groups = ["accuracy"]
    panels = [(g, f"dev accuracy, {GROUP_WORDS.get(g, 'all items' if g == 'accuracy' else g)}") for g in groups]
    return panels or ([("nll", "held-out NLL, nats a token")] if "nll" in keys else [])


def _development(axis: Axes, key: str, arms: Mapping[str, SeedRows], colours: Mapping[str, str]) -> None:
    for name, arm in arms.items():
        points = max((len(rows) for rows in (*arm.done.values(), *arm.broken.values())), default=0)
        front = 2 + 1 / (1 + points)  # an arm that is another's beginning stays visible
        _course(axis, arm, "tflops", key, "o-", colours[name], name, zorder=front)
        for row in arm.rows() if arm.kept is not None else ():
            if row["step"] == arm.kept and is_number(row.get(key)):
                axis.plot(row["tflops"], row[key], "o", ms=10, mfc="none", mec=colours[name], mew=1.5, label="_")
    if any(arm.kept is not None for arm in arms.values()):
        axis.plot([], [], "o", ms=9, mfc="none", mec=INK, mew=1.5, label="kept step")
    axis.set_xlabel("training TFLOPs, counted")
    spent = [row["tflops"] for arm in arms.values() for row in arm.rows() if key in row and row["tflops"] > 0]
    if not spent or max(spent) < WIDE * min(spent):
        axis.locator_params(axis="x", nbins=5)
        return
    axis.set_xscale("symlog", linthresh=min(spent), linscale=0.5)  # PPO costs hundreds of times a short SFT
    powers = range(math.ceil(math.log10(min(spent))), math.floor(math.log10(max(spent))) + 1)
    axis.minorticks_off()
    axis.set_xticks([0.0, *(10.0**power for power in powers[:: -(len(powers) // 4 + 1)])])
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def reward_kl_plot(arm: SeedRows, path: Path, colour: str) -> list[Path]:
    """PPO's reward against its KL to SFT and to the base, a point a step: each seed thin, the mean of the finished
    ones thick, its first and last step marked."""
    keys, several = ("kl_sft", "kl_base"), len(arm.done) > 1
    seeds = [{seed: rows} for seed, rows in (*arm.done.items(), *arm.broken.items())]
    if not any(over_seeds(one, key, "reward") for one in seeds for key in keys):
        return []

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2, sharey=True)
        for axis, key, title in zip(axes, keys, ("KL to SFT, nats", "KL to base, nats"), strict=True):
            for one in seeds[: len(arm.done)] if several else []:
                if line := over_seeds(one, key, "reward"):
                    axis.plot(line.x, line.mean, "-", color=colour, lw=0.8, alpha=0.5, label="a seed")
            for one in seeds[len(arm.done) :]:
                _broken(axis, over_seeds(one, key, "reward"), colour, "a seed, not finished or failed")
            if whole := over_seeds(arm.done, key, "reward"):
                label = "mean over seeds" if several else "the seed"
                axis.plot(whole.x, whole.mean, "o-", color=colour, lw=2.0, ms=3.5, label=label, zorder=3)
                first, last = (whole.x[:1], whole.mean[:1]), (whole.x[-1:], whole.mean[-1:])
                axis.plot(*first, "o", color=colour, mfc="none", ms=10, mew=1.5, label="first step")
                axis.plot(*last, "D", color=colour, ms=8, label="last step", zorder=3)
            axis.set_xlabel(title)
        axes[0].set_ylabel("reward, nats")
        _legend(figure, _handles(axes), "lower", ncols=4)

    return save_figure(draw, path, height=4.0)


# ---- scored responses

RIGHT, WRONG = "#0072b2", "#d55e00"


def score_plot(result: ScoreResult, path: Path) -> list[Path]:
    """Reward against length, and the share right in up to ten equal groups by reward; nothing for fewer than 3
    responses."""
    if len(result.responses) < 3:
        return []
    known = [each for each in result.responses if each.correct is not None]
    kinds = [("right", True, RIGHT), ("wrong", False, WRONG)] if known else [("responses", None, RIGHT)]

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
        for label, value, colour in kinds:
            rows = [each for each in result.responses if each.correct is value]
            x = [len(each.tokens) + {None: 0.0, True: -0.15, False: 0.15}[value] for each in rows]
            axes[0].plot(x, [each.reward for each in rows], ".", color=colour, ms=5, alpha=0.7, label=label)
        axes[0].set_title("reward, nats, against length")
        axes[0].set_xlabel("length, tokens")
        lengths = [len(each.tokens) for each in result.responses]
        axes[0].set_xlim(min(lengths) - 1.1, max(lengths) + 1.1)  # room for whole ticks where all are as long
        axes[0].locator_params(axis="x", integer=True)
        if known:
            axes[0].legend()
            bins = min(10, max(len(known) // 10, 1))
            by_reward = sorted(((each.reward, bool(each.correct)) for each in known), key=lambda pair: pair[0])
            ends = [len(known) * i // bins for i in range(1, bins)]
            means = [np.mean(group, axis=0) for group in np.split(np.array(by_reward), ends)]
            axes[1].plot(*np.transpose(means), "o-", color=RIGHT, ms=4)
            axes[1].set_ylim(-0.03, 1.03)
            axes[1].set_title(f"share right, {bins} equal groups by reward")
            axes[1].set_xlabel("mean reward of the group, nats")

    return save_figure(draw, path, height=3.6)


# ---- a forecast

SFT_COLOUR, OPTIMA = "#7f7f7f", (("sft", "#0072b2", "o-"), ("base", "#009e73", "s:"))
SEEN = ("demonstrated", "prompted")  # groups that PPO prompts come from
STAGES = ("#d55e00", "#cc79a7", "#e69f00", "#56b4e9")  # PPO stages; they take turns


def frontier_plot(result: ForecastResult, path: Path) -> list[Path]:
    """Reward and accuracy of optima and PPO checkpoints against KL to SFT, and what training measured."""
    keys = [("reward", "reward, nats a response")]
    keys += [("accuracy", "accuracy, sampled")] if result.start.accuracy else []
    counts = [sum(_seen_accuracy(row) is not None for row in rows) for rows in result.training.values()]
    keys += [("development", "accuracy in training, greedy")] if max(counts, default=0) > 1 else []

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, len(keys), squeeze=False)[0]
        for axis, (key, title) in zip(axes, keys, strict=True):
            _frontier(axis, key, result)
            axis.set_title(title)
            axis.set_xlabel("KL to SFT, nats a response")
        _legend(figure, _handles(axes), "lower", ncols=2)

    return save_figure(draw, path, height=4.4 + 0.2 * len(result.training))


def _frontier(axis: Axes, key: str, result: ForecastResult) -> None:
    names = dict.fromkeys([*(point.arm for point in result.checkpoints), *result.training])
    if key != "development":
        for anchor, colour, style in OPTIMA:
            points = [p for p in result.points if p.anchor == anchor and p.answered]
            own = anchor == result.anchor
            label = f"optimum, anchor {anchor}" + (" (beta beside it)" if own else "")
            _points(axis, key, sorted(points, key=lambda p: -p.beta), style, colour, label, small=True)
            for point in points if own else []:
                _beside(axis, key, point, f"{point.beta:g}" + (" *" if point is result.own else ""))
        _points(axis, key, [result.start], "D", SFT_COLOUR, "SFT")
    for name, colour in zip(names, cycle(STAGES), strict=False):
        of = _seen_accuracy if key == "development" else lambda row: row["reward"]
        rows = result.training.get(name, ()) if key != "accuracy" else ()
        known = [(row["kl_sft"], value) for row in rows if (value := of(row)) is not None]
        if known:
            label = f"{name}, as measured in training, by step"
            axis.plot(*zip(*known, strict=True), ".-", color=colour, lw=0.9, ms=4, alpha=0.7, label=label)
        points = [point for point in result.checkpoints if point.arm == name and key != "development"]
        _points(axis, key, points, "D", colour, f"{name}, checkpoints (step beside)")
        for point in points:
            _beside(axis, key, point, f"{point.step}" + (" kept" if point.name.endswith("(kept)") else ""))


def _seen_accuracy(row: Mapping[str, Any]) -> float | None:
    """Mean of the groups that PPO sees, or over all items where no group is named so; None where none was measured."""
    values = [float(row[f"dev/{group}"]) for group in SEEN if f"dev/{group}" in row]
    return sum(values) / len(values) if values else row.get("dev/accuracy")


def _points(
    axis: Axes, key: str, points: Sequence[Point], style: str, colour: str, label: str, *, small: bool = False
) -> None:
    """Points with whiskers in both directions."""
    if points:
        values, kls = [getattr(point, key) for point in points], [point.kl_sft for point in points]
        x, y = [kl.mean for kl in kls], [value.mean for value in values]
        look: dict[str, Any] = {"ms": 4, "lw": 1.6, "zorder": 2} if small else {"ms": 7, "zorder": 3}
        error: dict[str, Any] = {"xerr": _reach(kls), "yerr": _reach(values), "elinewidth": 0.7}
        axis.errorbar(x, y, fmt=style, color=colour, label=label, **error, **look)


def _beside(axis: Axes, key: str, point: Point, words: str) -> None:
    place = (point.kl_sft.mean, getattr(point, key).mean)
    box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.6}  # lines run behind it
    look: dict[str, Any] = {"fontsize": 8.5, "color": INK, "zorder": 5, "bbox": box}
    axis.annotate(words, place, xytext=(5, -11), textcoords="offset points", **look)


# ---- a sweep


def sweep_plot(result: SweepResult, path: Path) -> list[Path]:
    """Accuracy of each arm on each group under the primary decoding, 95% intervals: lines with bands along an axis of
    numbers, a row of panels for each value of the other axes; else dots."""
    decoding = tables.primary_metric(result.plan.sweep)[1]
    metrics = [metric for metric in tables.metrics_of(result) if metric[1] == decoding][:MOST_GROUPS]
    known = {
        metric: {(c.cell.point, c.cell.arm): c.accuracy[metric] for c in result.cells if metric in c.accuracy}
        for metric in metrics
    }
    if not metrics:
        return []
    axis = tables.line_axis(result.plan.sweep)
    return _sweep_lines(result.plan.sweep, axis, known, path) if axis else _sweep_dots(result.plan.sweep, known, path)


def _sweep_lines(sweep: Sweep, axis: str, known: Accuracies, path: Path) -> list[Path]:
    rows, colours = tables.panels(sweep, axis), arm_colours([arm.name for arm in sweep.arms])
    values = sorted({float(point.values[axis]) for point in sweep.points})

    def line(panel: Axes, colour: str, shown: Mapping[float, Estimate]) -> None:
        xs, means = [*shown], [each.mean for each in shown.values()]
        low, high = [each.low for each in shown.values()], [each.high for each in shown.values()]
        panel.fill_between(xs, low, high, color=colour, alpha=BAND, lw=0)
        panel.plot(xs, means, "o-", ms=4, lw=1.6, color=colour)
        if len(shown) == 1:  # a band of one point cannot be seen
            panel.errorbar(xs, means, yerr=_reach([*shown.values()]), color=colour)

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(rows), len(known), sharex=True, sharey="col", squeeze=False)
        for panels, (where, points) in zip(grid, rows.items(), strict=True):
            for panel, ((group, _), found) in zip(panels, known.items(), strict=True):
                for arm, colour in colours.items():
                    at = {float(p.values[axis]): found[p.name, arm] for p in points if (p.name, arm) in found}
                    line(panel, colour, at)
                title = GROUP_WORDS.get(group, group)
                panel.set_title(f"{title}, {where}" if where else title, fontsize=9.5)
        for panel in grid[0]:
            _clamp(panel.get_ylim, panel.set_ylim, 0.0, 1.0)
        if tables.is_log(sweep, axis):
            grid[0][0].set_xscale("log", base=2)
        grid[0][0].set_xticks(values, [short_number(value) for value in values])
        grid[0][0].minorticks_off()
        figure.supxlabel(tables.axis_words(axis), fontsize=10)
        figure.supylabel(f"accuracy, {sweep.analysis.decoding}", fontsize=10)
        _legend(figure, _arm_handles(colours))

    return save_figure(draw, path, height=1.2 + 2.5 * len(rows))


def _sweep_dots(sweep: Sweep, known: Accuracies, path: Path) -> list[Path]:
    """A line a cell: points in groups, in each a dot with whiskers an arm."""
    colours, several = arm_colours([arm.name for arm in sweep.arms]), len(sweep.points) > 1
    shown = [arm.name for arm in sweep.arms if sweep.analysis.decoding in KINDS[arm.kind].decodings]
    arms, cells = len(shown), [cell for cell in sweep.cells() if cell.arm in shown]
    names = [tables.point_label(sweep, point.name) for point in sweep.points] if several else [c.arm for c in cells]
    at = [i * arms + (arms - 1) / 2 for i in range(len(names))] if several else None
    panels = []
    for (group, _), found in known.items():
        keys = [(y, (cell.point, cell.arm)) for y, cell in enumerate(cells)]
        dots = [(y, found[key], colours[key[1]], True) for y, key in keys if key in found]
        panels.append(Dots(GROUP_WORDS.get(group, group), names, dots, at, range(arms, len(cells), arms)))
    label, height = f"accuracy, {sweep.analysis.decoding}, 95% interval", 1.3 + 0.3 * len(cells)
    legend = _arm_handles(colours) if several else None
    return _dot_plot(panels, path, label, height=height, legend=legend, rows=len(cells), sharey=True)


def curves_plot(result: CurveResult, path: Path) -> list[Path]:
    """Accuracy and mean length over KL to the SFT model: a line an arm, the first with its 95% interval, and a dot each
    policy that was measured; where arms are compared stand dotted lines."""
    colours = arm_colours([line.arm for line in result.lines])

    def draw(figure: Figure) -> None:
        axes = figure.subplots(1, 2, gridspec_kw={"width_ratios": [1.5, 1.0]})
        known: set[str] = set()
        for line in result.lines:
            style = "--" if colours[line.arm] in known else "-"  # there are more arms than colours
            known.add(colours[line.arm])
            look: dict[str, Any] = {"color": colours[line.arm], "lw": 1.6, "label": line.arm, "ls": style}
            kls, accuracy, length = zip(*line.points, strict=True)
            for axis, curve, dots in (
                (axes[0], [e.mean for e in line.accuracy], accuracy),
                (axes[1], line.length, length),
            ):
                axis.plot(line.kls, curve, **look)
                axis.plot(kls, dots, ".", ms=4, alpha=0.5, color=look["color"])
            if line is result.lines[0]:
                low, high = [e.low for e in line.accuracy], [e.high for e in line.accuracy]
                axes[0].fill_between(line.kls, low, high, color=look["color"], alpha=BAND, lw=0)
        for axis, name in zip(axes, (f"accuracy, {tables.metric_words(result.metric)}", "length, tokens"), strict=True):
            for kl in {each.kl for each in result.matched}:
                axis.axvline(kl, color=GRID, lw=1.0, ls=":")
            axis.set_title(name)
            axis.set_xlabel("KL to SFT, nats a response")
        _clamp(axes[0].get_ylim, axes[0].set_ylim, 0.0, 1.0)
        _legend(figure, _handles(axes), "lower", ncols=4)

    return save_figure(draw, path, height=4.4 + 0.12 * len(colours)) if result.lines else []


def differences_plot(result: SweepResult, path: Path) -> list[Path]:
    """Every planned difference on the primary metric with its interval against zero, a panel a pair; filled where the
    verdict is better or worse, in the colour of the arm that rows differ by, else of the model."""
    metric = tables.primary_metric(result.plan.sweep)
    pairs = tables.tested_by_pair(result, metric)
    if not any(found for rows in pairs.values() for _, _, found in rows):
        return []
    colours = arm_colours([arm.name for arm in result.plan.sweep.arms])
    panels = []
    for pair, rows in pairs.items():
        names = [row if found else f"{row}: no result" for row, _, found in rows]
        dots = []
        for y, (_, each, found) in enumerate(rows):
            colour = colours[(each.model if pair[1] else each.baseline).arm]
            dots += (
                [(y, found.finding.difference, colour, found.finding.verdict in ("better", "worse"))] if found else []
            )
        panels.append(Dots(tables.pair_words(pair), names, dots))
    counts = [len(rows) for rows in pairs.values()]
    label = f"difference of accuracy, {tables.metric_words(metric)}, with the verdict's interval"
    grid: dict[str, Any] = {"columns": 1, "gridspec_kw": {"height_ratios": [count + 0.8 for count in counts]}}
    height = 0.9 + 0.5 * len(pairs) + 0.3 * sum(counts)
    return _dot_plot(panels, path, label, height=height, limits=(-1.0, 1.0), **grid)
